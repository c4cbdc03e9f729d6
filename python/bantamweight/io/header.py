"""The versioned JSON header of a model file: what is in the file, checked field by field before use."""

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

from ..errors import FormatError
from ..weights import ConvGeometry
from .bitpack import packing_for

FORMAT_VERSION = 1
METADATA_KEY = "bantamweight"
MAX_SIZE = 2**31 - 1  # of any dimension: what the kernels take


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One quantized layer. `zero` is the zero of every group, or None where the file holds a tensor of them."""

    kind: str  # "linear", "conv2d" or "embedding"
    shape: tuple[int, int]  # [out, in] of the codes; of an embedding [rows, columns]
    levels: int
    group_size: int
    packing: str
    zero: float | None = None
    bias: bool = False
    activation_bits: int | None = None  # of the simulated form
    activations: str = "int8"  # how a linear layer's kernel rounds its inputs
    conv: ConvGeometry | None = None
    padding_idx: int | None = None  # of an embedding

    @property
    def n_groups(self) -> int:
        return -(-self.shape[1] // self.group_size)

    def tensors(self) -> dict[str, tuple[str, list[int]]]:
        """Name, safetensors dtype and shape of each tensor the file holds for this layer."""
        n, k = self.shape
        found = {
            "codes": ("U8", [n, packing_for(self.levels).row_bytes(k)]),
            "scale": ("F32", [n, self.n_groups]),
        }
        if self.zero is None:
            found["zero"] = ("F32", [n, self.n_groups])
        if self.bias:
            found["bias"] = ("F32", [n])
        return found


@dataclass(frozen=True, kw_only=True)
class ModelHeader:
    """All a file says about its model beside the tensors.

    Attributes:
        layers: the quantized layers by name.
        same_layer: a second name of a layer that the model uses twice -> the name in `layers`.
        same_tensor: a second name of a tied tensor -> the name in the file.
        folded: BatchNorm that was folded away -> the layer it was folded into.
        prepared: module -> what was done to it before it was quantized, as `nn.prepare` repeats it.
        quantization: what the quantizer reported, less what the records in `layers` say.
        extra: what the caller of `save` added.
    """

    format_version: int
    layers: dict[str, LayerRecord]
    same_layer: dict[str, str] = field(default_factory=dict)
    same_tensor: dict[str, str] = field(default_factory=dict)
    folded: dict[str, str] = field(default_factory=dict)
    prepared: dict[str, dict[str, Any]] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """Compact JSON; a field that has its default value is left out, because headers of small models count."""
        return json.dumps(_without_defaults(self), sort_keys=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, path: object) -> "ModelHeader":
        """Reads and checks a header; raises FormatError with one sentence that names the field."""
        try:
            raw = json.loads(text, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: its header is not JSON ({error}); get a whole copy of the file") from None
        check = _Check(path)
        raw = check.mapping(raw, "the header")
        version = check.integer(raw.get("format_version"), "format_version", 1)
        if version > FORMAT_VERSION:
            raise FormatError(
                f"{path}: its format_version is {version}, but this bantamweight reads up to {FORMAT_VERSION}; "
                "upgrade bantamweight"
            )
        layers = check.mapping(raw.get("layers"), "layers")
        header = cls(
            format_version=version,
            layers={name: check.layer(record, name) for name, record in layers.items()},
            same_layer=check.names(raw.get("same_layer", {}), "same_layer"),
            same_tensor=check.names(raw.get("same_tensor", {}), "same_tensor"),
            folded=check.names(raw.get("folded", {}), "folded"),
            prepared={
                name: check.mapping(done, f"prepared[{name!r}]")
                for name, done in check.mapping(raw.get("prepared", {}), "prepared").items()
            },
            quantization=check.mapping(raw.get("quantization", {}), "quantization"),
            extra=check.mapping(raw.get("extra", {}), "extra"),
        )
        for second, first in header.same_layer.items():
            if first not in header.layers or second in header.layers:
                check.fail(f"same_layer[{second!r}]", first, "the name of a layer in layers, given once")
        return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_defaults(item) for key, item in value.items()}
    if not is_dataclass(value):
        return value
    kept = {}
    for each in fields(value):
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        if getattr(value, each.name) != default:
            kept[each.name] = _without_defaults(getattr(value, each.name))
    return kept


@dataclass(frozen=True)
class _Check:
    """Typed reads of hostile JSON."""

    path: object

    def fail(self, what: str, came: object, allowed: str) -> None:
        shown = repr(came)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        raise FormatError(
            f"{self.path}: {what} is {shown}, but must be {allowed}; the file is damaged or not made by bantamweight, "
            "get a whole copy"
        )

    def mapping(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(what, value, "a JSON object")
        return dict(value)

    def names(self, value: Any, what: str) -> dict[str, str]:
        for key, name in self.mapping(value, what).items():
            if not isinstance(name, str):
                self.fail(f"{what}[{key!r}]", name, "a name")
        return dict(value)

    def integer(self, value: Any, what: str, least: int, most: int = MAX_SIZE) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self.fail(what, value, f"a whole number from {least} to {most}")
        return value

    def pair(self, value: Any, what: str, least: int) -> tuple[int, int]:
        if not isinstance(value, list) or len(value) != 2:
            self.fail(what, value, "two whole numbers")
        return (self.integer(value[0], what, least), self.integer(value[1], what, least))

    def choice(self, value: Any, what: str, allowed: tuple[str, ...]) -> str:
        if value not in allowed:
            self.fail(what, value, " or ".join(repr(name) for name in allowed))
        return value

    def layer(self, value: Any, name: str) -> LayerRecord:
        here = f"layer {name!r}"
        raw = self.mapping(value, here)
        unknown = sorted(set(raw) - {f.name for f in fields(LayerRecord)})
        if unknown:
            self.fail(f"{here}'s field {unknown[0]!r}", raw[unknown[0]], "absent in this version")
        kind = self.choice(raw.get("kind"), f"{here}'s kind", ("linear", "conv2d", "embedding"))
        levels = self.integer(raw.get("levels"), f"{here}'s levels", 2, 256)
        zero = raw.get("zero")
        if zero is not None and (isinstance(zero, bool) or not isinstance(zero, int | float) or not abs(zero) < 3e38):
            self.fail(f"{here}'s zero", zero, "a finite number or null")
        if not isinstance(raw.get("bias", False), bool):
            self.fail(f"{here}'s bias", raw["bias"], "true or false")
        activation_bits = raw.get("activation_bits")
        if activation_bits is not None and (isinstance(activation_bits, bool) or activation_bits != 8):
            self.fail(f"{here}'s activation_bits", activation_bits, "8 or null")
        modes = ("int8", "int8-block", "int16") if kind == "linear" else ("int8",)
        shape = self.pair(raw.get("shape"), f"{here}'s shape", 0)
        padding_idx = raw.get("padding_idx")
        if padding_idx is not None:
            padding_idx = self.integer(padding_idx, f"{here}'s padding_idx", 0, shape[0] - 1)
        return LayerRecord(
            kind=kind,
            shape=shape,
            levels=levels,
            group_size=self.integer(raw.get("group_size"), f"{here}'s group_size", 1),
            packing=self.choice(raw.get("packing"), f"{here}'s packing", (packing_for(levels).name,)),
            zero=None if zero is None else float(zero),
            bias=raw.get("bias", False),
            activation_bits=activation_bits,
            activations=self.choice(raw.get("activations", "int8"), f"{here}'s activations", modes),
            conv=self.conv(raw.get("conv"), here) if kind == "conv2d" else None,
            padding_idx=padding_idx,
        )

    def conv(self, value: Any, here: str) -> ConvGeometry:
        raw = self.mapping(value, f"{here}'s conv")
        padding = raw.get("padding", [0, 0])
        return ConvGeometry(
            in_channels=self.integer(raw.get("in_channels"), f"{here}'s in_channels", 1),
            kernel_size=self.pair(raw.get("kernel_size"), f"{here}'s kernel_size", 1),
            stride=self.pair(raw.get("stride", [1, 1]), f"{here}'s stride", 1),
            padding=padding if padding in ("same", "valid") else self.pair(padding, f"{here}'s padding", 0),
            dilation=self.pair(raw.get("dilation", [1, 1]), f"{here}'s dilation", 1),
            groups=self.integer(raw.get("groups", 1), f"{here}'s groups", 1),
            padding_mode=self.choice(
                raw.get("padding_mode", "zeros"),
                f"{here}'s padding_mode",
                ("zeros", "reflect", "replicate", "circular"),
            ),
        )
