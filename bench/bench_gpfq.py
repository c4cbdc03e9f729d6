"""GPFQ layer times and errors beside Brevitas' GPFQ, alternating in one process, on the same data and the same grid.

    python -m venv peer && peer/bin/pip install torch==2.13.0 brevitas==0.13.4 . && peer/bin/python bench/bench_gpfq.py
    options: --shapes 784x512x1024 768x3072x1024 2048x2048x1024 (d x N x m)  --threads 1  --repeats 5  --no-peer

Both get the weights of one 4-bit per-channel layer and both streams of its inputs, and give codes; times are CPU
seconds over everything in between (Gram matrices included), medians of ours and a single run of theirs. The floor is
the matrix products of the cheaper form alone, as torch runs them: 2 m d^2 + d^2 N multiply-adds in Gram form, 3 m d N
in sample form.
"""

import argparse
import contextlib
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bantamweight import _C
from bantamweight.quantize.grid import Grid
from bantamweight.quantize.path_following import follow_gram, follow_samples, gram_is_cheaper
from torch import Tensor

SHAPES = ("784x512x1024", "784x512x4096", "768x3072x1024", "768x3072x4096", "2048x2048x1024")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-peer", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    print(f"{cpu}, {options.threads} threads, kernel {_C.gpfq_select()}, torch {torch.__version__}")
    print("4 bits a channel, symmetric, order 0 .. d-1; CPU seconds; error ||XW - X~Q|| / ||XW||")
    print(f"{'d x N, m':>16} {'form':>7} {'ours':>8} {'spread':>8} {'floor':>8} {'x floor':>8} {'error':>9}", end="")
    print("" if options.no_peer else f" {'Brevitas':>9} {'error':>9} {'ratio':>7}")
    for shape in options.shapes:
        d, neurons, samples = (int(part) for part in shape.split("x"))
        weight, x, x_tilde = layer_and_streams(d, neurons, samples)
        grid = Grid(
            scale=(weight.abs().amax(1) / 7)[None, None],
            zero=torch.full((1, 1, neurons), 7.0),
            levels=15,
            group_size=d,
        )
        peer = None if options.no_peer else brevitas_gpfq(weight, x, x_tilde)
        gram = gram_is_cheaper(inputs=d, columns=neurons, samples=samples)
        solve = solve_gram if gram else solve_samples
        codes, times = timed(lambda solve=solve, data=(weight, x, x_tilde, grid): solve(*data), options.repeats)
        _, floors = timed(lambda data=(weight, x, x_tilde, gram): floor(*data), options.repeats)
        ours, least = times[len(times) // 2], floors[len(floors) // 2]
        error = relative_error(weight, grid.values(codes)[0].T, x, x_tilde)
        print(
            f"{f'{d}x{neurons}, {samples}':>16} {'gram' if gram else 'sample':>7} {ours:8.4f} "
            f"{(times[-1] - times[0]) / ours:7.0%} {least:9.4f} {ours / least:8.2f} {error:9.5f}",
            end="",
        )
        if peer is not None:
            their_weight, their_seconds = peer
            their_error = relative_error(weight, their_weight, x, x_tilde)
            print(f" {their_seconds:9.2f} {their_error:9.5f} {their_seconds / ours:7.0f}", end="")
        print(flush=True)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def layer_and_streams(d: int, neurons: int, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's weight [N, d], and its inputs [m, d] behind a ReLU layer that is float, and rounded to 4 bits."""
    generator = torch.Generator().manual_seed(d + neurons + samples)
    before = torch.randn(d, d // 2, generator=generator) / (d // 2) ** 0.5
    step = before.abs().amax(1, keepdim=True) / 7
    rounded = (before / step).round().clamp(-7, 7) * step
    first = torch.randn(samples, d // 2, generator=generator)
    weight = torch.randn(neurons, d, generator=generator) / d**0.5
    return weight, (first @ before.T).relu(), (first @ rounded.T).relu()


def solve_gram(weight: Tensor, x: Tensor, x_tilde: Tensor, grid: Grid) -> Tensor:
    transposed = x_tilde.T
    return follow_gram(weight.T[None], (transposed @ x)[None], (transposed @ x_tilde)[None], grid)


def solve_samples(weight: Tensor, x: Tensor, x_tilde: Tensor, grid: Grid) -> Tensor:
    return follow_samples(weight.T[None], x[None], x_tilde[None], grid)


def floor(weight: Tensor, x: Tensor, x_tilde: Tensor, gram: bool) -> Tensor:
    """The large products of either form, and nothing else."""
    if gram:
        transposed = x_tilde.T
        transposed @ x
        return (transposed @ x_tilde) @ weight.T
    error = x @ weight.T
    x_tilde @ weight.T
    return x_tilde.T @ error


def timed(work: Callable[[], Tensor], repeats: int) -> tuple[Tensor, list[float]]:
    result, times = work(), []
    for _ in range(repeats):
        begin = time.process_time()
        result = work()
        times.append(time.process_time() - begin)
    return result, sorted(times)


def relative_error(weight: Tensor, quantized: Tensor, x: Tensor, x_tilde: Tensor) -> float:
    x, x_tilde, weight = x.double(), x_tilde.double(), weight.double()
    reference = x @ weight.T
    return float((reference - x_tilde @ quantized.double().T).norm() / reference.norm())


@torch.no_grad()
def brevitas_gpfq(weight: Tensor, x: Tensor, x_tilde: Tensor) -> tuple[Tensor, float]:
    """The layer by Brevitas' GPFQ, on scales set once from the trained weight: its dequantized weight, CPU seconds."""
    import brevitas.nn as qnn  # type: ignore[import-not-found]
    from brevitas.graph.calibrate import quantization_status_manager  # type: ignore[import-not-found]
    from brevitas.graph.gpfq import GPFQ  # type: ignore[import-not-found]
    from brevitas.graph.gpxq import LayerHandler  # type: ignore[import-not-found]
    from brevitas.quant import Int8WeightPerChannelFloat  # type: ignore[import-not-found]
    from brevitas.utils.torch_utils import StopFwdException  # type: ignore[import-not-found]

    neurons, d = weight.shape
    layer = qnn.QuantLinear(
        d,
        neurons,
        bias=False,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=4,
        weight_scaling_impl_type="parameter_from_stats",
    ).eval()
    layer.weight.copy_(weight)
    layer(x[:1])  # sets the scales
    path = GPFQ(layer, "layer", act_order=False, len_parallel_layers=1, create_weight_orig=True)
    handler = LayerHandler()
    begin = time.process_time()
    with contextlib.suppress(StopFwdException):
        path.update_batch(layer, (x_tilde,), handler)
    with (
        quantization_status_manager(layer, disable_weight_quant=True, is_training=False),
        contextlib.suppress(StopFwdException),
    ):
        path.update_batch(layer, (x,), handler)
    path.single_layer_update()
    seconds = time.process_time() - begin
    return layer.quant_weight().value.clone(), seconds


if __name__ == "__main__":
    main()
