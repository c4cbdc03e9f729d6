"""Forward passes that are watched, and stopped, where they call chosen layers.

A pass runs the model's own code in a thread of its own. At a layer that is still to be quantized it stops and hands out
its input; the layer is quantized where it is, and the pass goes on through it. So each network runs once, whatever its
control flow, and nothing has to be traced.
"""

import copy
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batch

# Called with a layer's name and input before each of its calls.
Reached = Callable[[str, Tensor], None]

_here = threading.local()  # `reached`: what the pass that this thread runs does at a layer


class AbandonedError(BaseException):
    """Ends a pass that is not needed further; no `except Exception` of the model's may stop it."""


@contextmanager
def gates(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While it is open, calls of these layers are reported to the pass that makes them.

    The gate stands in for the layer's forward, behind its pre-hooks, and looks the forward up when the pass goes on:
    the layer may have become another one in the meantime.
    """

    def gate(name: str, layer: nn.Module) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            reached = getattr(_here, "reached", None)
            if reached is not None:
                reached(name, args[0] if args else kwargs["input"])
            return type(layer).forward(layer, *args, **kwargs)

        return forward

    for name, layer in layers.items():
        vars(layer)["forward"] = gate(name, layer)
    try:
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)


def watched(model: nn.Module, batch: Batch, reached: Reached) -> Any:
    """The model's output, telling `reached` of every call of a layer behind a gate."""
    _here.reached = reached
    try:
        return batch.run(model)
    finally:
        _here.reached = None


def replica(model: nn.Module, layers: Iterable[nn.Module]) -> nn.Module:
    """A copy for one pass to leave its state on (caches, buffers); it shares `layers` and all parameters."""
    memo: dict[int, Any] = {id(layer): layer for layer in layers}
    memo |= {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


class Pass:
    """One batch on its way through a network.

    Args:
        model: a replica of its own.
        stops: whether to stop at a layer of this name.
    """

    def __init__(self, model: nn.Module, batch: Batch, stops: Callable[[str], bool]) -> None:
        self.model, self.batch, self.stops = model, batch, stops
        self.at: str | None = None
        self.input: Tensor | None = None
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._ended = self._closing = False
        # Threads start without the modes of the one that made them.
        self._autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def input_at(self, name: str) -> Tensor | None:
        """The layer's input, or None if the pass ended without stopping there."""
        while self.at != name and not self._ended:
            self._advance()
        return self.input if self.at == name else None

    def close(self) -> None:
        """Ends the pass where it is."""
        if self._thread is not None and not self._ended:
            self._closing = True
            self._advance()
        if self._thread is not None:
            self._thread.join()

    def _advance(self) -> None:
        """On to the next stop, or to the end."""
        self.at = self.input = None
        if self._thread is None:
            self._thread = threading.Thread(target=self._body, daemon=True)
            self._thread.start()
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _body(self) -> None:
        self._go.acquire()
        enabled, dtype = self._autocast
        try:
            with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=enabled):
                watched(self.model, self.batch, self._reached)
        except AbandonedError:
            pass
        except BaseException as error:  # handed to the thread that waits
            self._error = error
        self._ended = True
        self._back.release()

    def _reached(self, name: str, x: Tensor) -> None:
        if self._closing:
            raise AbandonedError
        if self.stops(name):
            self.at, self.input = name, x
            self._back.release()
            self._go.acquire()
            if self._closing:
                raise AbandonedError
