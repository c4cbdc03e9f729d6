"""The largest Gauss-Newton eigenvalue of every layer from one pass over the data.

The Gauss-Newton matrix (Schraudolph, 2002, doi:10.1162/08997660260028683) of a layer's weight is A^T A, where A has
a row for every sample n and direction c of the outputs: the gradient of sqrt(h_nc) e_nc . outputs_n, with (h, e) the
eigenpairs of the loss's Hessian in the outputs. A A^T has the same largest eigenvalue and only as many rows as there
are samples and directions that matter, so no Hessian-vector product is needed. It leaves out the network's own
curvature, which can be negative: use it to rank layers, or to start Lanczos, and let `check` say where even that is
doubtful.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from tqdm import tqdm

from bantamweight.curvature import vectors as vector_ops
from bantamweight.curvature.batches import Batch, as_batches
from bantamweight.curvature.gram import Call, backward, eigenvector_of, forward, gram_of, weight_name, weight_of
from bantamweight.curvature.hvp import Hessian
from bantamweight.curvature.lanczos import DenseMatrix, lanczos
from bantamweight.curvature.mean_loss import LossFunction, free_memory
from bantamweight.curvature.result import Conditions, Result
from bantamweight.errors import BantamweightError, CalibrationError

MOST_ROWS = 8192
DOUBT = 0.5  # a block is doubtful if Hessian and Gauss-Newton matrix differ by this part along the same vector


@dataclass(frozen=True, kw_only=True, eq=False)
class GaussNewton(Result):
    """The largest eigenvalue of every block's Gauss-Newton matrix."""

    values: dict[str, float]  # block -> eigenvalue
    rows: int  # rows of A: output directions kept over all samples
    passes: int  # backward passes
    conditions: Conditions
    vectors: dict[str, dict[str, Tensor]] = field(repr=False)  # block -> layer -> part of the unit eigenvector
    checks: dict[str, float]  # block -> v^T H v of that eigenvector v, with the exact Hessian; empty if not asked for

    _not_in_json = ("vectors",)

    @property
    def ranking(self) -> list[str]:
        """The blocks, sharpest first."""
        return sorted(self.values, key=lambda name: -self.values[name])

    @property
    def doubtful(self) -> list[str]:
        """The checked blocks whose Hessian is not like the Gauss-Newton matrix where that is largest."""
        return [
            name for name, exact in self.checks.items() if abs(exact - self.values[name]) > DOUBT * self.values[name]
        ]

    def __str__(self) -> str:
        width = max(map(len, self.values))
        lines = [
            f"  {name:<{width}}  {self.values[name]:<12.6g}"
            + (f"  Hessian {self.checks[name]:.6g}" if name in self.checks else "")
            + ("  doubtful" if name in self.doubtful else "")
            for name in self.ranking
        ]
        head = f"Largest Gauss-Newton eigenvalue of {len(lines)} blocks ({self.passes} backward passes)"
        return "\n".join([head, *lines, f"  {self.conditions}"])

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A bar a block: a matplotlib Figure, saved if `path` is given."""
        from bantamweight.curvature.plots import plot_bars

        return plot_bars(list(self.values), list(self.values.values()), "largest Gauss-Newton eigenvalue", path)


def gauss_newton_eigenvalues(
    model: nn.Module,
    loss_fn: LossFunction,
    data: Any,
    *,
    blocks: Mapping[str, Sequence[str]] | None = None,
    rank_tol: float = 1e-3,
    memory: int | None = None,
    vectors: bool = False,
    check: bool = False,
    progress: Any = None,
) -> GaussNewton:
    """The largest Gauss-Newton eigenvalue of every layer's weight at once.

    Args:
        model: its linear and 1d or 2d convolution layers are ranked; evaluated in evaluation mode, since samples must
            not mix. It must return outputs [n, classes].
        loss_fn, data: as `Hessian` takes them; the loss must be a mean over samples.
        blocks: name -> the layers whose weights make one block; None: every layer is its own.
        rank_tol: output directions that together carry at most this part of the loss's curvature are left out.
            0 keeps all of them and is exact.
        memory: bytes for the gradients kept at once; beyond it the layers are taken in several groups.
        vectors: also find the eigenvectors (not where `memory` makes several groups).
        check: also take the exact curvature v^T H v along every eigenvector v, one Hessian-vector product a block.
            Where it is not the Gauss-Newton eigenvalue (`doubtful`), the network itself curves: measure such a block
            with `top_eigenvalues` if its place in the ranking matters. Needs the eigenvectors, as `vectors` does.

    Raises:
        UnsupportedLayerError: a model whose outputs are not [n, classes], or a layer that cannot be handled.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> data = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 1))
        >>> round(gauss_newton_eigenvalues(model, nn.functional.mse_loss, data).values[""], 4)
        4.0
    """
    if not 0 <= rank_tol < 1:
        raise BantamweightError(f"rank_tol is {rank_tol}, but must be at least 0 and below 1")
    layers = weight_layers(model)
    if blocks is None:
        blocks = {name: [name] for name in layers}
    wanted = list(dict.fromkeys(layer for names in blocks.values() for layer in names))
    if unknown := [name for name in wanted if name not in layers]:
        raise BantamweightError(
            f"{unknown[0]!r} is no linear or convolution layer of the model; there are {', '.join(layers)}"
        )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise BantamweightError("no parameter of the model requires grad; call model.requires_grad_(True) first")
    device = parameters[0].device
    batches = as_batches(data, device)
    drawn = [(batch.keywords or batch.arguments, batch.targets) for batch in batches]
    samples, count = sum(batch.samples for batch in batches), len(batches)
    if memory is None:
        memory = free_memory(device) // 4

    factors, loss, shapes = _loss_factors(model, loss_fn, batches, {n: layers[n] for n in wanted}, samples, rank_tol)
    rows = sum(int(kept.sum()) for _, kept in factors)
    if rows > MOST_ROWS:
        raise CalibrationError(
            f"{samples} samples give {rows} output directions, more than {MOST_ROWS}; pass fewer samples or raise "
            f"rank_tol ({rank_tol})"
        )
    live = [_live(batch, factor, kept) for batch, (factor, kept) in zip(batches, factors, strict=True) if kept.any()]
    batches, factors = [batch for batch, _ in live], [factor for _, factor in live]
    passes = 0
    grams = {name: torch.zeros(rows, rows, dtype=torch.float64, device=device) for name in blocks}
    members = {name: [block for block, names in blocks.items() if name in names] for name in wanted}
    kept_calls: dict[str, list[list[Call]]] = {}
    groups = _groups(wanted, shapes, max((kept.shape[1] for _, kept in factors), default=1), memory)
    with tqdm(total=len(wanted), desc="Gauss-Newton", unit="layer", leave=False, disable=progress) as bar:
        for group in groups:
            chosen = {name: layers[name] for name in group}
            calls = {name: [] for name in group}
            for batch, (factor, kept) in zip(batches, factors, strict=True):
                found = backward(model, batch, factor, int(kept.any(0).sum()), chosen)
                passes += int(kept.any(0).sum())
                for name in group:
                    calls[name].append(found[name])
            for name in group:
                gram = gram_of(layers[name], calls[name], [kept for _, kept in factors], rows, memory)
                for block in members[name]:
                    grams[block] += gram
                bar.update()
            if (vectors or check) and len(groups) == 1:
                kept_calls = calls
    values, tops = {}, {}
    for block, gram in grams.items():
        pair = lanczos(DenseMatrix(gram), k=1, which="largest", tol=1e-12, max_products=rows + 1, progress=True)
        values[block] = float(pair.values[0])
        tops[block] = pair.vectors[0]
    eigenvectors = {
        block: eigenvector_of(names, layers, kept_calls, [kept for _, kept in factors], tops[block])
        for block, names in blocks.items()
        if kept_calls
    }
    conditions = Conditions(
        mode="eval",
        differentiation="gauss_newton",
        samples=samples,
        batches=count,
        parameters=sum(weight_of(layers[name]).numel() for name in wanted),
        blocks=tuple(blocks),
        loss=loss,
    )
    checks = _curvature_along(model, loss_fn, drawn, eigenvectors) if check else {}
    return GaussNewton(
        values=values, rows=rows, passes=passes, conditions=conditions, vectors=eigenvectors, checks=checks
    )


def _curvature_along(
    model: nn.Module, loss_fn: LossFunction, data: Any, vectors: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """v^T H v of every block's unit vector v, with the exact Hessian."""
    weights = {block: [weight_name(layer) for layer in parts] for block, parts in vectors.items()}
    hessian = Hessian(model, loss_fn, data, blocks=sorted({name for names in weights.values() for name in names}))
    found = {}
    for block, parts in vectors.items():
        part = hessian.block(weights[block])
        by_name = dict(zip(weights[block], parts.values(), strict=True))
        v = torch.cat([by_name[name].reshape(-1) for name in part.names])
        found[block] = vector_ops.dot(part.product(v), part.split(v))
    return found


def weight_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear and convolution layers whose weight requires grad, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and module.weight.requires_grad
    }


def _loss_factors(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Sequence[Batch],
    layers: Mapping[str, nn.Module],
    samples: int,
    rank_tol: float,
) -> tuple[list[tuple[Tensor, Tensor]], float, dict[str, int]]:
    """For each batch sqrt(h) e [n, directions, classes] (steepest first) and which of them are kept [n, directions].

    Also the mean loss, and the number of outputs that every layer has over all samples.
    """
    pairs, loss, sizes = [], 0.0, dict.fromkeys(layers, 0)
    for i, batch in enumerate(batches):
        with torch.no_grad():
            outputs, calls = forward(model, batch, layers)
        for name, found in calls.items():
            sizes[name] += sum(call.output.numel() for call in found)
        share = batch.samples / samples
        with torch.enable_grad():
            z = outputs.detach().requires_grad_()
            value = loss_fn(z, batch.targets)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise CalibrationError("loss_fn must return a scalar tensor; use reduction='mean'")
            if not torch.isfinite(value.detach()):
                raise CalibrationError(f"the loss of batch {i} is {float(value.detach())}; check data and weights")
            (slope,) = torch.autograd.grad(value, z, create_graph=True)
            # The loss is a sum over samples, so one row of every sample's Hessian comes from one backward pass.
            rows = [
                torch.autograd.grad(slope[:, c].sum(), z, retain_graph=True, materialize_grads=True)[0]
                if slope.requires_grad
                else torch.zeros_like(z)
                for c in range(z.shape[1])
            ]
        loss += share * float(value.detach())
        h, e = torch.linalg.eigh(torch.stack(rows, dim=1).double() * share)
        h, e = h.flip(-1).clamp_min(0.0), e.flip(-1)  # steepest first; a convex loss has no others
        pairs.append((h, e))
    every = torch.cat([h.reshape(-1) for h, _ in pairs]).sort().values
    dropped = int((every.cumsum(0) <= rank_tol * every.sum()).sum())
    threshold = float(every[dropped]) if dropped < len(every) else float("inf")
    floor = 1e-14 * float(every[-1])  # what rounding left of directions without curvature
    factors = [((h.sqrt()[:, None, :] * e).mT.to(outputs.dtype), (h >= threshold) & (h > floor)) for h, e in pairs]
    return factors, loss, sizes


def _live(batch: Batch, factor: Tensor, kept: Tensor) -> tuple[Batch, tuple[Tensor, Tensor]]:
    """The samples with a direction that is kept: of a trained network's, often few. The others need no backward."""
    rows = kept.any(1).nonzero()[:, 0]
    leaves = [leaf for leaf in tree_leaves((batch.arguments, batch.keywords)) if isinstance(leaf, Tensor)]
    if len(rows) == batch.samples or any(leaf.ndim == 0 or len(leaf) != batch.samples for leaf in leaves):
        return batch, (factor, kept)
    arguments, keywords = tree_map_only(Tensor, lambda leaf: leaf[rows], (batch.arguments, batch.keywords))
    return Batch(arguments, keywords, batch.targets, len(rows)), (factor[rows], kept[rows])


def _groups(names: Sequence[str], sizes: Mapping[str, int], directions: int, memory: int) -> list[list[str]]:
    """Runs of layers whose kept gradients fit in `memory` together."""
    groups: list[list[str]] = [[]]
    used = 0
    for name in names:
        need = 4 * sizes[name] * (directions + 1)
        if groups[-1] and used + need > memory:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += need
    return groups
