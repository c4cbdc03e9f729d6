"""The rows of A behind a layer's Gauss-Newton matrix A^T A: from hooks to the Gram matrix A A^T.

A row is the gradient of one sample's output along one direction; it is the product of what the layer was given and
the gradient of what it gave, so that neither A nor A^T A is ever stored whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bantamweight.curvature.batches import Batch, evaluation
from bantamweight.errors import UnsupportedLayerError


@dataclass(eq=False)
class Call:
    """One call of a layer on one batch."""

    inputs: Tensor
    version: int
    output: Tensor
    gradients: list[Tensor] = field(default_factory=list)  # one a backward pass, of the output


def weight_name(layer: str) -> str:
    """The name of a layer's weight; the layer may be the whole model."""
    return f"{layer}.weight" if layer else "weight"


def weight_of(layer: nn.Module) -> Tensor:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _record(layers: Mapping[str, nn.Module], calls: dict[str, list[Call]]) -> list[Any]:
    """Hooks that note what each layer is given and gives."""

    def hook(name: str) -> Any:
        def note(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            calls[name].append(Call(args[0].detach(), args[0]._version, output))
            return output.clone()  # an activation in place would otherwise overwrite the node differentiated at

        return note

    return [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]


def forward(model: nn.Module, batch: Batch, layers: Mapping[str, nn.Module]) -> tuple[Tensor, dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {name: [] for name in layers}
    handles = _record(layers, calls)
    try:
        with evaluation(model, "eval"):
            outputs = model(*batch.arguments, **batch.keywords)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or len(outputs) != batch.samples:
        came = f"a tensor {list(outputs.shape)}" if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise UnsupportedLayerError(
            f"the model gave {came} for {batch.samples} samples, but this needs outputs [n, classes]; use the exact "
            "metric 'lambda_max' instead"
        )
    return outputs, calls


def backward(
    model: nn.Module, batch: Batch, factor: Tensor, directions: int, layers: Mapping[str, nn.Module]
) -> dict[str, list[Call]]:
    """Every layer's calls with the gradients of their outputs, one for each direction."""
    with torch.enable_grad():
        outputs, calls = forward(model, batch, layers)
    every = [call for found in calls.values() for call in found]
    for r in range(directions):
        gradients = torch.autograd.grad(
            outputs, [call.output for call in every], factor[:, r], retain_graph=r + 1 < directions,
            materialize_grads=True,
        )  # fmt: skip
        for call, gradient in zip(every, gradients, strict=True):
            call.gradients.append(gradient)
    for name, found in calls.items():
        for call in found:
            if call.inputs._version != call.version:
                raise UnsupportedLayerError(
                    f"the input of {name} is overwritten in place after it; remove inplace=True"
                )
    return calls


def _patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs as [n, groups, columns of the weight, positions]."""
    if isinstance(layer, nn.Linear):
        return x.reshape(len(x), -1, x.shape[-1]).mT[:, None]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    padding = layer._reversed_padding_repeated_twice
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if any(padding):
        x = functional.pad(x, list(padding), mode=mode)
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if isinstance(layer, nn.Conv1d):
        x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
    columns = functional.unfold(x, kernel, dilation=dilation, stride=stride)
    return columns.unflatten(1, (layer.groups, -1))


def _slopes(layer: nn.Module, gradient: Tensor) -> Tensor:
    """An output gradient as [n, groups, outputs a group, positions]."""
    if isinstance(layer, nn.Linear):
        return gradient.reshape(len(gradient), -1, gradient.shape[-1]).mT[:, None]
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return gradient.flatten(2).unflatten(1, (layer.groups, -1))


def gram_of(
    layer: nn.Module, batches: Sequence[Sequence[Call]], kept: Sequence[Tensor], rows: int, memory: int
) -> Tensor:
    """A A^T [rows, rows] of one layer, its columns taken in pieces that fit in memory."""
    weight = weight_of(layer)
    per_output = weight[0].numel()
    outputs = layer.out_channels // layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d) else weight.shape[0]
    groups = weight.shape[0] // outputs
    step = max(1, min(outputs, memory // max(1, 4 * rows * per_output * groups)))
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=weight.device)
    plain = isinstance(layer, nn.Linear) and all(len(calls) == 1 and calls[0].inputs.ndim == 2 for calls in batches)
    if plain:  # one position a sample: rows are outer products, whose inner products factor
        x = torch.cat([c[0].inputs[row] for c, k in zip(batches, kept, strict=True) for _, row in _by_direction(k)])
        d = torch.cat(
            [c[0].gradients[r][row] for c, k in zip(batches, kept, strict=True) for r, row in _by_direction(k)]
        )
        return gram.add_((x @ x.T) * (d @ d.T))
    patches = [[_patches(layer, call.inputs) for call in calls] for calls in batches]
    for start in range(0, outputs, step):
        pieces = []
        for calls, columns, k in zip(batches, patches, kept, strict=True):
            for r, row in _by_direction(k):
                piece: Tensor | None = None
                for call, x in zip(calls, columns, strict=True):
                    slope = _slopes(layer, call.gradients[r])[row, :, start : start + step]
                    part = slope @ x[row].mT
                    piece = part if piece is None else piece + part
                if piece is not None:
                    pieces.append(piece.flatten(1))
        if pieces:
            A = torch.cat(pieces)
            gram += A @ A.T
    return gram


def _by_direction(kept: Tensor) -> list[tuple[int, Tensor]]:
    """(direction, the samples that keep it) for every direction that one keeps: the order of the rows of A."""
    return [(r, kept[:, r].nonzero()[:, 0]) for r in range(kept.shape[1]) if bool(kept[:, r].any())]


def eigenvector_of(
    names: Sequence[str],
    layers: Mapping[str, nn.Module],
    calls: Mapping[str, Sequence[Sequence[Call]]],
    kept: Sequence[Tensor],
    top: Tensor,
) -> dict[str, Tensor]:
    """A^T top, normalised over the block: the eigenvector of A^T A in the weights' shapes."""
    parts: dict[str, Tensor] = {}
    for name in names:
        layer = layers[name]
        total = torch.zeros(weight_of(layer).shape, dtype=torch.float64, device=top.device)
        at = 0
        for found, k in zip(calls[name], kept, strict=True):
            mixes: list[Tensor | None] = [None] * len(found)
            for r, row in _by_direction(k):
                share = torch.zeros(len(k), dtype=top.dtype, device=top.device)
                share[row] = top[at : at + len(row)]
                at += len(row)
                for i, call in enumerate(found):
                    slope = _slopes(layer, call.gradients[r])
                    part = slope * share.to(slope.dtype)[:, None, None, None]
                    mix = mixes[i]
                    mixes[i] = part if mix is None else mix + part
            for mix, call in zip(mixes, found, strict=True):
                if mix is not None:
                    columns = _patches(layer, call.inputs)
                    total += torch.einsum("ngol,ngpl->gop", mix, columns).reshape(total.shape)
        parts[name] = total
    length = np.sqrt(sum(float((part**2).sum()) for part in parts.values()))
    return {name: (part / (length or 1.0)).to(weight_of(layers[name]).dtype) for name, part in parts.items()}
