"""Between the forms of a model's layers: simulated to packed, and back."""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..errors import BantamweightError
from ..ops.lowbit_linear import check_activations
from ..patterns import fits
from .embedding import PackedEmbedding, SimulatedEmbedding
from .fast_paths import leave_fast_paths
from .layer import QuantizedLayer, change_form
from .packed import PackedConv2d, PackedLinear
from .packed_layer import PackedLayer
from .simulated import SimulatedConv2d, SimulatedLayer, SimulatedLinear

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class PackedRecord:
    """What became of one quantized layer: `kernel` is None, and `reason` says why, where it stayed simulated."""

    name: str
    scheme: str
    kernel: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.scheme} {self.kernel or f'simulated, {self.reason}'}"


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """One record a quantized layer; `model.packing` after `pack`."""

    layers: tuple[PackedRecord, ...]

    def __str__(self) -> str:
        return "\n".join(str(record) for record in self.layers)


def pack(model: M, *, activations: str | Mapping[str, str] | None = None) -> M:
    """A copy of the model whose simulated layers run on kernels; see `pack_`."""
    return pack_(copy.deepcopy(model), activations=activations)


def pack_(model: M, *, activations: str | Mapping[str, str] | None = None) -> M:
    """Turns every simulated layer into its packed form, in place; returns the model.

    Every layer stays the same object with its hooks and the attributes that were put on it, so a list, a closure or
    another module that holds it runs the packed form too.

    A layer that no kernel takes stays simulated; ``model.packing`` (a PackingReport) says which and why. What is
    packed is for inference: no parameter requires a gradient any more, so the model also runs outside
    torch.no_grad(). An input that requires one is refused.

    Args:
        activations: how linear layers round their inputs: "int8", "int8-block" or "int16" (see PackedLinear), one for
            all of them or by layer: a name, the name of a module that contains it, or a regular expression. A layer
            that is not named, and every layer for None, keeps its own, "int8" unless it was set. Convolutions round
            to int8.

    Raises:
        BantamweightError: the model holds no quantized layer or is fused already, there are no such activations, or a
            pattern fits no linear layer.

    Example:
        >>> import torch
        >>> from bantamweight import QuantizedWeight, nn, pack
        >>> w = QuantizedWeight.from_codes(torch.randint(0, 3, (8, 32), dtype=torch.uint8), 0.1, 1.0, levels=3)
        >>> packed = pack(torch.nn.Sequential(nn.SimulatedLinear(w)))
        >>> [(record.name, record.scheme) for record in packed.packing.layers]
        [('0', 'ternary')]
    """
    if getattr(model, "fusion", None) is not None:
        raise BantamweightError(f"this {type(model).__name__} is fused and packed already; pack what it was made from")
    if not any(isinstance(module, QuantizedLayer) for module in model.modules()):
        raise BantamweightError(f"{type(model).__name__} has no quantized layer to pack; call quantize first")
    wanted = _activations_by_layer(model, activations)
    records: list[PackedRecord] = []
    reads_weight = _layers_whose_weight_is_read(model)
    for name, layer in _quantized_layers(model):
        mode, scheme, reason = wanted.get(id(layer), layer.activations), layer.scheme, None
        if id(layer) in reads_weight:
            reason = "the module above it reads its float weight"
        elif is_parametrized(layer):
            reason = "torch.nn.utils.parametrize changes its tensors"
        elif isinstance(layer, SimulatedLinear | SimulatedConv2d) and layer.weight.dtype == torch.float64:
            reason = "its numbers are float64, which no kernel takes; convert the model with .float()"
        elif isinstance(layer, SimulatedLayer) or mode != layer.activations:
            try:
                change_form(layer, _packed(layer, mode))
            except BantamweightError as error:
                reason = str(error)
        if reason is not None:
            log.info("%s stays simulated: %s", name or type(layer).__name__, reason)
        kernel = layer.kernel if isinstance(layer, PackedLayer) else None
        records.append(PackedRecord(name=name, scheme=scheme, kernel=kernel, reason=reason))
    model.requires_grad_(False)
    leave_fast_paths(model)
    setattr(model, "packing", PackingReport(layers=tuple(records)))  # noqa: B010  (nn.Module types attributes as tensors)
    return model


def unpack(model: M) -> M:
    """A copy of the model with every packed layer in its simulated form, the inverse of `pack`.

    The simulated layers round their inputs to int8 as the packed ones do (``activation_bits=8``), and every
    parameter that is left can be trained.
    """

    model = copy.deepcopy(model)
    for _, layer in _quantized_layers(model):
        if isinstance(layer, PackedLayer):
            change_form(layer, _simulated(layer))
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    if hasattr(model, "packing"):
        del model.packing
    return model


def _activations_by_layer(model: nn.Module, activations: str | Mapping[str, str] | None) -> dict[int, str]:
    """The mode asked for, by the id of each linear layer that is named."""
    linear = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SimulatedLinear | PackedLinear)
    }
    if activations is None:
        return {}
    if isinstance(activations, str):
        check_activations(activations)
        return {id(module): activations for module in linear.values()}
    wanted: dict[int, str] = {}
    for pattern, mode in activations.items():
        check_activations(mode)
        fitting = [module for name, module in linear.items() if fits("activations", pattern, name)]
        if not fitting:
            raise BantamweightError(
                f"activations names '{pattern}', which fits no quantized linear layer; they are "
                f"{', '.join(list(linear)[:8]) or 'none'}"
            )
        for module in fitting:
            wanted.setdefault(id(module), mode)
    return wanted


def _packed(layer: QuantizedLayer, activations: str) -> PackedLayer:
    if isinstance(layer, SimulatedConv2d):
        packed = PackedConv2d(layer.quantized, layer.bias, **vars(layer.geometry))
    elif isinstance(layer, SimulatedEmbedding):
        packed = PackedEmbedding(layer.quantized, padding_idx=layer.padding_idx)
    else:
        packed = PackedLinear(layer.quantized, layer.bias, activations=activations)
    return packed.to(dtype=layer.weight.dtype)


def _simulated(layer: PackedLayer) -> SimulatedLayer:
    if isinstance(layer, PackedConv2d):
        simulated = SimulatedConv2d(layer.quantized, layer.bias, activation_bits=8, **vars(layer.geometry))
    elif isinstance(layer, PackedEmbedding):
        simulated = SimulatedEmbedding(layer.quantized, padding_idx=layer.padding_idx)
    else:
        simulated = SimulatedLinear(layer.quantized, layer.bias, activation_bits=8, activations=layer.activations)
    return simulated.to(dtype=layer.weight.dtype)


def _quantized_layers(model: nn.Module) -> list[tuple[str, QuantizedLayer]]:
    """With their first names; a layer used twice comes once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantizedLayer)]


def _layers_whose_weight_is_read(model: nn.Module) -> set[int]:
    # nn.MultiheadAttention hands out_proj.weight to a function of torch's and never calls the layer.
    # A prepared attention has a forward of its own, which does.
    kind = nn.MultiheadAttention
    return {id(m.out_proj) for m in model.modules() if isinstance(m, kind) and type(m).forward is kind.forward}
