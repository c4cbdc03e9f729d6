"""Exact Hessian-vector products of any model's mean loss (Pearlmutter 1994, doi:10.1162/neco.1994.6.1.147)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bantamweight.curvature.mean_loss import LossFunction, MeanLoss
from bantamweight.curvature.result import Conditions
from bantamweight.errors import BantamweightError


class Hessian:
    """The Hessian of the mean loss over `data`, as a symmetric matrix that is never formed.

    Args:
        model: any module; its parameters that require grad are the variables.
        loss_fn: `loss_fn(model(inputs), targets)` -> a scalar, the mean over the batch's samples.
        data: one batch `(inputs, targets)` of tensors, or an iterable of such batches (a DataLoader). `inputs` may be
            a tensor, a tuple (passed as positional arguments) or a mapping (passed by keyword). Batches are drawn
            once and kept, so that a shuffling loader still gives one fixed matrix.
        blocks: names (of parameters or of modules) or regular expressions that must match them; None for everything.
        mode: "eval" (default) or "train": what BatchNorm and dropout do. In "train" the random state is the same for
            every product, and BatchNorm's running statistics are put back.
        differentiation: "auto", "double_backward" or "forward_over_reverse".
        graph_memory: bytes that kept graphs may take; the graphs of further batches are built anew in every product.
            None: a quarter of the free memory of the device. One batch is always kept.
        process_group: with torch.distributed, every process holds its own shard of the data, and each product ends
            in one all-reduce.

    Raises:
        CalibrationError: no batch, a loss that is not a scalar, or not finite.
        BantamweightError: no parameter that requires grad, or a block that matches none.
        UnsupportedLayerError: an operation without a second derivative in either direction.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.eye(2), torch.zeros(2, 1))
        >>> hessian = Hessian(model, nn.functional.mse_loss, data)  # (w0^2 + w1^2) / 2
        >>> hessian @ torch.tensor([1.0, 2.0])
        tensor([1., 2.])
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        *,
        blocks: str | Sequence[str] | None = None,
        mode: str = "eval",
        differentiation: str = "auto",
        graph_memory: int | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        if mode not in ("eval", "train"):
            raise BantamweightError(f"mode is {mode!r}, but must be 'eval' or 'train'")
        if differentiation not in ("auto", "double_backward", "forward_over_reverse"):
            raise BantamweightError(
                f"differentiation is {differentiation!r}, but must be 'auto', 'double_backward' or "
                "'forward_over_reverse'"
            )
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise BantamweightError("no parameter of the model requires grad; call model.requires_grad_(True) first")
        self._loss = MeanLoss(model, loss_fn, data, trainable, mode, differentiation, graph_memory, process_group)
        self._select(blocks)

    def _select(self, blocks: str | Sequence[str] | None) -> None:
        everything = list(self._loss.parameters)
        self.names = everything if blocks is None else match_names(everything, blocks)
        self._whole = len(self.names) == len(everything)
        self._shapes = [self._loss.parameters[name].shape for name in self.names]
        self._sizes = [shape.numel() for shape in self._shapes]
        self.size = sum(self._sizes)
        first = self._loss.parameters[self.names[0]]
        self.dtype, self.device = first.dtype, first.device
        self.products = 0

    def block(self, blocks: str | Sequence[str]) -> Hessian:
        """The diagonal block of some parameters; shares this one's graphs, so that nothing is evaluated again."""
        view = object.__new__(Hessian)
        view._loss = self._loss
        view._select(blocks)
        return view

    @property
    def shape(self) -> tuple[int, int]:
        return (self.size, self.size)

    @property
    def loss(self) -> float:
        return self._loss.value

    @property
    def conditions(self) -> Conditions:
        return Conditions(
            mode=self._loss.mode,
            differentiation=self._loss.differentiation,
            samples=int(self._loss.samples),
            batches=len(self._loss.batches),
            parameters=self.size,
            blocks=("all",) if self._whole else tuple(self.names),
            loss=self.loss,
            processes=self._loss.processes,
        )

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of a flat [size] vector in the parameters' shapes."""
        return [part.view(shape) for part, shape in zip(vector.split(self._sizes), self._shapes, strict=True)]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.split(vector), strict=True))

    def product(self, vector: Tensor) -> list[Tensor]:
        """H v for a flat [size] vector, one contiguous tensor a parameter: nothing is copied into flat storage."""
        if vector.shape != (self.size,):
            raise BantamweightError(
                f"the vector has shape {tuple(vector.shape)}, but this Hessian needs ({self.size},)"
            )
        self.products += 1
        return self._loss.product(self.names, self.split(vector))

    def __matmul__(self, vector: Tensor) -> Tensor:
        return torch.cat([part.reshape(-1) for part in self.product(vector)])

    def gradient(self) -> Tensor:
        """The gradient of the mean loss, flat [size]."""
        return torch.cat([part.reshape(-1) for part in self._loss.gradient(self.names)])


def match_names(names: Sequence[str], blocks: str | Sequence[str]) -> list[str]:
    """Parameter names covered by `blocks`: a parameter's or a module's name, or a regular expression for either."""
    patterns = [blocks] if isinstance(blocks, str) else list(blocks)
    chosen: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if name == pattern or name.startswith(pattern + ".")} or {
                name
                for name in names
                if any(re.fullmatch(pattern, ".".join(name.split(".")[:end])) for end in range(1, name.count(".") + 2))
            }
        except re.error as error:
            raise BantamweightError(
                f"the block {pattern!r} is neither a name nor a regular expression: {error}"
            ) from None
        if not hits:
            shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
            raise BantamweightError(f"the block {pattern!r} matches no parameter that requires grad; there are {shown}")
        chosen |= hits
    if not chosen:
        raise BantamweightError("blocks is empty; name at least one parameter or module, or pass None for all")
    return [name for name in names if name in chosen]
