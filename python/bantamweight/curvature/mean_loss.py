"""The mean loss over all batches, and its derivatives, on graphs that are kept while they fit in memory.

The gradient's graph is built once, so that a Hessian-vector product costs one backward pass through it (about two
gradients). Where an operation has no second derivative the product is taken forward over reverse instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from bantamweight.curvature.batches import as_batches, evaluation
from bantamweight.errors import CalibrationError, UnsupportedLayerError

LossFunction = Callable[[Any, Any], Tensor]
NO_SECOND_DERIVATIVE = re.compile(r"is not implemented|once_differentiable|not.*twice")


class MeanLoss:
    """The loss over all batches, and its first and second derivatives: what every block of one Hessian shares."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        data: Any,
        parameters: dict[str, nn.Parameter],
        mode: str,
        differentiation: str,
        graph_memory: int | None,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.loss_fn, self.parameters, self.mode = model, loss_fn, parameters, mode
        self.group = process_group
        self.processes = dist.get_world_size(process_group) if process_group is not None else 1
        self.device = next(iter(parameters.values())).device
        self.batches = as_batches(data, self.device)
        self._allow_fallback = differentiation == "auto"
        self.differentiation = "double_backward" if differentiation == "auto" else differentiation
        totals = torch.tensor([sum(batch.samples for batch in self.batches), 0.0], dtype=torch.float64)
        self.samples = float(self._all_reduce(totals)[0])
        self._graphs: dict[int, dict[str, Tensor]] = {}
        memory = free_memory(self.device) // 4 if graph_memory is None else graph_memory
        try:
            value = self._build(memory)
        except _NoDoubleBackwardError as error:
            self._fall_back(error)
            value = self._build(memory)
        self.value = float(self._all_reduce(torch.tensor([value], dtype=torch.float64))[0])

    def _build(self, memory: int) -> float:
        """Evaluates every batch, keeps the graphs that fit, and returns this process's part of the mean loss."""
        if self.differentiation == "forward_over_reverse":
            with torch.no_grad():
                return sum(self._weight(i) * float(self._evaluate(i)) for i in range(len(self.batches)))
        if len(self.batches) == 1:
            loss, self._graphs[0] = self._differentiate(0)
            return self._weight(0) * float(loss)
        with _saved_bytes() as saved:  # the graph built while counting holds hooks; it is dropped and built again
            self._differentiate(0)
        kept = max(1, memory // max(1, saved.total))
        total = 0.0
        for i in range(len(self.batches)):
            if i < kept:
                loss, self._graphs[i] = self._differentiate(i)
            else:
                with torch.no_grad():
                    loss = self._evaluate(i)
            total += self._weight(i) * float(loss)
        return total

    def _weight(self, i: int) -> float:
        return self.batches[i].samples / self.samples

    def _evaluate(self, i: int, overrides: dict[str, Tensor] | None = None) -> Tensor:
        batch = self.batches[i]
        # The fused attention kernels have no second derivative; the plain mathematical form has.
        with evaluation(self.model, self.mode), sdpa_kernel(SDPBackend.MATH):
            if overrides is None:
                output = self.model(*batch.arguments, **batch.keywords)
            else:
                output = torch.func.functional_call(self.model, overrides, batch.arguments, batch.keywords)
            loss = self.loss_fn(output, batch.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise CalibrationError(f"loss_fn returned {came}, but must return a scalar tensor; use reduction='mean'")
        if not torch.isfinite(loss.detach()):
            raise CalibrationError(
                f"the loss of batch {i} is {float(loss.detach())}, so it has no curvature; "
                "check the data and the weights"
            )
        return loss.reshape(())

    def _differentiate(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The batch's loss and its gradient with the graph for a second backward pass."""
        with torch.enable_grad():
            loss = self._evaluate(i)
            if not loss.requires_grad:
                raise CalibrationError("the loss does not depend on any parameter that requires grad")
            gradients = torch.autograd.grad(
                loss, list(self.parameters.values()), create_graph=True, materialize_grads=True
            )
        if _ends_in_an_error(gradients):
            raise _NoDoubleBackwardError("a function is marked once_differentiable")
        return loss.detach(), dict(zip(self.parameters, gradients, strict=True))

    def gradient(self, names: Sequence[str]) -> list[Tensor]:
        total: list[Tensor] | None = None
        for i in range(len(self.batches)):
            if i in self._graphs:
                parts = [self._graphs[i][name].detach() for name in names]
            else:
                variables = [self.parameters[name] for name in names]
                with torch.enable_grad():
                    parts = list(torch.autograd.grad(self._evaluate(i), variables, materialize_grads=True))
            total = accumulate(total, parts, self._weight(i))
        return self._all_reduce_parts(total)

    def product(self, names: Sequence[str], vectors: list[Tensor]) -> list[Tensor]:
        total: list[Tensor] | None = None
        for i in range(len(self.batches)):
            total = accumulate(total, self._batch_product(i, names, vectors), self._weight(i))
        return self._all_reduce_parts(total)

    def _batch_product(self, i: int, names: Sequence[str], vectors: list[Tensor]) -> list[Tensor]:
        if self.differentiation == "double_backward":
            try:
                return self._double_backward(i, names, vectors)
            except RuntimeError as error:
                self._fall_back(error)
        try:
            return self._forward_over_reverse(i, names, vectors)
        except (RuntimeError, NotImplementedError) as error:
            if "mplement" not in str(error):
                raise
            raise UnsupportedLayerError(
                f"an operation of the model has neither a double backward nor a forward derivative "
                f"({_first_line(error)}); replace it, or exclude its parameters with blocks="
            ) from error

    def _fall_back(self, error: RuntimeError) -> None:
        """From double backward to forward over reverse, if `error` says that an operation lacks the former."""
        if not isinstance(error, _NoDoubleBackwardError) and not NO_SECOND_DERIVATIVE.search(str(error)):
            raise error
        if not self._allow_fallback:
            raise UnsupportedLayerError(
                f"an operation of the model has no double backward ({_first_line(error)}); "
                "use differentiation='forward_over_reverse' or 'auto'"
            ) from error
        self.differentiation = "forward_over_reverse"
        self._graphs.clear()

    def _double_backward(self, i: int, names: Sequence[str], vectors: list[Tensor]) -> list[Tensor]:
        kept = i in self._graphs
        graph = self._graphs[i] if kept else self._differentiate(i)[1]
        variables = [self.parameters[name] for name in names]
        # A gradient that does not depend on any parameter (a linear model's) has no graph: its rows are zero.
        curved = [(graph[name], v) for name, v in zip(names, vectors, strict=True) if graph[name].requires_grad]
        if not curved:
            return [torch.zeros_like(p) for p in variables]
        gradients, directions = zip(*curved, strict=True)
        return list(torch.autograd.grad(gradients, variables, directions, retain_graph=kept, materialize_grads=True))

    def _forward_over_reverse(self, i: int, names: Sequence[str], vectors: list[Tensor]) -> list[Tensor]:
        with torch.enable_grad(), forward_ad.dual_level():
            duals = {
                name: forward_ad.make_dual(self.parameters[name].detach().requires_grad_(), v)
                for name, v in zip(names, vectors, strict=True)
            }
            gradients = torch.autograd.grad(self._evaluate(i, duals), list(duals.values()), materialize_grads=True)
            tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
        return [torch.zeros_like(v) if t is None else t.detach() for t, v in zip(tangents, vectors, strict=True)]

    def _all_reduce(self, tensor: Tensor) -> Tensor:
        if self.group is None:
            return tensor
        tensor = tensor.to(self.device) if dist.get_backend(self.group) == "nccl" else tensor
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def _all_reduce_parts(self, parts: list[Tensor] | None) -> list[Tensor]:
        assert parts is not None  # there is at least one batch
        if self.group is None:
            return [part.contiguous() for part in parts]
        flat = self._all_reduce(torch.cat([part.reshape(-1) for part in parts]))
        return [f.view(p.shape) for f, p in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


class _NoDoubleBackwardError(RuntimeError):
    """Found in the graph, where autograd itself would silently give zeros."""


def _ends_in_an_error(gradients: Iterable[Tensor]) -> bool:
    """Whether the gradients' graph holds a node that only raises: it is tied to no parameter, so it would never run."""
    seen, waiting = set(), [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            return True
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def accumulate(total: list[Tensor] | None, parts: list[Tensor], weight: float) -> list[Tensor]:
    """total + weight * parts, in place where there is a total."""
    if total is None:
        return parts if weight == 1.0 else [part * weight for part in parts]
    for sum_so_far, part in zip(total, parts, strict=True):
        sum_so_far.add_(part, alpha=weight)
    return total


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].strip()


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`, or a careful guess where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 4 << 30


class _SavedBytes:
    def __init__(self) -> None:
        self.total = 0
        self._seen: set[int] = set()

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.total += storage.nbytes()
        return tensor


@contextmanager
def _saved_bytes() -> Iterator[_SavedBytes]:
    saved = _SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.add, lambda tensor: tensor):
        yield saved
