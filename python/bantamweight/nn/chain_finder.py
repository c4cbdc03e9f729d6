"""Finds chains of packed convolutions, and of what a chain can run between them, in a graph of torch.fx."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F  # noqa: N812

from ..weights import pair
from .conv_chain import Step
from .packed import PackedConv2d


def find_chains(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> list["FoundChain"]:
    """In the order of their calls, without overlap: `PackedConv2d` with zero padding, ReLU, residual sums, max pooling,
    global averages, and the parameter-free shortcut of ResNets for small images, from one feature map to one other.
    """
    nodes = list(graph.nodes)
    chains: list[FoundChain] = []
    begin = 0
    while begin < len(nodes):
        found = _longest_chain(nodes[begin:], modules)
        if found is not None:
            chains.append(found)
        begin += 1 if found is None else len(found.nodes)
    return chains


def is_plain(module: nn.Module) -> bool:
    """Whether a call of the module runs its class's forward and nothing else: no hook, no forward of its own."""
    return "forward" not in vars(module) and not has_hooks(module)


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _longest_chain(nodes: Sequence[fx.Node], modules: Mapping[str, nn.Module]) -> "FoundChain | None":
    """The longest run of nodes from the first on that one feature map enters and one leaves."""
    chain = FoundChain(modules=modules)
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
        chain = FoundChain(modules=modules)
        for node in nodes[:count]:
            chain.take(node)
        chain.output = leaving[0]
        last = chain.value.get(leaving[0])
        if last is not None and last is chain.steps[-1] and any(step.conv for step in chain.steps):
            return chain
    return None


@dataclass(kw_only=True)
class FoundChain:
    """Steps for nodes, as long as they can be taken."""

    modules: Mapping[str, nn.Module]
    source: fx.Node | None = None
    output: fx.Node | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    value: dict[fx.Node, Step | None] = field(default_factory=dict)  # None: the source's
    flat: set[fx.Node] = field(default_factory=set)  # [n, channels]: may only leave
    dropouts: list[nn.Module] = field(default_factory=list)
    shared: set[fx.Node] = field(default_factory=set)  # other names of a value that others read as well

    @property
    def layers(self) -> list[str]:
        """The names of the convolutions."""
        found = [str(node.target) for node in self.nodes if type(_module(node, self.modules)) is PackedConv2d]
        return list(dict.fromkeys(found))

    def take(self, node: fx.Node) -> bool:
        taken = self._take(node, _module(node, self.modules))
        if taken:
            self.nodes.append(node)
        return taken

    def _take(self, node: fx.Node, module: nn.Module | None) -> bool:
        if node.op not in ("call_module", "call_function", "call_method") or not node.args:
            return False
        if node.op == "call_module" and module is None:
            return False
        x, *rest = node.args
        if not isinstance(x, fx.Node) or x in self.flat:
            return False
        if self.source is None:  # a chain begins with a convolution
            if type(module) is not PackedConv2d:
                return False
            self.source = x
            self.value[x] = None
        if type(module) is PackedConv2d:
            if x not in self.value or module.padding_mode != "zeros" or rest or node.kwargs:
                return False
            return self._append(node, Step(kind="conv", input=self.value[x], conv=module))
        if _function(node) in _ADDITIONS and len(rest) == 1 and isinstance(rest[0], fx.Node) and not node.kwargs:
            return self._take_sum(node, x, rest[0])
        step = self.value.get(x)
        if step is None:
            return False
        alone = self._alone(x)
        if type(module) is nn.ReLU or _function(node) in _RELUS:
            if step.kind not in ("conv", "add") or not alone or set(node.kwargs) - {"inplace"}:
                return False
            step.relu = True
            self.value[node] = step
            return True
        nothing = _subsampling(node) == (1, 1) or _channel_padding(node) == (0, 0)
        if type(module) in (nn.Dropout, nn.Dropout2d):
            nothing = not module.training  # type: ignore[union-attr]
            self.dropouts += [module] * nothing  # type: ignore[list-item]
        if nothing or type(module) is nn.Identity:
            self.value[node] = step
            if not alone:
                self.shared.add(node)
            return True
        if (pool := _pooling(node, module)) is not None:
            size, stride, padding = pool
            return self._append(
                node, Step(kind="max_pool", input=step, kernel_size=size, stride=stride, padding=padding)
            )
        if (flattens := _average(node, module)) is not None:
            if flattens:
                self.flat.add(node)
            return self._append(node, Step(kind="average", input=step))
        if _flattens(node, module) and step.kind == "average":
            self.flat.add(node)
            self.value[node] = step
            return True
        if (stride := _subsampling(node)) is not None:
            return self._append(node, Step(kind="subsample", input=step, stride=stride))
        if (channels := _channel_padding(node)) is not None:
            if step.kind == "subsample" and alone and step.channels == (0, 0):
                step.channels = channels
                self.value[node] = step
                return True
            return self._append(node, Step(kind="subsample", input=step, channels=channels))
        return False

    def _alone(self, node: fx.Node) -> bool:
        """Whether nothing else reads the node's value, so that its step may become what its one reader makes of it."""
        return len(node.users) == 1 and node not in self.shared

    def _append(self, node: fx.Node, step: Step) -> bool:
        self.steps.append(step)
        self.value[node] = step
        return True

    def _take_sum(self, node: fx.Node, a: fx.Node, b: fx.Node) -> bool:
        """Into the later convolution of the two, which moves behind what it adds; or a step of its own."""
        found = [(self.value.get(a), a, b), (self.value.get(b), b, a)]
        if any(step is None for step, _, _ in found) or a in self.flat or b in self.flat or a is b:
            return False
        if _function(node) in (operator.iadd, "add_") and not self._alone(a):  # the others may mean the sum
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
        return self._append(node, Step(kind="add", input=self.value[a], residual=self.value[b]))


_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_RELUS: tuple[Any, ...] = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")


def _module(node: fx.Node, modules: Mapping[str, nn.Module]) -> nn.Module | None:
    """What the node calls, if that is a module whose class says all that the call does."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return module if module is not None and is_plain(module) else None


def _function(node: fx.Node) -> Any:
    """The function or method that the node calls; None for a module, whose name may be that of a method."""
    return node.target if node.op in ("call_function", "call_method") else None


def _given(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any]:
    """The arguments by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _pooling(
    node: fx.Node, module: nn.Module | None
) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]] | None:
    """Kernel size, stride and padding of a max pooling that the kernel has."""
    if type(module) is nn.MaxPool2d:
        size, stride, padding = module.kernel_size, module.stride, module.padding
        if pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
            return None
    elif _function(node) in (F.max_pool2d, torch.max_pool2d):
        given = _given(node, ("x", "kernel_size", "stride", "padding", "dilation", "ceil_mode"))
        size, stride, padding = given["kernel_size"], given.get("stride"), given.get("padding", 0)
        if pair(given.get("dilation", 1)) != (1, 1) or given.get("ceil_mode") or given.get("return_indices"):
            return None
    else:
        return None
    return pair(size), pair(stride or size), pair(padding)


def _average(node: fx.Node, module: nn.Module | None) -> bool | None:
    """None if the node is no average over all pixels; else whether it drops their dimensions."""
    if type(module) is nn.AdaptiveAvgPool2d:
        return False if module.output_size in (1, (1, 1)) else None
    if _function(node) is F.adaptive_avg_pool2d and len(node.args) == 2:
        return False if node.args[1] in (1, (1, 1)) else None
    if _function(node) in ("mean", torch.mean):
        given = _given(node, ("x", "dim", "keepdim"))
        dims = given.get("dim")
        if set(given) - {"x", "input", "dim", "keepdim"} or not isinstance(dims, list | tuple):
            return None
        return not given.get("keepdim", False) if {d % 4 for d in dims if isinstance(d, int)} == {2, 3} else None
    return None


def _flattens(node: fx.Node, module: nn.Module | None) -> bool:
    if type(module) is nn.Flatten:
        return module.start_dim == 1 and module.end_dim in (-1, 3)
    return _function(node) in ("flatten", torch.flatten) and node.args[1:] == (1,) and not node.kwargs


def _subsampling(node: fx.Node) -> tuple[int, int] | None:
    """The strides of ``x[:, :, ::a, ::b]``."""
    if _function(node) is not operator.getitem or not isinstance(node.args[1], tuple) or len(node.args[1]) != 4:
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
    if _function(node) is not F.pad:
        return None
    given = _given(node, ("x", "pad", "mode", "value"))
    sides = given.get("pad")
    if not isinstance(sides, list | tuple) or len(sides) != 6 or any(side != 0 for side in sides[:4]):
        return None
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
        return None
    before, after = sides[4:]
    return (before, after) if isinstance(before, int) and isinstance(after, int) and min(before, after) >= 0 else None
