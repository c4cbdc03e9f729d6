"""Throughput of the packed linear kernels, and of what torch offers for the same layer.

Everything that computes one layer at one batch size takes turns in the same process, a slice of a
millisecond each, so that a busy or throttling machine slows all of it alike. Times are wall times of
the call from a float tensor to a float tensor, rounding of the activations included.
"""

import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import _C
from ..nn.packed import PackedLinear
from ..weights import QuantizedWeight

SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336))
ROWS = (1, 8, 32, 128, 512)
WEIGHTS = ("ternary", "W2", "W3", "W4", "W8", "ternary-g128", "W4-g128")
_LEVELS = {"ternary": 3, "W2": 4, "W3": 8, "W4": 16, "W8": 256}
_SLICE = 1e-3  # seconds a candidate runs before the next one's turn


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer, one batch size, one way to compute it."""

    name: str  # "W4-g128 amx", "torch fp32", "torch int8 onednn", ..
    in_features: int
    out_features: int
    rows: int
    threads: int
    microseconds: float  # median over the slices
    spread: float  # (90th - 10th percentile) / median
    fastest: float  # microseconds of the fastest slice
    bytes: int  # the weight in canonical packing: codes, scales
    error: float  # |y - x W^T| / |x W^T| with the float weights this candidate stands for
    ratio: float | None  # the best peer's median over ours; None for peers and without peers

    @property
    def gigabytes_per_second(self) -> float:
        """Weight bytes over time: what a matvec is bound by."""
        return self.bytes / self.microseconds / 1e3

    @property
    def gops(self) -> float:
        """Multiplications and additions, in 1e9 a second."""
        return 2e-3 * self.rows * self.in_features * self.out_features / self.microseconds


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    name: str
    call: Callable[[Tensor], Tensor]
    weight: Tensor  # float32 [out, in] to measure the error against
    bytes: int
    peer: bool


def random_weight(weights: str, out_features: int, in_features: int, seed: int = 0) -> QuantizedWeight:
    """A weight with uniformly drawn codes.

    Args:
        weights: one of `WEIGHTS`; "-g128" means one scale for 128 columns.

    Raises:
        ValueError: unknown `weights`.
    """
    base, _, group = weights.partition("-g")
    if base not in _LEVELS or (group and not group.isdigit()):
        raise ValueError(f"weights is {weights!r}; allowed are {', '.join(_LEVELS)}, each with -g128 or the like")
    generator = torch.Generator().manual_seed(seed)
    levels = _LEVELS[base]
    group_size = int(group) if group else in_features
    shape = (out_features, -(-in_features // group_size))
    codes = torch.randint(0, levels, (out_features, in_features), dtype=torch.uint8, generator=generator)
    scale = (0.5 + torch.rand(shape, generator=generator)) / in_features**0.5
    zero = torch.full(shape, float(levels // 2))
    return QuantizedWeight.from_codes(codes, scale, zero, group_size=group_size, levels=levels)


@contextmanager
def _ceiling(kernel: str) -> Iterator[None]:
    variable = "BANTAMWEIGHT_FORCE_KERNEL"
    before = os.environ.get(variable)
    os.environ[variable] = kernel
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def _ours(weight: QuantizedWeight, kernels: Sequence[str]) -> list[_Candidate]:
    found = []
    for kernel in kernels:
        with _ceiling(kernel):  # read when a layer is packed
            layer = PackedLinear.from_quantized(weight)
        found.append(
            _Candidate(
                name=f"{weight.scheme} {layer.kernel}",
                call=layer,
                weight=weight.dequantize(),
                bytes=weight.nbytes_on_disk,
                peer=False,
            )
        )
    return found


def _peers(weight: Tensor) -> list[_Candidate]:
    """torch's own ways to run a float layer: fp32, bf16, and dynamic int8 on both engines."""
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    count = weight.numel()
    half = nn.Linear(in_features, out_features, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        half.weight.copy_(weight)
    found = [
        _Candidate(name="torch fp32", call=layer, weight=weight, bytes=4 * count, peer=True),
        _Candidate(
            name="torch bf16",
            call=lambda x: half(x.bfloat16()).float(),
            weight=weight,
            bytes=2 * count,
            peer=True,
        ),
    ]
    before = torch.backends.quantized.engine
    for engine in ("x86", "onednn"):
        if engine not in torch.backends.quantized.supported_engines:
            continue
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the removal of its quantization
            quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]
        found.append(_Candidate(name=f"torch int8 {engine}", call=quantized, weight=weight, bytes=count, peer=True))
    torch.backends.quantized.engine = before
    return found


def _alternate(candidates: Sequence[_Candidate], x: Tensor, seconds: float) -> list[list[float]]:
    """Seconds a call of every candidate, a list of slices each."""
    repeats = []
    for candidate in candidates:
        candidate.call(x)
        start = time.perf_counter()
        candidate.call(x)
        once = time.perf_counter() - start
        repeats.append(max(1, min(1000, int(_SLICE / max(once, 1e-7)))))
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < end or len(times[0]) < 5:
        for candidate, repeat, slices in zip(candidates, repeats, times, strict=True):
            call = candidate.call
            call(x)  # untimed: it finds the caches and the heap as the candidate before left them
            start = time.perf_counter()
            for _ in range(repeat):
                call(x)
            slices.append((time.perf_counter() - start) / repeat)
    return times


def available_kernels() -> list[str]:
    """Names of the packed linear kernels this CPU runs, best first, without the scalar reference."""
    return [name for name, missing in _C.linear_variants() if not missing and name != "reference"]


def run(
    *,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rows: Iterable[int] = ROWS,
    weights: Iterable[str] = WEIGHTS,
    kernels: Sequence[str] | None = None,
    threads: Iterable[int] = (1, 2),
    peers: bool = True,
    seconds: float = 0.05,
    progress: Callable[[Row], None] | None = None,
) -> list[Row]:
    """Times every combination.

    Args:
        shapes: (in_features, out_features) of the layers.
        rows: batch sizes.
        weights: of `WEIGHTS`, any group size.
        kernels: names of kernels; None for the best one of this CPU.
        threads: numbers of threads, set with torch.set_num_threads and put back at the end.
        peers: time torch's fp32, bf16 and dynamic int8 layers too, and fill `Row.ratio`.
        seconds: for each candidate and combination.
        progress: called with every row as it is measured.

    Returns:
        One row a combination and candidate, peers first within a combination.

    Raises:
        KernelError: this CPU has no such kernel.

    Example:
        >>> rows = run(shapes=[(64, 64)], rows=[1], weights=["W4"], threads=[1], peers=False, seconds=0.001)
        >>> [row.rows for row in rows]
        [1]
    """
    chosen = list(kernels) if kernels is not None else [_C.linear_select()]
    batches, schemes, thread_counts = list(rows), list(weights), list(threads)
    found: list[Row] = []
    threads_before = torch.get_num_threads()
    try:
        for in_features, out_features in shapes:
            packed = [random_weight(name, out_features, in_features) for name in schemes]
            candidates = _peers(packed[0].dequantize()) if peers and packed else []
            for weight in packed:
                candidates += _ours(weight, chosen)
            for count in thread_counts:
                torch.set_num_threads(count)
                for batch in batches:
                    for row in _measure(candidates, in_features, out_features, batch, count, seconds):
                        found.append(row)
                        if progress is not None:
                            progress(row)
    finally:
        torch.set_num_threads(threads_before)
    return found


def _measure(
    candidates: Sequence[_Candidate], in_features: int, out_features: int, batch: int, threads: int, seconds: float
) -> list[Row]:
    x = torch.randn(batch, in_features, generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        times = _alternate(candidates, x, seconds)
        medians = [1e6 * statistics.median(slices) for slices in times]
        best = min((median for median, c in zip(medians, candidates, strict=True) if c.peer), default=None)
        rows = []
        for candidate, slices, median in zip(candidates, times, medians, strict=True):
            exact = x @ candidate.weight.t()
            error = float((candidate.call(x) - exact).norm() / exact.norm().clamp_min(1e-30))
            ordered = sorted(slices)
            low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
            rows.append(
                Row(
                    name=candidate.name,
                    in_features=in_features,
                    out_features=out_features,
                    rows=batch,
                    threads=threads,
                    microseconds=median,
                    spread=1e6 * (high - low) / median,
                    fastest=1e6 * ordered[0],
                    bytes=candidate.bytes,
                    error=error,
                    ratio=None if candidate.peer or best is None else best / median,
                )
            )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text under one heading."""
    heading = ("in x out", "M", "threads", "layer", "us", "spread", "min us", "GB/s", "GOPS", "error", "x best peer")
    lines: list[tuple[str, ...]] = [heading]
    for row in rows:
        lines.append(
            (
                f"{row.in_features}x{row.out_features}",
                str(row.rows),
                str(row.threads),
                row.name,
                f"{row.microseconds:.1f}",
                f"{row.spread:.0%}",
                f"{row.fastest:.1f}",
                f"{row.gigabytes_per_second:.1f}",
                f"{row.gops:.0f}",
                f"{row.error:.1e}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    left = heading.index("layer")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
