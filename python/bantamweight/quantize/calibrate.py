"""A layer's problem from its inputs in the analog and in the quantized network: rows drawn, gathered and collected."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

from ..nn.simulated import simulate_int8
from ..weights import ConvGeometry, conv_matrix
from .layer_problem import LayerProblem, ProblemBuilder
from .method import LayerwiseMethod, layer_seed

TargetLayer = nn.Linear | nn.Conv2d

# One batch's input of a layer in both networks (the same tensor where they do not differ yet), and which of its
# leading indices are held out.
Streams = tuple[Tensor, Tensor, Tensor]

_CHUNK_FLOATS = 1 << 24  # floats of the rows that are gathered at a time
_MOST_KEPT_FLOATS = 1 << 26  # of all rows of a layer that are kept, in each of the two networks


def layer_weight(layer: TargetLayer) -> Tensor:
    """The weight as the solver wants it: float32 [problems, inputs, neurons], convolutions channels last."""
    weight = layer.weight.detach()
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    matrix = conv_matrix(weight) if isinstance(layer, nn.Conv2d) else weight
    return matrix.to("cpu", torch.float32).reshape(groups, -1, matrix.shape[1]).transpose(1, 2).contiguous()


def input_rows(layer: TargetLayer, shape: torch.Size) -> int:
    """How many rows (samples, tokens, patches) an input of this shape gives the layer."""
    if isinstance(layer, nn.Linear):
        return shape[:-1].numel()
    height, width = _output_size(layer, shape)
    return (shape[0] if len(shape) == 4 else 1) * height * width


def build_problem(
    name: str, layer: TargetLayer, streams: Iterable[Streams], total_rows: int, config: LayerwiseMethod
) -> LayerProblem:
    """Draws rows from every batch and collects them.

    Args:
        streams: the layer's inputs batch by batch.
        total_rows: the rows of all of them; at most `config.patches_per_layer` are drawn, and no more than 500
            an input (or 4,096), evenly over the batches.

    Raises:
        CalibrationError: NaN or infinity in the inputs, or no rows at all.
    """
    weight = layer_weight(layer)
    # A neuron with few inputs needs few rows; depthwise convolutions would otherwise cost more than all others.
    enough = max(4096, 500 * weight.shape[1])
    share = min(1.0, min(config.patches_per_layer, enough) / max(total_rows, 1))
    rows_to_solve_on = round(total_rows * share * (1 - config.held_out))
    collect = config.statistics(inputs=weight.shape[1], neurons=weight.shape[2], rows=rows_to_solve_on)
    if collect == "rows":
        share = min(share, _MOST_KEPT_FLOATS / max(1, total_rows * weight.shape[0] * weight.shape[1]))
    builder = ProblemBuilder(name, weight, collect=collect)
    generator = torch.Generator().manual_seed(layer_seed(config.seed, name))
    for analog, quantized, held_out in streams:
        if analog.ndim == (3 if isinstance(layer, nn.Conv2d) else 1):
            analog, quantized = (analog[None],) * 2 if analog is quantized else (analog[None], quantized[None])
        count = input_rows(layer, analog.shape)
        drawn = torch.arange(count)
        if share < 1:
            drawn = torch.randperm(count, generator=generator)[: max(1, round(count * share))].sort().values
        if len(held_out) != analog.shape[0]:  # the layer's leading dimension is not the samples'
            aside_count = max(1, round(analog.shape[0] * config.held_out))
            held_out = torch.randperm(analog.shape[0], generator=generator) < aside_count
        aside = held_out[drawn // (count // analog.shape[0])] if count else drawn.bool()
        if config.activation_bits is not None:
            dims = (
                (-1,) if isinstance(layer, nn.Linear) else ConvGeometry.of(layer).rounded_together(layer.out_channels)
            )
            quantized = simulate_int8(quantized, dims)
        gather = _gather_patches if isinstance(layer, nn.Conv2d) else _gather_rows
        chunk = max(1, _CHUNK_FLOATS // max(1, weight.shape[0] * weight.shape[1]))
        for which, is_held_out in ((drawn[~aside], False), (drawn[aside], True)):
            for part in which.split(chunk):
                rows = gather(layer, analog, part)
                rows_quantized = rows if quantized is analog else gather(layer, quantized, part)
                builder.add(rows, rows_quantized, held_out=is_held_out)
    return builder.finish()


def _gather_rows(layer: TargetLayer, x: Tensor, rows: Tensor) -> Tensor:
    """Rows of the flattened input of a linear layer: [1, n, d]."""
    return x.reshape(-1, x.shape[-1])[rows.to(x.device)].to("cpu", torch.float32)[None]


def _gather_patches(layer: TargetLayer, x: Tensor, rows: Tensor) -> Tensor:
    """The patches of a convolution at output positions `rows` (image, then row, then column): [groups, n, d].

    Within a patch inputs are ordered as `conv_matrix` orders the weight's: ky, kx, channel.
    """
    assert isinstance(layer, nn.Conv2d)
    height, width = _output_size(layer, x.shape)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = F.pad(x, _padding(layer), mode=mode).permute(0, 2, 3, 1).contiguous()
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    rows = rows.to(x.device)
    image, position = rows // (height * width), rows % (height * width)
    y = (position // width * sh)[:, None, None] + torch.arange(kh, device=x.device)[:, None] * dh
    x0 = (position % width * sw)[:, None, None] + torch.arange(kw, device=x.device) * dw
    patches = padded[image[:, None, None], y, x0].to("cpu", torch.float32)  # [n, kh, kw, channels]
    channels = layer.in_channels // layer.groups
    patches = patches.reshape(len(rows), kh * kw, layer.groups, channels)
    return patches.permute(2, 0, 1, 3).reshape(layer.groups, len(rows), kh * kw * channels)


def _padding(layer: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top and bottom, as F.pad orders them."""
    if isinstance(layer.padding, tuple):
        vertical, horizontal = layer.padding
        return (horizontal, horizontal, vertical, vertical)
    if layer.padding == "valid":
        return (0, 0, 0, 0)
    height, width = (d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True))
    return (width // 2, width - width // 2, height // 2, height - height // 2)


def _output_size(layer: nn.Conv2d, shape: torch.Size) -> tuple[int, int]:
    left, right, top, bottom = _padding(layer)
    sizes = []
    for axis, (size, padding) in enumerate(((shape[-2], top + bottom), (shape[-1], left + right))):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
        sizes.append(max(0, (size + padding - reach) // layer.stride[axis] + 1))
    return sizes[0], sizes[1]
