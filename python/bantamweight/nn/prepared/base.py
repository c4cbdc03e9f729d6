"""What prepared modules share: they stand where a torch module stood, and their weights live in plain layers."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from ...errors import FormatError

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
# Weights of other types are left as they are.
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class PreparedModule(nn.Module):
    """Base of the prepared modules.

    A prepared module is also an instance of the class it stands for, keeps its settings (`hidden_size`, `num_heads`),
    and answers for its parameters from the children that hold them.
    """

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module]]  # the class whose forward it computes
    parameters_of: ClassVar[tuple[str, ...]] = ("weight",)  # what must be a parameter of the module that it replaces

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why this module cannot be prepared, or None; `module` is of the class that is replaced."""
        return None

    @classmethod
    def prepare(cls, module: Any) -> Self:
        """The prepared form, on the parameters of `module`; `module` keeps them too, until it becomes the new one."""
        raise NotImplementedError

    @classmethod
    def body_for(cls, own: type[nn.Module]) -> dict[str, Any]:
        """What the form adds to a class that it is mixed into."""
        return {}

    def record(self) -> dict[str, Any]:
        """What a file's header says of the module: JSON values, from which `prepare_like` makes it again."""
        return {"kind": self.kind}

    @classmethod
    def prepare_like(cls, module: Any, record: Mapping[str, Any]) -> Self:
        """The prepared form of a fresh `module`, as the record of a saved one says."""
        reason = reason_to_leave(cls, module)
        if reason is not None:
            raise FormatError(f"the file has it prepared as {cls.kind}, but here {reason}")
        return cls.prepare(module)


def reason_to_leave(form: type[PreparedModule], module: nn.Module) -> str | None:
    """Why `module` cannot take the prepared form, in words that follow its name; None where it can."""
    base: Any = form.replaces
    held = module._parameters
    if not isinstance(module, base):
        return f"it is a {type(module).__name__}, not a {base.__name__}"
    if "forward" in vars(module) or not calls_super(type(module), base):
        return f"its class {type(module).__name__} has a forward of its own"
    if parametrize.is_parametrized(module) or not set(form.parameters_of) <= set(held):
        return "its weights are made anew at every call; make them plain with settle_weights first"
    if any(has_no_shape(value) for value in held.values()):
        return "its weights have no shape yet; run the model once first"
    others = sorted({str(value.dtype) for value in held.values() if value is not None and value.dtype not in _FLOATS})
    if others:
        return f"its weights are {others[0]}, but must be real floating point"
    return form.why_not(module)


def bare(form: type[Any], module: nn.Module) -> Any:
    """An instance with the settings of `module` and none of its parameters, which its own __init__ would allocate."""
    cls: Any = class_for(form, type(module))
    new = cls.__new__(cls)
    nn.Module.__init__(new)
    vars(new).update({name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE})
    new.training = module.training
    return new


def has_no_shape(value: Tensor | None) -> bool:
    """Whether a parameter waits for the first call of a lazy module."""
    return isinstance(value, UninitializedParameter)


def parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """A parameter of these values that asks for a gradient where `like` does."""
    return nn.Parameter(tensor.detach(), requires_grad=like.requires_grad)


def linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """nn.Linear on these very parameters."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


def conv2d(weight: Tensor, bias: Tensor | None, *, groups: int = 1, **geometry: Any) -> nn.Conv2d:
    """nn.Conv2d on these very parameters, weight [out, in / groups, kh, kw]."""
    out_channels, in_channels, height, width = weight.shape
    layer = nn.Conv2d(
        in_channels * groups,
        out_channels,
        (height, width),
        groups=groups,
        bias=bias is not None,
        device="meta",
        **geometry,
    )
    layer.weight, layer.bias = weight, bias  # type: ignore[assignment]
    return layer


_subclasses: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def calls_super(own: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether every forward between `own` and the torch class `base` is one that hands over to super().forward."""
    between = own.__mro__[: own.__mro__.index(base)]
    forwards: list[Any] = [vars(cls)["forward"] for cls in between if "forward" in vars(cls)]
    names = [set(forward.__code__.co_names) if hasattr(forward, "__code__") else set() for forward in forwards]
    # torch's lists of parameters are empty in a prepared module.
    return all({"super", "forward"} <= each and "_flat_weights" not in each for each in names)


def class_for(form: type[Any], own: type[nn.Module]) -> type[Any]:
    """`form` as a subclass of the user's class `own` too, so that its other methods and isinstance keep working.

    A forward of the user's own comes first, and finds the prepared one as its super().forward.
    """
    if issubclass(form, own):
        return form
    if (form, own) not in _subclasses:
        body = {"__module__": form.__module__, "__reduce_ex__": _reduce, "_made_of": (form, own), **form.body_for(own)}
        own_first = "forward" not in body and own.forward is not form.replaces.forward
        _subclasses[form, own] = type(f"Prepared{own.__name__}", (own, form) if own_first else (form, own), body)
    return _subclasses[form, own]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # Classes that are made while running have no name to be pickled by; the two that they are made of have.
    own_state: Any = getattr(self, "__getstate__")()  # noqa: B009  (object's, since Python 3.11)
    return _restore, type(self)._made_of, own_state  # type: ignore[attr-defined]


def _restore(form: type[Any], own: type[nn.Module]) -> Any:
    cls: Any = class_for(form, own)
    return cls.__new__(cls)
