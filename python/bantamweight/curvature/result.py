"""What every curvature result carries: how it was measured, and how it is written down."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bantamweight.io.atomic import write_atomically

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """How the loss was evaluated while its curvature was measured."""

    mode: str  # "eval" or "train": what BatchNorm and dropout did
    differentiation: str  # "double_backward" or "forward_over_reverse"
    samples: int
    batches: int
    parameters: int
    blocks: tuple[str, ...]  # names of the parameters, or ("all",)
    loss: float
    processes: int = 1

    def __str__(self) -> str:
        layers = "BatchNorm and dropout in evaluation mode" if self.mode == "eval" else "BatchNorm and dropout training"
        batches = "batch" if self.batches == 1 else "batches"
        shards = f" on {self.processes} processes" if self.processes > 1 else ""
        return (
            f"{self.parameters:,} parameters, {self.samples:,} samples in {self.batches} {batches}{shards}, "
            f"loss {self.loss:.4g}, {layers}, {self.differentiation.replace('_', ' ')}"
        )


class Result:
    """A dataclass of plain numbers that writes itself as versioned JSON; tensors named in `_not_in_json` stay out."""

    _not_in_json: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        fields = {
            field.name: plain(getattr(self, field.name))
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.name not in self._not_in_json
        }
        return {"kind": type(self).__name__, "version": FORMAT_VERSION, **fields}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """JSON text; also written to `path` (atomically) when one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            write_atomically(path, (text + "\n").encode())
        return text


def plain(value: Any) -> Any:
    """`value` in JSON's types; NaN and infinities, which JSON lacks, as null."""
    if isinstance(value, Result):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, torch.Tensor | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
