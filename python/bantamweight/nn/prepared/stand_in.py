"""What a forward finds in the place of a weight that lives in a child: a tensor that turns products into calls.

The forward is somebody else's and stays as it is. Where it hands the weight to a linear function, a convolution, a
matrix product or a lookup, the child is called; whatever else it does with it happens on the float weight.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunctionSubclass  # pyright: ignore[reportPrivateImportUsage]
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

PRODUCTS = ("linear", "conv1d", "conv2d", "embedding")


@dataclass(frozen=True, kw_only=True)
class Use:
    """How a forward uses a weight.

    Attributes:
        op: one of `PRODUCTS`: what the child computes.
        experts: how many weights [a, b] a 3d parameter holds, each with a child of its own; None for one weight.
        transposed: whether a linear child's weight is the parameter with its last two dimensions exchanged.
        bias: the parameter of the same module that is handed over as the bias, which the child then holds.
        geometry: of a convolution, as of nn.Conv2d; of an embedding, its padding_idx.
    """

    op: str
    experts: int | None = None
    transposed: bool = False
    bias: str | None = None
    geometry: tuple[tuple[str, Any], ...] = ()

    def record(self) -> dict[str, Any]:
        return {**asdict(self), "geometry": {key: _listed(value) for key, value in self.geometry}}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Use:
        geometry = tuple((key, _tupled(value)) for key, value in record["geometry"].items())
        return cls(**{**record, "geometry": geometry})


class StandIn(Tensor):
    """Has the shape, dtype and device of the weight (or of an expert's, or of its transpose), and no values."""

    _host: Any  # the module, which has the children
    _name: str
    _expert: int | None
    _transposed: bool

    @staticmethod
    def of(
        host: Any,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        expert: int | None = None,
        transposed: bool = False,
    ) -> StandIn:
        made: Any = Tensor._make_wrapper_subclass(StandIn, tuple(shape), dtype=dtype, device=device)  # type: ignore[attr-defined]
        made._host, made._name, made._expert, made._transposed = host, name, expert, transposed
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if handler is not None:
            found = handler(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        return func(*_floats(args), **_floats(kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Reached from compiled code, which asks no __torch_function__.
        return func(*_floats(args), **_floats(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StandIn({self._name}, {list(self.shape)})"

    def floats(self) -> Tensor:
        """The values that it stands for."""
        weight = self._host.float_weight(self._name, self._expert)
        return weight.mT if self._transposed else weight


def _floats(value: Any) -> Any:
    """The arguments of a call with float weights; each is then used in a way that no child computes."""
    if isinstance(value, StandIn):
        value._host.used_otherwise(value._name)
        return value.floats()
    if type(value) in (list, tuple):
        return type(value)(_floats(part) for part in value)
    if isinstance(value, dict):
        return {key: _floats(part) for key, part in value.items()}
    return value


def _expert_of(w: StandIn, expert: int) -> StandIn:
    return StandIn.of(w._host, w._name, w.shape[1:], w.dtype, w.device, expert, w._transposed)


def _item(func: Any, w: Any, index: Any) -> Any:
    scalar = type(index) is int or (isinstance(index, Tensor) and index.ndim == 0 and not index.is_floating_point())
    if not isinstance(w, StandIn) or not scalar or index.__class__ is bool or w._expert is not None or w.ndim != 3:
        return NotImplemented
    if isinstance(index, Tensor) and index.dtype is torch.bool:
        return NotImplemented
    return _expert_of(w, range(w.shape[0])[int(index)])


def _select(func: Any, w: Any, dim: int, index: int) -> Any:
    return _item(func, w, index) if dim == 0 else NotImplemented


def _unbind(func: Any, w: Any, dim: int = 0) -> Any:
    if not isinstance(w, StandIn) or w.ndim != 3 or dim != 0:
        return NotImplemented
    return tuple(_expert_of(w, index) for index in range(w.shape[0]))


def _iterate(func: Any, w: Any) -> Any:
    found = _unbind(func, w)
    return found if found is NotImplemented else iter(found)


def _transpose(func: Any, w: Any, dim0: int, dim1: int) -> Any:
    if not isinstance(w, StandIn) or w.ndim > 3 or {dim0 % w.ndim, dim1 % w.ndim} != {w.ndim - 2, w.ndim - 1}:
        return NotImplemented
    shape = (*w.shape[:-2], w.shape[-1], w.shape[-2])
    return StandIn.of(w._host, w._name, shape, w.dtype, w.device, w._expert, not w._transposed)


def _matrix_transpose(func: Any, w: Any, *_: Any) -> Any:
    # .T and .t() are transposes of matrices only.
    if w.ndim != 2 and func != torch.Tensor.mT.__get__:  # type: ignore[attr-defined]
        return NotImplemented
    return _transpose(func, w, -2, -1)


def _permute(func: Any, w: Any, *dims: Any) -> Any:
    order = dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims
    last = [*range(w.ndim - 2), w.ndim - 1, w.ndim - 2]
    return _transpose(func, w, -2, -1) if [dim % w.ndim for dim in order] == last else NotImplemented


def _unchanged(func: Any, w: Any, *args: Any, **kwargs: Any) -> Any:
    """Conversions to the dtype and device that it has already."""
    if not isinstance(w, StandIn) or any(isinstance(part, StandIn) for part in args):
        return NotImplemented
    probe = func(torch.empty(0, dtype=w.dtype, device=w.device), *args, **kwargs)
    return w if probe.dtype == w.dtype and probe.device == w.device else NotImplemented


def _linear(func: Any, input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, StandIn) or not isinstance(weight, StandIn) or weight.ndim != 2 or input.is_sparse:
        return NotImplemented
    return weight._host.call(weight, Use(op="linear", transposed=weight._transposed), input, bias)


def _matmul(func: Any, x: Any, w: Any) -> Any:
    if isinstance(x, StandIn) or not isinstance(w, StandIn) or x.shape[-1:] != w.shape[-2:-1]:
        return NotImplemented
    use = Use(op="linear", transposed=not w._transposed)
    if w.ndim == 2:
        return w._host.call(w, use, x, None)
    if x.ndim != 3 or len(x) != len(w):
        return NotImplemented
    parts = [w._host.call(_expert_of(w, i), use, part, None) for i, part in enumerate(x.unbind(0))]
    return NotImplemented if any(part is NotImplemented for part in parts) else torch.stack(parts)


def _addmm(func: Any, bias: Any, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(x, StandIn) or not isinstance(w, StandIn) or w.ndim != 2 or (alpha, beta) != (1, 1):
        return NotImplemented
    return w._host.call(w, Use(op="linear", transposed=not w._transposed), x, bias)


def _einsum(func: Any, equation: Any, *operands: Any) -> Any:
    """An equation that is a product of the last dimension of x with a weight, or with every expert's."""
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    if not isinstance(equation, str) or len(operands) != 2 or not isinstance(operands[1], StandIn):
        return NotImplemented
    terms, _, out = equation.replace(" ", "").partition("->")
    first, _, second = terms.partition(",")
    x, w = operands
    batch = first[:1] if w.ndim == 3 and first[:1] == second[:1] else ""
    rows = second[len(batch) :]
    if len(rows) != 2 or isinstance(x, StandIn) or len({*first}) != len(first) or len({*second}) != len(second):
        return NotImplemented
    for summed, made, turned in ((rows[0], rows[1], w), (rows[1], rows[0], w.mT)):
        if first.endswith(summed) and made not in first and out == first[:-1] + made:
            return _matmul(func, x, turned)
    return NotImplemented


def _grouped_mm(
    func: Any, x: Any, w: Any, *more: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None
) -> Any:
    """Rows of x, sorted by expert, times each expert's weight; offs are where the rows of each end."""
    if more and offs is None:
        (offs,) = more
    if not isinstance(w, StandIn) or w.ndim != 3 or x.ndim != 2 or offs is None or bias is not None:
        return NotImplemented
    use, begin = Use(op="linear", transposed=not w._transposed), 0
    parts: list[Tensor] = []
    for index, end in enumerate(offs.tolist()):
        if end > begin:
            parts.append(w._host.call(_expert_of(w, index), use, x[begin:end], None))
        begin = max(begin, end)
    if any(part is NotImplemented for part in parts):
        return NotImplemented
    rest = x.new_zeros(len(x) - begin, w.shape[2])  # rows of no expert, which torch leaves unset
    joined = torch.cat((*parts, rest))
    return joined if out_dtype is None else joined.to(out_dtype)


def _convolution(func: Any, *args: Any, **kwargs: Any) -> Any:
    given = _CONVOLUTION.bind(*args, **kwargs)
    given.apply_defaults()
    x, weight, bias = (given.arguments.pop(name) for name in ("input", "weight", "bias"))
    if isinstance(x, StandIn) or not isinstance(weight, StandIn) or weight.ndim not in (3, 4):
        return NotImplemented
    groups = given.arguments.pop("groups")
    sizes = {name: _pair(value, weight.ndim - 2) for name, value in given.arguments.items()}
    op = "conv2d" if weight.ndim == 4 else "conv1d"
    return weight._host.call(weight, Use(op=op, geometry=(*sizes.items(), ("groups", groups))), x, bias)


def _convolution_signature(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> None:
    """As of F.conv1d and F.conv2d, which have none that `inspect` could read."""


_CONVOLUTION = inspect.signature(_convolution_signature)


def _embedding(
    func: Any, input: Any, weight: Any, padding_idx: Any = None, max_norm: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if isinstance(input, StandIn) or not isinstance(weight, StandIn) or max_norm is not None or weight.ndim != 2:
        return NotImplemented
    if weight._transposed or weight._expert is not None:
        return NotImplemented
    row = padding_idx if padding_idx is None or padding_idx >= 0 else padding_idx + weight.shape[0]
    return weight._host.call(weight, Use(op="embedding", geometry=(("padding_idx", row),)), input, None)


def _pair(value: Any, count: int) -> Any:
    """A size of a convolution as nn.Conv2d wants it; what a 1d one says is about columns."""
    if isinstance(value, str):
        return value
    sizes = (value,) * count if isinstance(value, int) else tuple(value)
    return sizes * count if len(sizes) < count else sizes


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_T = torch.Tensor
_METADATA = {
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda")),
    *(getattr(_T, name).__get__ for name in ("is_sparse", "is_meta", "is_cpu", "is_nested", "is_quantized", "is_leaf")),
    *(_T.size, _T.dim, _T.numel, _T.nelement, _T.ndimension, _T.is_floating_point, _T.is_complex, _T.__len__),
    *(torch.is_floating_point, torch.is_complex, torch.numel, _T.element_size, _T.get_device),
}
_HANDLERS: dict[Any, Callable[..., Any]] = {
    _T.__getitem__: _item,
    **{func: _select for func in (_T.select, torch.select)},
    **{func: _unbind for func in (_T.unbind, torch.unbind)},
    _T.__iter__: _iterate,
    **{func: _transpose for func in (_T.transpose, torch.transpose, _T.swapaxes, torch.swapaxes)},
    **{func: _matrix_transpose for func in (_T.t, torch.t, _T.T.__get__, _T.mT.__get__)},  # type: ignore[attr-defined]
    **{func: _permute for func in (_T.permute, torch.permute)},
    **{func: _unchanged for func in (_T.to, _T.type_as, _T.float, _T.half, _T.bfloat16, _T.double, _T.cpu)},
    **{func: _unchanged for func in (_T.contiguous, _T.detach, torch.detach, _T.data.__get__)},  # type: ignore[attr-defined]
    F.linear: _linear,
    **{func: _matmul for func in (_T.__matmul__, _T.matmul, torch.matmul, _T.mm, torch.mm, _T.bmm, torch.bmm)},
    **{func: _addmm for func in (torch.addmm, _T.addmm)},
    torch.einsum: _einsum,
    **{func: _convolution for func in (F.conv1d, F.conv2d)},
    F.embedding: _embedding,
    **{
        func: _grouped_mm
        for func in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None))
        if func is not None
    },
}
