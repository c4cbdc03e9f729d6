"""One layer in another's place, for everyone who holds it.

A module may hang under several names, in Python lists and dicts, in closures and in other modules' attributes. To set
an attribute of one parent leaves all the others with the old one, and the network then runs in part on layers that no
report names. So a layer is not exchanged: the object stays, and becomes another layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..errors import UnsupportedLayerError

M = TypeVar("M", bound=nn.Module)

# What nn.Module itself keeps of hooks on a call. They belong to the place in the network, not to the kind of layer.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_EMPTY = frozenset(vars(nn.Module()))


def become(old: nn.Module, new: M) -> M:
    """Makes `old` the layer that `new` is, and returns it; `new` itself is used up.

    Kept of the old one: its identity, its hooks on calls, its mode, and the attributes that users put on it and that
    the new layer does not have.

    Raises:
        UnsupportedLayerError: a class with __slots__, whose instances cannot change their class.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> layers = [net[0]]
        >>> _ = become(net[0], nn.Identity())
        >>> layers
        [Identity()]
    """
    state = vars(old)
    hooks = {name: state[name] for name in _HOOKS}
    names = {*state["_parameters"], *state["_buffers"], *state["_modules"]}
    own = {name: value for name, value in state.items() if name not in _EMPTY and name not in names}
    training = old.training
    try:
        old.__class__ = type(new)
    except TypeError as error:
        raise UnsupportedLayerError(
            f"a {type(old).__name__} cannot become a {type(new).__name__} where it is ({error}); add it to ignore"
        ) from None
    merged = {**own, **vars(new), **hooks, "training": training}
    state.clear()
    state.update(merged)
    return old  # type: ignore[return-value]


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """`new` under every name that `old` has in the model: for a module that keeps the old one inside it.

    Returns:
        The model, or `new` where the model is `old`.
    """
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                setattr(parent, name, new)
    return model


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Gives every module of the model its class and attributes back if what is done inside raises.

    Values of tensors that were written into are not: this is for changes of structure.
    """
    kept = [(module, type(module), _attributes(module)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, kind, attributes in kept:
            module.__class__ = kind
            state = vars(module)
            state.clear()
            state.update(attributes)
        raise


def _attributes(module: nn.Module) -> dict[str, object]:
    return {name: value.copy() if isinstance(value, dict) else value for name, value in vars(module).items()}
