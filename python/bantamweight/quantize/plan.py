"""Mixed precision: the bit width of every layer that adds least to the loss under a budget, solved exactly.

The integer program of HAWQ-V3 (Yao et al., 2021, arXiv:2011.10680) over the second-order loss increase of HAWQ-V2
(Dong et al., 2020, arXiv:1911.03852).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bantamweight.curvature.result import Result
from bantamweight.curvature.sensitivity import LayerSensitivity, Sensitivity
from bantamweight.errors import BantamweightError
from bantamweight.quantize.grid import alphabet
from bantamweight.quantize.method import LayerwiseMethod
from bantamweight.weights import packing_for

ACTIVATION_BITS = 8
UNITS = {"average_bits": "bits a weight", "max_bytes": "bytes", "max_bops": "bit operations", "max_latency_ms": "ms"}


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    name: str
    layers: tuple[str, ...]
    weights: int
    bits: int
    bytes: int  # of codes, scales and zeros on disk
    loss_increase: float  # second-order estimate


@dataclass(frozen=True, kw_only=True, eq=False)
class BitPlan(Result):
    """Bits a layer. `overrides` is what `quantize` takes."""

    layers: tuple[PlannedLayer, ...]
    choices: tuple[int, ...]
    budgets: dict[str, float]  # what was asked for
    used: dict[str, float]  # and how much of it the plan needs
    loss_increase: float

    @property
    def bits(self) -> dict[str, int]:
        """Layer -> bits."""
        return {name: layer.bits for layer in self.layers for name in layer.layers}

    @property
    def average_bits(self) -> float:
        return sum(layer.bits * layer.weights for layer in self.layers) / sum(layer.weights for layer in self.layers)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    def overrides(self, config: LayerwiseMethod) -> dict[str, LayerwiseMethod]:
        """For `quantize(model, config, overrides=plan.overrides(config))`."""
        return {name: dataclasses.replace(config, bits=bits, levels=None) for name, bits in self.bits.items()}

    def __str__(self) -> str:
        width = max(5, *(len(layer.name) for layer in self.layers))
        head = f"{'layer':<{width}}  {'weights':>10}  bits  {'bytes':>10}  {'+loss':>9}"
        rows = [
            f"{x.name:<{width}}  {x.weights:>10,}  {x.bits:>4}  {x.bytes:>10,}  {x.loss_increase:>9.3g}"
            for x in self.layers
        ]
        budgets = ", ".join(f"{self.used[b]:,.6g} of {limit:,.6g} {UNITS[b]}" for b, limit in self.budgets.items())
        tail = (
            f"{self.average_bits:.3f} bits on average, {self.bytes:,} bytes, loss + {self.loss_increase:.3g} by second "
            f"order; budget: {budgets}"
        )
        return "\n".join([head, *rows, tail])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A bar a layer: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_bits

        return plot_bits(self, path)


def plan(
    sensitivity: Sensitivity,
    *,
    average_bits: float | None = None,
    max_bytes: float | None = None,
    max_bops: float | None = None,
    max_latency_ms: float | None = None,
    latency: Mapping[str, Mapping[int, float]] | None = None,
    choices: Sequence[int] = (2, 3, 4, 8),
    ties: Sequence[Sequence[str]] = (),
    fixed: Mapping[str, int] | None = None,
) -> BitPlan:
    """The bits of every layer that minimise the estimated loss increase within the budgets; a proven optimum.

    Args:
        sensitivity: of the model's layers or blocks.
        average_bits: mean bits a weight.
        max_bytes: of all weights on disk: codes, scales and zeros.
        max_bops: bit operations for one sample: multiply-adds x bits x 8 (the activations' bits).
        max_latency_ms: sum of `latency`. At least one budget is needed; several hold together.
        latency: layer -> bits -> measured milliseconds, needed for max_latency_ms.
        choices: bit widths to choose from.
        ties: groups of layers that must share their bits (both sides of a residual addition).
        fixed: layer -> bits that are settled beforehand.

    Raises:
        BantamweightError: no budget, one that cannot be met, or a name that the sensitivity lacks.
        ImportError: scipy, which solves the program, is not installed.
    """
    budgets = {
        name: float(value)
        for name, value in [
            ("average_bits", average_bits),
            ("max_bytes", max_bytes),
            ("max_bops", max_bops),
            ("max_latency_ms", max_latency_ms),
        ]
        if value is not None
    }
    if not budgets:
        raise BantamweightError("plan needs a budget: average_bits, max_bytes, max_bops or max_latency_ms")
    if bad := [name for name, value in budgets.items() if not (np.isfinite(value) and value > 0)]:
        raise BantamweightError(f"{bad[0]} is {budgets[bad[0]]}, but a budget must be a finite number above 0")
    choices = _checked_choices(sensitivity, choices)
    layers = sensitivity.layers
    allowed = _allowed(layers, choices, fixed or {})
    units = _tied(layers, ties)
    resources = {name: _resource(name, sensitivity, choices, latency) for name in budgets}
    cost = np.array([[layer.loss_increase(b) for b in choices] for layer in layers])  # [layers, choices]

    # A unit is a set of layers that share their bits: what it costs and needs is the sum over them.
    def summed(table: np.ndarray) -> np.ndarray:
        return np.array([table[unit].sum(0) for unit in units])

    open_choices = np.array([allowed[unit].all(0) for unit in units])
    if not open_choices.any(1).all():
        unit = units[int(np.argmin(open_choices.any(1)))]
        names = ", ".join(layers[i].name for i in unit)
        raise BantamweightError(f"{names} are tied, but fixed to different bits; untie them or fix them alike")
    needs = {name: summed(table) for name, table in resources.items()}
    for name, need in needs.items():
        least = float(np.where(open_choices, need, np.inf).min(1).sum())
        if least > budgets[name] * (1 + 1e-12):
            raise BantamweightError(
                f"{name} is {budgets[name]:,.6g}, but this network needs at least {least:,.6g} {UNITS[name]} with "
                f"choices {tuple(choices)}; raise it or allow fewer bits"
            )
    picked = _solve(summed(cost), open_choices, [(needs[name], budgets[name]) for name in budgets])
    if picked is None:
        raise BantamweightError("no choice of bits meets all the budgets together; raise one of them")
    index = np.zeros(len(layers), dtype=int)
    for unit, choice in zip(units, picked, strict=True):
        index[unit] = choice
    rows = np.arange(len(layers))
    sizes = _resource("max_bytes", sensitivity, choices, None)
    return BitPlan(
        layers=tuple(
            PlannedLayer(
                name=layer.name,
                layers=layer.layers,
                weights=layer.weights,
                bits=int(choices[j]),
                bytes=int(sizes[i, j]),
                loss_increase=float(cost[i, j]),
            )
            for i, (layer, j) in enumerate(zip(layers, index, strict=True))
        ),
        choices=choices,
        budgets=budgets,
        used={name: float(table[rows, index].sum()) for name, table in resources.items()},
        loss_increase=float(cost[rows, index].sum()),
    )


def _checked_choices(sensitivity: Sensitivity, choices: Sequence[int]) -> tuple[int, ...]:
    known = sorted(sensitivity.layers[0].errors)
    ordered = tuple(sorted(set(choices)))
    if not ordered or not set(ordered) <= set(known):
        raise BantamweightError(
            f"choices is {tuple(choices)}, but the sensitivity knows the rounding errors of {tuple(known)} bits; "
            "measure it with bits=choices"
        )
    return ordered


def _index_of(name: str, layers: Sequence[LayerSensitivity], where: str) -> int:
    for i, layer in enumerate(layers):
        if layer.name == name or name in layer.layers:
            return i
    raise BantamweightError(f"{where} names {name!r}, which the sensitivity lacks; it has {layers[0].name}, ...")


def _allowed(layers: Sequence[LayerSensitivity], choices: Sequence[int], fixed: Mapping[str, int]) -> np.ndarray:
    """Which choice each layer may take: bool [layers, choices]."""
    allowed = np.ones((len(layers), len(choices)), dtype=bool)
    for name, bits in fixed.items():
        if bits not in choices:
            raise BantamweightError(f"fixed gives {name} {bits} bits, but choices is {tuple(choices)}; add it there")
        allowed[_index_of(name, layers, "fixed")] &= [bits == b for b in choices]
    return allowed


def _tied(layers: Sequence[LayerSensitivity], ties: Sequence[Sequence[str]]) -> list[list[int]]:
    """Sets of layers that share their bits; a layer in two ties joins them."""
    owner = list(range(len(layers)))
    for tie in ties:
        members = {owner[_index_of(name, layers, "ties")] for name in tie}
        if members:
            owner = [min(members) if o in members else o for o in owner]
    return [[i for i, o in enumerate(owner) if o == unit] for unit in sorted(set(owner))]


def _resource(
    budget: str,
    sensitivity: Sensitivity,
    choices: Sequence[int],
    latency: Mapping[str, Mapping[int, float]] | None,
) -> np.ndarray:
    """What every layer needs at every choice, in the budget's unit: [layers, choices]."""
    layers = sensitivity.layers
    if budget == "average_bits":
        total = sum(layer.weights for layer in layers)
        return np.array([[b * layer.weights / total for b in choices] for layer in layers])
    if budget == "max_bytes":
        return np.array([[_bytes(layer, b, sensitivity.group_size) for b in choices] for layer in layers], dtype=float)
    if budget == "max_bops":
        return np.array([[float(layer.macs) * b * ACTIVATION_BITS for b in choices] for layer in layers])
    if latency is None:
        raise BantamweightError("max_latency_ms needs latency=, the measured milliseconds of every layer at every bits")
    table = np.zeros((len(layers), len(choices)))
    for i, layer in enumerate(layers):
        for j, bits in enumerate(choices):
            try:
                table[i, j] = latency[layer.name][bits]
            except KeyError:
                raise BantamweightError(f"latency lacks {layer.name} at {bits} bits; measure it too") from None
    return table


def _bytes(layer: LayerSensitivity, bits: int, group_size: int | None) -> int:
    """On disk: packed codes, a float32 scale a group, and a zero where the grid has several to choose from."""
    grid = alphabet(bits, None, None)
    total = 0
    for out, width in layer.shapes:
        groups = -(-width // group_size) if group_size else 1
        total += out * packing_for(grid.levels).row_bytes(width) + 4 * out * groups * (2 if len(grid.zeros) > 1 else 1)
    return total


def _solve(cost: np.ndarray, allowed: np.ndarray, budgets: Sequence[tuple[np.ndarray, float]]) -> list[int] | None:
    """The choice of each unit with the least total cost, or None if none is feasible."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError:
        raise ImportError("plan solves an integer program with scipy; install it with: pip install scipy") from None
    units, choices = cost.shape
    # The solver's tolerances are absolute, and costs span many orders of magnitude: bring them to a fixed size.
    largest = float(cost.max())
    objective = (cost * (1e6 / largest if largest > 0 else 1.0)).ravel()
    one_each = np.kron(np.eye(units), np.ones(choices))
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [LinearConstraint(need.ravel()[None] / limit, -np.inf, 1 + 1e-12) for need, limit in budgets]
    answer = milp(
        objective,
        integrality=np.ones(units * choices),
        bounds=Bounds(0, allowed.ravel().astype(float)),  # pyright: ignore[reportArgumentType]
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if answer.status == 2:
        return None
    if answer.x is None:
        raise BantamweightError(f"the integer program was not solved: {answer.message}")
    return [int(j) for j in np.argmax(answer.x.reshape(units, choices), axis=1)]
