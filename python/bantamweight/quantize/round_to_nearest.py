"""Round to nearest: the baseline that looks at one weight at a time, and what other methods fall back on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .grid import Grid
from .layer_problem import LayerProblem
from .method import LayerResult, LayerwiseMethod, layer_result
from .step_search import Solution, Solve, search_step


def nearest_codes(problem: LayerProblem) -> Solve:
    """Solves for the codes nearest to each weight, whatever the data."""

    def solve(grid: Grid, neurons: Tensor | None) -> Tensor:
        weight = problem.weight_of(neurons)
        return grid.nearest(weight.repeat(1, 1, grid.scale.shape[2] // weight.shape[2]))

    return solve


def nearest(
    problem: LayerProblem, config: LayerwiseMethod, outputs: Tensor, *, factors: Sequence[float] = (1.0,)
) -> Solution:
    """Each weight to the nearest value of the best of the grids that reach `factors` times its range."""
    return search_step(
        problem,
        config.grid_alphabet,
        nearest_codes(problem),
        factors=factors,
        granularity=config.step_granularity,
        group_size=config.group_size_for(problem.inputs),
        percentile=config.percentile,
        rows_per_scale=config.rows_per_scale,
        corrected=config.bias_correction,
        outputs=outputs,
        refine=False,
    )


@dataclass(frozen=True, kw_only=True)
class RoundToNearest(LayerwiseMethod):
    """Each weight to the nearest value of the grid. Data is used for the bias, the choice among `steps`, and errors.

    Attributes: see LayerwiseMethod. `steps` None is the plain C = 1, the grid that reaches the largest weight.

    Example:
        >>> RoundToNearest(bits=4, group_size=128).scheme
        'W4-g128'
    """

    bias_correction: bool = False

    method: ClassVar[str] = "round_to_nearest"

    def statistics(self, *, inputs: int, neurons: int, rows: int) -> str:
        return "means"

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        outputs = problem.held_out_outputs()
        solution = nearest(problem, self, outputs, factors=self.steps or (1.0,))
        return layer_result(problem, solution, outputs, bias, corrected=self.bias_correction)
