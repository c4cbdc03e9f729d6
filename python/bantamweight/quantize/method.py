"""What a layer-wise method is to the driver: a frozen config that quantizes one LayerProblem."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from ..errors import BantamweightError
from ..weights import QuantizedWeight
from .grid import GRANULARITIES, Alphabet, alphabet
from .layer_problem import LayerProblem
from .step_search import Solution

_CONFIG_VERSION = 1
_METHODS: dict[str, type["LayerwiseMethod"]] = {}


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerResult:
    """A quantized layer.

    Attributes:
        weight: codes on their grid.
        bias: the bias to use, float32 [out], corrected or not; None if the layer has none and none was added.
        error: ||X W - X~ Q|| / ||X W|| on held-out calibration data, bias correction included.
        notes: what was done beyond the config's letter, or not done, and why.
    """

    weight: QuantizedWeight
    bias: Tensor | None
    error: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LayerwiseMethod:
    """Settings that every layer-wise method has.

    Attributes:
        bits: 2, 3, 4 or 8.
        levels: the number of values of a code, instead of what bits and alphabet give; 3 is ternary.
        alphabet: ``"symmetric"`` (2^bits - 1 values), ``"full"`` (2^bits values with a zero point), or None: full at
            2 bits (the symmetric one would be ternary), symmetric from 3.
        group_size: inputs that share a step; None for all of a neuron's.
        granularity: ``"layer"``, ``"channel"`` or ``"group"``: what has a step of its own. None: group if
            `group_size` is set, else channel.
        rows_per_scale: neurons (output channels) in a row that share their steps and zeros, as in Q-BERT (Shen et al.
            2020, arXiv:1909.05840: 128 groups of 6 rows in a 768 x 768 matrix); None for each its own. The last group
            may have fewer; a grouped convolution starts anew at each of its groups.
        percentile: the quantile of |w| that C = 1 reaches.
        steps: the candidates C of the step ``C * quantile / half the levels``; None for the method's own.
        bias_correction: add mean(X W - X~ Q) to the bias.
        activation_bits: 8 calibrates (and simulates) with inputs rounded to int8 as the packed layers do; None for
            float inputs.
        patches_per_layer: rows (samples, tokens, image patches) a layer is calibrated on at most, a random choice;
            layers with few inputs draw fewer.
        held_out: the share of the calibration samples kept for errors and choices.
        seed: of every random choice.
    """

    bits: int = 4
    levels: int | None = None
    alphabet: str | None = None
    group_size: int | None = None
    granularity: str | None = None
    rows_per_scale: int | None = None
    percentile: float = 1.0
    steps: tuple[float, ...] | None = None
    bias_correction: bool = True
    activation_bits: int | None = None
    patches_per_layer: int = 30_000
    held_out: float = 0.2
    seed: int = 0

    method: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        if cls.method:
            _METHODS[cls.method] = cls

    def __post_init__(self) -> None:
        alphabet(self.bits, self.levels, self.alphabet)
        if self.granularity is not None and self.granularity not in GRANULARITIES:
            raise BantamweightError(
                f"granularity is {self.granularity!r}, but must be one of {', '.join(GRANULARITIES)}, or None"
            )
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise BantamweightError(f"group_size is {self.group_size!r}, but must be a whole number from 1, or None")
        if (self.granularity == "group") != (self.group_size is not None) and self.granularity is not None:
            raise BantamweightError(
                f"granularity is {self.granularity!r} with group_size {self.group_size!r}; give a group_size for "
                "granularity 'group' and only for it"
            )
        if self.rows_per_scale is not None and (not isinstance(self.rows_per_scale, int) or self.rows_per_scale < 1):
            raise BantamweightError(
                f"rows_per_scale is {self.rows_per_scale!r}, but must be a whole number of rows from 1, or None"
            )
        if self.rows_per_scale is not None and self.granularity == "layer":
            raise BantamweightError(
                f"rows_per_scale is {self.rows_per_scale} with granularity 'layer', which has one step for all rows; "
                "leave one of them out"
            )
        if not 0 < self.percentile <= 1:
            raise BantamweightError(f"percentile is {self.percentile!r}, but must be above 0 and at most 1")
        if self.steps is not None:
            object.__setattr__(self, "steps", tuple(sorted(float(step) for step in self.steps)))
            if not self.steps or not all(0 < step < float("inf") for step in self.steps):
                raise BantamweightError(f"steps is {self.steps!r}, but must hold positive numbers, or be None")
        if self.activation_bits not in (None, 8):
            raise BantamweightError(f"activation_bits is {self.activation_bits!r}, but must be 8, or None for float")
        if not isinstance(self.patches_per_layer, int) or self.patches_per_layer < 2:
            raise BantamweightError(f"patches_per_layer is {self.patches_per_layer!r}, but must be a number from 2")
        if not 0 < self.held_out < 1:
            raise BantamweightError(f"held_out is {self.held_out!r}, but must be a share between 0 and 1, such as 0.2")

    def quantize_layer(self, problem: LayerProblem, bias: Tensor | None) -> LayerResult:
        """Quantizes one layer; `bias` is the layer's own, float [out], or None."""
        raise NotImplementedError

    def statistics(self, *, inputs: int, neurons: int, rows: int) -> str:
        """What the calibration collects of the rows to solve on: one of `layer_problem.STATISTICS`, the cheapest."""
        return "gram"

    @property
    def grid_alphabet(self) -> Alphabet:
        return alphabet(self.bits, self.levels, self.alphabet)

    @property
    def step_granularity(self) -> str:
        return self.granularity or ("channel" if self.group_size is None else "group")

    def group_size_for(self, inputs: int) -> int:
        return inputs if self.group_size is None else min(self.group_size, inputs)

    @property
    def scheme(self) -> str:
        """A short name of the target: ``W4``, ``ternary-g128``, ``W3A8``."""
        levels = self.grid_alphabet.levels
        name = "ternary" if levels == 3 else f"W{(levels - 1).bit_length()}"
        name += "" if self.activation_bits is None else f"A{self.activation_bits}"
        return name if self.group_size is None else f"{name}-g{self.group_size}"

    def to_json(self) -> str:
        """A versioned JSON object with every setting; `from_json` reads it."""
        return json.dumps({"version": _CONFIG_VERSION, "method": self.method, **asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The config that `to_json` wrote; called on a base class it gives the method the text names.

        Raises:
            BantamweightError: not such a text, of a newer version, of another method, or with unknown settings.
        """
        try:
            values: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise BantamweightError(f"the config is not JSON ({error}); pass what to_json wrote") from None
        if not isinstance(values, dict) or not isinstance(values.get("version"), int):
            raise BantamweightError("the config is not a JSON object with a version; pass what to_json wrote")
        version, name = values.pop("version"), values.pop("method", None)
        if version > _CONFIG_VERSION:
            raise BantamweightError(
                f"the config has version {version}, but this bantamweight reads up to {_CONFIG_VERSION}; upgrade it"
            )
        kind = _METHODS.get(name) if isinstance(name, str) else None
        if kind is None or not issubclass(kind, cls):
            raise BantamweightError(f"the config is for method {name!r}, not {cls.method or sorted(_METHODS)}")
        unknown = sorted(set(values) - {field.name for field in fields(kind)})
        if unknown:
            raise BantamweightError(f"the config has unknown settings {', '.join(unknown)}; pass what to_json wrote")
        if isinstance(values.get("steps"), list):
            values["steps"] = tuple(values["steps"])
        return kind(**values)  # type: ignore[return-value]


def layer_result(
    problem: LayerProblem,
    solution: Solution,
    outputs: Tensor,
    bias: Tensor | None,
    *,
    corrected: bool,
    notes: tuple[str, ...] = (),
) -> LayerResult:
    """A solution in the contract's form: rows are outputs, and the bias takes up the mean error."""
    grid = solution.grid
    problems, _, neurons = solution.codes.shape

    def rows(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).reshape(problems * neurons, -1).contiguous()

    weight = QuantizedWeight.from_codes(
        rows(solution.codes),
        rows(grid.scale.float()) * problem.weight_unit,
        rows(grid.zero.float()),
        group_size=grid.group_size,
        levels=grid.levels,
    )
    if corrected:
        shift = problem.shift(grid.values(solution.codes)).flatten() * (problem.weight_unit * problem.input_unit)
        bias = shift if bias is None else bias.detach().to(shift.dtype) + shift
    reference = float(outputs.square().sum())
    error = (solution.error / reference) ** 0.5 if reference > 0 else float(solution.error > 0)
    return LayerResult(weight=weight, bias=bias, error=error, notes=notes)


def layer_seed(seed: int, name: str) -> int:
    """A seed for a layer's draws that depends on nothing but the two, so that a resumed run repeats them."""
    generator = torch.Generator().manual_seed(seed)
    salt = int.from_bytes(name.encode()[-6:].rjust(6, b"\0"), "little") ^ (len(name) << 40)
    return (int(torch.randint(2**31, (1,), generator=generator)) * 0x9E3779B1 + salt) % (2**63)
