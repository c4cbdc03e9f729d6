"""Round to nearest: the baseline that looks at one weight at a time."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .layer_problem import LayerProblem
from .method import LayerResult, LayerwiseMethod, layer_result
from .step_search import search_step


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

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        outputs = problem.held_out_outputs()
        solution = search_step(
            problem,
            self.grid_alphabet,
            lambda grid: grid.nearest(problem.weight.repeat(1, 1, grid.scale.shape[2] // problem.neurons)),
            factors=self.steps or (1.0,),
            granularity=self.step_granularity,
            group_size=self.group_size_for(problem.inputs),
            percentile=self.percentile,
            rows_per_scale=self.rows_per_scale,
            corrected=self.bias_correction,
            outputs=outputs,
            refine=False,
        )
        return layer_result(problem, solution, outputs, bias, corrected=self.bias_correction)
