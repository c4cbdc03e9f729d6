"""A model's tensors as a file can hold and fill them."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import BantamweightError, FormatError
from .reader import DTYPES


def plain_tensor(name: str, value: Tensor) -> Tensor:
    """The tensor as a file can hold it.

    Raises:
        BantamweightError: it is sparse, quantized, nested, without a shape, on the meta device, or of a dtype that
            safetensors has no name for.
    """
    lazy = is_lazy(value)
    usual = not lazy and value.layout == torch.strided and not value.is_quantized and not value.is_nested
    if not usual or value.is_meta or value.dtype not in DTYPES or is_traceable_wrapper_subclass(value):
        kind = "" if usual else "lazy " if lazy else "nested " if value.is_nested else f"{value.layout} "
        where = " on the meta device" if value.is_meta else ""
        raise BantamweightError(
            f"{name} is a {kind}{type(value).__name__} of {value.dtype}{where}, but a model file holds dense tensors "
            "of real numbers, whole numbers, bool and complex64; convert it, or register it with persistent=False"
        )
    return value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()


def refuse_meta(model: nn.Module, filled: set[str], replaced: set[str], path: object) -> None:
    """Refuses a model of which a tensor would stay on the meta device.

    Args:
        filled: names of the tensors that the file holds.
        replaced: names of the modules whose tensors give way to others.

    Raises:
        FormatError: names the tensors.
    """
    known = {id(value) for name, value in _named_tensors(model) if name in filled}
    given_way = {id(inside) for name in replaced for inside in model.get_submodule(name).modules()}
    left: list[str] = []
    for path_to, module in model.named_modules():
        dot = f"{path_to}." if path_to else ""
        for name, value in (*module._parameters.items(), *module._buffers.items()):
            if value is not None and value.is_meta and id(value) not in known and id(module) not in given_way:
                left.append(dot + name)
        for name, value in vars(module).items():
            if name not in ("_parameters", "_buffers") and any(part.is_meta for part in _tensors_in(value)):
                left.append(dot + name)
    if left:
        raise FormatError(
            f"{path}: {', '.join(map(repr, left[:8]))}{' and more' if len(left) > 8 else ''} of {type(model).__name__} "
            "would stay on the meta device, because the state dict and so the file do not hold what is in it; make the "
            "model on the CPU"
        )


def make_writable(model: nn.Module, replaced: set[nn.Module]) -> None:
    """Gives tensors memory of their own that a state dict can be copied into.

    Those on the meta device have none, and elements of an expanded one share it.

    Args:
        replaced: modules whose tensors give way to others.
    """
    skipped = {id(inside) for module in replaced for inside in module.modules()}
    made: dict[int, Any] = {}
    for module in model.modules():
        if id(module) in skipped:
            continue
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is None or not (value.is_meta or _overlaps(value)):
                    continue
                if id(value) not in made:
                    fresh: Tensor = torch.empty(value.shape, dtype=value.dtype, device="cpu")
                    if not value.is_meta:
                        fresh = value.detach().clone(memory_format=torch.contiguous_format)
                    is_parameter = isinstance(value, nn.Parameter)
                    made[id(value)] = nn.Parameter(fresh, value.requires_grad) if is_parameter else fresh
                held[name] = made[id(value)]


def _overlaps(value: Tensor) -> bool:
    return value.layout == torch.strided and any(
        size > 1 and step == 0 for size, step in zip(value.shape, value.stride(), strict=True)
    )


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _tensors_in(value: Any) -> Iterable[Tensor]:
    """A plain attribute's tensors: itself, or what a list, a tuple or a dict holds."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]
