"""What a run of quantize did, layer by layer."""

import json
from dataclasses import asdict, dataclass
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
    """A layer left as it was, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """A run of `quantize`.

    Attributes:
        config: the method's settings as `to_json` writes them.
        layers: the quantized layers in forward order.
        skipped: the layers left as they were.
        folded: the batch normalizations folded into the layer before them.
        mode: ``"graph"`` (activations of both networks kept at layer boundaries), ``"replay"`` (networks run anew
            for each layer), or ``"graph, then replay"`` where memory ran short.
        samples: calibration samples, the held-out ones included.
        seconds: of the whole run.
    """

    config: str
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    folded: tuple[str, ...]
    mode: str
    samples: int
    seconds: float

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
        lines += [f"{layer.name:<{width}}  left as it was: {layer.reason}" for layer in self.skipped]
        return "\n".join(lines)
