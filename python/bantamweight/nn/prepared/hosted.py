"""Modules of other people's classes, whose forward stays theirs while the weights it multiplies with live in children.

Whether a forward suits is not read but seen: the module runs once with stand-ins for its weights (`observed`), and a
weight is moved into a child only if every use of it was one that the child computes.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.nn.utils import parametrize

from ...errors import FormatError
from .base import PreparedModule, bare, class_for, conv2d, has_no_shape, linear, parameter
from .stand_in import PRODUCTS, StandIn, Use


class HostedModule(PreparedModule):
    """A module whose own forward runs, with stand-ins for the parameters that children hold.

    The child of `weight` is `inner`, that of another parameter p is `p_layer`, and the children of a 3d parameter p are
    `p_layers.0` and on.
    """

    kind = "hosted"
    replaces = nn.Module
    uses: dict[str, Use]
    dtypes: dict[str, torch.dtype]
    observing: dict[str, list[Use | None]] | None  # while the module is observed; None stands for any other use

    @classmethod
    def body_for(cls, own: type[nn.Module]) -> dict[str, Any]:
        @functools.wraps(own.forward)
        def forward(self: HostedModule, *args: Any, **kwargs: Any) -> Any:
            # A tracer would keep the stand-in as a constant, and the child would never be called.
            if any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
                raise TraceError(f"{type(self).__name__} calls its layers in a way that fx cannot follow")
            return own.forward(self, *args, **kwargs)

        return {"forward": forward}

    @classmethod
    def host(cls, module: nn.Module, uses: dict[str, Use]) -> Self:
        """The hosted form of `module`, on its own parameters.

        Raises:
            FormatError: a parameter or a use that does not fit the module.
        """
        new: Any = bare(cls, module)
        new.observing = None
        new.uses = dict(uses)
        new.dtypes = {}
        held = module._parameters
        taken = {*uses, *(use.bias for use in uses.values() if use.bias is not None)}
        for name, use in uses.items():
            weight = held.get(name)
            bias = None if use.bias is None else held.get(use.bias)
            if weight is None or (use.bias is not None and bias is None):
                raise FormatError(f"it has no parameter {name if weight is None else use.bias}")
            new.dtypes[name] = weight.dtype
            child = child_name(name, use)
            if child in module._modules or hasattr(module, child):
                raise FormatError(f"it has an attribute {child} already")
            new.add_module(child, _children(weight, bias, use))
        for name, value in held.items():
            if name not in taken:
                new._parameters[name] = value
        new._buffers.update(module._buffers)
        new._non_persistent_buffers_set = set(module._non_persistent_buffers_set)
        new._modules = {**module._modules, **new._modules}
        return new

    @classmethod
    def prepare_like(cls, module: Any, record: Mapping[str, Any]) -> Self:
        try:
            uses = {name: Use.of(use) for name, use in record["uses"].items()}
            return cls.host(module, uses)
        except FormatError as error:
            raise FormatError(f"the file has it prepared as {cls.kind}, but here {error}") from None
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
            raise FormatError(f"its record does not fit it ({error})") from None

    def record(self) -> dict[str, Any]:
        return {"kind": self.kind, "uses": {name: use.record() for name, use in self.uses.items()}}

    def __getattr__(self, name: str) -> Any:
        state = vars(self)
        observing = state.get("observing")
        if observing is not None:
            held = state["_parameters"].get(name) if name in observing else None
            return super().__getattr__(name) if held is None else StandIn.of(self, name, *_looks(held))
        uses: dict[str, Use] = state.get("uses", {})
        if name in uses:
            return StandIn.of(self, name, *self._looks_of(name))
        for weight, use in uses.items():
            if use.bias == name:
                return self._layer(weight, None).bias
        return super().__getattr__(name)

    def call(self, weight: StandIn, use: Use, x: Tensor, bias: Any) -> Any:
        """What a product with the weight gives; NotImplemented where no child computes it."""
        name = weight._name
        if self.observing is not None:
            experts = None if weight._expert is None else self._parameters[name].shape[0]  # type: ignore[union-attr]
            held = None if experts is not None else self._bias_for(name, use, bias)
            self.observing[name].append(Use(**{**vars(use), "experts": experts, "bias": held}))
            return _float_call(self.float_weight(name, weight._expert), use, x, bias)
        known = self.uses[name]
        if Use(**{**vars(known), "bias": None, "experts": None}) != use:
            return NotImplemented
        layer = self._layer(name, weight._expert)
        if known.bias is not None:
            # The child adds its bias; a forward that hands over another one this time is served in float.
            if bias is not layer.bias:
                return NotImplemented
            bias = None
        y = layer(x.unsqueeze(-2)).squeeze(-2) if use.op == "conv1d" else layer(x)
        if bias is None:
            return y
        return y + (bias if use.op == "linear" else bias.view(-1, *[1] * (2 if use.op == "conv2d" else 1)))

    def _bias_for(self, name: str, use: Use, bias: Any) -> str | None:
        """The name of the parameter that was handed over as the bias, if it has one value an output."""
        outputs = self._parameters[name].shape[1 if use.transposed else 0]  # type: ignore[union-attr]
        fitting = (key for key, value in self._parameters.items() if value is not None and value is bias)
        return next((key for key in fitting if bias.shape == (outputs,)), None)

    def used_otherwise(self, name: str) -> None:
        if self.observing is not None:
            self.observing[name].append(None)

    def float_weight(self, name: str, expert: int | None) -> Tensor:
        """The parameter, or one expert's part of it, as the forward knows it; dequantized if its child is."""
        if self.observing is not None:
            held: Any = self._parameters[name]
            return held if expert is None else held[expert]
        use = self.uses[name]
        if use.experts is not None and expert is None:
            return torch.stack([self.float_weight(name, index) for index in range(use.experts)])
        weight = self._layer(name, expert).weight
        if use.op == "conv1d":
            return weight.squeeze(2)
        return weight.mT if use.transposed else weight

    def _layer(self, name: str, expert: int | None) -> Any:
        layers: Any = self._modules[child_name(name, self.uses[name])]
        return layers if expert is None else layers[expert]

    def _looks_of(self, name: str) -> tuple[Sequence[int], torch.dtype, torch.device]:
        """The shape, dtype and device of a parameter, without its values."""
        use = self.uses[name]
        layer = self._layer(name, None if use.experts is None else 0)
        if use.op in ("conv1d", "conv2d"):
            kernel = layer.kernel_size[-1:] if use.op == "conv1d" else layer.kernel_size
            shape = (layer.out_channels, layer.in_channels // layer.groups, *kernel)
        elif use.op == "embedding":
            shape = (layer.num_embeddings, layer.embedding_dim)
        else:
            shape = (layer.out_features, layer.in_features)[:: -1 if use.transposed else 1]
        shape = shape if use.experts is None else (use.experts, *shape)
        weight = getattr(layer, "weight", None)
        # Where a packed layer has codes only, the dtype is the one that the weight had.
        return (shape, self.dtypes[name], torch.device("cpu")) if weight is None else (shape, *_looks(weight)[1:])


def _looks(weight: Tensor) -> tuple[Sequence[int], torch.dtype, torch.device]:
    return weight.shape, weight.dtype, weight.device


def child_name(name: str, use: Use) -> str:
    """Of the child, or the list of children, that holds a parameter."""
    if use.experts is not None:
        return f"{name}_layers"
    return "inner" if name == "weight" else f"{name}_layer"


def watched(module: nn.Module) -> list[str]:
    """The parameters of a module with a forward of its own that a product may use; none of others."""
    cls: Any = type(module)
    if isinstance(module, PreparedModule | torch.jit.ScriptModule) or parametrize.is_parametrized(module):
        return []
    if cls.forward.__module__.startswith("torch.nn") and not (
        isinstance(module, nn.Conv1d | nn.Conv2d) and not cls._conv_forward.__module__.startswith("torch.nn")
    ):
        return []
    return [
        name
        for name, value in module._parameters.items()
        if value is not None
        and not has_no_shape(value)
        and value.is_floating_point()
        and value.ndim in (2, 3, 4)
        and value.numel() > 0
    ]


@contextmanager
def observed(
    modules: Mapping[str, tuple[nn.Module, Iterable[str]]],
) -> Iterator[dict[str, dict[str, list[Use | None]]]]:
    """While it is open, modules note how they use parameters of theirs; afterwards they are as they were.

    Args:
        modules: by name, a module and the names of its parameters to watch.

    Yields:
        By name of the module and of the parameter, the uses; None for one that no child could compute.
    """
    seen = {name: {key: [] for key in keys} for name, (_, keys) in modules.items()}
    classes = {name: type(module) for name, (module, _) in modules.items()}
    try:
        for name, (module, _) in modules.items():
            module.__class__ = class_for(HostedModule, type(module))
            vars(module)["observing"] = seen[name]
        yield seen
    finally:
        for name, (module, _) in modules.items():
            module.__class__ = classes[name]
            vars(module).pop("observing", None)


def uses_of(seen: Mapping[str, list[Use | None]]) -> tuple[dict[str, Use], dict[str, str]]:
    """The parameters that children can hold, each with its one use, and why others cannot, of those in products."""
    uses: dict[str, Use] = {}
    left: dict[str, str] = {}
    for name, found in seen.items():
        kinds = set(found)
        products = kinds - {None}
        if not products:
            continue
        if len(kinds) > 1:
            what = "computes with it in another way too" if None in kinds else "multiplies with it in several ways"
            left[name] = f"its forward {what}"
        else:
            uses[name] = next(iter(products))  # type: ignore[assignment]
    biases = [use.bias for use in uses.values()]
    for name, use in list(uses.items()):
        if use.bias is not None and (biases.count(use.bias) > 1 or use.bias in uses):
            del uses[name]
            left[name] = f"its bias {use.bias} is another weight's too"
    return uses, left


def _children(weight: Any, bias: Any, use: Use) -> nn.Module:
    if use.op not in PRODUCTS:
        raise FormatError(f"a child that computes {use.op} is unknown")
    if use.experts is not None:
        if use.op != "linear" or weight.ndim != 3 or weight.shape[0] != use.experts:
            raise FormatError(f"a parameter {list(weight.shape)} is no {use.experts} experts")
        parts = [parameter(part.mT if use.transposed else part, like=weight) for part in weight.detach()]
        return nn.ModuleList(linear(part, None) for part in parts)
    wanted = {"linear": 2, "embedding": 2, "conv1d": 3, "conv2d": 4}[use.op]
    if weight.ndim != wanted:
        raise FormatError(f"a parameter {list(weight.shape)} is none of a {use.op}")
    if use.op == "linear":
        return linear(parameter(weight.detach().T, like=weight) if use.transposed else weight, bias)
    if use.op == "embedding":
        table = nn.Embedding(*weight.shape, **dict(use.geometry), device="meta")
        table.weight = weight
        return table
    if use.op == "conv2d":
        return conv2d(weight, bias, **dict(use.geometry))
    rows = {"stride": 1, "padding": 0, "dilation": 1}  # of the one row that the image has
    wide: dict[str, Any] = {
        name: (rows[name], *value) if name in rows and not isinstance(value, str) else value
        for name, value in use.geometry
    }
    return conv2d(parameter(weight.unsqueeze(2), like=weight), bias, **wide)


def _float_call(weight: Tensor, use: Use, x: Tensor, bias: Any) -> Tensor:
    """What the child of this use would compute of the parameter."""
    if use.op == "linear":
        y = F.linear(x, weight.mT if use.transposed else weight)
        return y if bias is None else y + bias
    if use.op == "embedding":
        return F.embedding(x, weight, **dict(use.geometry))
    return (F.conv1d if use.op == "conv1d" else F.conv2d)(x, weight, bias, **dict(use.geometry))
