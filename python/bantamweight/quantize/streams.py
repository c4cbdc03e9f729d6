"""Two ways to give every layer its inputs in the analog and in the quantized network, in forward order.

`walk_graph` interprets the traced network node by node over all calibration batches and keeps the values of both
networks alive until their last use: each layer is run once, O(L) for L layers. `replay` needs no trace: for each
layer it runs both networks from the start up to that layer, O(L^2), and keeps one batch alive at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..errors import CalibrationError
from .calibrate import Batch, Streams, TargetLayer, input_rows, tensors_in

# Called for a layer with its name, its inputs (at its first call in a pass), how many rows they hold, and how often a
# pass calls it; puts the quantized layer in place.
Visit = Callable[[str, Iterable[Streams], int, int], None]


class TooMuchMemoryError(Exception):
    """The values alive in `walk_graph` are more than it may keep."""


class _Tracer(fx.Tracer):
    """Traces into every module that holds a target layer."""

    def __init__(self, targets: frozenset[nn.Module]) -> None:
        super().__init__()
        self.targets = targets

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self.targets:
            return True
        holds_target = any(part in self.targets for part in m.modules())
        return super().is_leaf_module(m, module_qualified_name) and not holds_target


def trace(model: nn.Module, targets: Iterable[nn.Module], batch: Batch) -> fx.Graph | None:
    """The graph of the model, or None if it cannot be traced or its graph does not compute what the model does."""
    try:
        graph = _Tracer(frozenset(targets)).trace(model)
        values = _bind(graph, batch)
        interpreter = fx.Interpreter(model, graph=graph)
        traced = interpreter.run(*values.values())
        pairs = zip(tensors_in(traced), tensors_in(batch.run(model)), strict=True)
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs)
    except CalibrationError:
        raise
    except Exception:  # tracing runs the user's code on proxies, which may fail in any way
        return None
    return graph if same else None


def walk_graph(
    graph: fx.Graph,
    analog: nn.Module,
    quantized: nn.Module,
    batches: Sequence[Batch],
    layers: dict[str, TargetLayer],
    visit: Visit,
    max_memory: int,
    changed: Iterable[str] = (),
) -> None:
    """Visits the layers in the order of the graph; `visit` changes `quantized` as it goes.

    Args:
        changed: modules in which the networks differ already.

    Raises:
        TooMuchMemoryError: the live values outgrew `max_memory` bytes; the layers visited so far stay quantized.
    """
    order = list(graph.nodes)
    left = {str(node.target) for node in order if node.op == "call_module"} & set(layers)
    calls = Counter(str(node.target) for node in order if node.op == "call_module")
    last_use = {used: node for node in order for used in node.all_input_nodes}
    # Per node and stream the values of all batches; one list serves both streams where they do not differ.
    alive: dict[fx.Node, tuple[list[Any], list[Any]]] = {}
    inputs = [_bind(graph, batch) for batch in batches]
    differing = set(changed)
    for node in order:
        if node.op == "output" or not left:
            return
        if node.op == "placeholder":
            values = [bound[node] for bound in inputs]
            alive[node] = (values, values)
        else:
            name = str(node.target)
            if node.op == "call_module" and name in left:
                streams = _streams_at(node, alive, batches)
                rows = sum(input_rows(layers[name], x.shape) for x, _, _ in streams)
                visit(name, streams, rows, calls[name])
                left.discard(name)
                differing.add(name)
                if not left:
                    return
            split = node.op == "call_module" and name in differing
            split = split or any(alive[used][0] is not alive[used][1] for used in node.all_input_nodes)
            first = [_execute(node, analog, alive, 0, index) for index in range(len(batches))]
            second = [_execute(node, quantized, alive, 1, index) for index in range(len(batches))] if split else first
            alive[node] = (first, second)
        for used in [node, *node.all_input_nodes]:
            if last_use.get(used, node) is node:
                alive.pop(used, None)
        if _bytes_of(alive) > max_memory:
            raise TooMuchMemoryError


def replay(
    analog: nn.Module,
    quantized: nn.Module,
    batches: Sequence[Batch],
    layers: dict[str, TargetLayer],
    visit: Visit,
) -> None:
    """Visits the layers in the order in which the analog network first calls them."""
    rows: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def count(name: str, layer: TargetLayer) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] += 1
            if name not in seen:
                seen.add(name)
                rows[name] = rows.get(name, 0) + input_rows(layer, _first_input(args, kwargs).shape)

        return hook

    handles = [layer.register_forward_pre_hook(count(name, layer), with_kwargs=True) for name, layer in layers.items()]
    try:
        for batch in batches:
            seen: set[str] = set()
            batch.run(analog)
    finally:
        for handle in handles:
            handle.remove()

    for name, total in rows.items():
        visit(name, _replayed(name, analog, quantized, batches), total, -(-calls[name] // len(batches)))


def _replayed(name: str, analog: nn.Module, quantized: nn.Module, batches: Sequence[Batch]) -> Iterator[Streams]:
    for batch in batches:
        x = _input_of(analog.get_submodule(name), analog, batch)
        x_tilde = _input_of(quantized.get_submodule(name), quantized, batch)
        if x is not None and x_tilde is not None:
            yield x, x if torch.equal(x, x_tilde) else x_tilde, batch.held_out


class _ReachedError(Exception):
    """Ends a forward pass at the layer it was run for."""


def _input_of(layer: nn.Module, model: nn.Module, batch: Batch) -> Tensor | None:
    """The layer's first input in this batch; None if the batch does not reach it."""
    caught: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        caught.append(_first_input(args, kwargs))
        raise _ReachedError

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        batch.run(model)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return caught[0] if caught else None


def _first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What linear and convolution layers call `input`, however it was passed."""
    return args[0] if args else kwargs["input"]


def _bind(graph: fx.Graph, batch: Batch) -> dict[fx.Node, Any]:
    """The arguments of a batch by placeholder."""
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    args, left = batch.fresh()
    bound: dict[fx.Node, Any] = dict(zip(placeholders, args, strict=False))
    for node in placeholders[len(args) :]:
        if str(node.target) in left:
            bound[node] = left.pop(str(node.target))
        elif node.args:
            bound[node] = node.args[0]  # the parameter's default
        else:
            raise CalibrationError(f"a calibration batch has no '{node.target}', which the model's forward requires")
    if left or len(args) > len(placeholders):
        extra = ", ".join(left) or f"{len(args)} tensors"
        raise CalibrationError(f"a calibration batch has {extra}, which the model's forward does not take")
    return bound


def _streams_at(
    node: fx.Node, alive: dict[fx.Node, tuple[list[Any], list[Any]]], batches: Sequence[Batch]
) -> list[Streams]:
    source = _first_input(node.args, node.kwargs)
    assert isinstance(source, fx.Node)
    analog, quantized = alive[source]
    return [(x, y, batch.held_out) for x, y, batch in zip(analog, quantized, batches, strict=True)]


def _execute(
    node: fx.Node,
    model: nn.Module,
    alive: dict[fx.Node, tuple[list[Any], list[Any]]],
    stream: int,
    index: int,
) -> Any:
    args = map_arg(node.args, lambda used: alive[used][stream][index])
    kwargs = map_arg(node.kwargs, lambda used: alive[used][stream][index])
    if node.op == "call_module":
        return model.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    assert node.op == "get_attr"
    value: Any = model
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def _bytes_of(alive: dict[fx.Node, tuple[list[Any], list[Any]]]) -> int:
    sizes = {}
    for streams in alive.values():
        for tensor in tensors_in(streams):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
