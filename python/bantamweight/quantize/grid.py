"""The grids that weights are rounded to: alphabets, and the candidates among which a step is searched.

A grid is ``scale * (code - zero)`` for codes 0 .. levels - 1. The step of an alphabet that reaches C times the
quantile r of the weights is ``C r / half``, with half = (levels - 1) / 2 codes on either side: for the symmetric
alphabet {-K .. K} that is the papers' ``delta = C r / K``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import BantamweightError

GRANULARITIES = ("layer", "channel", "group")
ALPHABETS = ("symmetric", "full")

# A channel or group of zeros gets this step: its codes then stand for nothing but rounding errors of zero. Its inverse
# is finite, and the weights of a layer are brought to ordinary size before they meet it.
SMALLEST_STEP = 1e-30


@dataclass(frozen=True, kw_only=True)
class Alphabet:
    """How many values a code takes, and which of them may stand for zero.

    Attributes:
        levels: values of a code.
        zeros: the candidates for the zero point; one of them for a symmetric alphabet.
    """

    levels: int
    zeros: tuple[float, ...]

    @property
    def half(self) -> float:
        return (self.levels - 1) / 2


def alphabet(bits: int, levels: int | None, kind: str | None) -> Alphabet:
    """The alphabet of a setting.

    Args:
        bits: 2 .. 8; what a code is stored in.
        levels: an odd or even number of values instead of what `bits` gives; 3 is ternary.
        kind: ``"symmetric"``: 2^bits - 1 values {-K .. K}. ``"full"``: 2^bits values, their zero point searched among
            the two middle codes (and halfway between them at 2 bits). None: full at 2 bits, where the symmetric
            alphabet would be the ternary one, and symmetric from 3.

    Raises:
        BantamweightError: bits or levels out of range, or a kind of another name.
    """
    if not isinstance(bits, int) or bits not in (2, 3, 4, 8):
        raise BantamweightError(f"bits is {bits!r}, but codes have 2, 3, 4 or 8 bits; for ternary use levels=3")
    if kind is not None and kind not in ALPHABETS:
        raise BantamweightError(f"alphabet is {kind!r}, but must be one of {', '.join(ALPHABETS)}, or None")
    if levels is None:
        full = kind == "full" or (kind is None and bits == 2)
        levels = 2**bits if full else 2**bits - 1
    elif not isinstance(levels, int) or not 2 <= levels <= 256:
        raise BantamweightError(f"levels is {levels!r}, but a code has 2 to 256 levels (3 for ternary)")
    middle = (levels - 1) / 2
    if levels % 2 == 1:
        return Alphabet(levels=levels, zeros=(middle,))
    zeros = (middle - 0.5, middle + 0.5)
    return Alphabet(levels=levels, zeros=(*zeros, middle) if levels <= 4 else zeros)


@dataclass(frozen=True, kw_only=True, eq=False)
class Grid:
    """The grid of every column (neuron, or neuron under one candidate) of the independent problems of a layer.

    Attributes:
        scale: float [problems, groups, columns], > 0.
        zero: the same shape, in code units.
        levels: values of a code.
        group_size: inputs a group.
    """

    scale: Tensor
    zero: Tensor
    levels: int
    group_size: int

    def values(self, codes: Tensor) -> Tensor:
        """What codes uint8 [problems, inputs, columns] stand for."""
        values = codes.to(self.scale.dtype)
        for group, part in enumerate(values.split(self.group_size, dim=1)):
            part.sub_(self.zero[:, group, None]).mul_(self.scale[:, group, None])
        return values

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes nearest to weights [problems, inputs, columns]."""
        steps = weight.clone()
        for group, part in enumerate(steps.split(self.group_size, dim=1)):
            part.div_(self.scale[:, group, None]).add_(self.zero[:, group, None] + 0.5)
        return steps.floor_().clamp_(0, self.levels - 1).to(torch.uint8)

    def columns(self, part: slice) -> "Grid":
        """The grid of some of the columns."""
        return replace(self, scale=self.scale[:, :, part], zero=self.zero[:, :, part])


def weight_range(
    weight: Tensor,
    *,
    granularity: str,
    group_size: int,
    percentile: float,
    rows_per_scale: int | None = None,
    layer_range: str = "largest",
) -> Tensor:
    """The quantile r of |w| over each group of each neuron.

    Args:
        weight: [problems, inputs, columns].
        granularity: ``"group"`` and ``"channel"``: each (group of a) neuron its own. ``"layer"``: one for all.
        group_size: inputs a group.
        percentile: 0 < quantile <= 1; 1 is the largest absolute value.
        rows_per_scale: neurons in a row that share a range, that of all their weights; None for each its own.
        layer_range: of granularity ``"layer"``: the ``"largest"`` of the neurons' ranges, which cuts nothing off, or
            their ``"mean"``, as GPFQ has it (Zhang et al. 2023, arXiv:2201.11113).

    Returns:
        [problems, groups, columns].
    """
    if rows_per_scale is not None:
        # A group of neurons is one neuron with all their weights.
        ranges = []
        for block in weight.split(rows_per_scale, dim=2):
            parts = [part.flatten(1)[:, :, None] for part in block.split(group_size, dim=1)]
            found = [
                weight_range(p, granularity="channel", group_size=p.shape[1], percentile=percentile) for p in parts
            ]
            ranges.append(torch.cat(found, dim=1).expand(-1, -1, block.shape[2]))
        return torch.cat(ranges, dim=2)
    parts = [part.abs() for part in weight.split(group_size, dim=1)]
    if percentile < 1:
        ranges = torch.stack([torch.quantile(part, percentile, dim=1) for part in parts], dim=1)
    else:
        ranges = torch.stack([part.amax(dim=1) for part in parts], dim=1)
    if granularity == "layer":
        ranges = (ranges.mean() if layer_range == "mean" else ranges.amax()).expand_as(ranges)
    return ranges


def sum_over_row_groups(values: Tensor, rows: int) -> Tensor:
    """values [..., neurons], each replaced by the sum over its group of `rows` neurons in a row."""
    return torch.cat([group.sum(-1, keepdim=True).expand_as(group) for group in values.split(rows, dim=-1)], dim=-1)


def candidate_grid(ranges: Tensor, chosen: Alphabet, factors: Sequence[float] | Tensor, group_size: int) -> Grid:
    """Every C with every zero point, side by side: candidate s of neuron n is column ``s * columns + n``.

    Args:
        ranges: [problems, groups, columns] as `weight_range` gives them.
        factors: the values of C to try, or a tensor [candidates, problems, 1, columns] with each neuron's own.
    """
    if not isinstance(factors, Tensor):
        factors = torch.tensor(list(factors), dtype=ranges.dtype, device=ranges.device).reshape(-1, 1, 1, 1)
    scale = (factors * (ranges / chosen.half)).clamp_min(SMALLEST_STEP)  # [candidates, problems, groups, columns]
    scales = torch.cat([scale] * len(chosen.zeros))
    shifts = torch.cat([torch.full_like(scale, zero) for zero in chosen.zeros])
    return Grid(scale=_columns(scales), zero=_columns(shifts), levels=chosen.levels, group_size=group_size)


def pick(grid: Grid, codes: Tensor, best: Tensor) -> tuple[Grid, Tensor]:
    """The candidate `best` [problems, columns] of every neuron out of a grid and its codes."""
    problems, neurons = best.shape
    column = best * neurons + torch.arange(neurons, device=best.device)

    def take(tensor: Tensor) -> Tensor:
        return tensor.gather(2, column[:, None, :].expand(problems, tensor.shape[1], neurons))

    chosen = Grid(scale=take(grid.scale), zero=take(grid.zero), levels=grid.levels, group_size=grid.group_size)
    return chosen, take(codes)


def _columns(candidates: Tensor) -> Tensor:
    """[candidates, problems, groups, columns] as [problems, groups, candidates * columns]."""
    return candidates.permute(1, 2, 0, 3).reshape(candidates.shape[1], candidates.shape[2], -1).contiguous()
