"""Data as calls of a model: every form of loader that a torch user has, and which of its samples are held out."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .errors import CalibrationError

Calibration = Iterable[Any] | Tensor | Callable[[nn.Module], Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

_BATCH = 64  # samples of a batch cut from one tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One call of the model: its arguments, how many samples it has, and which of them are held out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    held_out: Tensor  # bool [samples]

    def fresh(self) -> Call:
        """The arguments as copies, which a model that works in place may change."""
        return map_tensors((self.args, self.kwargs), Tensor.clone)

    def run(self, model: nn.Module) -> Any:
        args, kwargs = self.fresh()
        return model(*args, **kwargs)


def collect_batches(model: nn.Module, calibration: Calibration, *, held_out: float, seed: int) -> list[Batch]:
    """Every form of calibration data as a list of calls of the model.

    Args:
        calibration: a tensor (one batch, cut into batches of 64); an iterable, such as a DataLoader, of tensors,
            of tuples that begin with the model's arguments, or of dicts of keyword arguments; or a function that calls
            the model it is given on the data. Of a tuple as many elements are arguments as the model's forward
            requires, all of them where it takes ``*args``; what follows are labels and is dropped, with a warning
            where it could have been an optional argument. ``((a, b), labels)`` and ``({"a": a}, labels)`` are taken
            apart where forward takes a and b.
        held_out: the share of the samples held out, a random choice of one at least (and not all, of two or more).

    Raises:
        CalibrationError: nothing in it, or something else than these forms.
    """
    if isinstance(calibration, Tensor):
        calls: list[Call] = [((part,), {}) for part in calibration.split(_BATCH)] if calibration.numel() else []
    elif isinstance(calibration, Mapping | str):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, but must be a tensor, an iterable of batches "
            "(put a dict batch in a list), or a function of the model"
        )
    elif isinstance(calibration, Iterable):
        signature = _Signature(model)
        calls = [signature.call(batch) for batch in calibration]
        signature.warn_of_dropped()
    elif callable(calibration):
        calls = _recorded_calls(model, calibration)
    else:
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}, but must be a tensor, an iterable of batches, or a "
            "function of the model"
        )
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    calls = [map_tensors(call, lambda tensor: tensor.detach().to(device)) for call in calls]
    sizes = [_batch_size(call) for call in calls]
    total = sum(sizes)
    if total == 0:
        raise CalibrationError("the calibration data is empty; pass at least one batch with one sample")
    generator = torch.Generator().manual_seed(seed)
    count = max(1, min(round(total * held_out), total - 1))
    flags = torch.zeros(total, dtype=torch.bool)
    flags[torch.randperm(total, generator=generator)[:count]] = True
    return [
        Batch(args=args, kwargs=kwargs, held_out=part)
        for (args, kwargs), part in zip(calls, flags.split(sizes), strict=True)
        if len(part) > 0
    ]


def without_wrappers(model: nn.Module) -> nn.Module:
    """The network inside DataParallel, DistributedDataParallel and torch.compile's module, whose forward tells more."""
    while True:
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        wraps = (
            isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "_orig_mod" in model._modules
        )
        if inner is None or not wraps:
            return model
        model = inner


class _Signature:
    """What the model's forward takes, to tell arguments from labels."""

    def __init__(self, model: nn.Module) -> None:
        try:
            parameters = list(inspect.signature(without_wrappers(model).forward).parameters.values())
        except (TypeError, ValueError):  # forwards of C functions and scripts have none
            parameters = []
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self.names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        self.required = sum(p.default is p.empty for p in positional)
        self.optional = [p.name for p in positional if p.default is not p.empty]
        self.takes_all = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.dropped = 0

    def call(self, batch: Any) -> Call:
        if isinstance(batch, Mapping):
            return (), dict(batch)
        if isinstance(batch, Tensor):
            return (batch,), {}
        if (
            not isinstance(batch, list | tuple)
            or not batch
            or not isinstance(batch[0], Tensor | list | tuple | Mapping)
        ):
            raise CalibrationError(
                f"a calibration batch is a {type(batch).__name__}, but must be a tensor, a tuple that starts with "
                "tensors, or a dict of keyword arguments; convert numpy arrays with torch.from_numpy"
            )
        first = batch[0]
        if isinstance(first, Mapping) and first and set(first) <= self.names:
            return (), dict(first)
        if isinstance(first, list | tuple) and len(first) == self.required > 1 and len(batch) <= 2:
            return tuple(first), {}
        if self.takes_all:
            return tuple(batch), {}
        taken = max(1, self.required)
        if self.optional:
            self.dropped = max(self.dropped, len(batch) - taken)
        return tuple(batch[:taken]), {}

    def warn_of_dropped(self) -> None:
        if self.dropped:
            warnings.warn(
                f"the calibration batches hold {self.dropped} more tensors than the model's forward requires; they are "
                f"taken for labels and left out. If they are its {' or '.join(self.optional)}, pass dicts of keyword "
                "arguments",
                stacklevel=4,
            )


def _recorded_calls(model: nn.Module, forward_loop: Callable[[nn.Module], Any]) -> list[Call]:
    """The arguments of every call that `forward_loop` makes."""
    calls: list[Call] = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, dict(kwargs))),  # type: ignore[arg-type]
        with_kwargs=True,
    )
    try:
        with torch.no_grad():
            forward_loop(model)
    finally:
        handle.remove()
    return calls


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def call_tensors(batches: Iterable[Batch]) -> Iterator[Tensor]:
    """Every tensor among the arguments of the batches, in order."""
    for batch in batches:
        yield from tensors_in((batch.args, batch.kwargs))


def map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`change` of every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) is dict:
        return {key: map_tensors(part, change) for key, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(part, change) for part in value))
    if type(value) in (list, tuple):
        return type(value)(map_tensors(part, change) for part in value)
    return value


def _batch_size(call: Call) -> int:
    first = next(tensors_in(call), None)
    if first is None:
        raise CalibrationError("a calibration batch holds no tensor; pass batches of the model's inputs")
    return first.shape[0] if first.ndim else 1
