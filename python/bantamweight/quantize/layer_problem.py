"""One layer to quantize: its weight, what its inputs were in both networks, and the errors of a proposal.

Both streams of inputs come in chunks of rows (samples, tokens or image patches). Of rows to solve on, a method has the
Gram matrices, the rows themselves, or no more than their means, whichever is the cheapest that it can work with;
held-out rows are kept, to measure errors and choose settings on data the solver has not seen.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import CalibrationError
from .grid import Grid


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerProblem:
    """W, and the statistics of X (analog inputs) and X~ (inputs in the quantized network).

    A layer is `problems` independent ones (the channel groups of a convolution, else 1) of `d` inputs and `neurons`
    outputs each. Neuron n of problem p is output ``p * neurons + n`` of the layer.

    Attributes:
        name: of the layer, for messages and for the seed of its random draws.
        weight: float32 [problems, d, neurons].
        gram: X~^T X~ [problems, d, d], over `rows` rows; None if not collected.
        cross: X~^T X [problems, d, d]; None if not collected.
        analog, quantized: the rows themselves [problems, rows, d]; None if not kept.
        mean, mean_quantized: the means of X and X~ [problems, d].
        held_out, held_out_quantized: [problems, held-out rows, d].
        rows: rows solved on.
        weight_unit, input_unit: powers of two that weights and inputs were divided by to be of ordinary size.
    """

    name: str
    weight: Tensor
    gram: Tensor | None
    cross: Tensor | None
    analog: Tensor | None
    quantized: Tensor | None
    mean: Tensor
    mean_quantized: Tensor
    held_out: Tensor
    held_out_quantized: Tensor
    rows: int
    weight_unit: float = 1.0
    input_unit: float = 1.0

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def neurons(self) -> int:
        return self.weight.shape[2]

    def part(self, neurons: Tensor) -> "LayerProblem":
        """The same of some of the neurons."""
        return replace(self, weight=self.weight_of(neurons))

    def weight_of(self, neurons: Tensor | None) -> Tensor:
        """The columns of these neurons; None for all."""
        return self.weight if neurons is None else self.weight[:, :, neurons]

    def norms(self) -> Tensor:
        """||X~_t||^2 of every input, summed over the problems: [d]."""
        if self.gram is not None:
            return self.gram.diagonal(dim1=1, dim2=2).sum(0)
        assert self.quantized is not None
        return self.quantized.square().sum((0, 1))

    def matrices(self, centered: bool) -> tuple[Tensor, Tensor]:
        """G = X~^T X and H = X~^T X~; of the rows less their means if `centered`."""
        if self.gram is not None and self.cross is not None:
            cross, gram = self.cross, self.gram
        else:
            if self.analog is None or self.quantized is None:
                raise ValueError("neither Gram matrices nor rows were collected for this method")
            transposed = self.quantized.transpose(1, 2)
            gram = torch.bmm(transposed, self.quantized)
            cross = gram if self.analog is self.quantized else torch.bmm(transposed, self.analog)
        if not centered:
            return cross, gram
        tilde = self.mean_quantized[:, :, None] * self.rows
        around_mean = gram - tilde @ self.mean_quantized[:, None, :]
        # What is left of a constant input is the rounding of the sums; it carries nothing and counts as zero.
        varies = around_mean.diagonal(dim1=1, dim2=2) > 1e-5 * gram.diagonal(dim1=1, dim2=2)
        around_mean *= varies[:, :, None] & varies[:, None, :]
        return (cross - tilde @ self.mean[:, None, :]) * varies[:, :, None], around_mean

    def samples(self, centered: bool) -> tuple[Tensor, Tensor] | None:
        """X and X~ if the rows were kept; less their means if `centered`."""
        if self.analog is None or self.quantized is None:
            return None
        if not centered:
            return self.analog, self.quantized
        analog = self.analog - self.mean[:, None, :]
        if self.analog is self.quantized:
            return analog, analog
        return analog, self.quantized - self.mean_quantized[:, None, :]

    def shift(self, values: Tensor) -> Tensor:
        """What the bias must take up, the mean of X w - X~ q: [problems, neurons] for values [problems, d, neurons]."""
        analog = torch.bmm(self.mean[:, None, :], self.weight)
        return torch.baddbmm(analog, self.mean_quantized[:, None, :], values, alpha=-1)[:, 0]

    def held_out_outputs(self) -> Tensor:
        """X w on the held-out rows: [problems, held-out rows, neurons]."""
        return torch.bmm(self.held_out, self.weight)

    def squared_errors(self, grid: Grid, codes: Tensor, outputs: Tensor, *, corrected: bool) -> Tensor:
        """||X w - X~ q||^2 on the held-out rows for every column of a grid: [problems, columns].

        Args:
            grid, codes: of q, candidate s of neuron n in column ``s * neurons + n``.
            outputs: `held_out_outputs`.
            corrected: subtract the shift that bias correction would.
        """
        errors = []
        # One candidate at a time: the values and the errors of all at once could be large.
        for at in range(0, codes.shape[2], self.neurons):
            part = slice(at, at + self.neurons)
            values = grid.columns(part).values(codes[:, :, part])
            error = torch.baddbmm(outputs, self.held_out_quantized, values, alpha=-1)
            if corrected:
                error -= self.shift(values)[:, None]
            errors.append(error.square_().sum(1))
        return torch.cat(errors, dim=1)


# What is collected of the rows to solve on.
STATISTICS = ("gram", "rows", "means")

_ORDINARY = 20  # numbers up to 2^20, and whose largest is 2^-20 or more, have squares that float32 sums well


def ordinary_unit(largest: float) -> float:
    """1 for numbers of ordinary size, else the power of two that makes the largest of them about 1."""
    if largest == 0 or not math.isfinite(largest) or 2.0**-_ORDINARY <= largest <= 2.0**_ORDINARY:
        return 1.0
    return 2.0 ** math.frexp(largest)[1]


class ProblemBuilder:
    """Collects a layer's rows chunk by chunk.

    Args:
        weight: [problems, d, neurons].
        collect: of the rows to solve on: ``"gram"`` two d x d matrices a problem, ``"rows"`` all of them, ``"means"``
            their sums alone. Held-out rows are kept.
    """

    def __init__(self, name: str, weight: Tensor, *, collect: str = "gram") -> None:
        self.name = name
        self.weight_unit = ordinary_unit(float(weight.abs().max()) if weight.numel() else 0.0)
        self.weight = weight if self.weight_unit == 1.0 else weight / self.weight_unit
        self.collect = collect
        self.input_unit: float | None = None
        problems, d, _ = weight.shape
        self.rows = 0
        self.sum = weight.new_zeros(problems, d)
        self.sum_quantized = self.sum
        self.gram: Tensor | None = None
        self.cross: Tensor | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.held_out: list[tuple[Tensor, Tensor]] = []
        self.same = True  # until a chunk's two streams differ

    def add(self, analog: Tensor, quantized: Tensor, *, held_out: bool) -> None:
        """Adds rows [problems, n, d]; `quantized` may be `analog` itself where the networks do not differ yet."""
        if analog.shape[1] == 0:
            return
        for stream, rows in (("the network", analog), ("the quantized network", quantized)):
            # One pass where all is well: a sum is finite only if every number is.
            if not bool(torch.isfinite(rows.sum())) and not bool(torch.isfinite(rows).all()):
                raise CalibrationError(
                    f"the inputs of layer '{self.name}' in {stream} hold NaN or infinity; check the calibration data "
                    "and the weights before this layer"
                )
        if self.input_unit is None:
            self.input_unit = ordinary_unit(float(analog.abs().max()) if analog.numel() else 0.0)
        if self.input_unit != 1.0:
            same = quantized is analog
            analog = analog / self.input_unit
            quantized = analog if same else quantized / self.input_unit
        if held_out:
            self.held_out.append((analog, quantized))
            return
        self.rows += analog.shape[1]
        if quantized is not analog and self.same:
            self.same = False
            self.sum_quantized = self.sum.clone()
            self.cross = None if self.gram is None else self.gram.clone()
        self.sum += analog.sum(1)
        if not self.same:
            self.sum_quantized += quantized.sum(1)
        if self.collect == "rows":
            self.kept.append((analog, quantized))
        if self.collect != "gram":
            return
        transposed = quantized.transpose(1, 2)
        self.gram = _accumulate(self.gram, transposed, quantized)
        if not self.same:
            self.cross = _accumulate(self.cross, transposed, analog)

    def finish(self) -> LayerProblem:
        """The problem of all rows added.

        Raises:
            CalibrationError: no rows came.
        """
        if self.rows == 0:
            # A single sample cannot be split: it serves both ends.
            unit, self.input_unit = self.input_unit, 1.0  # they are in units already
            for analog, quantized in list(self.held_out):
                self.add(analog, quantized, held_out=False)
            self.input_unit = unit
        if self.rows == 0:
            raise CalibrationError(
                f"layer '{self.name}' saw no calibration data; pass calibration batches that are not empty and reach it"
            )
        if self.gram is not None and not bool(torch.isfinite(self.gram.sum())):
            raise CalibrationError(
                f"the inputs of layer '{self.name}' differ too much in size for float32 products; scale the "
                "calibration data, or ignore the layer"
            )
        analog = quantized = None
        if self.kept:
            analog, quantized = self._stack(self.kept)
        if not self.held_out:
            raise CalibrationError(
                f"layer '{self.name}' drew no held-out rows; pass more samples or raise patches_per_layer"
            )
        held_out, held_out_quantized = self._few(*self._stack(self.held_out))
        return LayerProblem(
            name=self.name,
            weight=self.weight,
            gram=self.gram,
            cross=self.gram if self.same else self.cross,
            analog=analog,
            quantized=quantized,
            mean=self.sum / self.rows,
            mean_quantized=self.sum_quantized / self.rows,
            held_out=held_out,
            held_out_quantized=held_out_quantized,
            rows=self.rows,
            weight_unit=self.weight_unit,
            input_unit=self.input_unit or 1.0,
        )

    def _few(self, analog: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
        """Every so-many-th held-out row of a layer whose weights are so many that errors on all would cost most."""
        most = max(_FEWEST_HELD_OUT, _MOST_PRODUCTS // max(1, self.weight.numel()))
        if analog.shape[1] <= most:
            return analog, quantized
        step = -(-analog.shape[1] // most)
        few = analog[:, ::step].contiguous()
        return few, few if quantized is analog else quantized[:, ::step].contiguous()

    def _stack(self, chunks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        analog = torch.cat([chunk for chunk, _ in chunks], dim=1)
        return analog, analog if self.same else torch.cat([chunk for _, chunk in chunks], dim=1)


_FEWEST_HELD_OUT = 512  # rows, however large the layer is
_MOST_PRODUCTS = 1 << 30  # of held-out rows and weights, for each candidate


def _accumulate(total: Tensor | None, transposed: Tensor, rows: Tensor) -> Tensor:
    return torch.bmm(transposed, rows) if total is None else total.baddbmm_(transposed, rows)
