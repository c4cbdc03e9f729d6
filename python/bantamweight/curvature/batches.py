"""The data that a loss is taken over, drawn once, and the mode in which the model sees them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from bantamweight.errors import CalibrationError


@dataclass(frozen=True)
class Batch:
    """One batch on the model's device, and its share of the mean."""

    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    targets: Any
    samples: int


def as_batches(data: Any, device: torch.device) -> list[Batch]:
    """Every batch of `data`, drawn once."""
    if isinstance(data, Mapping) or (isinstance(data, tuple | list) and len(data) == 2 and _is_batch(data)):
        data = [data]
    if not isinstance(data, Iterable):
        raise CalibrationError(
            f"data is a {type(data).__name__}, but must be a batch (inputs, targets) or an iterable of batches"
        )
    batches = [_as_batch(item, number, device) for number, item in enumerate(data)]
    if not batches:
        raise CalibrationError("the data hold no batch; pass (inputs, targets) or a loader that yields at least one")
    return batches


def _is_batch(pair: Sequence[Any]) -> bool:
    """Whether a two-element sequence is (inputs, targets) rather than two batches."""
    inputs, targets = pair
    return isinstance(targets, Tensor) and (isinstance(inputs, Tensor | Mapping) or _all_tensors(inputs))


def _all_tensors(inputs: Any) -> bool:
    return isinstance(inputs, tuple | list) and all(isinstance(item, Tensor) for item in inputs)


def _as_batch(item: Any, number: int, device: torch.device) -> Batch:
    if isinstance(item, Mapping):
        if "labels" not in item:
            raise CalibrationError(f"batch {number} is a mapping without 'labels'; it has {', '.join(map(str, item))}")
        inputs, targets = item, item["labels"]
    elif isinstance(item, tuple | list) and len(item) == 2:
        inputs, targets = item
    else:
        size = f" of {len(item)}" if isinstance(item, tuple | list) else ""
        raise CalibrationError(f"batch {number} is a {type(item).__name__}{size}, but must be (inputs, targets)")
    inputs, targets = tree_map_only(Tensor, lambda tensor: tensor.to(device), (inputs, targets))
    arguments = tuple(inputs) if isinstance(inputs, tuple | list) else () if isinstance(inputs, Mapping) else (inputs,)
    keywords = dict(inputs) if isinstance(inputs, Mapping) else {}
    sized = targets if isinstance(targets, Tensor) and targets.ndim else next(iter([*arguments, *keywords.values()]))
    samples = len(sized)
    if samples == 0:
        raise CalibrationError(f"batch {number} holds no sample; drop it from the loader")
    return Batch(arguments, keywords, targets, samples)


@contextmanager
def evaluation(model: nn.Module, mode: str) -> Iterator[None]:
    """Runs the model in `mode` and puts back every module's own mode; in "train" also buffers and the random state."""
    training = [(module, module.training) for module in model.modules()]
    train = mode == "train"
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()] if train else []
    with torch.random.fork_rng() if train else nullcontext():
        if train:
            torch.manual_seed(0)  # the same dropout in every product, or the matrix would not be symmetric
        model.train(train)
        try:
            yield
        finally:
            for module, was_training in training:
                module.training = was_training
            # The graph's backward pass may still need the buffers as it saw them: .data leaves their version alone.
            for buffer, value in buffers:
                buffer.data.copy_(value)
