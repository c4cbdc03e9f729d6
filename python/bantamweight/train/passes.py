"""The passes of a sharpness-aware step: gradients, and gradients with a Hessian-vector product."""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import BantamweightError
from .perturbation import norms
from .second_derivative import LeanSecondDerivatives
from .snapshot import Snapshot

Closure = Callable[[], Any]


class NotFinite(Exception):  # noqa: N818  (a signal between two modules, not an error to show)
    """A loss or gradient is infinite or NaN; `gradients` are the ones to show a GradScaler."""

    def __init__(self, what: str, gradients: list[Tensor | None]) -> None:
        super().__init__(what)
        self.gradients = gradients


class Passes:
    """Runs the closures at the weights as they are, and gives unscaled gradients that nobody else holds."""

    def __init__(
        self,
        closures: Sequence[Closure],
        parameters: Sequence[Tensor],
        model: nn.Module | None,
        scaler: torch.amp.GradScaler | None,
        snapshot: Snapshot,
    ) -> None:
        self.closures, self.parameters, self.scaler, self.snapshot = closures, parameters, scaler, snapshot
        self.distributed = model if isinstance(model, DistributedDataParallel) else None
        self.loss: Any = None  # of the first pass

    def gradient(self, exact: bool = False) -> list[Tensor | None]:
        """By ordinary backward passes, ours or (but for `exact`) the closure's."""
        self._begin()
        total = None
        ours = None
        for closure in self.closures:
            with torch.enable_grad():
                loss = closure()
                if ours is None:
                    ours = all(p.grad is None for p in self.parameters)
                if ours:
                    self._scale(_with_graph(loss)).backward()
                elif exact:
                    raise BantamweightError(
                        'the closure called backward itself, but mode="exact" differentiates the gradient and needs '
                        'the loss with its graph: return the loss without calling backward, or use mode="fd"'
                    )
            total = _add(total, loss.detach() if isinstance(loss, Tensor) else loss)
        self.loss = total if self.loss is None else self.loss
        gradients = [p.grad for p in self.parameters]
        for index, parameter in enumerate(self.parameters):
            parameter.grad = None
            g = gradients[index]
            if g is not None and g.layout is not torch.strided:
                raise BantamweightError(
                    f"a gradient has layout {g.layout}, but only dense ones are handled: set sparse=False"
                )
            if g is not None and g._is_view():  # a bucket of DistributedDataParallel, overwritten by the next pass
                gradients[index] = g.clone()
        self._unscale(gradients)
        self.check_finite(gradients, None if self._is_distributed() else total)
        return gradients

    def gradient_and_product(self, pull: Callable[[list[Tensor | None]], list[Tensor | None]]) -> list[Tensor | None]:
        """d = g* + H v with v = pull(g*), by differentiating <g*, v>.

        One closure's graph serves both. With several, g* of all is needed before v is known, so each runs again.
        """
        if len(self.closures) > 1:
            ascended = self.gradient()
            v = pull(ascended)
            products: list[Tensor | None] = [None] * len(ascended)
            with self._unsynchronised():
                self._begin()
                for closure in self.closures:
                    graph = self._graph(closure)
                    products = [_add(p, q) for p, q in zip(products, self._product(graph, v), strict=True)]
        else:
            with self._unsynchronised():
                self._begin()
                graph = self._graph(self.closures[0])
            ascended = [None if g is None else g.detach().clone() for g in graph]
            self._unscale(ascended)
            self._average(ascended)
            self.check_finite(ascended)
            v = pull(ascended)
            products = self._product(graph, v)
        self._unscale(products)
        self._average(products)
        direction = [_add(a, p) for a, p in zip(ascended, products, strict=True)]
        self.check_finite(direction)
        return direction

    def check_finite(self, gradients: list[Tensor | None], loss: Any = None) -> None:
        """One wait for the device. A loss of one process alone is not looked at: all must decide alike."""
        present = [g for g in gradients if g is not None]
        if isinstance(loss, Tensor) and not bool(torch.isfinite(loss).all()):
            raise NotFinite("the loss", [None if g is None else torch.full_like(g, torch.nan) for g in gradients])
        if present and not bool(torch.isfinite(norms(present)).all()):
            raise NotFinite("the gradient", gradients)

    def _graph(self, closure: Closure) -> list[Tensor | None]:
        """Gradients that can be differentiated."""
        with torch.enable_grad():
            with LeanSecondDerivatives():
                loss = _with_graph(closure())
            with _needing_double_backward():
                graph = torch.autograd.grad(self._scale(loss), self.parameters, create_graph=True, allow_unused=True)
        return list(graph)

    def _product(self, graph: list[Tensor | None], v: list[Tensor | None]) -> list[Tensor | None]:
        """H v, scaled as the loss is. A gradient without a graph does not depend on the weights: its share is 0."""
        pairs = [(g, u) for g, u in zip(graph, v, strict=True) if g is not None and u is not None and g.requires_grad]
        if not pairs:
            return [None] * len(graph)
        outputs, along = zip(*pairs, strict=True)
        with _needing_double_backward():
            return list(torch.autograd.grad(outputs, self.parameters, along, allow_unused=True))

    def _begin(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        self.snapshot.replay_rng()
        torch.clear_autocast_cache()  # it would hand out the 16-bit copies of the weights before they were moved

    def _scale(self, loss: Tensor) -> Tensor:
        return loss if self.scaler is None else self.scaler.scale(loss)  # type: ignore[return-value]

    def _unscale(self, gradients: list[Tensor | None]) -> None:
        present = [g for g in gradients if g is not None]
        if self.scaler is not None and present:
            torch._foreach_div_(present, self.scaler.get_scale())

    def _is_distributed(self) -> bool:
        return torch.distributed.is_available() and torch.distributed.is_initialized()

    def _unsynchronised(self) -> AbstractContextManager[Any]:
        """DistributedDataParallel averages what backward accumulates, and torch.autograd.grad accumulates nothing."""
        return nullcontext() if self.distributed is None else self.distributed.no_sync()

    def _average(self, gradients: list[Tensor | None]) -> None:
        if self.distributed is None:
            return
        group: Any = self.distributed.process_group
        # A parameter unused here may be used in another process: all must send the same list.
        for index, parameter in enumerate(self.parameters):
            g = gradients[index]
            if g is None:
                g = gradients[index] = torch.zeros_like(parameter)
            torch.distributed.all_reduce(g, group=group)
        torch._foreach_div_([g for g in gradients if g is not None], group.size())


def _add(a: Any, b: Any) -> Any:
    return b if a is None else a if b is None else a + b


def _with_graph(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise BantamweightError(
            f"the closure returned {came} and no gradients were set, but must return a scalar loss that depends on "
            "the parameters: do not detach it, and do not use torch.no_grad"
        )
    return loss


# What torch says of custom functions, of fused kernels, and of torch.compile'd graphs.
_NO_SECOND_DERIVATIVE = ("double backward", "is not implemented", "requires create_graph=False")


class _needing_double_backward(AbstractContextManager):  # noqa: N801  (used as a verb)
    """Turns torch's message where an operation has no second derivative into what to do about it."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_SECOND_DERIVATIVE):
            raise BantamweightError(
                'mode="exact" differentiates the gradient, and an operation of this model cannot be differentiated '
                f'twice ({str(error).splitlines()[0]}): use mode="fd"'
            ) from error
