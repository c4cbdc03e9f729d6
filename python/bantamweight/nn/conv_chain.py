"""Chains of packed convolutions, with what lies between them, as one call."""

import logging
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor, fx, nn
from torch.compiler import is_compiling
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F  # noqa: N812

from .. import _C
from ..errors import CalibrationError
from ..ops.lowbit_linear import check_status
from ..weights import pair
from .fold import LayerTracer
from .packed import PackedConv2d

log = logging.getLogger(__name__)


@dataclass(eq=False, kw_only=True)
class _Step:
    """A step of `csrc/conv_network`; `input` and `residual` are steps, None for the chain's input."""

    kind: Literal["conv", "max_pool", "average", "subsample", "add"]
    input: "_Step | None"
    residual: "_Step | None" = None
    relu: bool = False
    conv: PackedConv2d | None = None
    kernel_size: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    channels: tuple[int, int] = (0, 0)  # zeros before and after

    def run(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """The same by torch and the single layers."""
        match self.kind:
            case "conv":
                assert self.conv is not None
                x = self.conv(x)
            case "max_pool":
                x = F.max_pool2d(x, self.kernel_size, self.stride, self.padding)
            case "average":
                x = x.mean((2, 3), keepdim=True)
            case "subsample":
                x = F.pad(x[:, :, :: self.stride[0], :: self.stride[1]], (0, 0, 0, 0, *self.channels))
        if residual is not None:
            x = x + residual
        return x.relu() if self.relu else x


@dataclass(frozen=True, kw_only=True)
class CodeRange:
    """A feature map as int8 codes: value = scale * (code - zero), codes -127 .. 127."""

    scale: float
    zero: int

    @classmethod
    def covering(cls, low: float, high: float) -> "CodeRange":
        """Of the values from low to high and zero, which has a code: -127 where no value is below it."""
        low, high = min(low, 0.0), max(high, 0.0)
        # Rounded to the float32 that the kernels compute with.
        scale = float(torch.tensor((high - low) / 254, dtype=torch.float32))
        if scale < torch.finfo(torch.float32).tiny:  # a map of zeros
            return cls(scale=1.0, zero=-127)
        return cls(scale=scale, zero=max(-127, min(127, round(-127 - low / scale))))


class PackedConvChain(nn.Module):
    """Packed convolutions and the ReLUs, residual sums and poolings between them; `nn.fuse` makes it.

    A few images at a time run through the whole chain in memory that is kept between calls, so feature maps stay in
    the caches. Outputs equal those of the single layers (an average over pixels up to float rounding) and are channels
    last.

    After `use_int8_maps` the maps inside the chain are int8 with one scale a map, known from calibration data (Jacob
    et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018, arXiv
    1712.05877), as static quantization elsewhere has them: a convolution writes them and the next reads them as they
    lie. Only the chain's input is still rounded image by image. Graphs of torch.compile and traces keep the single
    layers, whose scales are dynamic.
    """

    def __init__(self, steps: Sequence[_Step], flat: bool) -> None:
        super().__init__()
        self._steps, self._flat = tuple(steps), flat
        self.convolutions = nn.ModuleList(step.conv for step in steps if step.conv is not None)
        self._key: Any = None  # the addresses that _network was built on
        self._network: Any = None
        self._ranges: dict[_Step, CodeRange] = {}  # of every step but the last; empty: float maps
        self._seen: dict[_Step, tuple[float, float]] | None = None  # what `observe` has met

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_key": None, "_network": None}

    def forward(self, x: Tensor) -> Tensor:
        """y [n, channels, h', w'] (or [n, channels] after an average that was flattened) in the dtype of x.

        Raises:
            BantamweightError: x is not a float32, bfloat16 or float16 tensor on the CPU with the channels of the first
                layer, is too small for a layer, requires a gradient, or holds NaN or infinity.
        """
        if self._ranges and x.dtype in (torch.bfloat16, torch.float16) and not (is_compiling() or is_tracing()):
            return self.forward(x.float()).to(x.dtype)
        plain = type(x) is Tensor and x.dtype is torch.float32 and x.is_cpu and x.ndim == 4 and len(x)
        if not plain or is_compiling() or is_tracing() or (x.requires_grad and torch.is_grad_enabled()):
            return self._run_layers(x)
        if self._seen is not None:
            return self._run_layers(x)
        key = [conv._addresses for conv in self.convolutions]  # type: ignore[union-attr]
        if key != self._key:
            self._network, self._key = _C.ConvNetwork(self._describe()), key
        images, channels, h, w = x.shape
        status, *size = self._network.output_size(channels, h, w)
        if status:
            return self._run_layers(x)  # the layer that does not take its input says so
        y = torch.empty((images, *size), memory_format=torch.channels_last, dtype=torch.float32, device="cpu")
        status = self._network.forward(x.data_ptr(), images, channels, h, w, *x.stride(), y.data_ptr())
        if status:
            check_status(status, "a chain of packed convolutions")
        return y.flatten(1) if self._flat else y

    @property
    def has_int8_maps(self) -> bool:
        return bool(self._ranges)

    def observe(self, on: bool) -> None:
        """Starts or stops recording the range of every map, on the float maps of the single layers."""
        self._seen = {} if on else None

    def use_int8_maps(self) -> None:
        """Makes the maps between the steps int8, in the ranges that were recorded since `observe`, and stops that.

        Raises:
            CalibrationError: nothing was recorded, or no finite range.
        """
        seen, self._seen = self._seen, None
        if not seen:
            raise CalibrationError(
                f"the calibration data never reaches the chain of convolutions that begins with "
                f"{self._steps[0].conv}; pass calibration data that the whole model runs on"
            )
        ranges: dict[_Step, CodeRange] = {}
        for step in self._steps[:-1]:
            if step.kind in ("max_pool", "subsample"):  # keep the codes they are given
                assert step.input is not None
                ranges[step] = ranges[step.input]
                continue
            low, high = seen[step]
            if not math.isfinite(high - low):
                raise CalibrationError(
                    f"the feature maps behind {step.conv or step.kind} reach from {low:g} to {high:g} on the "
                    "calibration data, which no int8 scale covers; scale the calibration data, or check the weights"
                )
            ranges[step] = CodeRange.covering(0.0 if step.relu else low, high)
        self._ranges, self._key = ranges, None

    def _run_layers(self, x: Tensor) -> Tensor:
        """The way of graphs, of tensors that are more than a plain one, and of refusals."""
        values: dict[_Step | None, Tensor] = {None: x}
        y = x
        for step in self._steps:
            y = step.run(values[step.input], None if step.residual is None else values[step.residual])
            values[step] = y
            if self._seen is not None and y.numel():
                low, high = self._seen.get(step, (0.0, 0.0))
                self._seen[step] = (min(low, float(y.amin())), max(high, float(y.amax())))
        return y.flatten(1) if self._flat else y

    def _describe(self) -> list["_C.NetworkStep"]:
        index: dict[_Step | None, int] = {None: 0}
        described = []
        for step in self._steps:
            made = _C.NetworkStep()
            made.kind, made.input, made.relu = step.kind, index[step.input], step.relu
            made.residual = -1 if step.residual is None else index[step.residual]
            if step.conv is not None:
                made.set_conv(*step.conv._addresses)
            made.kernel_h, made.kernel_w = step.kernel_size
            made.stride_h, made.stride_w = step.stride
            made.pad_h, made.pad_w = step.padding
            made.channels_before, made.channels_after = step.channels
            if (maps := self._ranges.get(step)) is not None:
                made.scale, made.zero = maps.scale, maps.zero
            described.append(made)
            index[step] = len(described)
        return described

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._key = None
        return self

    def extra_repr(self) -> str:
        return f"{len(self._steps)} steps" + (", int8 maps" if self._ranges else "")


def use_int8_maps(model: nn.Module, batches: Iterable[Any]) -> None:
    """Makes the maps inside every chain of the model int8, with ranges from batches (`quantize.calibrate.Batch`).

    Raises:
        BantamweightError: a chain that no batch reaches, or batches that the model or its layers refuse.
    """
    chains = [module for module in model.modules() if isinstance(module, PackedConvChain)]
    for chain in chains:
        chain.observe(True)
    try:
        with torch.no_grad():
            for batch in batches:
                batch.run(model)
        for chain in chains:
            chain.use_int8_maps()
    finally:
        for chain in chains:
            chain.observe(False)


def chain_convolutions(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The packed model with chains of its convolutions run as one call each, and the names of the layers in them.

    Found by torch.fx: `PackedConv2d` with zero padding, ReLU, residual sums, max pooling, global averages, and the
    parameter-free shortcut of ResNets for small images, from one feature map to one other. What lies outside, or what
    torch.fx cannot trace, stays as it is. The model given is changed.
    """
    try:
        graph = LayerTracer().trace(model)
    except Exception as error:  # whatever the model's own forward raises when it meets a proxy
        log.info("%s keeps its layers: torch.fx cannot trace it (%s)", type(model).__name__, error)
        return model, []
    modules: dict[str, nn.Module] = dict(model.named_modules())
    names: list[str] = []
    nodes = list(graph.nodes)
    begin = chains = 0
    while begin < len(nodes):
        found = _longest_chain(nodes[begin:], modules)
        if found is None:
            begin += 1
            continue
        chain = PackedConvChain(found.steps, found.output in found.flat)
        name = f"conv_chain_{chains}"
        model.add_module(name, chain)
        with graph.inserting_after(found.nodes[-1]):
            call = graph.call_module(name, (found.source,))
        assert found.output is not None
        found.output.replace_all_uses_with(call)
        for node in reversed(found.nodes):
            graph.erase_node(node)
        names += [str(node.target) for node in found.nodes if isinstance(_module(node, modules), PackedConv2d)]
        begin += len(found.nodes)
        chains += 1
    if not chains:
        return model, []
    fused = fx.GraphModule(model, graph, type(model).__name__)
    fused.delete_all_unused_submodules()
    return fused.train(model.training), names


def _longest_chain(nodes: list[fx.Node], modules: dict[str, nn.Module]) -> "_Chain | None":
    """The longest run of nodes from the first on that one feature map enters and one leaves."""
    chain = _Chain(modules=modules)
    taken = 0
    for node in nodes:
        if not chain.take(node):
            break
        taken += 1
    for count in range(taken, 1, -1):
        inside = set(nodes[:count])
        leaving = [node for node in nodes[:count] if any(user not in inside for user in node.users)]
        if len(leaving) != 1:
            continue
        chain = _Chain(modules=modules)
        for node in nodes[:count]:
            chain.take(node)
        chain.output = leaving[0]
        last = chain.value.get(leaving[0])
        if last is not None and last is chain.steps[-1] and any(step.conv for step in chain.steps):
            return chain
    return None


@dataclass(kw_only=True)
class _Chain:
    """Steps for nodes, as long as they can be taken."""

    modules: dict[str, nn.Module]
    source: fx.Node | None = None
    output: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    steps: list[_Step] = field(default_factory=list)
    value: dict[fx.Node, _Step | None] = field(default_factory=dict)  # None: the source's
    flat: set[fx.Node] = field(default_factory=set)  # [n, channels]: may only leave
    shared: set[fx.Node] = field(default_factory=set)  # other names of a value that others read as well

    def take(self, node: fx.Node) -> bool:
        taken = self._take(node, _module(node, self.modules))
        if taken:
            self.nodes.append(node)
        return taken

    def _take(self, node: fx.Node, module: nn.Module | None) -> bool:
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return False
        x, *rest = node.args
        if not isinstance(x, fx.Node) or x in self.flat:
            return False
        if self.source is None:  # a chain begins with a convolution
            if not isinstance(module, PackedConv2d):
                return False
            self.source = x
            self.value[x] = None
        if isinstance(module, PackedConv2d):
            if x not in self.value or module.padding_mode != "zeros" or rest or node.kwargs:
                return False
            return self._append(node, _Step(kind="conv", input=self.value[x], conv=module))
        if node.target in _ADDITIONS and len(rest) == 1 and isinstance(rest[0], fx.Node) and not node.kwargs:
            return self._take_sum(node, x, rest[0])
        step = self.value.get(x)
        if step is None:
            return False
        alone = self._alone(x)
        if isinstance(module, nn.ReLU) or node.target in _RELUS:
            if step.kind not in ("conv", "add") or not alone or set(node.kwargs) - {"inplace"}:
                return False
            step.relu = True
            self.value[node] = step
            return True
        nothing = _subsampling(node) == (1, 1) or _channel_padding(node) == (0, 0)
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            nothing = not module.training
        if nothing or isinstance(module, nn.Identity):
            self.value[node] = step
            if not alone:
                self.shared.add(node)
            return True
        if (pool := _pooling(node, module)) is not None:
            size, stride, padding = pool
            return self._append(
                node, _Step(kind="max_pool", input=step, kernel_size=size, stride=stride, padding=padding)
            )
        if (flattens := _average(node, module)) is not None:
            if flattens:
                self.flat.add(node)
            return self._append(node, _Step(kind="average", input=step))
        if _flattens(node, module) and step.kind == "average":
            self.flat.add(node)
            self.value[node] = step
            return True
        if (stride := _subsampling(node)) is not None:
            return self._append(node, _Step(kind="subsample", input=step, stride=stride))
        if (channels := _channel_padding(node)) is not None:
            if step.kind == "subsample" and alone and step.channels == (0, 0):
                step.channels = channels
                self.value[node] = step
                return True
            return self._append(node, _Step(kind="subsample", input=step, channels=channels))
        return False

    def _alone(self, node: fx.Node) -> bool:
        """Whether nothing else reads the node's value, so that its step may become what its one reader makes of it."""
        return len(node.users) == 1 and node not in self.shared

    def _append(self, node: fx.Node, step: _Step) -> bool:
        self.steps.append(step)
        self.value[node] = step
        return True

    def _take_sum(self, node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
        """Into the later convolution of the two, which moves behind what it adds; or a step of its own."""
        found = [(self.value.get(a), a, b), (self.value.get(b), b, a)]
        if any(step is None for step, _, _ in found) or a in self.flat or b in self.flat or a is b:
            return False
        if node.target in (operator.iadd, "add_") and not self._alone(a):  # the others may mean the sum
            return False
        found.sort(key=lambda entry: self.steps.index(entry[0]), reverse=True)  # type: ignore[arg-type]
        for step, own, other in found:
            assert step is not None
            if step.kind == "conv" and not step.relu and step.residual is None and self._alone(own):
                if self.value[other] is step:
                    continue
                self.steps.remove(step)
                self.steps.append(step)
                step.residual = self.value[other]
                self.value[node] = step
                return True
        return self._append(node, _Step(kind="add", input=self.value[a], residual=self.value[b]))


_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def _module(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    return modules.get(str(node.target)) if node.op == "call_module" else None


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _pooling(
    node: fx.Node, module: nn.Module | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """Kernel size, stride and padding of a max pooling that the kernel has."""
    if isinstance(module, nn.MaxPool2d):
        size, stride, padding = module.kernel_size, module.stride, module.padding
        if pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
            return None
    elif node.target in (F.max_pool2d, torch.max_pool2d):
        given = _given(node, ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode"))
        size, stride, padding = given["kernel_size"], given.get("stride"), given.get("padding", 0)
        if pair(given.get("dilation", 1)) != (1, 1) or given.get("ceil_mode") or given.get("return_indices"):
            return None
    else:
        return None
    return pair(size), pair(stride or size), pair(padding)


def _average(node: fx.Node, module: nn.Module | None) -> bool | None:
    """None if the node is no average over all pixels; else whether it drops their dimensions."""
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return False if module.output_size in (1, (1, 1)) else None
    if node.target is F.adaptive_avg_pool2d and len(node.args) == 2:
        return False if node.args[1] in (1, (1, 1)) else None
    if node.target in ("mean", torch.mean):
        given = _given(node, ("x", "dim", "keepdim"))
        dims = given.get("dim")
        if set(given) - {"x", "input", "dim", "keepdim"} or not isinstance(dims, list | tuple):
            return None
        return not given.get("keepdim", False) if {d % 4 for d in dims if isinstance(d, int)} == {2, 3} else None
    return None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    if isinstance(module, nn.Flatten):
        return module.start_dim == 1 and module.end_dim in (-1, 3)
    return node.target in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs


def _subsampling(node: fx.Node) -> tuple[int, int] | None:
    """The strides of ``x[:, :, ::a, ::b]``."""
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) != 4:
        return None
    steps = []
    for index in node.args[1]:
        if not isinstance(index, slice) or index.start not in (None, 0) or index.stop is not None:
            return None
        steps.append(1 if index.step is None else index.step)
    if not all(isinstance(step, int) for step in steps) or steps[:2] != [1, 1]:
        return None
    return (steps[2], steps[3])


def _channel_padding(node: fx.Node) -> tuple[int, int] | None:
    """Zeros before and after the channels, of ``F.pad(x, (0, 0, 0, 0, before, after))``."""
    if node.target is not F.pad:
        return None
    given = _given(node, ("x", "pad", "mode", "value"))
    sides = given.get("pad")
    if not isinstance(sides, list | tuple) or len(sides) != 6 or any(side != 0 for side in sides[:4]):
        return None
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
        return None
    before, after = sides[4:]
    return (before, after) if isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0 else None
