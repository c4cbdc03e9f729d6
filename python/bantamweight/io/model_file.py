"""One safetensors file a model: canonical codes, scales and biases, and every other tensor as it is.

The file holds no kernel layout, so one made on x86 runs on ARM and on CUDA; and no pickle, so
opening one from a stranger runs no code. Its metadata has one key, "bantamweight": a versioned
JSON header (`ModelHeader`).
"""

import math
import os
from collections import OrderedDict
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy

from ..errors import BantamweightError, FormatError
from ..nn.embedding import PackedEmbedding, SimulatedEmbedding
from ..nn.layer import QuantizedLayer, change_form
from ..nn.prepare import SETTLED, prepare_like
from ..nn.prepared.settle import settle_like
from ..nn.simulated import SimulatedConv2d, SimulatedLinear
from ..nn.surgery import become, replace, restored_on_error
from ..nn.swap import pack_
from ..weights import ConvGeometry, QuantizedWeight
from .atomic import write_atomically
from .bitpack import pack_codes, packing_for, unpack_codes
from .header import FORMAT_VERSION, METADATA_KEY, LayerRecord, ModelHeader
from .model_tensors import make_writable, plain_tensor, refuse_meta
from .reader import Reader

M = TypeVar("M", bound=nn.Module)

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.Identity)


def save(model: nn.Module, path: str | os.PathLike[str], *, extra: dict[str, Any] | None = None) -> None:
    """Writes a quantized model, packed or simulated, to one file; an existing file is replaced at once or not at all.

    Args:
        model: from `quantize` or `pack`.
        path: of the file; its folder must exist.
        extra: JSON-like values to keep in the header, `read_header(path).extra`.

    Raises:
        BantamweightError: the model holds no quantized layer, or something that is no tensor or that a file cannot hold
            (complex128, sparse, on the meta device); or the file cannot be written (then a file that was there is as
            before).
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

    rest, same_tensor = _rest_of(model, [_join(name, "") for name in (*layers, *same_layer)])
    tensors |= rest
    header = ModelHeader(
        format_version=FORMAT_VERSION,
        layers=records,
        same_layer=same_layer,
        same_tensor=same_tensor,
        folded=dict(getattr(model, "folded_batchnorms", {})),
        prepared=_plain(getattr(model, "prepared", {})),
        quantization=_report_of(model),
        extra=_plain(extra or {}),
    )
    whole = {
        name: value.detach().to("cpu").clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }
    write_atomically(path, safetensors_bytes(whole, {METADATA_KEY: header.to_json()}))


def load(path: str | os.PathLike[str], model: M, *, form: str = "packed") -> M:
    """Turns a float model into the quantized one that was saved.

    Args:
        path: a file that `save` wrote, on this machine or another.
        model: what make_model() gives, with any weights or on the meta device; it is changed in place. Every layer
            stays the same object, with its hooks, and keeps its dtype: a bfloat16 model runs in bfloat16.
        form: "packed" to run on kernels, "simulated" for float arithmetic on dequantized weights.

    Returns:
        The model in eval mode. It owns its memory: the file may go.

    Raises:
        FormatError: the file is missing, damaged, hostile, newer than this version, or another model's; or a tensor
            would stay on the meta device, because no file holds it. The model is then as before.

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
    with restored_on_error(model), Reader(path) as file:
        header = file.header
        settle_like(model, [name for name, done in header.prepared.items() if done.get("kind") == SETTLED])
        _make_room_for_biases(model, header)
        prepare_like(model, header.prepared)
        targets = _targets(model, header, path)
        expected = _expected_rest(model, header, path)
        refuse_meta(model, {*expected, *header.same_tensor}, {*targets, *header.folded}, path)
        file.check_names([*expected, *(_join(n, part) for n, r in header.layers.items() for part in r.tensors())])
        for name, value in expected.items():
            file.check_like(name, value)
        layers = {name: _read_layer(file, name, record) for name, record in header.layers.items()}
        rest = {name: file.tensor(name) for name in expected}

    rest |= {second: rest[first] for second, first in header.same_tensor.items()}
    state = OrderedDict(rest)
    # What modules that count versions of their state read: without it they take a file for an old one.
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    for norm in header.folded:
        if type(model.get_submodule(norm)) in _NORMS:
            become(model.get_submodule(norm), nn.Identity())
    make_writable(model, set(targets.values()))
    model.load_state_dict(state, strict=False)  # the names were checked, both ways, before anything changed
    for name, layer in layers.items():
        old = targets[name].weight
        change_form(targets[name], layer.to(device="cpu" if old.is_meta else old.device, dtype=old.dtype))
    for second, first in header.same_layer.items():
        if targets[second] is not targets[first]:
            model = replace(model, targets[second], targets[first])  # type: ignore[assignment]
    if header.prepared:
        setattr(model, "prepared", dict(header.prepared))  # noqa: B010  (nn.Module types attributes as tensors)
    setattr(model, "folded_batchnorms", dict(header.folded))  # noqa: B010
    setattr(model, "quantization", dict(header.quantization))  # noqa: B010
    return (pack_(model) if form == "packed" else model).eval()


def read_header(path: str | os.PathLike[str]) -> ModelHeader:
    """What a model file says about its model, without reading its tensors.

    Raises:
        FormatError: as `load`.
    """
    with Reader(path) as file:
        return file.header


def _read_layer(file: Reader, name: str, record: LayerRecord) -> QuantizedLayer:
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


def _targets(model: nn.Module, header: ModelHeader, path: object) -> dict[str, Any]:
    """The model's module under every name of a saved layer."""
    for name, value in model.state_dict().items():
        if is_lazy(value):
            raise FormatError(
                f"{path}: {name!r} of {type(model).__name__} has no shape yet; run the model on an input once, then "
                "load"
            )
    targets = {name: _target(model, name, record, path) for name, record in header.layers.items()}
    targets |= {
        second: _target(model, second, header.layers[first], path) for second, first in header.same_layer.items()
    }
    first_of = {id(module): header.same_layer.get(name, name) for name, module in targets.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        first = first_of.get(id(module))
        if first is not None and header.same_layer.get(name, name) != first:
            raise FormatError(
                f"{path}: {name!r} and {first!r} are one layer of {type(model).__name__}, but not of the saved model; "
                "pass the make_model() it was saved from"
            )
    return targets


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


def _make_room_for_biases(model: nn.Module, header: ModelHeader) -> None:
    """A layer that a BatchNorm was folded into has a bias, with or without one in make_model()."""
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))
    for into in header.folded.values():
        module = modules.get(into)
        if isinstance(module, nn.Linear | _ConvNd) and module.bias is None:
            outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            module.bias = nn.Parameter(module.weight.new_zeros(outputs))


def _expected_rest(model: nn.Module, header: ModelHeader, path: object) -> dict[str, Tensor]:
    """The tensors that the file must hold beside those of its quantized layers, as the model has them."""
    state = model.state_dict()
    for norm, into in header.folded.items():
        for name, kinds in ((norm, (*_NORMS, _BatchNorm)), (into, (nn.Module,))):
            try:
                module = model.get_submodule(name)
            except AttributeError:
                module = None
            if not isinstance(module, kinds):
                raise FormatError(
                    f"{path}: BatchNorm {norm!r} was folded into {into!r}, but the model has no such pair; "
                    "pass the make_model() it was saved from"
                )
    # A subclass with a forward of its own stays where it was folded, with tensors that change nothing.
    folded = {id(module) for module in map(model.get_submodule, header.folded) if type(module) in _NORMS}
    norms = [name for name, module in model.named_modules(remove_duplicate=False) if id(module) in folded]
    gone = tuple(_join(name, "") for name in (*header.layers, *header.same_layer, *norms))
    expected = {name: value for name, value in state.items() if not name.startswith(gone)}
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


def _rest_of(model: nn.Module, inside: list[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors outside quantized layers, and the further names of those that are tied."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in model.state_dict().items():
        if name.startswith(tuple(inside)):
            continue
        if not isinstance(value, Tensor):
            raise BantamweightError(
                f"{name} of the model's state dict is a {type(value).__name__}, but a model file holds tensors only; "
                "keep it out of the state dict, or pass it as extra"
            )
        value = plain_tensor(name, value)
        identity = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() > 0 and seen.setdefault(identity, name) != name:
            same[name] = seen[identity]
        else:
            tensors[name] = value
    return tensors, same


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
