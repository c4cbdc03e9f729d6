"""nn.EmbeddingBag as a plain table, whose rows are gathered, and the reduction of each bag."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import PreparedModule, bare


class PreparedEmbeddingBag(PreparedModule, nn.EmbeddingBag):
    """`nn.EmbeddingBag` whose table is its child `table`, an nn.Embedding.

    Example:
        >>> bag = PreparedEmbeddingBag.prepare(nn.EmbeddingBag(10, 4, mode="sum"))
        >>> bag(torch.tensor([1, 2, 4, 5]), torch.tensor([0, 3])).shape
        torch.Size([2, 4])
    """

    kind = "embedding_bag"
    replaces = nn.EmbeddingBag
    table: nn.Embedding

    @classmethod
    def why_not(cls, module: nn.EmbeddingBag) -> str | None:
        if module.max_norm is not None:
            return f"its max_norm={module.max_norm} changes its table at every call; set it to None once it is trained"
        return None

    @classmethod
    def prepare(cls, module: nn.EmbeddingBag) -> Self:
        new: Any = bare(cls, module)
        new.table = nn.Embedding(
            module.num_embeddings,
            module.embedding_dim,
            padding_idx=module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq,
            sparse=module.sparse,
            device="meta",
        )
        new.table.weight = module.weight
        return new

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.table.weight

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """[bags, embedding_dim]; as torch's."""
        if per_sample_weights is not None and per_sample_weights.shape != input.shape:
            raise ValueError(
                f"embedding_bag: If per_sample_weights ({per_sample_weights.shape}) is not None, then it must have the "
                f"same shape as the input ({input.shape})"
            )
        if per_sample_weights is not None and self.mode != "sum":
            raise NotImplementedError(
                f"embedding_bag: per_sample_weights was not None. per_sample_weights is only supported for mode='sum' "
                f"(got mode='{self.mode}')"
            )
        ids, bags, count = self._bags(input, offsets)
        rows = self.table(ids)
        # Sums of many rows in a short float type would lose what torch keeps.
        wide = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
        if per_sample_weights is not None:
            wide = wide * per_sample_weights.reshape(-1, 1)
        if self.padding_idx is not None:
            kept = ids != self.padding_idx
            wide, bags = wide[kept], bags[kept]
        if self.mode == "max":
            empty = wide.new_zeros(count, wide.shape[1])
            found = empty.scatter_reduce(0, bags[:, None].expand_as(wide), wide, "amax", include_self=False)
            return found.to(rows.dtype)
        total = wide.new_zeros(count, wide.shape[1]).index_add(0, bags, wide)
        if self.mode == "mean":
            total = total / torch.bincount(bags, minlength=count).clamp(min=1)[:, None]
        return total.to(rows.dtype)

    def _bags(self, input: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """The ids of all bags in a row, the bag of each, and how many bags there are."""
        if input.dim() == 2:
            if offsets is not None:
                raise ValueError(f"if input is 2D, then offsets has to be None, but got offsets of {offsets.dtype}")
            count, length = input.shape
            return input.flatten(), torch.arange(count, device=input.device).repeat_interleave(length), count
        if input.dim() != 1:
            raise ValueError(f"input has to be 1D or 2D Tensor, but got Tensor of dimension {input.dim()}")
        if offsets is None or offsets.dim() != 1:
            raise ValueError("offsets has to be a 1D Tensor where the input is 1D")
        ends = offsets[1:] if self.include_last_offset else torch.cat((offsets[1:], offsets.new_tensor([len(input)])))
        starts = offsets[: len(ends)]
        if len(starts) and int(starts[0]) != 0:
            raise RuntimeError(f"offsets[0] has to be 0, i.e., the first sequence starts from 0, but got {starts[0]}")
        lengths = ends - starts
        if bool((lengths < 0).any()) or int(lengths.sum()) > len(input):
            raise RuntimeError(
                f"offsets must rise from 0 to at most the {len(input)} indices, but got {offsets.tolist()}"
            )
        bags = torch.arange(len(lengths), device=input.device).repeat_interleave(lengths)
        return input[: len(bags)], bags, len(lengths)
