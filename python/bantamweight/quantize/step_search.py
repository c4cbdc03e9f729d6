"""The search for the step: every candidate is solved, and held-out data chooses among them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Alphabet, Grid, candidate_grid, pick, sum_over_row_groups, weight_range
from .layer_problem import LayerProblem

# Solves for the codes [problems, d, columns] of every column of a grid, which is of all neurons or of those given.
Solve = Callable[[Grid, Tensor | None], Tensor]

_MAX_CODES = 1 << 25  # codes of all candidates that are solved together

# In layers of so many weights all factors are tried on one neuron of eight, and on the others those chosen most.
_PILOT_WEIGHTS = 1 << 17
_PILOT_STRIDE = 8
_PILOT_KEEPS = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """Codes on their grid, one column a neuron, and the squared held-out errors [problems, neurons]."""

    grid: Grid
    codes: Tensor
    errors: Tensor

    @property
    def error(self) -> float:
        return float(self.errors.sum())


def search_step(
    problem: LayerProblem,
    chosen: Alphabet,
    solve: Solve,
    *,
    factors: Sequence[float],
    granularity: str,
    group_size: int,
    percentile: float,
    rows_per_scale: int | None = None,
    layer_range: str = "largest",
    corrected: bool,
    outputs: Tensor,
    refine: bool = True,
) -> Solution:
    """The best step among C times the range of the weights, for every neuron (or the layer) by its held-out error.

    With groups along the inputs a candidate scales the steps of all groups of a neuron alike. After the listed
    factors come two in between, halfway to the neighbours of each neuron's best one. A large layer tries all factors on
    some of its neurons first.

    Args:
        factors: the values of C, ascending.
        granularity: ``"layer"`` chooses one C for all neurons.
        rows_per_scale: neurons in a row that choose one C; None for each its own.
        layer_range: `weight_range`'s.
        refine: whether the factors in between are tried.
        outputs: `LayerProblem.held_out_outputs`.
    """

    def search(
        part: LayerProblem, outputs: Tensor, factors: Sequence[float], neurons: Tensor | None
    ) -> tuple[Solution, Tensor]:
        """The best solution of all neurons, or of those given, and each one's factor's index [problems, neurons]."""
        ranges = weight_range(
            part.weight,
            granularity=granularity,
            group_size=group_size,
            percentile=percentile,
            rows_per_scale=rows_per_scale,
            layer_range=layer_range,
        )

        def solve_all(candidates: Tensor) -> tuple[Solution, Tensor]:
            """The best solution among `candidates` [count, problems, 1, neurons], and which of them it is."""
            grid = candidate_grid(ranges, chosen, candidates, group_size)
            codes = solve(grid, neurons)
            errors = part.squared_errors(grid, codes, outputs, corrected=corrected)
            errors = errors.reshape(errors.shape[0], -1, part.neurons)  # [problems, candidates x zeros, neurons]
            best = of_choice(errors, granularity, rows_per_scale).argmin(1)
            grid, codes = pick(grid, codes, best)
            least = errors.gather(1, best[:, None, :])[:, 0]
            return Solution(grid=grid, codes=codes, errors=least), best % len(candidates)

        def best_of(candidates: Tensor) -> tuple[Solution, Tensor]:
            """`solve_all`, some candidates at a time where all at once would take too much memory."""
            at_once = max(1, _MAX_CODES // max(1, part.weight.numel() * len(chosen.zeros)))
            best: Solution | None = None
            which = torch.empty(0)
            for at in range(0, len(candidates), at_once):
                found, index = solve_all(candidates[at : at + at_once])
                if best is None:
                    best, which = found, index
                    continue
                take = better(best, found, granularity, rows_per_scale)
                which = torch.where(take, index + at, which)
                best = choose_columns(best, found, take)
            assert best is not None
            return best, which

        table = torch.tensor(list(factors), dtype=ranges.dtype)
        problems, _, count = ranges.shape
        solution, best = best_of(table.reshape(-1, 1, 1, 1).expand(-1, problems, 1, count))
        if not refine or neurons is not None or len(factors) < 3:
            return solution, best
        centre = table[best]
        below = (centre + table[(best - 1).clamp_min(0)]) / 2
        above = (centre + table[(best + 1).clamp_max(len(factors) - 1)]) / 2
        between, _ = best_of(torch.stack([below, above])[:, :, None, :])
        return choose_columns(solution, between, better(solution, between, granularity, rows_per_scale)), best

    alone = granularity != "layer" and rows_per_scale is None
    if alone and len(factors) > _PILOT_KEEPS and problem.weight.numel() >= _PILOT_WEIGHTS:
        some = torch.arange(0, problem.neurons, _PILOT_STRIDE)
        _, best = search(problem.part(some), outputs[:, :, some], factors, some)
        counts = best.flatten().bincount(minlength=len(factors))
        factors = [factors[index] for index in sorted(counts.topk(_PILOT_KEEPS).indices.tolist())]
    return search(problem, outputs, factors, None)[0]


def of_choice(errors: Tensor, granularity: str, rows_per_scale: int | None) -> Tensor:
    """Errors [..., problems, candidates, neurons], each summed over the neurons that choose with it."""
    if granularity == "layer":
        return errors.sum((0, 2), keepdim=True).expand_as(errors)
    return errors if rows_per_scale is None else sum_over_row_groups(errors, rows_per_scale)


def better(first: Solution, second: Solution, granularity: str, rows_per_scale: int | None) -> Tensor:
    """Which neurons [problems, neurons] the second solution serves better."""
    errors = (of_choice(each.errors[:, None], granularity, rows_per_scale) for each in (second, first))
    return next(errors)[:, 0] < next(errors)[:, 0]


def choose_columns(first: Solution, second: Solution, take: Tensor) -> Solution:
    """The second solution for the neurons in `take` [problems, neurons], the first for the others."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(take[:, None, :], b, a)

    grid = Grid(
        scale=choose(first.grid.scale, second.grid.scale),
        zero=choose(first.grid.zero, second.grid.zero),
        levels=first.grid.levels,
        group_size=first.grid.group_size,
    )
    return Solution(
        grid=grid,
        codes=choose(first.codes, second.codes),
        errors=torch.where(take, second.errors, first.errors),
    )
