"""GPFQ: Zhang, Zhou, Saab, "Post-training Quantization for Neural Networks with Provable Guarantees", arXiv:2201.11113.

SIAM J. Math. Data Sci., 2023. Greedy path following: layer by layer, and within a neuron input by input, each weight
is rounded so that the quantized network's pre-activation X~ q follows the analog one X w as closely as the grid
allows; errors of earlier inputs and earlier layers are made up for by later ones.
Its predecessor is Lybrand and Saab, "A Greedy Algorithm for Quantizing Neural Networks", 2021, arXiv:2010.15979.

Where we differ from the authors' code: their alphabet has 2^b + 1 values, ours fits in b bits; the step is chosen
per channel on held-out data among several C instead of one C for all; convolutions draw patches at every position
instead of at non-overlapping ones; the activations of both networks are kept at layer boundaries instead of being
recomputed for each layer; an input that is zero on all samples keeps its rounded weight.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import BantamweightError
from .grid import Grid
from .layer_problem import LayerProblem
from .method import LayerResult, LayerwiseMethod, layer_result, layer_seed
from .path_following import (
    GramPath,
    Rounding,
    coordinate_descent,
    coordinate_descent_on_samples,
    follow_aligned,
    follow_samples,
    gram_is_cheaper,
    in_order,
)
from .round_to_nearest import nearest
from .step_search import Solution, Solve, better, choose_columns, search_step

ORDERS = ("norm", "natural")
VARIANTS = ("stochastic", "l1", "l0")
REFINEMENTS = ("coordinate_descent", "aligned", "auto")

_TERNARY_STEPS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.8, 1.0)
_STEPS = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_PENALTIES = {"l1": 0.25, "l0": 0.75}
_FEWEST_ROWS = 8  # below which what is followed is chance
_GRAM_IS_WORTH = 4.0  # times the cost of the sample form, for the refinements that need it


@dataclass(frozen=True, kw_only=True)
class GPFQ(LayerwiseMethod):
    """Greedy path-following quantization (Zhang, Zhou, Saab 2023, arXiv:2201.11113) and its variants.

    No neuron's held-out error is larger than that of rounding to nearest (but for variants "l1" and "l0"): where
    following the path does not pay, as where a layer's inputs were zero or its rows few, the nearest codes stand.

    Attributes:
        order: ``"norm"`` visits a layer's inputs by descending ||X~_t||, ``"natural"`` as they stand.
        damping: adds this fraction of the mean of H's diagonal to the diagonals of G and H, as if every input had
            also been seen alone: steadier, above all where samples are few.
        centered: follow the path of the inputs less their means, which bias correction makes up for. Needs
            `bias_correction`.
        variant: ``"stochastic"`` rounds up with the probability of the fraction (SGPFQ; Zhang and Saab 2023,
            arXiv:2309.10975); ``"l1"`` shrinks the argument by `penalty` steps before rounding and ``"l0"`` sets
            arguments within `penalty` steps to zero, for sparser codes (section 5 of the paper; its L0 alphabet has
            a gap around zero, ours stays uniform).
        penalty: of the L1 and L0 variants, in steps; None for 0.25 and 0.75.
        refine: what follows plain GPFQ. ``"coordinate_descent"``: `sweeps` sweeps over all inputs. ``"aligned"``:
            mismatch-corrected error feedback in its place (Qronos-like, arXiv:2505.11695). ``"auto"``: both are
            tried. The result with the smaller held-out error is kept, and always plain GPFQ where the rows are
            fewer than twice the inputs, because the refined ones then fit the calibration data only.
        sweeps: of coordinate descent.
        The rest: see LayerwiseMethod.

    The defaults are those with the smallest held-out errors on CIFAR-10 ResNets. The paper's own method is
    ``GPFQ(granularity="layer", order="natural", damping=0, centered=False, refine=None)``.

    Raises:
        BantamweightError: a setting out of range; the sentence names it.

    Example:
        >>> GPFQ(bits=3, group_size=64).scheme
        'W3-g64'
        >>> GPFQ(levels=3) == GPFQ.from_json(GPFQ(levels=3).to_json())
        True
    """

    order: str = "norm"
    damping: float = 0.1
    centered: bool = True
    variant: str | None = None
    penalty: float | None = None
    refine: str | None = "auto"
    sweeps: int = 4

    method: ClassVar[str] = "gpfq"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, allowed in (
            ("order", self.order, ORDERS),
            ("variant", self.variant, (*VARIANTS, None)),
            ("refine", self.refine, (*REFINEMENTS, None)),
        ):
            if value not in allowed:
                raise BantamweightError(f"{name} is {value!r}, but must be one of {', '.join(map(str, allowed))}")
        if not 0 <= self.damping < float("inf"):
            raise BantamweightError(f"damping is {self.damping!r}, but must be a number from 0")
        if self.penalty is not None and (self.variant not in _PENALTIES or not 0 <= self.penalty < float("inf")):
            raise BantamweightError(
                f"penalty is {self.penalty!r} with variant {self.variant!r}; it is a number from 0 for 'l1' or 'l0'"
            )
        if not isinstance(self.sweeps, int) or self.sweeps < 1:
            raise BantamweightError(f"sweeps is {self.sweeps!r}, but must be a whole number from 1")

    @property
    def candidates(self) -> tuple[float, ...]:
        """The values of C to try."""
        return self.steps or (_TERNARY_STEPS if self.grid_alphabet.levels <= 4 else _STEPS)

    def statistics(self, *, inputs: int, neurons: int, rows: int) -> str:
        columns = neurons * len(self.candidates) * len(self.grid_alphabet.zeros)
        # The refinements but coordinate descent work on the Gram matrices.
        favour = _GRAM_IS_WORTH if self.refine is not None and rows >= 2 * inputs else 1.0
        cheaper = gram_is_cheaper(inputs=inputs, columns=columns, samples=rows, favour=favour)
        return "gram" if cheaper else "rows"

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        outputs = problem.held_out_outputs()
        rounded = nearest(problem, self, outputs)
        if problem.rows < _FEWEST_ROWS:
            note = f"rounded to nearest: {problem.rows} rows of calibration data are too few to follow"
            return layer_result(problem, rounded, outputs, bias, corrected=self.bias_correction, notes=(note,))
        plain = self._search(problem, outputs, self._plain_solver(problem))
        best, notes = self._refined(problem, outputs, plain)
        if self.variant in _PENALTIES:  # sparser codes at the price of a larger error are what was asked for
            return layer_result(problem, best, outputs, bias, corrected=self.bias_correction, notes=notes)
        # On a tie, as for an input that is zero on all samples, the nearest code stands.
        gains = better(rounded, best, self.step_granularity, self.rows_per_scale)
        if kept := int((~gains).sum()):
            notes = (*notes, f"{kept} of {gains.numel()} neurons rounded to nearest: no smaller held-out error")
        best = choose_columns(rounded, best, gains)
        return layer_result(problem, best, outputs, bias, corrected=self.bias_correction, notes=notes)

    @property
    def _is_centered(self) -> bool:
        return self.centered and self.bias_correction

    def _search(self, problem: LayerProblem, outputs: Tensor, solve: Solve) -> Solution:
        return search_step(
            problem,
            self.grid_alphabet,
            solve,
            factors=self.candidates,
            granularity=self.step_granularity,
            group_size=self.group_size_for(problem.inputs),
            percentile=self.percentile,
            rows_per_scale=self.rows_per_scale,
            layer_range="mean",
            corrected=self.bias_correction,
            outputs=outputs,
            refine=self.steps is None,
        )

    def _rounding(self, problem: LayerProblem) -> Rounding:
        penalty = _PENALTIES.get(self.variant or "", 0.0) if self.penalty is None else self.penalty
        return Rounding(
            stochastic=self.variant == "stochastic",
            seed=layer_seed(self.seed, problem.name),
            shrink=self.variant if self.variant in _PENALTIES else None,
            threshold=penalty,
        )

    def _order(self, problem: LayerProblem) -> Tensor | None:
        if self.order == "natural":
            return None
        return torch.argsort(problem.norms(), descending=True, stable=True)

    def _damped(self, problem: LayerProblem) -> tuple[Tensor, Tensor]:
        cross, gram = problem.matrices(self._is_centered)
        if self.damping == 0:
            return cross, gram
        ridge = self.damping * gram.diagonal(dim1=1, dim2=2).mean(1)
        ridge = ridge[:, None, None] * torch.eye(problem.inputs, dtype=gram.dtype)
        return cross + ridge, gram + ridge

    def _plain_solver(self, problem: LayerProblem) -> Solve:
        order, rounding = self._order(problem), self._rounding(problem)
        kept = problem.samples(self._is_centered)
        if kept is not None:
            ridge = self.damping * kept[1].square().sum(1).mean(1)
            analog, quantized = in_order(*kept, order)

            def solve(grid: Grid, neurons: Tensor | None) -> Tensor:
                weight = problem.weight_of(neurons)
                return follow_samples(weight, analog, quantized, grid, order=order, ridge=ridge, rounding=rounding)

            return solve
        return GramPath(problem.weight, *self._damped(problem), order=order, rounding=rounding).follow

    def _refined(self, problem: LayerProblem, outputs: Tensor, plain: Solution) -> tuple[Solution, tuple[str, ...]]:
        """The refined solution if it is better on held-out data, and a note of which was kept."""
        if self.refine is None:
            return plain, ()
        if problem.rows < 2 * problem.inputs:
            return plain, (f"plain: {problem.rows} rows are fewer than twice the {problem.inputs} inputs",)
        if problem.gram is None:
            return self._descended_on_samples(problem, outputs, plain)
        matrices = self._damped(problem)
        rounding = self._rounding(problem)
        best, kept = plain, "plain"
        if self.refine in ("coordinate_descent", "auto"):
            refined = self._descend(problem, outputs, plain, matrices, rounding)
            if refined.error < best.error:
                best, kept = refined, "coordinate descent"
        if self.refine in ("aligned", "auto"):
            order = self._order(problem)

            def solve(grid: Grid, neurons: Tensor | None) -> Tensor:
                return follow_aligned(problem.weight_of(neurons), *matrices, grid, order=order, rounding=rounding)

            aligned = self._search(problem, outputs, solve)
            if aligned.error < best.error:
                best, kept = aligned, "aligned"
        return best, (f"{kept}: held-out error {(best.error / max(plain.error, 1e-300)) ** 0.5:.3f} of plain",)

    def _descended_on_samples(
        self, problem: LayerProblem, outputs: Tensor, plain: Solution
    ) -> tuple[Solution, tuple[str, ...]]:
        kept = problem.samples(self._is_centered)
        assert kept is not None
        codes = coordinate_descent_on_samples(
            problem.weight,
            *kept,
            plain.grid,
            plain.codes,
            sweeps=self.sweeps,
            ridge=self.damping * kept[1].square().sum(1).mean(1),
            rounding=self._rounding(problem),
        )
        errors = problem.squared_errors(plain.grid, codes, outputs, corrected=self.bias_correction)
        refined = Solution(grid=plain.grid, codes=codes, errors=errors)
        best, name = (refined, "coordinate descent") if refined.error < plain.error else (plain, "plain")
        return best, (f"{name}: held-out error {(best.error / max(plain.error, 1e-300)) ** 0.5:.3f} of plain",)

    def _descend(
        self,
        problem: LayerProblem,
        outputs: Tensor,
        plain: Solution,
        matrices: tuple[Tensor, Tensor],
        rounding: Rounding,
    ) -> Solution:
        codes = coordinate_descent(
            problem.weight, *matrices, plain.grid, plain.codes, sweeps=self.sweeps, rounding=rounding
        )
        errors = problem.squared_errors(plain.grid, codes, outputs, corrected=self.bias_correction)
        return Solution(grid=plain.grid, codes=codes, errors=errors)
