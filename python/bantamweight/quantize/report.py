"""What a run of quantize did, layer by layer."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerReport:
    """One quantized layer.

    Attributes:
        name, kind: of the layer, as in `named_modules`, and its class.
        shape: of its weight.
        scheme: of its quantized weight, such as ``W4-g128``.
        bits, levels, group_size: of the codes; group_size None for one step a channel.
        error: ||X W - X~ Q|| / ||X W|| on held-out calibration data; ||W - Q|| / ||W|| of an embedding table.
        notes: what the method did beyond the config's letter.
        seconds: spent on the layer, calibration statistics included; 0 for a layer taken from a resumed run.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    scheme: str
    bits: int
    levels: int
    group_size: int | None
    error: float
    notes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class SkippedLayer:
    """A layer, or a parameter that is in no layer, left as it was, and why; `weights` is how many it has."""

    name: str
    kind: str
    reason: str
    weights: int = 0


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """A run of `quantize`.

    Attributes:
        config: the method's settings as `to_json` writes them.
        layers: the quantized layers in forward order.
        skipped: the layers and parameters of two dimensions or more that were left as they were.
        folded: the batch normalizations folded into the layer before them.
        kept_batchnorms: the other batch normalizations, with the reason.
        mode: ``"one pass"`` (all batches went through both networks side by side), or ``"replay"`` (networks run anew
            for each layer, because their activations together were more than the memory allowed).
        samples: calibration samples, the held-out ones included.
        seconds: of the whole run.
        weights: of all parameters of two dimensions or more, and how many of them are quantized.
        output_error: ||f~(x) - f(x)|| / ||f(x)|| of the whole network's outputs on the first calibration batch; None
            where they do not compare (no tensors, or other ones at every call).
        notes: about the run.
    """

    config: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    folded: tuple[str, ...]
    kept_batchnorms: Mapping[str, str] = field(default_factory=dict)
    mode: str
    samples: int
    seconds: float
    weights: int = 0
    weights_quantized: int = 0
    output_error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """The share of the network's weights that is quantized."""
        return self.weights_quantized / self.weights if self.weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "config": json.loads(self.config)}

    def __str__(self) -> str:
        """A table for people."""
        width = max([len(layer.name) for layer in self.layers], default=4)
        lines = [f"{'layer':<{width}}  {'shape':<18} {'scheme':<14} {'error':>7}  seconds"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            notes = f"  {'; '.join(layer.notes)}" if layer.notes else ""
            lines.append(
                f"{layer.name:<{width}}  {shape:<18} {layer.scheme:<14} {layer.error:7.4f} {layer.seconds:8.2f}{notes}"
            )
        total = max(self.weights, 1)
        lines += [
            f"{layer.name:<{width}}  left as it was ({layer.weights / total:.1%} of the weights): {layer.reason}"
            for layer in self.skipped
        ]
        lines += [f"{name:<{width}}  BatchNorm kept: {reason}" for name, reason in self.kept_batchnorms.items()]
        lines.append(f"{self.share:.1%} of {self.weights:,} weights quantized")
        if self.output_error is not None:
            lines[-1] += f"; the network's outputs differ by {self.output_error:.2%} on the first calibration batch"
        return "\n".join([*lines, *self.notes])
