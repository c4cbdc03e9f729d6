"""What a packed file remembers of the run that made it, so that `evaluate` needs that file and the model's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError
from .inputs import Preprocessing

KEY = "run"  # of the `extra` part of a packed file's header


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """`model` is FILE.py:FUNCTION with an absolute path, or the embedded example's name."""

    model: str
    fp32_bytes: int
    baseline_accuracy: float
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def pixels(self) -> Preprocessing | None:
        if self.mean is None or self.std is None:
            return None
        return Preprocessing(mean=self.mean, std=self.std)

    def to_extra(self) -> dict[str, Any]:
        """What io.save puts into the file's header."""
        return {KEY: asdict(self)}


def run_header(extra: Mapping[str, Any], path: Path) -> RunHeader | None:
    """The header in a packed file's `extra`; None where `compress` did not write it (bw.save in a script, say).

    Raises:
        FormatError: the header is damaged.
    """
    if KEY not in extra:
        return None
    try:
        fields = extra[KEY]
        header = RunHeader(
            model=fields["model"],
            fp32_bytes=fields["fp32_bytes"],
            baseline_accuracy=fields["baseline_accuracy"],
            mean=_numbers(fields["mean"]),
            std=_numbers(fields["std"]),
        )
    except (ValueError, KeyError, TypeError):
        header = None
    if (
        header is None
        or not isinstance(header.model, str)
        or not isinstance(header.fp32_bytes, int)
        or not isinstance(header.baseline_accuracy, float)
    ):
        raise FormatError(f"{path}: the note of the run that made it is damaged; compress again or copy it again")
    return header


def _numbers(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(float(value) for value in values)
