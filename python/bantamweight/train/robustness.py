"""What a trained network keeps at 8 to 2 bits, and how sharp its minimum is."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from ..curvature import top_eigenvalues, trace
from ..quantize import GPFQ, RoundToNearest, quantize
from .loop import TrainConfig, accuracy, make_optimizer, update

BITS = (8, 4, 3, 2)
TRACE_PRODUCTS = 24


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """Accuracies 0..1 on test data; `gpfq` and `nearest` by bits a weight (a step for every output channel).

    lambda_max, trace: the Hessian's eigenvalue of largest magnitude and its (estimated) trace, of the mean loss in
    evaluation mode on training data.
    """

    float_accuracy: float
    gpfq: dict[int, float]
    nearest: dict[int, float]
    lambda_max: float
    trace: float


def robustness(
    model: nn.Module,
    x_train: Tensor,
    y_train: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    *,
    bits: Sequence[int] = BITS,
    calibration: int = 512,
    hessian_samples: int = 256,
) -> Robustness:
    """Quantizes copies of `model`, calibrated on the first training inputs, and tests them with float activations."""
    kept: dict[str, dict[int, float]] = {"gpfq": {}, "nearest": {}}
    for name, method in (("gpfq", GPFQ), ("nearest", RoundToNearest)):
        for b in bits:
            small = quantize(model, method(bits=b), calibration=x_train[:calibration], progress=False)
            kept[name][b] = accuracy(small, x_test, y_test)
    batch = (x_train[:hessian_samples], y_train[:hessian_samples])
    top = top_eigenvalues(model, F.cross_entropy, batch, tol=1e-2)
    return Robustness(
        float_accuracy=accuracy(model, x_test, y_test),
        lambda_max=float(top.values[0]),
        trace=trace(model, F.cross_entropy, batch, products=TRACE_PRODUCTS).value,
        **kept,
    )


def relative_cost(model: nn.Module, x: Tensor, y: Tensor, config: TrainConfig, *, rounds: int = 7) -> float:
    """Seconds of a step with `config`'s optimizer over those of an SGD step: medians, the two taking turns.

    `x`, `y` are one batch; `model` is not touched.
    """
    still = replace(config, lr=1e-6)  # a trained network stays where it is
    pairs = [
        (m := copy.deepcopy(model).train(), make_optimizer(m, c)) for c in (replace(still, optimizer="sgd"), still)
    ]
    seconds: list[list[float]] = [[], []]
    with torch.random.fork_rng():
        for number in range(rounds + 1):
            for (network, optimizer), times in zip(pairs, seconds, strict=True):
                begin = perf_counter()
                update(network, optimizer, x, y)
                if number:  # the first is a warm-up
                    times.append(perf_counter() - begin)
    return sorted(seconds[1])[rounds // 2] / sorted(seconds[0])[rounds // 2]
