"""Throughput of the packed linear kernels, and of other libraries' ways to run the same layer.

Everything that computes one layer at one batch size takes turns in the same process. Times are wall times of the call
from a float tensor to a float tensor, rounding of the activations included.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..io.bitpack import bits_for
from ..nn.packed import PackedLinear
from ..weights import QuantizedWeight
from .limits import Limits, measure
from .peers import Peer, Source, build, choose
from .timing import Turn, take_turns

SHAPES = ((768, 768), (768, 3072), (3072, 768), (4096, 4096), (4096, 14336))
ROWS = (1, 8, 32, 128, 512)
WEIGHTS = ("ternary", "W2", "W3", "W4", "W8", "ternary-g128", "W4-g128")
_LEVELS = {"ternary": 3, "W2": 4, "W3": 8, "W4": 16, "W8": 256}
_CHECKED = 32  # rows of a batch whose result is compared with float arithmetic


@dataclass(frozen=True, kw_only=True)
class Row:
    """One layer, one batch size, one way to compute it."""

    name: str  # "W4-g128 amx", "torch fp32", "onnxruntime W2-g128", ..
    kernel: str  # what ran it, as far as its library tells
    peer: bool
    bits: int  # of a weight code; ternary counts as 2
    in_features: int
    out_features: int
    rows: int
    threads: int
    microseconds: float  # median over the slices
    spread: float  # (90th - 10th percentile) / median
    fastest: float  # microseconds of the fastest slice
    bytes: int  # of the weight as it lies in memory: codes, scales
    floor: float  # microseconds at the machine's limit: to read `bytes` or to do the operations in int8
    error: float  # |y - x W^T| / |x W^T| with the float weights this candidate stands for
    ratio: float | None = None  # the best median of the peers of as many bits or fewer, over ours; None for peers
    ratio_any: float | None = None  # the same against peers of any bits

    @property
    def gigabytes_per_second(self) -> float:
        """Weight bytes over time: what a matvec is bound by."""
        return self.bytes / self.microseconds / 1e3

    @property
    def gops(self) -> float:
        """Multiplications and additions, in 1e9 a second."""
        return 2e-3 * self.rows * self.in_features * self.out_features / self.microseconds

    @property
    def limit(self) -> float:
        """The part of the machine's limit that was reached; a little above 1 when the limit's own loop was unlucky."""
        return self.floor / self.microseconds

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every attribute and property."""
        derived = ("gigabytes_per_second", "gops", "limit")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


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


def _ours(weight: QuantizedWeight, kernels: Sequence[str]) -> Iterator[Peer]:
    """The packed layer on each kernel, in the form of a peer."""
    for kernel in kernels:
        with _ceiling(kernel):  # read when a layer is packed
            layer = PackedLinear.from_quantized(weight)
        yield Peer(
            name=f"{weight.scheme} {layer.kernel}",
            bits=bits_for(weight.levels),
            bytes=layer.layout.nbytes,
            kernel=layer.kernel,
            pool="openmp",
            prepare=lambda x, layer=layer: lambda: layer(x),
            dequantize=weight.dequantize,
        )


def available_kernels() -> list[str]:
    """Names of the packed linear kernels this CPU runs, best first, without the scalar reference."""
    return [name for name, missing in _C.linear_variants() if not missing and name != "reference"]


def best_kernel() -> str:
    """The kernel that a layer packed now gets: the best of this CPU under BANTAMWEIGHT_FORCE_KERNEL."""
    return _C.linear_select()


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    peer: Peer
    is_peer: bool
    exact: Tensor  # [_CHECKED, out]: what the first rows of every batch should give


def run(
    *,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    rows: Iterable[int] = ROWS,
    weights: Iterable[str] = WEIGHTS,
    kernels: Sequence[str] | None = None,
    threads: Iterable[int] = (1, 2),
    peers: str | Sequence[str] = (),
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
        peers: libraries to time too, as `peers.choose` takes them; those that are missing are left out.
        seconds: for each candidate and combination.
        progress: called with every row as it is measured.

    Returns:
        One row a combination and candidate, peers first within a combination.

    Raises:
        BantamweightError: an unknown peer.
        KernelError: this CPU has no such kernel.

    Example:
        >>> rows = run(shapes=[(64, 64)], rows=[1], weights=["W4"], threads=[1], seconds=0.001)
        >>> [row.rows for row in rows]
        [1]
    """
    chosen = list(kernels) if kernels is not None else [best_kernel()]
    libraries = choose(peers)
    batches, schemes, thread_counts = list(rows), list(weights), list(threads)
    found: list[Row] = []
    limits: dict[int, Limits] = {}
    threads_before = torch.get_num_threads()
    try:
        for in_features, out_features in shapes:
            x = torch.randn(max(batches, default=0), in_features, generator=torch.Generator().manual_seed(0))
            packed = [random_weight(name, out_features, in_features) for name in schemes]
            source = Source(torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(1)))
            exact: dict[str, Tensor] = {}
            for count in thread_counts:
                torch.set_num_threads(count)
                if count not in limits:
                    limits[count] = measure()
                with torch.inference_mode():
                    candidates = [_checked(peer, True, x, exact) for peer in build(libraries, source, count)]
                    for quantized in packed:
                        candidates += [_checked(ours, False, x, exact) for ours in _ours(quantized, chosen)]
                    for batch in batches:
                        for row in _measure(candidates, x[:batch], limits[count], seconds):
                            found.append(row)
                            if progress is not None:
                                progress(row)
                del candidates
    finally:
        torch.set_num_threads(threads_before)
    return found


def _checked(peer: Peer, is_peer: bool, x: Tensor, exact: dict[str, Tensor]) -> _Candidate:
    """The candidate with its exact products, which `exact` keeps by name for the next number of threads."""
    if peer.name not in exact:
        exact[peer.name] = x[:_CHECKED] @ peer.dequantize().t()
    return _Candidate(peer=peer, is_peer=is_peer, exact=exact[peer.name])


def _measure(candidates: Sequence[_Candidate], x: Tensor, limits: Limits, seconds: float) -> list[Row]:
    able = [c for c in candidates if c.peer.max_rows is None or x.shape[0] <= c.peer.max_rows]
    calls = [candidate.peer.prepare(x) for candidate in able]
    errors = [_error(call(), candidate.exact) for call, candidate in zip(calls, able, strict=True)]
    turns = [Turn(call=call, pool=candidate.peer.pool) for call, candidate in zip(calls, able, strict=True)]
    times = take_turns(turns, seconds, threads=limits.threads)
    rows = []
    for candidate, error, took in zip(able, errors, times, strict=True):
        others = [(other.peer.bits, its.median) for other, its in zip(able, times, strict=True) if other.is_peer]
        out_features = candidate.exact.shape[1]
        bits = candidate.peer.bits
        rows.append(
            Row(
                name=candidate.peer.name,
                kernel=candidate.peer.kernel,
                peer=candidate.is_peer,
                bits=bits,
                in_features=x.shape[1],
                out_features=out_features,
                rows=x.shape[0],
                threads=limits.threads,
                microseconds=1e6 * took.median,
                spread=took.spread,
                fastest=1e6 * took.fastest,
                bytes=candidate.peer.bytes,
                floor=limits.microseconds(candidate.peer.bytes, 2.0 * x.numel() * out_features),
                error=error,
                ratio=None if candidate.is_peer else _ratio([m for b, m in others if b <= bits], took.median),
                ratio_any=None if candidate.is_peer else _ratio([m for _, m in others], took.median),
            )
        )
    return rows


def _error(y: Tensor, exact: Tensor) -> float:
    exact = exact[: y.shape[0]]
    return float((y[:_CHECKED].float() - exact).norm() / exact.norm().clamp_min(1e-30))


def _ratio(medians: Sequence[float], ours: float) -> float | None:
    return min(medians) / ours if medians else None


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned text under one heading."""
    heading = ("in x out", "M", "threads", "layer", "us", "spread", "min us", "GB/s", "GOPS", "limit", "error")
    heading += ("x same bits", "x any")
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
                f"{row.limit:.0%}",
                f"{row.error:.1e}",
                "" if row.ratio is None else f"{row.ratio:.2f}",
                "" if row.ratio_any is None else f"{row.ratio_any:.2f}",
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


def format_kernels(rows: Sequence[Row]) -> str:
    """What ran every peer, as far as its library tells, a line each."""
    kernels = {row.name: row.kernel or "not told by the library" for row in rows if row.peer}
    width = max((len(name) for name in kernels), default=0)
    return "\n".join(f"{name.ljust(width)}  {kernel}" for name, kernel in kernels.items())
