"""The copy of a user's network that is worked on, or one sentence on why there can be none."""

import copy
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..errors import BantamweightError
from ..nn.layer import QuantizedLayer


def working_copy(model: nn.Module) -> nn.Module:
    """A deep copy in evaluation mode, without the wrappers of torch.compile.

    Tensors with a graph that the model keeps on itself are detached in the copy.

    Raises:
        BantamweightError: a network that cannot be copied or quantized, by the name of the kind or of the attribute.
    """
    _check_kind(model)
    if "_orig_mod" in model._modules:
        inner = model._modules["_orig_mod"]
        assert inner is not None
        return working_copy(inner)
    memo: dict[int, Any] = {}
    for tensor in _kept_tensors(model):
        if tensor.grad_fn is not None:
            memo[id(tensor)] = tensor.detach().clone()
    try:
        made = copy.deepcopy(model, memo)
    except Exception as error:
        where = _uncopyable(model, memo) or "one of its attributes"
        raise BantamweightError(
            f"the model cannot be copied: {where} does not allow it ({type(error).__name__}: {str(error)[:200]}); "
            "remove that attribute before quantizing and set it again afterwards"
        ) from None
    for before, after in zip(model.modules(), made.modules(), strict=False):
        _forget_compiled_forward(before, after)
    return made.eval()


def _check_kind(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise BantamweightError(f"model is a {type(model).__name__}, but must be a trained nn.Module")
    name = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        raise BantamweightError(
            f"the model is a {name}, a script whose layers are fixed; quantize the eager model that it was made from"
        )
    layers = [module for module in model.modules() if isinstance(module, QuantizedLayer)]
    if layers:
        raise BantamweightError(
            f"this {name} is quantized already: it holds {len(layers)} {layers[0].form} layers; pass the float model"
        )
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise BantamweightError(
                f"'{path}' of the model is a {type(module).__name__}, a script whose layers are fixed; put the eager "
                "module in its place"
            )
        kind = type(module).__module__
        if kind.startswith(("torch.ao.nn.quantized", "torch.ao.nn.qat", "torch.nn.quantized")):
            raise BantamweightError(
                f"layer '{path}' is a {type(module).__name__} of torch's own quantization; pass the float model"
            )
    for path, tensor in (*model.named_parameters(), *model.named_buffers()):
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise BantamweightError(
                f"'{path}' of the model is not initialized yet (a lazy module); run the model once and train it first"
            )
        if tensor.is_meta:
            raise BantamweightError(
                f"'{path}' of the model is on the meta device and holds no numbers; load the trained weights first"
            )


def _kept_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that modules keep as plain attributes or buffers, in containers of any depth."""
    for module in model.modules():
        values = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
        seen: set[int] = set()
        while values:
            value = values.pop()
            if id(value) in seen:
                continue
            seen.add(id(value))
            if isinstance(value, Tensor):
                yield value
            elif isinstance(value, Mapping):
                values.extend(value.values())
            elif isinstance(value, list | tuple | set):
                values.extend(value)


def _uncopyable(model: nn.Module, memo: dict[int, Any]) -> str | None:
    """The attribute that deepcopy stumbles over."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name == "_modules":
                continue
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:
                return f"attribute '{path + '.' if path else ''}{name}' (a {type(value).__name__})"
    return None


def _forget_compiled_forward(before: nn.Module, after: nn.Module) -> None:
    """``m.forward = torch.compile(m.forward)`` calls the network it was made of, also from a copy."""
    compiled = vars(after).get("forward")
    plain = inspect.unwrap(getattr(compiled, "_torchdynamo_orig_callable", compiled)) if compiled is not None else None
    if getattr(compiled, "_torchdynamo_orig_callable", None) is None:
        return
    if getattr(plain, "__func__", None) is type(before).forward:
        del vars(after)["forward"]
