"""What the simulated and the packed form of a layer share: one state dict, in canonical form.

Either form saves ``codes`` (bit-packed), ``scale``, ``zero``, ``grid`` (int64 [out, in, levels, group_size])
and ``bias``, so each loads the other's state dict, on any machine.
"""

import inspect
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from ..errors import BantamweightError, FormatError
from ..io.bitpack import pack_codes, unpack_codes
from ..weights import ConvGeometry, QuantizedWeight
from .surgery import become

L = TypeVar("L", bound=nn.Module)

CANONICAL = ("codes", "scale", "zero", "grid")


def canonical_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors that stand for a weight in a state dict."""
    grid = [weight.out_features, weight.in_features, weight.levels, weight.group_size]
    return {
        "codes": pack_codes(weight.codes, weight.levels),
        "scale": weight.scale,
        "zero": weight.zero,
        "grid": torch.tensor(grid, dtype=torch.int64),
    }


def weight_of(tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The inverse of `canonical_tensors`; refuses tensors that do not fit together."""
    grid = tensors["grid"]
    if grid.dtype != torch.int64 or tuple(grid.shape) != (4,):
        raise FormatError(
            f"grid is {grid.dtype} {list(grid.shape)}, but must be int64 [4]: out, in, levels, group size; "
            "load a state dict that a quantized layer made"
        )
    if any(part.is_meta for part in tensors.values()):
        raise FormatError("its tensors are on the meta device, which holds no values; load a state dict that is whole")
    out_features, in_features, levels, group_size = grid.tolist()
    codes = tensors["codes"]
    if out_features < 0 or in_features < 0 or not 2 <= levels <= 256 or codes.ndim != 2 or len(codes) != out_features:
        raise FormatError(
            f"grid says {out_features}x{in_features} codes of {levels} levels, which codes of {list(codes.shape)} "
            "cannot hold; load a state dict that a quantized layer made"
        )
    return QuantizedWeight(
        codes=unpack_codes(codes.detach(), levels, in_features),
        scale=tensors["scale"].detach().to(codes.device, copy=True),
        zero=tensors["zero"].detach().to(codes.device, copy=True),
        levels=levels,
        group_size=group_size,
    )


class QuantizedLayer(nn.Module):
    """Base of the quantized layers. `form` is "simulated" or "packed"."""

    form: str
    bias: Tensor | None
    scheme: str
    weight: Any  # as torch's layer has it: a Tensor; of the packed form one that is dequantized when it is used
    rows: int  # of the weight's matrix: output channels
    columns: int  # inputs of a channel
    activation_bits: int | None  # 8 where inputs are rounded as `activations` says
    activations: str = "int8"  # how a linear layer's kernel rounds its inputs: "int8", "int8-block" or "int16"

    like: nn.Parameter  # without entries: models ask their first parameter for a dtype and a device

    def __init__(self) -> None:
        super().__init__()
        self.register_parameter("like", nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False))

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in canonical form."""
        raise NotImplementedError

    def set_quantized(self, weight: QuantizedWeight) -> None:
        """Puts another weight of the same shape in place."""
        raise NotImplementedError

    @property
    def name_of_layer(self) -> str:
        """What the layer is, for error sentences."""
        return f"{type(self).__name__} {self.rows}x{self.columns}"

    def check_same_shape(self, weight: QuantizedWeight) -> None:
        if (weight.out_features, weight.in_features) != (self.rows, self.columns):
            raise BantamweightError(
                f"a weight of {weight.out_features}x{weight.in_features} came for a {type(self).__name__} of "
                f"{self.rows}x{self.columns}; pass the weight of this layer"
            )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "like"]
        for name, tensor in canonical_tensors(self.quantized).items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing = [prefix + name for name in CANONICAL if prefix + name not in state_dict]
        if missing:
            missing_keys.extend(missing)
        else:
            try:
                self.set_quantized(weight_of({name: state_dict[prefix + name] for name in CANONICAL}))
            except BantamweightError as error:
                error_msgs.append(f"{prefix.removesuffix('.') or type(self).__name__}: {error}")
        rest = {key: value for key, value in state_dict.items() if key not in {prefix + name for name in CANONICAL}}
        rest[prefix + "like"] = self.like
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


class Conv2dAttributes:
    """What models read of an nn.Conv2d beside its tensors, and torch's own operation with them."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    transposed = False
    output_padding = (0, 0)

    @property
    def geometry(self) -> ConvGeometry:
        """The arguments in one piece."""
        return ConvGeometry.of(self)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self.geometry.sides, mode=self.padding_mode), 0
        return F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)

    def _words(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding!r}, dilation={self.dilation}, groups={self.groups}"
        )


class EmbeddingAttributes:
    """What models read of an nn.Embedding beside its table. A table of codes has no norm to keep and no gradients."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    max_norm: float | None = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False


def change_form(layer: nn.Module, form: L) -> L:
    """`layer` becomes `form` where it is (`surgery.become`); what only its own form needs does not stay."""
    for kind in type(layer).__mro__:
        if issubclass(kind, QuantizedLayer):
            for name in inspect.get_annotations(kind):  # what a class declares is its own, the rest is the user's
                vars(layer).pop(name, None)
    if isinstance(layer, QuantizedLayer) and isinstance(form, QuantizedLayer):
        form.like = layer.like
    return become(layer, form)


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """Refuses a bias that is not one finite float a channel."""
    if bias is None:
        return
    fits = isinstance(bias, Tensor) and bias.is_floating_point() and tuple(bias.shape) == (out_features,)
    if not fits or bias.is_meta or bias.layout != torch.strided:
        came = f"a {type(bias).__name__}"
        if isinstance(bias, Tensor):
            where = f" on {bias.device}" if bias.is_meta else ""
            kind = "" if bias.layout == torch.strided else f"{bias.layout} "
            came = f"{kind}{bias.dtype} {list(bias.shape)}{where}"
        raise BantamweightError(
            f"bias is {came}, but {out_features} channels need a float tensor [{out_features}] or None"
        )
    if not bool(torch.isfinite(bias).all()):
        raise BantamweightError("bias holds NaN or infinity, but must be finite; look for NaN in the trained model")
