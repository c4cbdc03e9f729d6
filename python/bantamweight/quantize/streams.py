"""Every layer's inputs in the analog and in the quantized network, in forward order.

All batches pass through both networks side by side and stop at each layer until it is quantized: each network runs
once, O(L) for L layers. A layer that a pass calls several times (a recurrent cell, a shared block) is calibrated on all
of its calls, for which both networks run up to the last of them first. Where the activations of all batches together
would take too much memory, the networks run up to each layer anew, O(L^2), one batch alive at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from ..data import Batch, tensors_in
from ..errors import BantamweightError, CalibrationError
from .calibrate import Streams, TargetLayer, input_rows
from .passes import AbandonedError, Pass, replica, watched

# Called for a layer with its name, its inputs, how many rows they hold, and how often a pass calls it; the layer is
# quantized when it returns.
Visit = Callable[[str, Iterable[Streams], int, int], None]

_MOST_PASSES = 256  # threads that wait at a time: two for every batch


@dataclass(kw_only=True)
class Survey:
    """What one pass of every batch through the analog network showed.

    Attributes:
        order: the layers in the order in which they are first called.
        calls: of every batch, how often it calls each layer.
        rows: rows (samples, tokens, patches) that each layer sees in all batches and calls.
        live_bytes: of the activations of all batches that are alive at a layer, at most.
    """

    order: list[str] = field(default_factory=list)
    calls: list[Counter[str]] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)
    live_bytes: int = 0

    def most_calls(self, name: str) -> int:
        return max(calls[name] for calls in self.calls)


def survey(model: nn.Module, layers: Mapping[str, TargetLayer], batches: Sequence[Batch]) -> Survey:
    """Runs every batch through the network once.

    Raises:
        CalibrationError: the model refuses a batch.
        BantamweightError: the network calls layers that are not its own.
    """
    found = Survey()
    for number, batch in enumerate(batches):
        calls: Counter[str] = Counter()
        alive = _Alive()

        def reached(name: str, x: Tensor, calls: Counter[str] = calls, alive: _Alive = alive) -> None:
            if name not in layers:
                raise BantamweightError(
                    f"a copy of the model calls layer '{name.removeprefix('original ')}' of the model itself, "
                    "through a closure or a forward that was set on the instance; make it a method of the class, or "
                    "quantize the module inside"
                )
            calls[name] += 1
            found.rows[name] += input_rows(layers[name], x.shape)
            alive.add(x)
            alive.measure()

        try:
            with alive.watching():
                watched(replica(model, layers.values()), batch, reached)
        except BantamweightError:
            raise
        except Exception as error:  # whatever the user's own code raises on data that it was not made for
            said = " ".join(str(error).split())[:300]
            raise CalibrationError(
                f"the model does not run on calibration batch {number} ({type(error).__name__}: {said}); pass what the "
                "model itself takes, in its dtype and shape: tensors, tuples of its arguments, or dicts of keywords"
            ) from error
        _merge(found.order, list(calls))
        found.calls.append(calls)
        found.live_bytes += alive.most
    return found


def walk(
    analog: nn.Module,
    quantized: nn.Module,
    layers: Mapping[str, TargetLayer],
    batches: Sequence[Batch],
    seen: Survey,
    visit: Visit,
    max_memory: int,
) -> str:
    """Visits the layers in the order of the survey; `visit` makes each a quantized one in `quantized`.

    Args:
        layers: of `analog`; gates stand before them and before their counterparts in `quantized`.

    Returns:
        "one pass", or "replay" where the activations of all batches outgrow `max_memory` bytes.
    """
    networks = (_Network(analog, layers), _Network(quantized, counterparts(quantized, layers)))
    state = sum(_bytes_of(buffer) for buffer in analog.buffers())
    one_pass = 2 * len(batches) <= _MOST_PASSES and 2 * (seen.live_bytes + len(batches) * state) <= max_memory
    waiting = {name for name in seen.order if one_pass and seen.most_calls(name) == 1}
    passes = [tuple(network.start(batch, waiting.__contains__) for network in networks) for batch in batches]
    try:
        for name in seen.order:
            step = _stopped(name, passes) if name in waiting else _replayed(name)
            streams = _streams(networks, name, batches, seen, step)
            visit(name, streams, seen.rows[name], seen.most_calls(name))
            waiting.discard(name)
    finally:
        for pair in passes:
            for each in pair:
                each.close()
    return "one pass" if one_pass else "replay"


def counterparts(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules of the same names in another network."""
    return {name: model.get_submodule(name) for name in layers}


@dataclass(frozen=True)
class _Network:
    model: nn.Module
    layers: Mapping[str, nn.Module]

    def start(self, batch: Batch, stops: Callable[[str], bool]) -> Pass:
        return Pass(replica(self.model, self.layers.values()), batch, stops)

    def inputs_of(self, name: str, batch: Batch, calls: int) -> list[Tensor]:
        """The layer's inputs at its first `calls` calls."""
        caught: list[Tensor] = []

        def reached(other: str, x: Tensor) -> None:
            if other == name:
                caught.append(x.clone() if calls > 1 else x)  # later steps may change it in place
                if len(caught) == calls:
                    raise AbandonedError

        with suppress(AbandonedError):
            watched(replica(self.model, self.layers.values()), batch, reached)
        return caught


# The layer's inputs in one network and batch, given how often the survey saw it called.
_Step = Callable[[int, int, _Network, Batch, int], list[Tensor]]


def _stopped(name: str, passes: Sequence[tuple[Pass, ...]]) -> _Step:
    def step(index: int, stream: int, network: _Network, batch: Batch, calls: int) -> list[Tensor]:
        x = passes[index][stream].input_at(name)
        # A batch that calls layers in another order than the first has gone past this one.
        return network.inputs_of(name, batch, calls) if x is None else [x]

    return step


def _replayed(name: str) -> _Step:
    return lambda index, stream, network, batch, calls: network.inputs_of(name, batch, calls)


def _streams(
    networks: tuple[_Network, _Network], name: str, batches: Sequence[Batch], seen: Survey, step: _Step
) -> Iterator[Streams]:
    for index, batch in enumerate(batches):
        calls = seen.calls[index][name]
        if not calls:
            continue
        analog, quantized = (step(index, stream, network, batch, calls) for stream, network in enumerate(networks))
        for x, x_tilde in zip(analog, quantized, strict=False):  # control flow on values may end one earlier
            x_tilde = x if torch.equal(x, x_tilde) else x_tilde
            yield x if _correspond(x, x_tilde) else x_tilde, x_tilde, batch.held_out


def _correspond(x: Tensor, x_tilde: Tensor) -> bool:
    """Whether the rows are the same ones in both networks.

    A network that routes (experts, say) may send other tokens to a layer once it is quantized. Then the analog inputs
    say nothing about these, and the layer is calibrated on the quantized network's alone.
    """
    if x is x_tilde:
        return True
    return x.shape == x_tilde.shape and bool((x_tilde - x).norm() <= x.norm())


def _merge(order: list[str], calls: list[str]) -> None:
    """Puts names that are new into the order, each behind the one that this batch calls before it."""
    at = 0
    for name in calls:
        if name in order:
            at = order.index(name) + 1
        else:
            order.insert(at, name)
            at += 1


class _Alive:
    """The bytes of modules' outputs that are alive at a time."""

    def __init__(self) -> None:
        self.tensors: dict[int, tuple[ref[Tensor], int]] = {}
        self.most = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        handle = register_module_forward_hook(lambda _, args, output: self.add(output))
        try:
            yield
        finally:
            handle.remove()

    def add(self, value: Any) -> None:
        for tensor in tensors_in(value):
            self.tensors[id(tensor)] = ref(tensor), _bytes_of(tensor)

    def measure(self) -> None:
        self.tensors = {key: entry for key, entry in self.tensors.items() if entry[0]() is not None}
        self.most = max(self.most, sum(size for _, size in self.tensors.values()))


def _bytes_of(tensor: Tensor) -> int:
    """Of its entries, as if they were all there: sparse and nested tensors do not say what they take."""
    return tensor.numel() * tensor.element_size()
