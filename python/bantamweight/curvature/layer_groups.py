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
from bantamweight.errors import BantamweightError, CalibrationError, UnsupportedLayerError
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


def tied_layers(layers: Mapping[str, TargetLayer]) -> dict[str, list[str]]:
    """The layers by their weights: the first that has each, and all that share it, the first included."""
    sharing: dict[int, list[str]] = {}
    for name, layer in layers.items():
        sharing.setdefault(id(layer.weight), []).append(name)
    return {names[0]: names for names in sharing.values()}


def measured_once(groups: Mapping[str, Sequence[str]], tied: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """The groups with every weight in the one that has it first, under its first layer's name."""
    left = {block: [name for name in names if name in tied] for block, names in groups.items()}
    return {block: names for block, names in left.items() if names}


def parameter_names(model: nn.Module, layers: Mapping[str, TargetLayer]) -> dict[str, str]:
    """What each layer's weight is called among the model's parameters: a tied one has the name of its first holder.

    Raises:
        UnsupportedLayerError: a weight that is computed from other parameters.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name, layer in layers.items():
        if id(layer.weight) not in names:
            raise UnsupportedLayerError(
                f"the weight of layer {name!r} is computed from other parameters; list it in ignore, or remove its "
                "parametrization first"
            )
    return {name: names[id(layer.weight)] for name, layer in layers.items()}


def refuse_tied(model: nn.Module, layers: Mapping[str, TargetLayer]) -> None:
    """For what is measured call by call, and would miss the calls of a weight's other holders.

    Raises:
        UnsupportedLayerError: a layer whose weight another module has too.
    """
    for name, layer in layers.items():
        for path, other in model.named_modules():
            if other is not layer and any(parameter is layer.weight for parameter in other._parameters.values()):
                raise UnsupportedLayerError(
                    f"layer {name!r} shares its weight with {path!r}, and metric 'ggn' sees the calls of one alone; "
                    f"list {name!r} in ignore, or take another metric"
                )


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
    block_of = {name: block for block, names in groups.items() for name in names}
    for first, *others in tied_layers({name: layers[name] for name in taken}).values():
        if apart := [name for name in others if block_of[name] != block_of[first]]:
            raise BantamweightError(
                f"{first} and {apart[0]} share one weight, but are in different blocks; put both into one"
            )
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
