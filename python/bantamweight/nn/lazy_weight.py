"""The weight of a packed layer as models read it: a tensor that is dequantized once something is computed with it."""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import BantamweightError
from ..ops.embedding import unpack_embedding
from ..ops.lowbit_conv2d import unpack_conv2d
from ..ops.lowbit_linear import LIBRARY, unpack_linear
from ..weights import conv_weight

_UNPACK = {"linear": unpack_linear, "conv2d": unpack_conv2d, "embedding": unpack_embedding}


class LazyWeight(Tensor):
    """A tensor that knows its shape and dtype, and computes its values whenever an operation wants them.

    Models ask a layer's weight for its dtype at every call, which must cost nothing; some also compute with it, which
    must be right. A view stays lazy; every other operation takes and gives plain tensors. It cannot be changed in
    place, because the codes that it stands for would not follow.

    Example:
        >>> from bantamweight import QuantizedWeight
        >>> from bantamweight.nn import PackedLinear
        >>> codes = torch.tensor([[0, 1, 2], [2, 1, 0]], dtype=torch.uint8)
        >>> layer = PackedLinear(QuantizedWeight.from_codes(codes, 0.5, 1.0, levels=3))
        >>> layer.weight
        LazyWeight([2, 3], torch.float32)
        >>> layer.weight + 1
        tensor([[0.5000, 1.0000, 1.5000],
                [1.5000, 1.0000, 0.5000]])
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    values: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, values: Callable[[], Tensor], like: Tensor) -> "LazyWeight":
        """The tensor that `values` computes; `like` has its shape, strides and dtype, on any device."""
        self = Tensor._make_wrapper_subclass(
            cls, like.shape, like.stride(), like.storage_offset(), dtype=like.dtype, device=torch.device("cpu")
        )
        self.values = values
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        arguments = func._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        written = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
        if any(isinstance(leaf, cls) for name in written for leaf in tree_leaves(given.get(name))):
            _refuse_change()
        with torch.no_grad():
            if func.is_view or func is torch.ops.aten.alias.default:
                shapes = tree_map_only(cls, _on_meta, (args, kwargs))
                like = func(*shapes[0], **shapes[1])
                if isinstance(like, Tensor):
                    return cls(lambda: func(*_computed(args), **_computed(kwargs)), like)
            return func(*_computed(args), **_computed(kwargs))

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self

    @data.setter
    def data(self, value: Any) -> None:
        _refuse_change()

    @property
    def requires_grad(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, mode: bool = True) -> Self:
        return _refuse_change() if mode else self

    def __setitem__(self, index: Any, value: Any) -> None:
        _refuse_change()

    def data_ptr(self) -> int:
        raise BantamweightError("the weight of a packed layer has no memory of its own; clone it first")

    def numpy(self, *, force: bool = False) -> Any:
        return self.values().numpy(force=force)

    def tolist(self) -> Any:
        return self.values().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # nothing can change it

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.values().__reduce_ex__(protocol)

    def __format__(self, format_spec: str) -> str:
        return format(self.values(), format_spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"LazyWeight({list(self.shape)}, {self.dtype})"


def lazy_weight(layout: Tensor, kind: str, levels: int, shape: Sequence[int], dtype: torch.dtype) -> LazyWeight:
    """The weight in a packed layout.

    Args:
        layout: of `ops.pack_linear`, `ops.pack_conv2d` or `ops.pack_embedding`.
        kind: "linear", "conv2d" or "embedding".
        levels: as in the weight that was packed.
        shape: of the layer's weight, [out, in], [out, in / groups, kh, kw] or [rows, columns].
        dtype: that the weight has.
    """
    like = torch.empty(tuple(shape), dtype=dtype, device="meta")
    return LazyWeight(lambda: dequantized(layout, kind, levels, shape, dtype), like)


def dequantized(layout: Tensor, kind: str, levels: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The same as a plain tensor."""
    matrix = _UNPACK[kind](layout, levels).dequantize()
    weight = conv_weight(matrix, shape[2], shape[3]) if kind == "conv2d" else matrix
    return weight.to(dtype)


def _computed(values: Any) -> Any:
    return tree_map_only(LazyWeight, lambda weight: weight.values(), values)


def _on_meta(weight: Tensor) -> Tensor:
    return torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="meta")


def _refuse_change() -> NoReturn:
    raise BantamweightError(
        "the weight of a packed layer is computed from its codes and cannot be changed in place; change the simulated "
        "form (nn.unpack), or clone the weight first"
    )


def _weight_fake(layout: Tensor, kind: str, levels: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return layout.new_empty(tuple(shape), dtype=dtype)


# A graph that only asks for the dtype drops the operation again.
LIBRARY.define("lowbit_weight(Tensor layout, str kind, int levels, int[] shape, ScalarType dtype) -> Tensor")
LIBRARY.impl("lowbit_weight", dequantized, "CPU")
torch.library.register_fake("bantamweight::lowbit_weight", _weight_fake, lib=LIBRARY)
