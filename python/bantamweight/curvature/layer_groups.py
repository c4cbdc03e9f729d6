"""Which layers are judged together, how much each computes, and on which random subsets of the data."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from bantamweight.curvature.batches import Batch, evaluation
from bantamweight.errors import BantamweightError, CalibrationError
from bantamweight.quantize.calibrate import TargetLayer


def target_layers(model: nn.Module, ignore: Sequence[str]) -> dict[str, TargetLayer]:
    """The layers that `quantize` can handle and whose weight requires grad."""
    try:
        patterns = [re.compile(pattern) for pattern in ([ignore] if isinstance(ignore, str) else ignore)]
    except re.error as error:
        raise BantamweightError(f"ignore holds {error.pattern!r}, which is no regular expression: {error}") from None
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and module.weight.requires_grad
        and not any(pattern.fullmatch(name) for pattern in patterns)
    }
    if not layers:
        raise BantamweightError(
            "the model has no linear or 2d convolution layer whose weight requires grad; check `ignore`, or call "
            "model.requires_grad_(True) first"
        )
    return layers


def as_groups(blocks: Mapping[str, Sequence[str]], layers: Mapping[str, TargetLayer]) -> dict[str, list[str]]:
    groups = {}
    for block, patterns in blocks.items():
        names = [patterns] if isinstance(patterns, str) else list(patterns)
        found = [name for name in layers if any(name == p or name.startswith(f"{p}.") for p in names)]
        if not found:
            raise BantamweightError(f"the block {block!r} ({', '.join(names)}) holds no linear or 2d convolution layer")
        groups[block] = found
    taken = [name for names in groups.values() for name in names]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise BantamweightError(f"{twice[0]} is in more than one block; list each layer once")
    return groups


def default_groups(model: nn.Module, layers: Mapping[str, TargetLayer], per: str) -> dict[str, list[str]]:
    if per == "layer":
        return {name: [name] for name in layers}
    if per != "block":
        raise BantamweightError(f"per is {per!r}, but must be 'layer' or 'block'; name your own with blocks=")
    groups: dict[str, list[str]] = {}
    containers: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer in containers)
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and not inside:
            containers.append(name)
            for child, _ in module.named_children():
                block = f"{name}.{child}"
                if found := [layer for layer in layers if layer == block or layer.startswith(block + ".")]:
                    groups[block] = found
    inside = {name for names in groups.values() for name in names}
    groups.update({name: [name] for name in layers if name not in inside})
    order = list(layers)
    return dict(sorted(groups.items(), key=lambda item: order.index(item[1][0])))


def multiply_adds(model: nn.Module, batch: Batch, layers: Mapping[str, TargetLayer], mode: str) -> dict[str, int]:
    """Multiply-adds of every layer for one sample, counted in one forward pass."""
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Any:
        def count(module: TargetLayer, _: Any, output: Tensor) -> None:
            counts[name] += output.numel() * module.weight[0].numel() // batch.samples

        return count

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad(), evaluation(model, mode):
            model(*batch.arguments, **batch.keywords)
    finally:
        for handle in handles:
            handle.remove()
    if idle := [name for name, count in counts.items() if count == 0]:
        raise BantamweightError(f"{idle[0]} is never called by the model; list it in ignore")
    return counts


def random_subsets(batches: list[Batch], count: int, fraction: float, seed: int) -> list[list[tuple[Any, Any]]]:
    """`count` random draws without replacement of a part of all samples, each cut into batches."""
    pairs = [(batch.keywords or batch.arguments, batch.targets) for batch in batches]
    if count == 1:
        return [pairs]
    flat = [tree_flatten(pair)[0] for pair in pairs]
    tensors = [leaf for leaf in flat[0] if isinstance(leaf, Tensor)]
    samples = sum(batch.samples for batch in batches)
    widest = max(batch.samples for batch in batches)
    try:
        whole = tree_map(lambda *leaves: torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0], *pairs)
        if any(len(tensor) != batches[0].samples for tensor in tensors):
            raise BantamweightError("not every tensor has one row a sample")
    except (RuntimeError, TypeError, ValueError) as error:
        raise CalibrationError(
            f"the batches cannot be cut into subsets of samples ({str(error).splitlines()[0]}); pad them to one shape, "
            "or pass subsets=1"
        ) from None
    size = max(1, math.floor(fraction * samples + 0.5))
    generator = torch.Generator().manual_seed(seed)
    device = tensors[0].device
    chosen = [torch.randperm(samples, generator=generator)[:size].to(device) for _ in range(count)]

    def pick(rows: Tensor) -> Any:
        return tree_map_only(Tensor, lambda tensor: tensor[rows], whole)

    return [[pick(rows) for rows in choice.split(widest)] for choice in chosen]
