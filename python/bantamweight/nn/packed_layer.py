"""What packed layers share: memory that kernels read by its address, and what models read of it.

A packed layer is for inference. It keeps its weight only in the kernel's layout; its state dict and the file it is
saved to hold the canonical form, so both move between machines.
"""

from typing import Any, Self

import torch
from torch import Tensor, fx, nn
from torch._C import _get_tracing_state  # pyright: ignore[reportPrivateImportUsage]
from torch.compiler import is_compiling

from ..errors import BantamweightError
from ..ops.lowbit_linear import ALIGNMENT
from ..weights import QuantizedWeight
from .layer import QuantizedLayer, check_bias
from .lazy_weight import LazyWeight, lazy_weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of a packed layer's inputs


class PackedLayer(QuantizedLayer):
    """A kernel's layout and a bias, and their addresses as plain ints: a call must cost little more than the kernel.

    Both are checked when they are set, by whatever way, and an address is used only while the tensor still lies there.
    """

    form = "packed"
    kind: str  # "linear", "conv2d" or "embedding"
    activation_bits: int | None = 8
    layout: Tensor
    kernel: str
    levels: int
    _fixed: frozenset[str] = frozenset({"rows", "columns"})  # attributes that the layout settles
    _dtype: torch.dtype  # of the model's other weights
    _at: tuple[int, int, int]  # addresses when they were last checked
    _kept: tuple[Tensor, Tensor | None]  # other tensors of the same memory, so that it stays while a kernel reads it
    _weight: LazyWeight | None

    def __init__(self, quantized: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        check_bias(bias, quantized.out_features)
        self.rows, self.columns = quantized.out_features, quantized.in_features
        self._dtype = torch.float32
        self.register_buffer("layout", None, persistent=False)  # the state dict is QuantizedLayer's work
        self.register_buffer("bias", None if bias is None else bias.detach().to("cpu", torch.float32, copy=True))
        self._hold(quantized)

    def _hold(self, quantized: QuantizedWeight) -> None:
        before = vars(self).get("levels"), vars(self).get("scheme")
        self.levels, self.scheme = quantized.levels, quantized.scheme
        try:
            self.layout = self.pack(quantized)
        except BaseException:
            self.levels, self.scheme = before  # type: ignore[assignment]
            raise

    def pack(self, quantized: QuantizedWeight) -> Tensor:
        """The weight in the layout of the kernel that will run it."""
        raise NotImplementedError

    def adopt(self, layout: Tensor) -> None:
        """Takes over what a layout's header says, or refuses a layout of another layer."""
        raise NotImplementedError

    def set_quantized(self, weight: QuantizedWeight) -> None:
        self.check_same_shape(weight)
        self._hold(weight)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of the weight as torch's layer has it."""
        return (self.rows, self.columns)

    @property
    def weight(self) -> Tensor:
        """The weight in the layer's own shape, for models that read it: dequantized when something is computed with it.

        Its dtype is that of the model's other weights (float32, or what `.half()` and `.bfloat16()` made of them;
        float32 after `.double()`), so ``x.to(layer.weight.dtype)`` gives what the layer and its neighbours take. It is
        no parameter and no buffer, and cannot be changed.
        """
        layout = self.layout
        arguments = (layout, self.kind, self.levels, self.weight_shape, self._dtype)
        if isinstance(layout, fx.Proxy) or is_compiling() or _get_tracing_state():
            return torch.ops.bantamweight.lowbit_weight(*arguments)
        if self._weight is None:
            self.__dict__["_weight"] = lazy_weight(*arguments)
        return self._weight  # type: ignore[return-value]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "layout":
            self._take(value, self._buffers["bias"])
        elif name == "bias":
            self._take(self._buffers["layout"], value)
        elif name == "weight":
            raise BantamweightError(
                f"{self.name_of_layer} has its weight as codes in a kernel's layout; put another one in place with "
                "set_quantized, or change the simulated form (nn.unpack)"
            )
        elif name in self._fixed and vars(self).get(name, value) != value:
            raise BantamweightError(
                f"{name} of {self.name_of_layer} is {vars(self)[name]!r} and settled when the layer is packed, so it "
                f"cannot become {value!r}; set it on the float layer, or pack again"
            )
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in ("layout", "bias"):
            raise BantamweightError(
                f"{self.name_of_layer} hands its {name} to a kernel, which no deletion and no parametrization reaches; "
                "set bias to None to drop it, or change the simulated form (nn.unpack)"
            )
        super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_at", "_kept", "_weight")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"_dtype": torch.float32, **state})
        self._take(self._buffers["layout"], self._buffers["bias"])

    @property
    def _addresses(self) -> tuple[int, int, int]:
        """The addresses of the layout, its bytes and the bias (0 for none), as they are now."""
        layout, bias = self._buffers["layout"], self._buffers["bias"]
        at = self._at
        if layout.data_ptr() != at[0] or (0 if bias is None else bias.data_ptr()) != at[2]:  # type: ignore[union-attr]
            self._take(layout, bias)
        return self._at

    def _take(self, layout: Any, bias: Any) -> None:
        """Makes the two the layer's own, in the form that kernels read; refuses what has none and changes nothing."""
        if not isinstance(layout, Tensor):
            raise BantamweightError(
                f"layout of {self.name_of_layer} is a {type(layout).__name__}, but must be a packed weight; put "
                "another one in place with set_quantized"
            )
        for name, part in (("layout", layout), ("bias", bias)):
            if isinstance(part, Tensor) and part.layout == torch.strided and not part.is_meta and _is_cut(part):
                raise BantamweightError(
                    f"the memory of {name} of {self.name_of_layer} was taken away; set {name} again"
                )
        check_bias(bias, self.rows)
        if bias is not None and not _is_plain(bias):
            bias = bias.detach().to("cpu", torch.float32).as_subclass(Tensor).contiguous().resolve_neg()
        if layout.data_ptr() % ALIGNMENT:
            layout = layout.clone()
        self.adopt(layout)
        self._buffers["layout"], self._buffers["bias"] = layout, bias
        kept = (layout.detach(), None if bias is None else bias.detach())
        at = (layout.data_ptr(), layout.numel(), 0 if bias is None else bias.data_ptr())
        self.__dict__.update(_kept=kept, _at=at, _weight=None)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        probe = fn(torch.empty(0, dtype=self._dtype, device="cpu"))
        if probe.device.type != "cpu":
            raise BantamweightError(
                f"{self.name_of_layer} is packed for the CPU and cannot move to {probe.device}; move the float or the "
                "simulated model (nn.unpack)"
            )
        layout, bias = self._buffers["layout"], self._buffers["bias"]
        super()._apply(fn, recurse)
        moved, moved_bias = self._buffers["layout"], self._buffers["bias"]
        assert moved is not None and layout is not None
        # Module.type() and to_empty() would make other bytes of it.
        if moved is not layout and (moved.dtype != torch.uint8 or not torch.equal(moved, layout)):
            moved = layout
        # .half() is for inputs and outputs, which the layer converts; the bias stays float32.
        if moved_bias is not None and moved_bias.dtype != torch.float32:
            moved_bias = bias
        if probe.is_floating_point():
            self._dtype = probe.dtype if probe.dtype in _DTYPES else torch.float32
        self._take(moved, moved_bias)
        return self

    def refuse_gradient(self) -> None:
        raise BantamweightError(
            f"{self.name_of_layer} is for inference, but the input requires a gradient; call it under torch.no_grad() "
            "or train the simulated form (nn.unpack)"
        )

    def refuse_layout(self, came: str) -> None:
        raise BantamweightError(
            f"a layout of {came} came for {self.name_of_layer}; put another weight in place with set_quantized"
        )

    def describe(self) -> str:
        inputs = "" if self.activations == "int8" else f", {self.activations} inputs"
        return f"bias={self.bias is not None}, packed {self.scheme} {self.kernel}{inputs}"


def _is_plain(bias: Tensor) -> bool:
    """True for what a kernel can read as it lies."""
    usual = type(bias) is Tensor and bias.dtype == torch.float32 and bias.is_cpu and bias.is_contiguous()
    return usual and not bias.requires_grad and not bias.is_neg()


def _is_cut(part: Tensor) -> bool:
    """True where the tensor reaches beyond its storage, which resize_ of the storage may have made smaller."""
    if part.numel() == 0 or type(part) not in (Tensor, nn.Parameter):
        return False
    last = sum((size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True))
    return part.untyped_storage().nbytes() < (part.storage_offset() + last + 1) * part.itemsize
