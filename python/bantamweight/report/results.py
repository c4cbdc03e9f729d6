"""What one run of `compress` found, and its JSON form (out/report.json)."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One quantized layer. `error` is ||XW - X~Q|| / ||XW|| on calibration data that the quantizer did not see."""

    name: str
    shape: tuple[int, ...]
    bits: int
    scheme: str
    group_size: int | None
    error: float
    kernel: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One network as it was measured: accuracy 0..1, bytes on disk, milliseconds a batch by batch size."""

    label: str
    accuracy: float
    bytes: int
    latency: Mapping[int, float]
    layers: Sequence[Layer] = ()


@dataclass(frozen=True, kw_only=True)
class Machine:
    cpu: str
    threads: int
    kernel: str
    torch: str
    bantamweight: str


@dataclass(frozen=True, kw_only=True)
class Report:
    """`packed[chosen]` is the network in model.safetensors; the others were tried in the same run.

    `busy` says what other work spoilt the times, if any did.
    """

    network: str
    method: str
    baseline: Outcome
    packed: Sequence[Outcome]
    chosen: int
    calibration_inputs: int
    test_inputs: int
    skipped: Mapping[str, str]
    max_drop: float | None
    notes: Sequence[str]
    busy: str | None
    machine: Machine
    seconds: float

    @property
    def best(self) -> Outcome:
        return self.packed[self.chosen]

    def to_json(self) -> dict[str, Any]:
        return {
            "format": 1,
            "network": self.network,
            "method": self.method,
            "baseline_accuracy": self.baseline.accuracy,
            "accuracy": self.best.accuracy,
            "bytes": self.best.bytes,
            "fp32_bytes": self.baseline.bytes,
            "latency": [
                {"batch_size": size, "ms_per_batch": self.best.latency[size], "fp32_ms_per_batch": fp32}
                for size, fp32 in self.baseline.latency.items()
            ],
            "layers": [asdict(layer) for layer in self.best.layers],
            "skipped": dict(self.skipped),
            "tried": [
                {"label": o.label, "accuracy": o.accuracy, "bytes": o.bytes, "ms_per_batch": dict(o.latency)}
                for o in self.packed
            ],
            "max_drop": self.max_drop,
            "notes": list(self.notes),
            "busy": self.busy,
            "calibration_inputs": self.calibration_inputs,
            "test_inputs": self.test_inputs,
            "machine": asdict(self.machine),
            "seconds": round(self.seconds, 2),
        }


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
