"""Beacon: Zhang, Saab, "Post-Training Quantization with Integrated Grid Selection", 2025, arXiv:2508.20293.

By GPFQ's authors. The codes of a neuron are those whose outputs X~ v have the largest cosine with the analog ones
X w; the scale that goes with them is a quotient, so no step is searched for. The target is the analog network's
output, so errors of earlier layers are made up for, as in Qronos (Zhang et al. 2025, arXiv:2505.11695).

Where we differ from the paper: the descent may start from the codes of mismatch-corrected error feedback instead of
a greedy pass; groups of inputs have scales of their own, each fitted to what the others leave; neurons of few inputs
take the best of all combinations; even alphabets try every zero point; what serves a neuron best on held-out rows,
rounding to nearest among it, is kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BantamweightError
from .cosine_descent import best_of_all, cosine_descent, dead_inputs, shared_scale_descent
from .gpfq import _STEPS, _TERNARY_STEPS, ORDERS
from .grid import SMALLEST_STEP, Alphabet, Grid
from .layer_problem import LayerProblem
from .method import LayerResult, LayerwiseMethod, layer_result
from .path_following import GramPath, follow_aligned
from .round_to_nearest import nearest_codes
from .step_search import Solution, Solve, better, choose_columns, search_step

STARTS = ("aligned", "greedy", "nearest")

# Where a greedy pass starts: the weights in units of this share of the step that reaches the largest of them.
_GREEDY_FACTORS = (0.45, 0.65, 0.85)


@dataclass(frozen=True, kw_only=True)
class Beacon(LayerwiseMethod):
    """Codes and scales together by the cosine of the outputs (Zhang and Saab 2025, arXiv:2508.20293).

    Attributes:
        start: where the descent starts. ``"greedy"``: the paper's pass over the inputs. ``"aligned"``: `GPFQ`'s
            mismatch-corrected error feedback with the step that is best on held-out rows, or its plain path following
            where the rows are fewer than twice the inputs. ``"nearest"``: rounding to nearest, likewise.
        order: ``"norm"`` visits a layer's inputs by descending ||X~_t||, ``"natural"`` as they stand.
        sweeps: of coordinate descent over all inputs, at most.
        damping: adds this fraction of the mean of H's diagonal to the diagonals of G and H, as if every input had
            also been seen alone.
        centered: compare the outputs less their means, which bias correction makes up for. Needs `bias_correction`.
        steps: the candidates C of the steps to start from; None for the method's own.
        The rest: see LayerwiseMethod. Where neurons share a scale (`rows_per_scale`, granularity ``"layer"``) sweeps
        and the best common scale take turns, because the cosine of one neuron does not settle it.

    Raises:
        BantamweightError: a setting out of range; the sentence names it.

    Example:
        >>> Beacon(levels=3).scheme
        'ternary'
        >>> Beacon(bits=2, sweeps=8) == Beacon.from_json(Beacon(bits=2, sweeps=8).to_json())
        True
    """

    start: str = "aligned"
    order: str = "norm"
    sweeps: int = 6
    damping: float = 0.05
    centered: bool = True

    method: ClassVar[str] = "beacon"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (("start", self.start, STARTS), ("order", self.order, ORDERS)):
            if value not in allowed:
                raise BantamweightError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}")
        if not isinstance(self.sweeps, int) or isinstance(self.sweeps, bool) or self.sweeps < 1:
            raise BantamweightError(f"sweeps is {self.sweeps!r}, but must be a whole number from 1")
        if not 0 <= self.damping < float("inf"):
            raise BantamweightError(f"damping is {self.damping!r}, but must be a number from 0")
        if self.start == "greedy" and self._is_shared:
            raise BantamweightError(
                "start is 'greedy', which gives each neuron a scale of its own; with rows_per_scale or granularity "
                "'layer' start from 'aligned' or 'nearest'"
            )

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        outputs = problem.held_out_outputs()
        weight = problem.weight
        best = self._search(problem, outputs, self.grid_alphabet, nearest_codes(problem), layer_range="largest")
        kept = torch.zeros_like(best.errors, dtype=torch.bool)
        cross, gram = self._damped(problem)
        dead = dead_inputs(gram)[:, :, None]
        for grid, codes in self._descents(problem, outputs, cross, gram):
            # The data says nothing about an input that is zero throughout; new data may.
            codes = torch.where(dead, grid.nearest(weight), codes)
            errors = problem.squared_errors(grid, codes, outputs, corrected=self.bias_correction)
            found = Solution(grid=grid, codes=codes, errors=errors)
            take = better(best, found, self.step_granularity, self.rows_per_scale)
            best, kept = choose_columns(best, found, take), kept | take
        notes = ()
        if not bool(kept.all()):
            notes = (f"{int((~kept).sum())} of {kept.numel()} neurons rounded to nearest, better on held-out rows",)
        return layer_result(problem, best, outputs, bias, corrected=self.bias_correction, notes=notes)

    def _descents(
        self, problem: LayerProblem, outputs: Tensor, cross: Tensor, gram: Tensor
    ) -> Iterator[tuple[Grid, Tensor]]:
        """The grids and codes to choose among."""
        weight, target = problem.weight, torch.bmm(cross, problem.weight)
        order = None if self.order == "natural" else torch.argsort(problem.norms(), descending=True, stable=True)
        for zero in self.grid_alphabet.zeros:
            alphabet = Alphabet(levels=self.grid_alphabet.levels, zeros=(zero,))
            if self.start == "greedy":
                for grid, start in self._greedy_starts(problem, outputs, alphabet):
                    yield cosine_descent(target, gram, grid, start, order=order, sweeps=self.sweeps)
            else:
                first = self._search(problem, outputs, alphabet, self._starter(problem, cross, gram, order))
                grid, codes = first.grid, first.codes
                yield grid, codes
                if self._is_shared:
                    shared = self.rows_per_scale
                    yield shared_scale_descent(
                        weight, cross, gram, grid, codes, rows_per_scale=shared, sweeps=self.sweeps
                    )
                    continue
                yield cosine_descent(target, gram, grid, _steps(grid, codes), order=order, sweeps=self.sweeps)
            every = best_of_all(target, gram, alphabet.levels, zero) if self.group_size is None else None
            if every is not None:
                scale, codes = every
                grid = Grid(
                    scale=scale.clamp_min(SMALLEST_STEP),
                    zero=torch.full_like(scale, zero),
                    levels=alphabet.levels,
                    group_size=problem.inputs,
                )
                yield grid, codes

    def _greedy_starts(
        self, problem: LayerProblem, outputs: Tensor, alphabet: Alphabet
    ) -> Iterator[tuple[Grid, Tensor]]:
        """Grids, and the weights in units of their steps: off the grid until the first sweep has visited them."""
        for factor in self.steps or _GREEDY_FACTORS:
            only = replace(self, steps=(factor,))
            grid = only._search(problem, outputs, alphabet, nearest_codes(problem)).grid
            yield grid, _divided(problem.weight, grid)

    def _starter(self, problem: LayerProblem, cross: Tensor, gram: Tensor, order: Tensor | None) -> Solve:
        if self.start == "nearest":
            return nearest_codes(problem)
        # Aligned feedback needs many more rows than inputs; with few it fits the calibration data only.
        if problem.rows < 2 * problem.inputs:
            return GramPath(problem.weight, cross, gram, order=order).follow
        return lambda grid, neurons: follow_aligned(problem.weight_of(neurons), cross, gram, grid, order=order)

    def _search(
        self,
        problem: LayerProblem,
        outputs: Tensor,
        alphabet: Alphabet,
        solve: Solve,
        *,
        layer_range: str = "mean",
    ) -> Solution:
        return search_step(
            problem,
            alphabet,
            solve,
            factors=self.steps or (_TERNARY_STEPS if alphabet.levels <= 4 else _STEPS),
            granularity=self.step_granularity,
            group_size=self.group_size_for(problem.inputs),
            percentile=self.percentile,
            rows_per_scale=self.rows_per_scale,
            layer_range=layer_range,
            corrected=self.bias_correction,
            outputs=outputs,
            refine=self.steps is None,
        )

    def _damped(self, problem: LayerProblem) -> tuple[Tensor, Tensor]:
        cross, gram = problem.matrices(self.centered and self.bias_correction)
        ridge = self.damping * gram.diagonal(dim1=1, dim2=2).mean(1)
        ridge = ridge[:, None, None] * torch.eye(problem.inputs, dtype=gram.dtype)
        return cross + ridge, gram + ridge

    @property
    def _is_shared(self) -> bool:
        return self.rows_per_scale is not None or self.step_granularity == "layer"


def _steps(grid: Grid, codes: Tensor) -> Tensor:
    """Codes less their zero points."""
    return Grid(
        scale=torch.ones_like(grid.scale), zero=grid.zero, levels=grid.levels, group_size=grid.group_size
    ).values(codes)


def _divided(weight: Tensor, grid: Grid) -> Tensor:
    """Weights in units of their steps."""
    parts = weight.clone()
    for group, part in enumerate(parts.split(grid.group_size, dim=1)):
        part.div_(grid.scale[:, group, None])
    return parts
