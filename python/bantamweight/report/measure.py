"""Accuracy and latency of networks, measured the same way for float and packed ones."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import BantamweightError

ACCURACY_BATCH = 128  # fixed: the same batches in every run give the same accuracy to the image


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows whose largest logit is at the label, 0..1.

    Raises:
        BantamweightError: a logit is NaN or infinite.
    """
    correct = 0
    with torch.inference_mode():
        for rows, labels in zip(x.split(ACCURACY_BATCH), y.split(ACCURACY_BATCH), strict=True):
            logits = model(rows)
            if not bool(torch.isfinite(logits).all()):
                raise BantamweightError(
                    "the model gives NaN or infinite logits on the test data; check how x was scaled and the weights"
                )
            correct += int((logits.argmax(1) == labels).sum())
    return correct / len(y)


def latency(models: Mapping[str, nn.Module], x: Tensor, batch_size: int, *, seconds: float = 1.0) -> dict[str, float]:
    """Median milliseconds a batch of every model.

    The models take turns, so that a busy or throttling machine slows all of them alike.

    Args:
        models: by name.
        x: rows to make the batch of, repeated where there are too few.
        seconds: time to spend in all; at least 5 rounds are run.
    """
    batch = x[torch.arange(batch_size) % len(x)].contiguous()
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for model in models.values():
            model(batch)
            model(batch)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
            for name, model in models.items():
                start = time.perf_counter()
                model(batch)
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def busy_note() -> str | None:
    """A sentence for the report where other work ran beside the measurement, which makes times meaningless."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 1.5 * cores:
        return None
    return f"The machine was busy (load {load:.1f} on {cores} cores): measure the times again when it is not."


def float_bytes(model: nn.Module) -> int:
    """Bytes of a safetensors file with the model's state dict; tied tensors count once."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        tensors.setdefault(tensor.data_ptr() or id(tensor), (name, tensor))
    return len(save({name: tensor.contiguous() for name, tensor in tensors.values()}))
