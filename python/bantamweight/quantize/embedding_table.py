"""Embedding tables, rounded row by row: a lookup multiplies nothing, so there is no error of outputs to follow.

Where Q-BERT (Shen et al. 2020, arXiv:1909.05840, section 3.2) quantizes the embedding with the scales of its groups
of rows, a row here has its own scale, or one for every `group_size` of its columns.
"""

import torch
from torch import nn

from ..errors import BantamweightError
from ..weights import QuantizedWeight
from .grid import candidate_grid, pick, sum_over_row_groups, weight_range
from .method import LayerwiseMethod

_ROWS_AT_ONCE = 4096


@torch.no_grad()
def quantize_embedding(embedding: nn.Embedding, config: LayerwiseMethod) -> tuple[QuantizedWeight, float]:
    """Each entry to the nearest value of the grid of its row.

    Args:
        embedding: float, on any device.
        config: gives the alphabet, `granularity`, `group_size`, `percentile` and the candidates `steps` (None is the
            plain C = 1); among several steps and zero points each row takes those of its least squared error.

    Returns:
        The table as a QuantizedWeight [num_embeddings, embedding_dim], and ||W - Q|| / ||W||.

    Raises:
        BantamweightError: the table holds NaN or infinity, or is empty.

    Example:
        >>> from bantamweight import RoundToNearest
        >>> table, error = quantize_embedding(nn.Embedding(100, 64), RoundToNearest(bits=8))
        >>> table, error < 0.01
        (QuantizedWeight(W8, 100x64), True)
    """
    weight = embedding.weight.detach().to("cpu", torch.float32)
    if weight.numel() == 0 or not bool(torch.isfinite(weight).all()):
        raise BantamweightError(
            f"the table {list(weight.shape)} of an embedding is empty or holds NaN or infinity; load trained weights "
            "that are finite, or leave the layer in float"
        )
    group_size = config.group_size_for(weight.shape[1])
    alphabet, factors, shared = config.grid_alphabet, config.steps or (1.0,), config.rows_per_scale
    # The rows of the table are the columns ("neurons") of a problem.
    ranges = weight_range(
        weight.T[None],
        granularity=config.step_granularity,
        group_size=group_size,
        percentile=config.percentile,
        rows_per_scale=shared,
    )
    codes, scale, zero, squared = [], [], [], 0.0
    # Rows at a time, in whole groups of those that share a scale.
    at_once = _ROWS_AT_ONCE if shared is None else -(-_ROWS_AT_ONCE // shared) * shared
    for begin in range(0, weight.shape[0], at_once):
        part = weight[begin : begin + at_once].T[None].contiguous()
        rows = part.shape[2]
        grid = candidate_grid(ranges[:, :, begin : begin + rows], alphabet, factors, group_size)
        wide = part.repeat(1, 1, grid.scale.shape[2] // rows)
        proposed = grid.nearest(wide)
        errors = (grid.values(proposed) - wide).square().sum(1).reshape(1, -1, rows)
        alike = errors if shared is None else sum_over_row_groups(errors, shared)
        best = alike.argmin(1)
        squared += float(errors.gather(1, best[:, None, :]).sum())
        grid, chosen = pick(grid, proposed, best)
        for found, tensor in ((codes, chosen), (scale, grid.scale), (zero, grid.zero)):
            found.append(tensor[0].T.contiguous())
    table = QuantizedWeight.from_codes(
        torch.cat(codes), torch.cat(scale), torch.cat(zero), group_size=group_size, levels=alphabet.levels
    )
    return table, (squared / max(float(weight.square().sum()), 1e-300)) ** 0.5
