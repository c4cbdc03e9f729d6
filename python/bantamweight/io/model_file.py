"""One safetensors file a model: canonical codes, scales and biases, and every other tensor as it is.

The file holds no kernel layout, so one made on x86 runs on ARM and on CUDA; and no pickle, so
opening one from a stranger runs no code. Its metadata has one key, "bantamweight": a versioned
JSON header (`ModelHeader`).
"""

import math
import os
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from ..errors import BantamweightError, FormatError
from ..nn.embedding import PackedEmbedding, SimulatedEmbedding
from ..nn.layer import QuantizedLayer
from ..nn.simulated import SimulatedConv2d, SimulatedLinear
from ..nn.swap import pack_
from ..weights import ConvGeometry, QuantizedWeight
from .atomic import write_atomically
from .bitpack import pack_codes, packing_for, unpack_codes
from .header import FORMAT_VERSION, METADATA_KEY, LayerRecord, ModelHeader

M = TypeVar("M", bound=nn.Module)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity)


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
    """Writes a quantized model, packed or simulated, to one file; an existing file is replaced at once or not at all.

    Args:
        model: from `quantize` or `pack`.
        path: of the file; its folder must exist.
        extra: JSON-like values to keep in the header, `read_header(path).extra`.

    Raises:
        BantamweightError: the model holds no quantized layer, or something that is no tensor; or the file cannot be
            written (then a file that was there is as before).
    """
    layers, same_layer = _quantized_layers(model)
    if not layers:
        raise BantamweightError(f"{type(model).__name__} has no quantized layer to save; call quantize first")
    tensors: dict[str, Tensor] = {}
    records: dict[str, LayerRecord] = {}
    for name, layer in layers.items():
        weight = layer.quantized
        geometry = getattr(layer, "geometry", None)
        record = LayerRecord(
            kind=_kind_of(layer),
            shape=(weight.out_features, weight.in_features),
            levels=weight.levels,
            group_size=weight.group_size,
            packing=packing_for(weight.levels).name,
            zero=weight.uniform_zero,
            bias=layer.bias is not None,
            activation_bits=layer.activation_bits,
            activations=layer.activations,
            conv=geometry,
            padding_idx=getattr(layer, "padding_idx", None),
        )
        held = {"codes": pack_codes(weight.codes, weight.levels), "scale": weight.scale, "zero": weight.zero}
        if layer.bias is not None:
            held["bias"] = layer.bias.detach().to(torch.float32)
        tensors |= {_join(name, part): held[part] for part in record.tensors()}
        records[name] = record

    same_tensor: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    inside = [_join(name, "") for name in (*layers, *same_layer)]
    for name, value in model.state_dict().items():
        if name.startswith(tuple(inside)):
            continue
        if not isinstance(value, Tensor):
            raise BantamweightError(
                f"{name} of the model's state dict is a {type(value).__name__}, but a model file holds tensors only; "
                "keep it out of the state dict, or pass it as extra"
            )
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() > 0 and seen.setdefault(identity, name) != name:
            same_tensor[name] = seen[identity]
        else:
            tensors[name] = value
    header = ModelHeader(
        format_version=FORMAT_VERSION,
        layers=records,
        same_layer=same_layer,
        same_tensor=same_tensor,
        folded=dict(getattr(model, "folded_batchnorms", {})),
        quantization=_report_of(model),
        extra=_plain(extra or {}),
    )
    whole = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    write_atomically(path, safetensors_bytes(whole, {METADATA_KEY: header.to_json()}))


def load(path: str | os.PathLike[str], model: M, *, form: str = "packed") -> M:
    """Turns a float model into the quantized one that was saved.

    Args:
        path: a file that `save` wrote, on this machine or another.
        model: what make_model() gives, with any weights or on the meta device; it is changed in place.
        form: "packed" to run on kernels, "simulated" for float arithmetic on dequantized weights.

    Returns:
        The model in eval mode (a new module where the model is itself one quantized layer).

    Raises:
        FormatError: the file is missing, damaged, hostile, newer than this version, or another model's. The model
            is then as before.

    Example:
        >>> import bantamweight as bw
        >>> def make_model():
        ...     return torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> small = bw.quantize(make_model(), bw.RoundToNearest(bits=4), calibration=[torch.randn(64, 32)])
        >>> bw.save(bw.pack(small), "model.safetensors")
        >>> bw.load("model.safetensors", make_model())(torch.randn(2, 32)).shape
        torch.Size([2, 4])
    """
    if form not in ("packed", "simulated"):
        raise BantamweightError(f"form is {form!r}, but must be 'packed' or 'simulated'")
    with _Reader(path) as file:
        header = file.header
        replaced = {name: _target(model, name, record, path) for name, record in header.layers.items()}
        for second, first in header.same_layer.items():
            replaced[second] = _target(model, second, header.layers[first], path)
        expected = _expected_rest(model, header, path)
        file.check_names([*expected, *(_join(n, part) for n, r in header.layers.items() for part in r.tensors())])
        for name, value in expected.items():
            file.check_like(name, value)
        layers = {name: _read_layer(file, name, record) for name, record in header.layers.items()}
        rest = {name: file.tensor(name) for name in expected}

    for second, first in header.same_tensor.items():
        rest[second] = rest[first]
    on_meta = any(value.is_meta for value in model.state_dict().values())  # nothing there to copy into
    for norm, into in header.folded.items():
        _put(model, norm, nn.Identity())
        module: Any = model.get_submodule(into)
        if into not in replaced and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(module.weight.detach()[:, 0].flatten(1)[:, 0]))
    model.load_state_dict(
        rest, strict=False, assign=on_meta
    )  # the names were checked, both ways, before anything changed
    for name in replaced:
        model = _put(model, name, layers[header.same_layer.get(name, name)])
    setattr(model, "folded_batchnorms", dict(header.folded))  # noqa: B010  (nn.Module types attributes as tensors)
    setattr(model, "quantization", dict(header.quantization))  # noqa: B010
    return (pack_(model) if form == "packed" else model).eval()


def read_header(path: str | os.PathLike[str]) -> ModelHeader:
    """What a model file says about its model, without reading its tensors.

    Raises:
        FormatError: as `load`.
    """
    with _Reader(path) as file:
        return file.header


class _Reader:
    """A safetensors file opened with suspicion: every read checks the dtype and the shape first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> "_Reader":
        if not os.path.isfile(self.path):
            raise FormatError(f"{self.path} is not a file; pass the path of a model file that save wrote")
        try:
            self.file = safe_open(os.fspath(self.path), framework="pt", device="cpu")
            self.file.__enter__()
            metadata = self.file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f"{self.path} cannot be read as a safetensors file ({error}); it is cut short, damaged or of another "
                "kind, get a whole copy"
            ) from None
        if METADATA_KEY not in metadata:
            self.__exit__(None, None, None)
            raise FormatError(
                f"{self.path} is a safetensors file without a {METADATA_KEY} header; pass one that bantamweight saved, "
                "or load a float checkpoint with safetensors.torch.load_file"
            )
        self.header = ModelHeader.from_json(metadata[METADATA_KEY], self.path)
        self.names = set(self.file.keys())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.__exit__(*exc_info)

    def check_names(self, expected: Iterable[str]) -> None:
        wanted = set(expected)
        for names, what in ((wanted - self.names, "lacks"), (self.names - wanted, "has")):
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                rest = "which the model needs" if what == "lacks" else "which the model does not know"
                raise FormatError(
                    f"{self.path} {what} {min(names)!r}{others}, {rest}; pass the make_model() it was saved from"
                )

    def check(self, name: str, dtype: str, shape: list[int]) -> None:
        found = self.file.get_slice(name)
        if found.get_dtype() != dtype or found.get_shape() != shape:
            raise FormatError(
                f"{self.path}: {name!r} is {found.get_dtype()} {found.get_shape()}, but its header calls for {dtype} "
                f"{shape}; the file is damaged, get a whole copy"
            )

    def check_like(self, name: str, value: Tensor) -> None:
        found = self.file.get_slice(name)
        is_float = "F" in found.get_dtype()  # F64, F32, F16, BF16, F8_*
        if is_float != value.is_floating_point() or found.get_shape() != list(value.shape):
            raise FormatError(
                f"{self.path}: {name!r} is {found.get_dtype()} {found.get_shape()}, but the model has {value.dtype} "
                f"{list(value.shape)}; pass the make_model() it was saved from"
            )

    def tensor(self, name: str) -> Tensor:
        return self.file.get_tensor(name)


def _read_layer(file: _Reader, name: str, record: LayerRecord) -> QuantizedLayer:
    for part, (dtype, shape) in record.tensors().items():
        file.check(_join(name, part), dtype, shape)
    held = {part: file.tensor(_join(name, part)) for part in record.tensors()}
    try:
        weight = QuantizedWeight.from_codes(
            unpack_codes(held["codes"], record.levels, record.shape[1]),
            held["scale"],
            held["zero"] if record.zero is None else record.zero,
            group_size=record.group_size,
            levels=record.levels,
        )
        if record.kind == "embedding":
            return SimulatedEmbedding(weight, padding_idx=record.padding_idx)
        if record.conv is None:
            return SimulatedLinear(
                weight, held.get("bias"), activation_bits=record.activation_bits, activations=record.activations
            )
        return SimulatedConv2d(weight, held.get("bias"), activation_bits=record.activation_bits, **vars(record.conv))
    except BantamweightError as error:
        raise FormatError(f"{file.path}: layer {name!r}: {error}") from None


def _target(model: nn.Module, name: str, record: LayerRecord, path: object) -> nn.Module:
    """The model's module in the place of a saved layer, if it is one the layer can replace."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise FormatError(
            f"{path} has a layer {name!r}, which {type(model).__name__} lacks; pass the make_model() it was saved from"
        ) from None
    if isinstance(module, nn.Conv2d | nn.Linear | nn.Embedding):
        geometry = ConvGeometry.of(module) if isinstance(module, nn.Conv2d) else None
        shape = (module.weight.shape[0], math.prod(module.weight.shape[1:]))
    elif isinstance(module, QuantizedLayer):
        geometry = getattr(module, "geometry", None)
        shape = (module.rows, module.columns)
    else:
        raise FormatError(
            f"{path} has a {record.kind} layer {name!r}, which in {type(model).__name__} is a {type(module).__name__}; "
            "pass the make_model() it was saved from"
        )
    kind = _kind_of(module)
    if kind != record.kind or shape != record.shape or geometry != record.conv:
        raise FormatError(
            f"{path}: layer {name!r} is {_shape_words(record.kind, record.shape, record.conv)}, but the model's is "
            f"{_shape_words(kind, shape, geometry)}; pass the make_model() it was saved from"
        )
    return module


def _expected_rest(model: nn.Module, header: ModelHeader, path: object) -> dict[str, Tensor]:
    """The tensors that the file must hold beside those of its quantized layers, as the model has them."""
    state = model.state_dict()
    gone = [_join(name, "") for name in (*header.layers, *header.same_layer, *header.folded)]
    expected = {name: value for name, value in state.items() if not name.startswith(tuple(gone))}
    for norm, into in header.folded.items():
        for name, kinds in ((norm, _NORMS), (into, (nn.Module,))):
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, kinds):
                raise FormatError(
                    f"{path}: BatchNorm {norm!r} was folded into {into!r}, but the model has no such pair; "
                    "pass the make_model() it was saved from"
                )
        if into not in header.layers and into not in header.same_layer and _join(into, "weight") in state:
            weight = state[_join(into, "weight")]
            expected[_join(into, "bias")] = weight.new_empty(weight.shape[0], device="meta")
    for second, first in header.same_tensor.items():
        if first not in expected or second not in expected or expected[first].shape != expected[second].shape:
            raise FormatError(
                f"{path}: {second!r} is tied to {first!r}, but the model has no such pair; "
                "pass the make_model() it was saved from"
            )
    return {name: value for name, value in expected.items() if name not in header.same_tensor}


def _quantized_layers(model: nn.Module) -> tuple[dict[str, QuantizedLayer], dict[str, str]]:
    """The quantized layers by name, and the further names of those that are used twice."""
    layers: dict[str, QuantizedLayer] = {}
    first_names: dict[int, str] = {}
    same: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            if first_names.setdefault(id(module), name) == name:
                layers[name] = module
            else:
                same[name] = first_names[id(module)]
    return layers, same


def _put(model: M, name: str, module: nn.Module) -> M:
    if not name:
        return module  # type: ignore[return-value]  # the model is the layer
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
    return model


def _join(layer: str, part: str) -> str:
    return f"{layer}.{part}" if layer else part


def _kind_of(layer: nn.Module) -> str:
    if isinstance(layer, nn.Embedding | SimulatedEmbedding | PackedEmbedding):
        return "embedding"
    return "conv2d" if isinstance(layer, nn.Conv2d) or hasattr(layer, "geometry") else "linear"


def _shape_words(kind: str, shape: tuple[int, int], conv: ConvGeometry | None) -> str:
    if conv is None:
        return f"{kind} {shape[0]}x{shape[1]}"
    return f"conv2d of {shape[0]} channels out, {', '.join(f'{k} {v}' for k, v in vars(conv).items())}"


def _report_of(model: nn.Module) -> dict[str, Any]:
    """The quantizer's report without what the layer records say already: in a small model's file bytes count."""
    report = _plain(getattr(model, "quantization", {}), digits=5)
    for layer in report.get("layers", ()):
        for key in ("kind", "shape", "scheme", "bits", "levels", "group_size", "seconds"):
            layer.pop(key, None)
        if not layer.get("notes", True):
            del layer["notes"]
    return report


def _plain(value: Any, digits: int = 17) -> Any:
    """Dataclasses, tuples and the like as JSON has them; a number that is not finite becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name), digits) for each in fields(value)}
    if isinstance(value, dict):
        return {str(key): _plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
