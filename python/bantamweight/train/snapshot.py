"""What a training step may disturb and must be able to put back: weights, gradients, RNG, running statistics."""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel


class Snapshot:
    """The state before a step, and the way back to it.

    Copies are kept because w + e - e is not bit-exact. Normalisation layers are taken from `model`, or, without
    one, noticed as they run forward; each is copied before its first forward pass of the step.
    """

    def __init__(self, parameters: Sequence[Tensor], moved: Sequence[Tensor], model: nn.Module | None) -> None:
        self._parameters, self._moved = parameters, moved
        self._gradients = [p.grad for p in parameters]
        self._weights: list[Tensor] = []
        self._devices = sorted({p.device for p in parameters if p.device.type != "cpu"}, key=str)
        self._rng = self._rng_state()
        self._seen: set[int] = set()
        self._statistics: list[Tensor] = []
        self._before: list[Tensor] = []
        self._once: list[Tensor] = []
        self.saw_distributed = False
        self._hook = None
        self._open = True
        if model is None:
            self._hook = register_module_forward_pre_hook(lambda module, _: self._notice(module))
        else:
            self._notice(model)

    # ---- weights ----------------------------------------------------------------------------------------------

    def keep_weights(self) -> None:
        """Copies the weights that are about to be moved."""
        self._weights = [p.detach().clone() for p in self._moved]

    def restore_weights(self) -> None:
        if self._weights:
            with torch.no_grad():
                torch._foreach_copy_(list(self._moved), self._weights)

    # ---- random numbers ---------------------------------------------------------------------------------------

    def replay_rng(self) -> None:
        """Every pass of a step sees the same dropout masks: differences of gradients are then due to the weights."""
        cpu, others = self._rng
        torch.set_rng_state(cpu)
        for device, state in zip(self._devices, others, strict=True):
            getattr(torch, device.type).set_rng_state(state, device)

    def _rng_state(self) -> tuple[Tensor, list[Tensor]]:
        others = [getattr(torch, device.type).get_rng_state(device) for device in self._devices]
        return torch.get_rng_state(), others

    # ---- normalisation statistics -----------------------------------------------------------------------------

    def _notice(self, module: nn.Module) -> None:
        """Copies the running statistics of every normalisation layer within `module`, once a step."""
        if id(module) in self._seen:
            return
        for part in module.modules():
            if id(part) in self._seen:
                continue
            self._seen.add(id(part))
            self.saw_distributed |= isinstance(part, DistributedDataParallel)
            if isinstance(part, _NormBase) and part.track_running_stats:
                new = [b for b in (part.running_mean, part.running_var, part.num_batches_tracked) if b is not None]
                self._statistics += new
                self._before += [b.clone() for b in new]

    def keep_statistics(self) -> None:
        """Remembers the statistics after the first pass: the ones a step ends with."""
        self._once = [b.clone() for b in self._statistics]

    def _set_statistics(self, values: list[Tensor]) -> None:
        with torch.no_grad():
            for buffer, value in zip(self._statistics, values, strict=False):
                buffer.copy_(value)

    # ---- the two ends of a step -------------------------------------------------------------------------------

    def commit(self) -> None:
        """The step is done: weights as updated by the caller, statistics as after one pass."""
        self._close()
        if self._once:
            self._set_statistics(self._once)
        self._open = False

    def rollback(self) -> None:
        """The step is off: everything as before, unless it was committed."""
        self._close()
        if self._open:
            self.restore_weights()
            self._set_statistics(self._before)
            self.replay_rng()
            for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
                parameter.grad = gradient

    def _close(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Holds Ctrl-C back until the block is done, so that no interrupt falls between two halves of an update."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield  # signals reach the main thread alone, and a handler set outside Python cannot be put back
        return
    pending: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            previous(*pending[0])
