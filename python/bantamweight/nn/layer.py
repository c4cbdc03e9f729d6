"""What the simulated and the packed form of a layer share: one state dict, in canonical form.

Either form saves ``codes`` (bit-packed), ``scale``, ``zero``, ``grid`` (int64 [out, in, levels, group_size])
and ``bias``, so each loads the other's state dict, on any machine.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BantamweightError, FormatError
from ..io.bitpack import pack_codes, unpack_codes
from ..weights import QuantizedWeight

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
    rows: int  # of the weight's matrix: output channels
    columns: int  # inputs of a channel
    activation_bits: int | None  # 8 where inputs are rounded as `activations` says
    activations: str = "int8"  # how a linear layer's kernel rounds its inputs: "int8", "int8-block" or "int16"

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
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


def check_bias(bias: Tensor | None, out_features: int) -> None:
    """Refuses a bias that is not one finite float a channel."""
    if bias is None:
        return
    if not isinstance(bias, Tensor) or not bias.is_floating_point() or tuple(bias.shape) != (out_features,):
        came = f"{bias.dtype} {list(bias.shape)}" if isinstance(bias, Tensor) else f"a {type(bias).__name__}"
        raise BantamweightError(
            f"bias is {came}, but {out_features} channels need a float tensor [{out_features}] or None"
        )
    if not bool(torch.isfinite(bias).all()):
        raise BantamweightError("bias holds NaN or infinity, but must be finite; look for NaN in the trained model")
