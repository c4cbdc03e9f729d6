"""How much the loss minds rounding each layer, with error bars over subsets of the data.

Metrics: the top Hessian eigenvalue (HAWQ, Dong et al., 2019, arXiv:1905.03696), the average trace (HAWQ-V2, Dong et
al., 2020, arXiv:1911.03852), the top Gauss-Newton eigenvalue, and Q-BERT's Omega = |mean| + standard deviation of the
top eigenvalue over subsets (Shen et al., 2020, arXiv:1909.05840).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bantamweight.curvature.batches import as_batches
from bantamweight.curvature.eigenvalues import Eigenvalues, eigenvalues_of
from bantamweight.curvature.ggn import gauss_newton_eigenvalues
from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.layer_groups import (
    as_groups,
    default_groups,
    measured_once,
    multiply_adds,
    parameter_names,
    random_subsets,
    refuse_tied,
    target_layers,
    tied_layers,
)
from bantamweight.curvature.mean_loss import LossFunction
from bantamweight.curvature.result import FORMAT_VERSION, Conditions, Result
from bantamweight.curvature.trace import block_traces
from bantamweight.errors import BantamweightError, FormatError
from bantamweight.quantize.calibrate import TargetLayer, layer_weight
from bantamweight.quantize.grid import Grid, alphabet, weight_range

METRICS = {
    "lambda_max": "largest Hessian eigenvalue",
    "trace": "Hessian trace / number of weights",
    "ggn": "largest Gauss-Newton eigenvalue",
    "omega": "|mean| + std of the top Hessian eigenvalue",
}


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """One layer, or one block of layers that is judged as a whole."""

    name: str
    layers: tuple[str, ...]  # the linear and convolution layers in it
    shapes: tuple[tuple[int, int], ...]  # of their weights as matrices [out, in]
    weights: int
    macs: int  # multiply-adds for one sample
    values: tuple[float, ...]  # the metric's quantity on every subset
    score: float  # curvature along a unit change of the weights, as the metric sees it
    errors: dict[int, float]  # bits -> ||Q(W) - W||^2 under round to nearest

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def std(self) -> float:
        """Standard deviation over the subsets (0 if there is only one)."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else 0.0

    def loss_increase(self, bits: int) -> float:
        """The second-order estimate of what rounding to `bits` adds to the loss: score / 2 * ||Q(W) - W||^2.

        With metric "trace" this is HAWQ-V2's Omega (halved). Negative curvature counts as none.
        """
        return 0.5 * max(self.score, 0.0) * self.errors[bits]


@dataclass(frozen=True, kw_only=True, eq=False)
class Sensitivity(Result):
    """Every layer's sensitivity. The input of `bantamweight.plan`."""

    metric: str
    per: str
    layers: tuple[LayerSensitivity, ...]
    group_size: int | None
    subsets: int
    samples: int  # in each subset
    products: int  # Hessian-vector products used, over all subsets
    converged: bool
    conditions: Conditions
    doubtful: tuple[str, ...] | None = None  # with metric "ggn" and check: what it may misjudge (see GaussNewton)

    @property
    def scores(self) -> dict[str, float]:
        return {layer.name: layer.score for layer in self.layers}

    @property
    def ranking(self) -> list[str]:
        """Names, most sensitive first."""
        return sorted(self.scores, key=lambda name: -self.scores[name])

    def __str__(self) -> str:
        bits = sorted(self.layers[0].errors)
        width = max(5, *(len(layer.name) for layer in self.layers))
        head = f"{'layer':<{width}}  {'weights':>10}  {'score':>11}  {'std':>9}" + "".join(
            f"  {f'+loss {b}b':>10}" for b in bits
        )
        rows = [
            f"{layer.name:<{width}}  {layer.weights:>10,}  {layer.score:>11.4g}  {layer.std:>9.2g}"
            + "".join(f"  {layer.loss_increase(b):>10.3g}" for b in bits)
            for layer in self.layers
        ]
        state = "" if self.converged else "; NOT all converged: raise max_products or tol"
        doubt = (
            f"\ndoubtful, for there the Hessian is not like the Gauss-Newton matrix: {', '.join(self.doubtful)}"
            if self.doubtful
            else ""
        )
        tail = (
            f"score: {METRICS[self.metric]}; {self.subsets} subsets of {self.samples} samples, "
            f"{self.products} Hessian-vector products{state}{doubt}\n{self.conditions}"
        )
        return "\n".join([head, *rows, tail])

    @classmethod
    def from_json(cls, text: str) -> Sensitivity:
        """The inverse of `to_json`.

        Raises:
            FormatError: text that is not a Sensitivity of this version.
        """
        try:
            fields = json.loads(text)
            kind, version = fields.pop("kind"), fields.pop("version")
            if kind != "Sensitivity" or version != FORMAT_VERSION:
                raise FormatError(
                    f"this is a {kind} of version {version}, but a Sensitivity of version {FORMAT_VERSION} is needed"
                )
            fields["layers"] = tuple(_layer_from(layer) for layer in fields["layers"])
            conditions = fields["conditions"]
            if fields.get("doubtful") is not None:
                fields["doubtful"] = tuple(fields["doubtful"])
            fields["conditions"] = Conditions(**{**conditions, "blocks": tuple(conditions["blocks"])})
            return cls(**fields)
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"this is not a Sensitivity as to_json writes it ({error}); write it again") from None

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Scores with error bars over the subsets: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_bars

        label = METRICS[self.metric] + (" (bar: std over subsets)" if self.subsets > 1 else "")
        scale = [layer.weights if self.metric == "trace" else 1 for layer in self.layers]
        errors = [layer.std / s for layer, s in zip(self.layers, scale, strict=True)]
        return plot_bars(
            [layer.name for layer in self.layers],
            [layer.score for layer in self.layers],
            label,
            path,
            errors if self.subsets > 1 else None,
        )


def _layer_from(fields: dict[str, Any]) -> LayerSensitivity:
    return LayerSensitivity(
        **{
            **fields,
            "layers": tuple(fields["layers"]),
            "shapes": tuple((int(n), int(k)) for n, k in fields["shapes"]),
            "values": tuple(map(float, fields["values"])),
            "errors": {int(bits): float(error) for bits, error in fields["errors"].items()},
        }
    )


def sensitivity(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    per: str = "layer",
    metric: str = "lambda_max",
    subsets: int = 10,
    fraction: float = 0.1,
    blocks: Mapping[str, Sequence[str]] | None = None,
    ignore: Sequence[str] = (),
    bits: Sequence[int] = (2, 3, 4, 8),
    group_size: int | None = None,
    tol: float = 1e-3,
    max_products: int = 100,
    products: int = 30,
    check: bool = True,
    seed: int = 0,
    progress: Any = None,
    **options: Any,
) -> Sensitivity:
    """How sharply the loss curves along each layer's weights, measured on random subsets of the data.

    A weight that several layers share is measured once, under the first one's name; its curvature is that of all its
    uses, an embedding's included.

    Args:
        model, loss_fn, data, options: as `Hessian` takes them; metric "ggn" needs outputs [n, classes].
        per: "layer": every linear and 2d convolution layer. "block": the members of the model's outermost
            ModuleLists and Sequentials (encoder layers, residual blocks), as Q-BERT does.
        metric: "lambda_max", "trace", "ggn" (all layers in one pass, many times faster) or "omega".
        subsets: how many random subsets; 1 takes all the data once.
        fraction: the part of the samples in each subset.
        blocks: name -> layers, judged together; instead of `per`.
        ignore: names or regular expressions of layers to leave out.
        bits: the bit widths whose rounding error is noted, for `plan` to choose from.
        group_size: inputs that share a step when rounding; None for a whole row.
        tol, max_products: of each eigenvalue.
        products: Hessian-vector products a subset, with metric "trace"; all layers share them.
        check: with metric "ggn", spend one product a layer on the first subset to find the layers that the one-pass
            score may misjudge: the result's `doubtful`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> data = (torch.randn(40, 4), torch.randint(0, 3, (40,)))
        >>> result = sensitivity(model, nn.functional.cross_entropy, data, metric="ggn", subsets=2, fraction=0.5)
        >>> [layer.name for layer in result.layers]
        ['0', '2']
    """
    if metric not in METRICS:
        raise BantamweightError(f"metric is {metric!r}, but must be one of {', '.join(METRICS)}")
    if subsets < 1 or not 0 < fraction <= 1:
        raise BantamweightError(
            f"subsets ({subsets}) must be at least 1, and fraction ({fraction}) above 0 and at most 1"
        )
    targets = target_layers(model, ignore)
    groups = as_groups(blocks, targets) if blocks is not None else default_groups(model, targets, per)
    used = {name: targets[name] for name in targets if any(name in names for names in groups.values())}
    tied = tied_layers(used)
    groups = measured_once(groups, tied)
    if metric == "ggn":
        refuse_tied(model, used)
    weights = parameter_names(model, used)
    device = next(iter(used.values())).weight.device
    batches = as_batches(data, device)
    macs = multiply_adds(model, batches[0], used, options.get("mode", "eval"))

    measured: list[dict[str, float]] = []
    spent, converged = 0, True
    doubtful: tuple[str, ...] | None = None
    warm: dict[str, Eigenvalues] = {}
    conditions: Conditions | None = None
    parts = random_subsets(batches, subsets, fraction, seed)
    for number, subset in enumerate(tqdm(parts, desc=f"sensitivity ({metric})", unit="subset", disable=progress)):
        if metric == "ggn":
            first = number == 0
            found = gauss_newton_eigenvalues(
                model, loss_fn, subset, blocks=groups, check=check and first, progress=progress
            )
            if found.checks:
                doubtful, spent = tuple(found.doubtful), len(found.checks)
            measured.append(found.values)
            conditions = found.conditions
            continue
        hessian = Hessian(model, loss_fn, subset, blocks=[weights[name] for name in tied], **options)
        conditions = hessian.conditions
        names = {block: [weights[layer] for layer in layers] for block, layers in groups.items()}
        if metric == "trace":
            traces = block_traces(hessian, names, products=products, seed=seed + number, progress=progress)
            measured.append({block: trace.value for block, trace in traces.items()})
            spent += hessian.products
            continue
        which = "largest" if metric == "lambda_max" else "largest_magnitude"
        for block, parameters in names.items():
            warm[block] = eigenvalues_of(
                hessian.block(parameters),
                which=which,
                tol=tol,
                max_products=max_products,
                start=warm.get(block),
                seed=seed,
                progress=True,
            )
            spent += warm[block].products
            converged &= warm[block].converged
        measured.append({block: float(result.values[0]) for block, result in warm.items()})
    assert conditions is not None
    layers = tuple(
        _describe(block, names, tied, used, macs, [subset[block] for subset in measured], metric, bits, group_size)
        for block, names in groups.items()
    )
    return Sensitivity(
        metric=metric,
        per="blocks" if blocks is not None else per,
        layers=layers,
        group_size=group_size,
        subsets=len(parts),
        samples=sum(batch.samples for batch in as_batches(parts[0], device)),
        products=spent,
        converged=converged,
        conditions=conditions,
        doubtful=doubtful,
    )


def rounding_error(layer: TargetLayer, bits: int, group_size: int | None) -> float:
    """||Q(W) - W||^2 when every weight goes to the nearest value of the default grid of `quantize`."""
    weight = layer_weight(layer)
    chosen = alphabet(bits, None, None)
    size = group_size or weight.shape[1]
    granularity = "group" if group_size else "channel"
    ranges = weight_range(weight, granularity=granularity, group_size=size, percentile=1.0)
    scale = (ranges / chosen.half).clamp_min(1e-12)
    errors = []
    for zero in chosen.zeros:
        grid = Grid(scale=scale, zero=torch.full_like(scale, zero), levels=chosen.levels, group_size=size)
        errors.append((grid.values(grid.nearest(weight)) - weight).square().sum(1))
    return float(torch.stack(errors).amin(0).double().sum())  # each neuron with its better zero point


def _describe(
    block: str,
    names: Sequence[str],
    tied: Mapping[str, Sequence[str]],
    layers: Mapping[str, TargetLayer],
    macs: Mapping[str, int],
    values: Sequence[float],
    metric: str,
    bits: Sequence[int],
    group_size: int | None,
) -> LayerSensitivity:
    weights = sum(layers[name].weight.numel() for name in names)
    score = float(np.mean(values))
    if metric == "trace":
        score /= weights
    elif metric == "omega":
        score = abs(score) + (float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
    holders = [holder for name in names for holder in tied[name]]
    return LayerSensitivity(
        name=block,
        layers=tuple(holders),
        shapes=tuple((len(layers[name].weight), layers[name].weight[0].numel()) for name in holders),
        weights=weights,
        macs=sum(macs[name] for name in holders),
        values=tuple(values),
        score=score,
        errors={b: sum(rounding_error(layers[name], b, group_size) for name in names) for b in bits},
    )
