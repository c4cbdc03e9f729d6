"""The algorithms under GPFQ on plain tensors: path following, coordinate descent, aligned error feedback.

Zhang, Zhou, Saab, "Post-training Quantization for Neural Networks with Provable Guarantees", SIAM J. Math. Data Sci.
2023, arXiv:2201.11113. For each neuron w and inputs t = 0 .. d-1, with analog inputs X and quantized-network
inputs X~ (columns X_t, X~_t):

    u_t = u_{t-1} + w_t X_t - q_t X~_t,    q_t = Q( <X~_t, u_{t-1} + w_t X_t> / ||X~_t||^2 )

The recursion keeps u of the size of the samples and touches it twice an input. Here two forms that round the same
numbers in blocks of inputs, as matrix products around the small recursion of ``csrc/gpfq``:

- Gram form: with G = X~^T X and H = X~^T X~, <X~_t, u_{t-1} + w_t X_t> = sum_{s<=t} G_ts w_s - sum_{s<t} H_ts q_s.
- Sample-block form: u kept, but updated once a block.

Tensors carry a leading dimension of independent problems (the channel groups of a convolution, else 1):
weights are [problems, d, columns], matrices [problems, d, d], samples [problems, m, d].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _C
from ..errors import KernelError
from .grid import Grid

BLOCK = 128  # inputs a block, as many as the kernel takes

_FEEDBACK = {"value": 0, "change": 1, "error": 2}
_SHRINK = {None: 0, "l1": 1, "l0": 2}


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How an argument becomes a code.

    Attributes:
        stochastic: round up with the probability of the fraction (SGPFQ) instead of to nearest.
        seed: of the stochastic draws.
        shrink: ``"l1"`` shrinks arguments by `threshold` steps before rounding, ``"l0"`` sets those within it to zero.
        threshold: in steps.
    """

    stochastic: bool = False
    seed: int = 0
    shrink: str | None = None
    threshold: float = 0.0


NEAREST = Rounding()


def gram_is_cheaper(*, inputs: int, columns: int, samples: int, favour: float = 1.0) -> bool:
    """Whether the Gram form is the faster: 3 m d^2 + 2 d^2 N operations against m d (6 N + 4 B) slower ones.

    The sample form's products are B wide at most and pass over u twice a block; they run at about 4/5 of the speed.

    Args:
        favour: how many times as long as the sample form the Gram form may take.
    """
    return 3 * inputs + 2 * inputs * columns / max(samples, 1) < favour * 1.25 * (6 * columns + 4 * BLOCK)


def follow_gram(
    weight: Tensor,
    cross: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    order: Tensor | None = None,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """Path following in Gram form: `GramPath` for one grid."""
    return GramPath(weight, cross, gram, order=order, rounding=rounding).follow(grid)


class GramPath:
    """Path following in Gram form, for as many grids as are tried.

    Args:
        weight: [problems, d, neurons].
        cross, gram: G = X~^T X and H = X~^T X~, [problems, d, d], any common factor.
        order: int64 [d], the inputs in the order they are visited; None for 0 .. d-1.
        rounding: how arguments are rounded.
    """

    def __init__(
        self,
        weight: Tensor,
        cross: Tensor,
        gram: Tensor,
        *,
        order: Tensor | None = None,
        rounding: Rounding = NEAREST,
    ) -> None:
        self.neurons, self.order, self.rounding = weight.shape[2], order, rounding
        if order is not None:
            weight = weight[:, order]
            cross, gram = cross[:, order][:, :, order], gram[:, order][:, :, order]
        self.gram = gram
        self.inverse, dead = _inverse_norms(gram)
        # sum_{s<=t} G_ts w_s / H_tt, which no grid changes.
        self.target = torch.empty_like(weight)
        for a in range(0, weight.shape[1], BLOCK):
            b = min(a + BLOCK, weight.shape[1])
            left = cross[:, a:b, :b] * self.inverse[:, a:b, None]
            _keep_lower(left[:, :, a:], dead[:, a:b])
            self.target[:, a:b] = torch.bmm(left, weight[:, :b])

    def follow(self, grid: Grid, neurons: Tensor | None = None) -> Tensor:
        """Codes uint8 [problems, d, candidates * neurons], inputs in their own order.

        Args:
            grid: of ``candidates * neurons`` columns; the candidates of a neuron share its products with G.
            neurons: int64, the neurons that the grid is of; None for all.
        """
        target = self.target if neurons is None else self.target[:, :, neurons]
        problems, d, count = target.shape
        group = torch.arange(d, device=target.device) // grid.group_size
        panels = _Panels(grid, group if self.order is None else group[self.order], self.rounding)
        columns = grid.scale.shape[2]
        values = target.new_empty(problems, d, columns)
        codes = torch.empty(problems, d, columns, dtype=torch.uint8)
        for a in range(0, d, BLOCK):
            b = min(a + BLOCK, d)
            panel = values[:, a:b]
            panel.view(problems, b - a, columns // count, count).copy_(target[:, a:b, None])
            lower = self.gram[:, a:b, :b] * self.inverse[:, a:b, None]
            if a > 0:
                panel.baddbmm_(lower[:, :, :a], values[:, :a], alpha=-1)
            panels.run(panel, lower[:, :, a:], codes[:, a:b], a, feedback="value")
        return _restore(codes, self.order)


def in_order(analog: Tensor, quantized: Tensor, order: Tensor | None) -> tuple[Tensor, Tensor]:
    """X and X~ with their columns in the order in which they are visited; one copy where both are the same."""
    if order is None:
        return analog, quantized
    ordered = analog[:, :, order]
    return ordered, ordered if analog is quantized else quantized[:, :, order]


def follow_samples(
    weight: Tensor,
    analog: Tensor,
    quantized: Tensor,
    grid: Grid,
    *,
    order: Tensor | None = None,
    ridge: Tensor | None = None,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """Path following in sample-block form: no d x d matrix, cheaper where there are few samples.

    Args:
        weight: [problems, d, neurons].
        analog, quantized: X and X~, [problems, m, d], as `in_order` gives them: column t is the t-th input visited.
        ridge: [problems], what is added to the diagonals of G and H; None for nothing.
        grid, order, rounding: as in `GramPath`, and so is the result.
    """
    problems, d, neurons = weight.shape
    columns = grid.scale.shape[2]
    group = torch.arange(d, device=weight.device) // grid.group_size
    visit = torch.arange(d, device=weight.device) if order is None else order
    panels = _Panels(grid, group[visit], rounding)
    weight = weight[:, visit].repeat(1, 1, columns // neurons)
    codes = torch.empty(problems, d, columns, dtype=torch.uint8)
    error = weight.new_zeros(problems, analog.shape[1], columns)  # u
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        x, x_tilde = analog[:, :, a:b], quantized[:, :, a:b]
        transposed = x_tilde.transpose(1, 2)
        gram, left = torch.bmm(transposed, x_tilde), torch.bmm(transposed, x)
        if ridge is not None:
            gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
            left.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        inverse, dead = _inverse_norms(gram)
        left *= inverse[:, :, None]
        _keep_lower(left, dead)
        panel = torch.bmm(left, weight[:, a:b])
        panel += torch.bmm(transposed, error) * inverse[:, :, None]
        panels.run(panel, gram * inverse[:, :, None], codes[:, a:b], a, feedback="value")
        error.baddbmm_(x, weight[:, a:b]).baddbmm_(x_tilde, panel, alpha=-1)
    return _restore(codes, order)


def coordinate_descent(
    weight: Tensor, cross: Tensor, gram: Tensor, grid: Grid, codes: Tensor, *, sweeps: int, rounding: Rounding = NEAREST
) -> Tensor:
    """Cyclic coordinate descent on ||X w - X~ q||^2 over the grid, starting from `codes`.

    Each visit sets q_t to the grid value nearest its minimizer q_t + (G w - H q)_t / H_tt, so no sweep makes the
    error on the calibration data larger (Zhang et al., "COMQ", 2024, arXiv:2403.07134, with two streams).
    Stops early when a sweep changes nothing. Arguments and result as in `GramPath`, one candidate a neuron.
    """
    d = weight.shape[1]
    group = torch.arange(d, device=weight.device) // grid.group_size
    panels = _Panels(grid, group, rounding)
    inverse, dead = _inverse_norms(gram)
    codes = codes.clone()
    values = grid.values(codes)
    residual = torch.bmm(cross, weight).baddbmm_(gram, values, alpha=-1)  # G w - H q
    for _ in range(sweeps):
        before = codes.clone()
        for a in range(0, d, BLOCK):
            b = min(a + BLOCK, d)
            hi = inverse[:, a:b, None]
            target = torch.where(dead[:, a:b, None], weight[:, a:b], values[:, a:b])
            panel = (residual[:, a:b] * hi).add_(target)
            previous = values[:, a:b].contiguous()
            panels.run(panel, gram[:, a:b, a:b] * hi, codes[:, a:b], a, feedback="change", previous=previous)
            values[:, a:b] += panel
            residual.baddbmm_(gram[:, :, a:b], panel, alpha=-1)
        if torch.equal(before, codes):
            break
    return codes


def coordinate_descent_on_samples(
    weight: Tensor,
    analog: Tensor,
    quantized: Tensor,
    grid: Grid,
    codes: Tensor,
    *,
    sweeps: int,
    ridge: Tensor,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """`coordinate_descent` on X and X~ themselves, cheaper where a layer has many more inputs than neurons.

    Args:
        analog, quantized: X and X~, [problems, m, d].
        ridge: [problems], what is added to the diagonals of G and H.
    """
    d = weight.shape[1]
    group = torch.arange(d, device=weight.device) // grid.group_size
    panels = _Panels(grid, group, rounding)
    codes = codes.clone()
    values = grid.values(codes)
    error = torch.bmm(analog, weight).baddbmm_(quantized, values, alpha=-1)  # X w - X~ q
    for _ in range(sweeps):
        before = codes.clone()
        for a in range(0, d, BLOCK):
            b = min(a + BLOCK, d)
            x_tilde, previous = quantized[:, :, a:b], values[:, a:b].contiguous()
            gram = torch.bmm(x_tilde.transpose(1, 2), x_tilde)
            gram.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
            inverse, dead = _inverse_norms(gram)
            residual = torch.bmm(x_tilde.transpose(1, 2), error)
            residual += ridge[:, None, None] * (weight[:, a:b] - previous)
            target = torch.where(dead[:, :, None], weight[:, a:b], previous)
            panel = (residual * inverse[:, :, None]).add_(target)
            lower = gram * inverse[:, :, None]
            panels.run(panel, lower, codes[:, a:b], a, feedback="change", previous=previous)
            values[:, a:b] += panel
            error.baddbmm_(x_tilde, panel, alpha=-1)
        if torch.equal(before, codes):
            break
    return codes


def follow_aligned(
    weight: Tensor,
    cross: Tensor,
    gram: Tensor,
    grid: Grid,
    *,
    order: Tensor | None = None,
    damping: float = 0.01,
    rounding: Rounding = NEAREST,
) -> Tensor:
    """Mismatch-corrected error feedback.

    First the weights V that reproduce the analog outputs best from the quantized network's inputs, V = (H + l I)^-1
    (G + l I) W; then GPTQ on V (Frantar et al. 2022, arXiv:2210.17323), whose errors go to the inputs not yet
    rounded along the rows of the Cholesky factor of (H + l I)^-1. Close to Qronos (Zhang et al. 2025,
    arXiv:2505.11695), which also visits its first input by the greedy rule. It fits more closely than path following
    and needs many more samples than inputs to pay on new data.

    Args:
        damping: l as a fraction of the mean of H's diagonal, > 0.
        weight, cross, gram, grid, order, rounding: as in `GramPath`, and so is the result.
    """
    problems, d, neurons = weight.shape
    columns = grid.scale.shape[2]
    group = torch.arange(d, device=weight.device) // grid.group_size
    if order is not None:
        weight = weight[:, order]
        cross, gram, group = cross[:, order][:, :, order], gram[:, order][:, :, order], group[order]
    panels = _Panels(grid, group, rounding)
    level = damping * gram.diagonal(dim1=1, dim2=2).mean(1)
    level = torch.where(level > 0, level, 1.0)[:, None, None]
    ridge = level * torch.eye(d, dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram + ridge)
    while bool(info.any()):
        # Sums of float32 products may leave H slightly indefinite where inputs are far from zero mean.
        ridge *= 10
        factor, info = torch.linalg.cholesky_ex(gram + ridge)
    left = torch.cholesky_solve(torch.bmm(cross + ridge, weight), factor).repeat(1, 1, columns // neurons)  # V
    upper = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    # Row t of `spread` is what input t's error adds to the inputs after it, per unit.
    spread = upper / upper.diagonal(dim1=1, dim2=2)[:, :, None]
    codes = torch.empty(problems, d, columns, dtype=torch.uint8)
    for a in range(0, d, BLOCK):
        b = min(a + BLOCK, d)
        panel = left[:, a:b].contiguous()
        panels.run(panel, -spread[:, a:b, a:b].transpose(1, 2), codes[:, a:b], a, feedback="error")
        left[:, b:].baddbmm_(spread[:, a:b, b:].transpose(1, 2), panel)  # the panel now holds q - v
    return _restore(codes, order)


class _Panels:
    """The in-block recursion over the panels of one problem."""

    def __init__(self, grid: Grid, group: Tensor, rounding: Rounding) -> None:
        self.scale = grid.scale.contiguous()
        self.inverse_scale = 1 / self.scale
        self.zero = grid.zero.contiguous()
        self.levels = grid.levels
        self.group = group.to(torch.int32)
        self.rounding = rounding

    def run(
        self,
        panel: Tensor,
        lower: Tensor,
        codes: Tensor,
        first_row: int,
        *,
        feedback: str,
        previous: Tensor | None = None,
    ) -> None:
        """Turns a panel of arguments into what each input took out, in place, and writes its codes."""
        problems, rows, columns = panel.shape
        amounts = panel.contiguous()
        lower = lower.contiguous()
        group = self.group[first_row : first_row + rows]
        own = codes if codes.is_contiguous() else torch.empty(codes.shape, dtype=torch.uint8)
        rounding = self.rounding
        arguments = (
            (problems, rows, columns, self.scale.shape[1]),
            amounts.data_ptr(),
            lower.data_ptr(),
            (self.scale.data_ptr(), self.inverse_scale.data_ptr(), self.zero.data_ptr()),
            group.data_ptr(),
            0 if previous is None else previous.data_ptr(),
            own.data_ptr(),
            self.levels,
            (_FEEDBACK[feedback], int(rounding.stochastic), _SHRINK[rounding.shrink]),
            rounding.threshold,
            rounding.seed & 0xFFFFFFFF,
            first_row,
        )
        double = panel.dtype == torch.float64
        status = _C.gpfq_panel_f64(*arguments) if double else _C.gpfq_panel_f32(*arguments, "")
        if status != 0:
            raise KernelError(f"gpfq: {_C.status_message(status)} (panel {list(panel.shape)}, {self.levels} levels)")
        if own is not codes:
            codes.copy_(own)
        if amounts is not panel:
            panel.copy_(amounts)


def _inverse_norms(gram: Tensor) -> tuple[Tensor, Tensor]:
    """1 / H_tt [problems, d], and which inputs are dead: zero (to working precision) on all samples.

    The paper sets z = 0 there. We round the weight itself: the calibration error is the same, and an input that is
    not zero on new data is not thrown away.
    """
    diagonal = gram.diagonal(dim1=1, dim2=2)
    dead = diagonal <= 1e-12 * diagonal.amax(1, keepdim=True)
    return torch.where(dead, 0.0, 1 / diagonal), dead


def _keep_lower(block: Tensor, dead: Tensor) -> None:
    """tril in place; a dead input keeps its own weight and nothing else."""
    block.tril_()
    block.diagonal(dim1=1, dim2=2).masked_fill_(dead, 1.0)


def _restore(codes: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return codes
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return restored
