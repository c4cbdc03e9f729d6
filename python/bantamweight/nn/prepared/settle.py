"""Weights that a hook makes anew at every call, made plain parameters with their present value.

Pruning masks, weight normalization (Salimans and Kingma 2016, arXiv:1602.07868), spectral normalization (Miyato et al.
2018, arXiv:1802.05957) and every parametrization of torch serve training: a trained network needs only what comes out.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import utils
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook
from torch.nn.utils.weight_norm import WeightNorm

from ...errors import FormatError


def settle_weights(model: nn.Module) -> dict[str, str]:
    """Makes, in place, every weight that is computed from others a plain parameter of its value in evaluation mode.

    Covers `torch.nn.utils.prune`, `weight_norm` and `spectral_norm`, the hooks and the parametrizations, and every
    other registered parametrization. torch's own removal functions do the work.

    Returns:
        By name of the tensor, what computed it: "prune", "weight_norm", "spectral_norm" or "parametrization"; for
        `settle_like`.

    Example:
        >>> net = nn.Sequential(utils.parametrizations.weight_norm(nn.Conv1d(4, 8, 3)))
        >>> settle_weights(net)
        {'0.weight': 'parametrization'}
        >>> type(net[0]), [name for name, _ in net.named_parameters()]
        (<class 'torch.nn.modules.conv.Conv1d'>, ['0.bias', '0.weight'])
    """
    settled: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        for tensor, kind in list(_computed(module)):
            _settle(module, tensor, kind)
            settled[f"{name}.{tensor}" if name else tensor] = kind
    return settled


def settle_like(model: nn.Module, settled: Iterable[str]) -> None:
    """Does to a model from make_model() what `settle_weights` did to the one that was saved.

    A tensor that is plain already stays so: pruning, say, is done to a model after it was made.

    Raises:
        FormatError: the model has no such tensor.
    """
    for name in settled:
        path, _, tensor = name.rpartition(".")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            module = None
        if module is None or not hasattr(module, tensor):
            raise FormatError(
                f"the file has a settled weight {name!r}, which {type(model).__name__} lacks; pass the make_model() it "
                "was saved from"
            )
        for computed, kind in list(_computed(module)):
            if computed == tensor:
                _settle(module, tensor, kind)


def _computed(module: nn.Module) -> Iterator[tuple[str, str]]:
    """The tensors of a module that a hook or a parametrization computes, the last registered first."""
    for hook in reversed(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            yield hook._tensor_name, "prune"
        elif isinstance(hook, WeightNorm | SpectralNorm):
            yield hook.name, "weight_norm" if isinstance(hook, WeightNorm) else "spectral_norm"
    if parametrize.is_parametrized(module):
        for tensor in module.parametrizations:  # type: ignore[union-attr]
            yield tensor, "parametrization"


def _settle(module: Any, tensor: str, kind: str) -> None:
    # Without gradients torch would take what comes out for a frozen tensor.
    with _evaluation(module), torch.enable_grad():
        if kind == "parametrization":
            _settle_parametrization(module, tensor)
            return
        parts = [module._parameters.get(f"{tensor}_{part}") for part in ("orig", "g", "v")]
        trained = any(part.requires_grad for part in parts if part is not None)
        if kind == "prune":
            prune.remove(module, tensor)
        elif kind == "weight_norm":
            utils.remove_weight_norm(module, tensor)
        else:
            utils.remove_spectral_norm(module, tensor)
            _forget_state_hooks(module, tensor)
        module._parameters[tensor].requires_grad_(trained)


def _settle_parametrization(module: Any, tensor: str) -> None:
    _own_class(module)
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    if tensor not in module._parameters:  # of frozen parts torch leaves a bare tensor
        value = getattr(module, tensor)
        delattr(module, tensor)
        module.register_parameter(tensor, nn.Parameter(value.detach(), requires_grad=False))


def _own_class(module: nn.Module) -> None:
    """torch's removal takes the tensor's property off the class, which deep copies of a parametrized module share."""
    cls = type(module)
    body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)  # type: ignore[assignment]


def _forget_state_hooks(module: Any, tensor: str) -> None:
    """torch's removal looks for its hooks on state dicts, but not inside the wrappers that it registers them in."""
    kinds = (SpectralNormLoadStateDictPreHook, SpectralNormStateDictHook)
    for hooks in (module._load_state_dict_pre_hooks, module._state_dict_hooks):
        for key, wrapper in list(hooks.items()):
            hook = getattr(wrapper, "hook", wrapper)
            if isinstance(hook, kinds) and hook.fn.name == tensor:
                del hooks[key]


@contextmanager
def _evaluation(module: nn.Module) -> Iterator[None]:
    """A spectral norm in training mode takes a step of its power iteration whenever its weight is read."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
