"""The algorithms under Beacon on plain tensors: codes and their scale together, by the cosine of the outputs.

Zhang and Saab, "Beacon: Post-Training Quantization with Integrated Grid Selection", 2025, arXiv:2508.20293. For a
neuron w with analog inputs X and quantized-network inputs X~, codes v (less their zero point) are chosen to maximize
cos(X w, X~ v); the best scale for them, <X w, X~ v> / ||X~ v||^2, then needs no search. In Gram form, with
h = X~^T X w, H = X~^T X~, s = h.v, r = v.Hv and u = H v, changing v_t by e makes the squared cosine

    (s + e h_t)^2 / (r + 2 e u_t + e^2 H_tt),

up to the constant ||X w||^2. Inputs that share a scale (a group) are fitted to what the other groups leave of X w, so
a visit never makes ||X w - X~ q|| larger.

Tensors carry a leading dimension of independent problems, as in `path_following`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .grid import Grid, sum_over_row_groups
from .path_following import BLOCK, coordinate_descent

# Up to here every level is tried; with more, those around the stationary point and the two ends.
_FEW_LEVELS = 8
_MAX_COMBINATIONS = 1 << 18
_CHUNK_FLOATS = 1 << 24


def cosine_descent(
    target: Tensor,
    gram: Tensor,
    grid: Grid,
    start: Tensor,
    *,
    order: Tensor | None = None,
    sweeps: int,
) -> tuple[Grid, Tensor]:
    """Coordinate descent on the codes and their scales together.

    Args:
        target: X~^T X w of every column, [problems, d, columns].
        gram: H = X~^T X~, [problems, d, d].
        grid: its scales are where the groups start; zeros, levels and groups stay.
        start: what the values are at first, in steps from the zero point, [problems, d, columns]. They need not be
            on the grid: weights in units of a step give the greedy first pass, which puts one input after the other
            on the grid while those not yet visited stay as they are.
        order: int64 [d], the inputs in the order they are visited within a group; None for 0 .. d-1.
        sweeps: over all inputs, at most; stops when one changes nothing.

    Returns:
        The grid with the scales found, and codes uint8 [problems, d, columns]. A column whose codes correlate with
        the outputs in no group keeps its scale there.
    """
    d = gram.shape[1]
    visit = _by_group(d, grid.group_size, order)
    back = torch.empty_like(visit)
    back[visit] = torch.arange(d, device=visit.device)
    target, gram, steps = target[:, visit], gram[:, visit][:, :, visit].contiguous(), start[:, visit].clone()
    scale, ladder = grid.scale.clone(), _Ladder(grid)
    dead = dead_inputs(gram)
    residual = target - torch.bmm(gram, _scaled(steps, scale, grid.group_size))
    for _ in range(sweeps):
        moved = False
        for group, a in enumerate(range(0, d, grid.group_size)):
            b = min(a + grid.group_size, d)
            was = steps[:, a:b] * scale[:, group, None]
            own = gram[:, a:b, a:b]
            # What the other groups leave of the target; with one group, the target.
            left = residual[:, a:b] + torch.bmm(own, was)
            block = steps[:, a:b].clone()
            fitted = _sweep(left, own, dead[:, a:b], block, ladder, group, scale[:, group])
            # With groups, a scale that moved changes what the others have to fit.
            moved = moved or not torch.equal(block, steps[:, a:b]) or not torch.allclose(fitted, scale[:, group])
            steps[:, a:b], scale[:, group] = block, fitted
            residual.baddbmm_(gram[:, :, a:b], block * fitted[:, None] - was, alpha=-1)
        if not moved:
            break
    found = Grid(scale=scale, zero=grid.zero, levels=grid.levels, group_size=grid.group_size)
    return found, _codes(steps, grid, visit)[:, back]


def shared_scale_descent(
    weight: Tensor,
    cross: Tensor,
    gram: Tensor,
    grid: Grid,
    codes: Tensor,
    *,
    rows_per_scale: int | None,
    sweeps: int,
) -> tuple[Grid, Tensor]:
    """Codes and scales in turn, where many neurons share a scale: a sweep of each neuron, then the best scale for all.

    The cosine of one neuron says nothing about a scale that others have a say in, so the sweeps are those of
    `coordinate_descent`. Neither half makes the summed error larger.

    Args:
        weight, cross, gram, grid, codes, sweeps: as in `coordinate_descent`.
        rows_per_scale: neurons in a row that share their scales; None if all neurons of all problems do.
    """
    target = torch.bmm(cross, weight)
    for _ in range(sweeps):
        before = codes
        codes = coordinate_descent(weight, cross, gram, grid, codes, sweeps=1)
        grid = _refit_shared(target, gram, grid, codes, rows_per_scale)
        if torch.equal(before, codes):
            break
    return grid, codes


def best_of_all(target: Tensor, gram: Tensor, levels: int, zero: float) -> tuple[Tensor, Tensor] | None:
    """The codes of the largest cosine among all that there are, for few inputs such as a depthwise convolution's.

    Args:
        target: X~^T X w, [problems, d, neurons].
        gram: X~^T X~, [problems, d, d].

    Returns:
        The scales [problems, 1, neurons] and codes uint8 [problems, d, neurons]; None if there are more than 262,144
        combinations of codes. A neuron with a target of zero gets the scale 0.
    """
    problems, d, neurons = target.shape
    count = levels**d
    if count > _MAX_COMBINATIONS:
        return None
    digits = torch.arange(count)[:, None] // levels ** torch.arange(d)[None] % levels
    steps = digits.to(gram.dtype) - zero
    scale = target.new_zeros(problems, 1, neurons)
    codes = torch.empty(problems, d, neurons, dtype=torch.uint8)
    for p in range(problems):
        energy = (torch.mm(steps, gram[p]) * steps).sum(1)  # v.Hv
        inverse = torch.where(energy > 1e-12 * energy.max(), energy.rsqrt(), 0.0)
        for part in torch.arange(neurons).split(max(1, _CHUNK_FLOATS // count)):
            products = torch.mm(steps, target[p][:, part])  # h.v
            best = (products * inverse[:, None]).argmax(0)
            s = products.gather(0, best[None])[0]
            scale[p, 0, part] = (s * inverse[best].square()).clamp_min(0)
            codes[p][:, part] = digits[best].T.to(torch.uint8)
    return scale, codes


def dead_inputs(gram: Tensor) -> Tensor:
    """Which inputs are zero, to working precision, on all samples: [problems, d]."""
    diagonal = gram.diagonal(dim1=1, dim2=2)
    return diagonal <= 1e-12 * diagonal.amax(1, keepdim=True)


def _sweep(
    target: Tensor, gram: Tensor, dead: Tensor, steps: Tensor, ladder: "_Ladder", group: int, scale: Tensor
) -> Tensor:
    """Visits every input of one group, changes `steps` in place, and returns the best scale of each column."""
    products = torch.bmm(gram, steps)  # u = H v
    s, r = (target * steps).sum(1), (products * steps).sum(1)
    diagonal = gram.diagonal(dim1=1, dim2=2)[:, :, None]
    d = steps.shape[1]
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        before = steps[:, a:b].clone()
        u = products[:, a:b].clone()
        inside = gram[:, a:b, a:b]
        for t in range(a, b):
            h, u_t, norm = target[:, t], u[:, t - a], diagonal[:, t]
            change = ladder.best_change(group, steps[:, t], s, r, h, u_t, norm)
            # An input that is zero on all samples has nothing to say, and keeps the value nearest to where it was.
            change = torch.where(dead[:, t, None], ladder.nearest(group, steps[:, t]) - steps[:, t], change)
            r = r + change * (2 * u_t + change * norm)
            s = s + change * h
            steps[:, t] += change
            u += inside[:, :, t - a, None] * change[:, None]
        if b < d:
            products[:, b:].baddbmm_(gram[:, b:, a:b], steps[:, a:b] - before)
    # Anew, without the rounding that the updates have gathered.
    s, r = (target * steps).sum(1), (torch.bmm(gram, steps) * steps).sum(1)
    return torch.where((s > 0) & (r > 0), s / r.clamp_min(torch.finfo(r.dtype).tiny), scale)


class _Ladder:
    """The values a code can take, in steps from the zero point of each column."""

    def __init__(self, grid: Grid) -> None:
        self.zero = grid.zero
        self.levels = grid.levels

    def nearest(self, group: int, steps: Tensor) -> Tensor:
        zero = self.zero[:, group]
        return (steps + zero + 0.5).floor().clamp(0, self.levels - 1) - zero

    def best_change(
        self, group: int, value: Tensor, s: Tensor, r: Tensor, h: Tensor, u: Tensor, norm: Tensor
    ) -> Tensor:
        """The change of one input's value that makes the signed squared cosine largest; ties go to no change."""
        own = self.nearest(group, value)  # the value itself, once it is on the grid
        tried = [own, *self._candidates(group, value, s, r, h, u, norm)]
        best, gain = own - value, None
        for candidate in tried:
            change = candidate - value
            product = s + change * h
            cosine = product * product.abs() / (r + change * (2 * u + change * norm)).clamp_min(1e-30)
            if gain is None:
                gain = cosine
                continue
            # The margin keeps float rounding from moving codes to and fro between values that are equally good.
            better = cosine > gain + 1e-6 * gain.abs()
            best, gain = torch.where(better, change, best), torch.where(better, cosine, gain)
        return best

    def _candidates(
        self, group: int, value: Tensor, s: Tensor, r: Tensor, h: Tensor, u: Tensor, norm: Tensor
    ) -> Iterator[Tensor]:
        zero = self.zero[:, group]
        if self.levels <= _FEW_LEVELS:
            for level in range(self.levels):
                yield level - zero
            return
        # The cosine has one stationary point in the change; the best level is beside it or at an end.
        slope = s * norm - h * u
        point = torch.where(slope != 0, (h * r - s * u) / torch.where(slope != 0, slope, 1.0), 0.0)
        below = (value + point + zero).floor().nan_to_num(0.0)
        yield below.clamp(0, self.levels - 1) - zero
        yield (below + 1).clamp(0, self.levels - 1) - zero
        yield -zero
        yield self.levels - 1 - zero


def _refit_shared(target: Tensor, gram: Tensor, grid: Grid, codes: Tensor, rows_per_scale: int | None) -> Grid:
    """The scales that fit best to the codes, group of inputs by group of inputs."""
    steps = codes.to(grid.scale.dtype)
    for group, part in enumerate(steps.split(grid.group_size, dim=1)):
        part.sub_(grid.zero[:, group, None])
    scale = grid.scale.clone()
    residual = target - torch.bmm(gram, _scaled(steps, scale, grid.group_size))
    d = gram.shape[1]
    for group, a in enumerate(range(0, d, grid.group_size)):
        part = slice(a, min(a + grid.group_size, d))
        moved = torch.bmm(gram[:, :, part], steps[:, part])
        s = (residual[:, part] * steps[:, part]).sum(1)
        r = (moved[:, part] * steps[:, part]).sum(1)
        if rows_per_scale is None:
            s, r = s.sum().expand_as(s), r.sum().expand_as(r)
        else:
            s, r = sum_over_row_groups(s, rows_per_scale), sum_over_row_groups(r, rows_per_scale)
        change = torch.where(r > 0, s / r.clamp_min(torch.finfo(r.dtype).tiny), 0.0)
        change = torch.where(scale[:, group] + change > 0, change, 0.0)
        scale[:, group] += change
        residual.sub_(moved * change[:, None])
    return Grid(scale=scale, zero=grid.zero, levels=grid.levels, group_size=grid.group_size)


def _by_group(d: int, group_size: int, order: Tensor | None) -> Tensor:
    """The inputs in their order, those of a group together."""
    order = torch.arange(d) if order is None else order
    return order[torch.argsort(order // group_size, stable=True)]


def _scaled(steps: Tensor, scale: Tensor, group_size: int) -> Tensor:
    values = steps.clone()
    for group, part in enumerate(values.split(group_size, dim=1)):
        part.mul_(scale[:, group, None])
    return values


def _codes(steps: Tensor, grid: Grid, visit: Tensor) -> Tensor:
    """Codes uint8 of steps from the zero point, in the order of `visit`."""
    zero = grid.zero[:, visit // grid.group_size]
    return (steps + zero).round().clamp(0, grid.levels - 1).to(torch.uint8)
