"""BatchNorm folded into the convolution or linear layer before it, so that one kernel does both."""

import copy
import logging
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from .layer import QuantizedLayer

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

_FOLDS_INTO = {  # the layers whose output channels are the channels of that BatchNorm
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d),
    nn.BatchNorm2d: (nn.Conv2d,),
    nn.BatchNorm3d: (nn.Conv3d,),
}


def fold_batchnorm(model: M) -> tuple[M, list[str]]:
    """A copy of the model in which each BatchNorm that can be is folded away, and the names of those.

    With the statistics of eval mode, ``y = gamma (W x + b - mean) / sqrt(var + eps) + beta`` is one layer:
    ``W' = s W``, ``b' = beta + s (b - mean)``, ``s = gamma / sqrt(var + eps)``. A BatchNorm is folded where the
    output of a layer goes to it alone and both are called once; it becomes nn.Identity. What torch.fx cannot trace
    (control flow on values, say) keeps its BatchNorms. ``copy.folded_batchnorms`` maps each to its layer.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> folded, names = fold_batchnorm(net)
        >>> names
        ['1']
    """
    folded = copy.deepcopy(model)
    pairs = _foldable(folded)
    for norm_name, layer_name in pairs.items():
        norm, layer = folded.get_submodule(norm_name), folded.get_submodule(layer_name)
        _fold(layer, norm)
        parent, _, own = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), own, nn.Identity().train(norm.training))
    earlier = getattr(model, "folded_batchnorms", {})
    setattr(folded, "folded_batchnorms", {**earlier, **pairs})  # noqa: B010  (nn.Module types attributes as tensors)
    return folded, list(pairs)


class LayerTracer(fx.Tracer):
    """Keeps quantized layers whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, QuantizedLayer) or super().is_leaf_module(m, module_qualified_name)


def _foldable(model: nn.Module) -> dict[str, str]:
    """BatchNorm name -> name of the layer it folds into, in the order of the calls."""
    if not any(type(module) in _FOLDS_INTO for module in model.modules()):
        return {}
    try:
        graph = LayerTracer().trace(model)
    except Exception as error:  # whatever the model's own forward raises when it meets a proxy
        log.info("%s keeps its BatchNorms: torch.fx cannot trace it (%s)", type(model).__name__, error)
        return {}
    modules: dict[str, Any] = dict(model.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # A parameter that is read beside the layer's own call would see the folded values.
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    pairs: dict[str, str] = {}
    for node in graph.nodes:
        norm: Any = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(norm) not in _FOLDS_INTO or norm.running_mean is None:
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer_name, norm_name = str(source.target), str(node.target)
        layer = modules[layer_name]
        alone = calls[layer_name] == 1 and calls[norm_name] == 1 and layer_name not in read
        shared = sum(1 for m in modules.values() if getattr(m, "weight", None) is getattr(layer, "weight", layer)) > 1
        if alone and not shared and type(layer) in _FOLDS_INTO[type(norm)] and len(layer.weight) == norm.num_features:
            pairs[norm_name] = layer_name
    return pairs


@torch.no_grad()
def _fold(layer: Any, norm: Any) -> None:
    # In double: the folded layer then differs from the pair by one rounding of W' and of b'.
    def double(value: Tensor | None, default: float) -> Tensor:
        return torch.full_like(norm.running_mean, default).double() if value is None else value.double()

    weight: Tensor = layer.weight
    scale = double(norm.weight, 1.0) / torch.sqrt(norm.running_var.double() + norm.eps)
    bias = double(norm.bias, 0.0) + scale * (double(layer.bias, 0.0) - norm.running_mean.double())
    layer.weight.copy_(weight.double() * scale.view(-1, *[1] * (weight.ndim - 1)))
    layer.bias = nn.Parameter(bias.to(weight.dtype), requires_grad=weight.requires_grad)
