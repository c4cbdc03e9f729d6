"""BatchNorm folded into the convolution or linear layer before it, so that one kernel does both."""

import copy
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..data import tensors_in
from .layer import QuantizedLayer
from .prepared.base import PreparedModule
from .surgery import become

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

# Runs a copy of the model on data; None where there is none.
Run = Callable[[nn.Module], Any]

_FOLDS_INTO = {  # the layers whose output channels are the channels of that BatchNorm
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d, nn.ConvTranspose1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_SAME = 1e-3  # relative error up to which a folded network computes what the other does


def fold_batchnorm(model: M, run: Run | None = None) -> tuple[M, list[str]]:
    """A copy of the model in which each BatchNorm that can be is folded away, and the names of those.

    With the statistics of eval mode, ``y = gamma (W x + b - mean) / sqrt(var + eps) + beta`` is one layer:
    ``W' = s W``, ``b' = beta + s (b - mean)``, ``s = gamma / sqrt(var + eps)``. A BatchNorm is folded where the
    output of a layer goes to it alone and both are called once; it becomes nn.Identity. A subclass with a forward of
    its own (BatchNorm and an activation, say) stays, with statistics and weights that change nothing.
    ``copy.folded_batchnorms`` maps each to its layer, ``copy.kept_batchnorms`` the others to the reason.

    Pairs are found by torch.fx on a throw-away copy, or, where it cannot follow the model, on `run`.

    Args:
        run: calls the model it is given on data, and returns its output. With it, folding that changes the output is
            undone, pair by pair; without it, what torch.fx cannot trace keeps its BatchNorms.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> folded, names = fold_batchnorm(net)
        >>> names
        ['1']
    """
    norms = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    found: Mapping[str, str] | None = _traced_pairs(model) if norms else {}
    reason = "no layer before it whose output goes to it alone"
    if found is None:
        found = {} if run is None else _observed_pairs(model, run)
        reason = "torch.fx cannot trace the model" if run is None else reason
    pairs = {norm: layer for norm, layer in found.items() if _fits(model, norm, layer)}
    if run is not None and pairs:
        tried, pairs = pairs, _equal_pairs(model, pairs, run)
        kept = dict.fromkeys(set(tried) - set(pairs), "the network computes something else without it")
    else:
        kept = {}
    folded = _folded(model, pairs)
    earlier = getattr(model, "folded_batchnorms", {})
    left = {name: kept.get(name, reason) for name in norms if name not in pairs}
    setattr(folded, "folded_batchnorms", {**earlier, **pairs})  # noqa: B010  (nn.Module types attributes as tensors)
    setattr(folded, "kept_batchnorms", left)  # noqa: B010
    return folded, list(pairs)


class LayerTracer(fx.Tracer):
    """Keeps quantized layers, prepared modules and BatchNorms of any class whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, QuantizedLayer | PreparedModule | _BatchNorm)
        return whole or super().is_leaf_module(m, module_qualified_name)


def _traced_pairs(model: nn.Module) -> dict[str, str] | None:
    """BatchNorm name -> name of the layer whose output it alone reads; None where torch.fx cannot follow the model."""
    scratch = copy.deepcopy(model)  # tracing runs the model's code, which may keep what it is given
    try:
        graph = LayerTracer().trace(scratch)
    except Exception as error:  # whatever the model's own forward raises when it meets a proxy
        log.info(
            "%s: torch.fx finds no BatchNorms to fold, it cannot trace the model (%s)", type(model).__name__, error
        )
        return None
    modules = dict(scratch.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A parameter that is read beside the layer's own call would see the folded values.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules.get(str(node.target)), _BatchNorm):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer, norm = str(source.target), str(node.target)
        if calls[layer] == 1 == calls[norm] and not {layer, norm} & read:
            pairs[norm] = layer
    return pairs


def _observed_pairs(model: nn.Module, run: Run) -> dict[str, str]:
    """The same from one run: a BatchNorm whose input is the very tensor that a layer gave."""
    scratch = copy.deepcopy(model)
    given: dict[int, tuple[str, Tensor]] = {}  # outputs are kept, so that no other tensor gets their id
    pairs: dict[str, str] = {}
    calls: Counter[str] = Counter()

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name] += 1
            if isinstance(module, _BatchNorm) and args and id(args[0]) in given:
                pairs[name] = given[id(args[0])][0]
            elif isinstance(output, Tensor):
                given[id(output)] = name, output

        module.register_forward_hook(hook)

    kinds = tuple(kind for kinds in _FOLDS_INTO.values() for kind in kinds)
    for name, module in scratch.named_modules():
        if isinstance(module, (_BatchNorm, *kinds)):
            watch(name, module)
    try:
        run(scratch)
    except Exception as error:  # the caller's own run of the model says what is wrong with it
        log.info("%s does not run (%s)", type(model).__name__, error)
        return {}
    return {norm: layer for norm, layer in pairs.items() if calls[norm] == 1 == calls[layer]}


def _fits(model: nn.Module, norm_name: str, layer_name: str) -> bool:
    """Whether the two can be one by what they are."""
    norm: Any = model.get_submodule(norm_name)
    layer: Any = model.get_submodule(layer_name)
    kinds = next((kinds for kind, kinds in _FOLDS_INTO.items() if isinstance(norm, kind)), ())
    if type(layer) not in kinds or norm.running_mean is None or "forward" in vars(layer) or "forward" in vars(norm):
        return False
    # Hooks see or change what passes between the two; weights made anew at every call cannot be scaled.
    plain = not (layer._forward_hooks or layer._forward_pre_hooks or norm._forward_hooks or norm._forward_pre_hooks)
    plain = plain and "weight" in layer._parameters and layer.weight is not None
    shared = sum(getattr(module, "weight", None) is layer.weight for module in model.modules()) > 1
    return plain and not shared and _channels(layer) == norm.num_features


def _channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@torch.no_grad()
def _equal_pairs(model: nn.Module, pairs: dict[str, str], run: Run) -> dict[str, str]:
    """Those of the pairs that together leave the output of `run` as it is."""
    try:
        expected, again = run(copy.deepcopy(model)), run(copy.deepcopy(model))
    except Exception as error:
        log.info("%s does not run (%s)", type(model).__name__, error)
        return {}
    if not same_outputs(expected, again, _SAME):
        return {}  # nothing can be shown of a network that draws at random

    def equal(some: dict[str, str]) -> bool:
        try:
            return same_outputs(expected, run(_folded(model, some)), _SAME)
        except Exception:  # the model reads something of a BatchNorm that an nn.Identity lacks
            return False

    def largest(known: dict[str, str], tried: dict[str, str]) -> dict[str, str]:
        """`known` and as many of `tried` as go together, halving them where not all do."""
        if equal({**known, **tried}):
            return {**known, **tried}
        if len(tried) == 1:
            return known
        names = list(tried)
        for part in (names[: len(names) // 2], names[len(names) // 2 :]):
            known = largest(known, {name: tried[name] for name in part})
        return known

    return largest({}, pairs)


def same_outputs(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two outputs hold tensors of the same shapes whose values differ by no more than rounding."""
    return output_error(a, b) <= tolerance


def output_error(a: Any, b: Any) -> float:
    """The largest ||b - a|| / ||a|| among the tensors of two outputs; infinity where they do not correspond.

    Tensors of whole numbers (predicted classes, say) count with the share of the entries that differ.
    """
    first, second = list(tensors_in(a)), list(tensors_in(b))
    if len(first) != len(second) or any(x.shape != y.shape for x, y in zip(first, second, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(first, second, strict=True):
        if x.numel() == 0:
            continue
        if x.is_complex() and y.is_complex():
            x, y = torch.view_as_real(x), torch.view_as_real(y)
        if not x.is_floating_point():
            worst = max(worst, float((x != y).double().mean()))
            continue
        same = (x == y) | (x.isnan() & y.isnan())  # infinities of masks among them
        difference = torch.where(same, 0.0, y.double() - x.double()).norm()
        size = torch.where(x.isfinite(), x.double(), 0.0).norm()
        worst = max(worst, float(difference / size) if size > 0 else float(difference))
    return worst if worst == worst else float("inf")


@torch.no_grad()
def _folded(model: M, pairs: Mapping[str, str]) -> M:
    folded = copy.deepcopy(model)
    for norm_name, layer_name in pairs.items():
        norm: Any = folded.get_submodule(norm_name)
        _fold(folded.get_submodule(layer_name), norm)
        if type(norm) in _FOLDS_INTO:
            become(norm, nn.Identity())
        else:
            # Its own forward does more than normalize, and goes on with what the layer gives.
            norm.running_mean.zero_()
            norm.running_var.fill_(1 - norm.eps)
            if norm.affine:
                norm.weight.fill_(1)
                norm.bias.zero_()
    return folded


def _fold(layer: Any, norm: Any) -> None:
    # In double: the folded layer then differs from the pair by one rounding of W' and of b'.
    def double(value: Tensor | None, default: float) -> Tensor:
        return torch.full_like(norm.running_mean, default).double() if value is None else value.double()

    weight: Tensor = layer.weight
    scale = double(norm.weight, 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = double(norm.bias, 0.0) + scale * (double(layer.bias, 0.0) - norm.running_mean.double())
    if isinstance(layer, _TRANSPOSED):  # [in, out / groups, ...], the inputs of each group in a row
        by_group = weight.double().unflatten(0, (layer.groups, -1))
        factor = scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        weight.copy_((by_group * factor).flatten(0, 1))
    else:
        weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
