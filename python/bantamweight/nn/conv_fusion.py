"""Chains of convolutions in place of single ones, in every part of a model that torch.fx can follow."""

import copy
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import BantamweightError
from .chain_finder import FoundChain, find_chains, has_hooks
from .conv_chain import PackedConvChain
from .packed import PackedConv2d
from .traced_forward import install, trace, uninstall

log = logging.getLogger(__name__)

Call = tuple[tuple[Any, ...], dict[str, Any]]

_TOLERANCE = 0.02  # of the outputs' norm: an average summed in another order moves a few int8 codes after it
_SIZES = (32, 64, 224)  # of images that convolution networks take


@dataclass(kw_only=True, eq=False)
class ChainedModule:
    """A module whose forward runs chains of its convolutions.

    `layers` are the names of these, in the whole model; `reason` says why it does not run them after all.
    """

    name: str
    module: nn.Module
    layers: list[str]
    chains: list[str]
    reason: str | None = None

    def undo(self, reason: str) -> None:
        """Leaves the module as it was."""
        uninstall(self.module)
        for chain in self.chains:
            del vars(self.module)[chain]
        self.reason, self.chains = reason, []


def chain_convolutions(model: nn.Module) -> list[ChainedModule]:
    """Gives the model, or its largest parts that torch.fx can follow, a forward that runs chains of convolutions.

    The chains are plain attributes (``conv_chain_0``, ...) beside the layers they share: nothing is registered, so
    names, order and number of submodules stay. The model given is changed.

    Returns:
        A record a module with chains, and one a module that torch.fx cannot follow and whose parts have none either.
    """
    chained: list[ChainedModule] = []
    _chain(model, "", chained)
    return chained


def convolution_chains(model: nn.Module) -> list[PackedConvChain]:
    """Every chain that a forward in the model runs."""
    return [part for module in model.modules() for part in vars(module).values() if isinstance(part, PackedConvChain)]


def use_int8_maps(model: nn.Module, batches: Iterable[Any]) -> None:
    """Makes the maps inside every chain of the model int8, with ranges from batches (`data.Batch`).

    Raises:
        BantamweightError: a chain that no batch reaches, or batches that the model or its layers refuse.
    """
    chains = convolution_chains(model)
    for chain in chains:
        chain.observe(True)
    try:
        with torch.no_grad():
            for batch in batches:
                batch.run(model)
        for chain in chains:
            chain.use_int8_maps()
    finally:
        for chain in chains:
            chain.observe(False)


def check_on_example(chained: ChainedModule) -> None:
    """Undoes a forward that gives other outputs than the module's own, on images of a size that the module takes.

    A tracer sees one way through a forward: what it asks of values, types, sizes and the state of the process is
    answered once. Nothing is said where the module takes no single image.
    """
    first = next(part for part in chained.module.modules() if isinstance(part, PackedConv2d))
    floats = (parameter.dtype for parameter in chained.module.parameters() if parameter.is_floating_point())
    dtype = next(floats, torch.float32)
    generator = torch.Generator().manual_seed(0)
    probe = copy.deepcopy(chained.module)  # a forward may leave things on its module
    ran = 0
    for size in _SIZES:
        for images in (1, 2):
            x = torch.randn(images, first.in_channels, size, size, generator=generator).to(dtype)
            found = _difference(probe, ((x,), {}))
            if found:
                chained.undo(found)
            if found or found is None:
                break
            ran += 1
        if chained.reason is not None or ran >= 4:
            return


def check_on_calls(model: nn.Module, records: Iterable[ChainedModule], calls: Iterable[Call]) -> None:
    """As `check_on_example`, on what reaches each module when the model is called, and on parts of that."""
    seen: dict[int, list[Call]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.setdefault(id(module), []).append(tree_map(_copied, (args, kwargs)))

    handles = [
        record.module.register_forward_pre_hook(note, with_kwargs=True)  # type: ignore[arg-type]
        for record in records
        if record.chains
    ]
    try:
        with torch.no_grad():
            for args, kwargs in calls:
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    for record in records:
        probe = copy.deepcopy(record.module)
        for call in _variants(seen.get(id(record.module), [])[:2] if record.chains else []):
            if found := _difference(probe, call):
                record.undo(found)
                break


# ---- one module ---------------------------------------------------------------------------------


def _chain(module: nn.Module, name: str, chained: list[ChainedModule]) -> bool:
    """Whether the module, or one of its parts, has got chains; where none has, a record says why."""
    if any(record.module is module for record in chained):  # under another name
        return any(record.module is module and record.chains for record in chained)
    if isinstance(module, PackedConv2d) or not any(isinstance(part, PackedConv2d) for part in module.modules()):
        return False
    whole: list[tuple[str, nn.Module]] = []
    reason = None
    try:
        traced = trace(module)
    except BantamweightError as error:
        reason = str(error)
        whole = list(module.named_children())
        log.info("%s (%s) keeps its forward: %s", name or "the model", type(module).__name__, reason)
    else:
        modules = dict(module.named_modules())
        found = find_chains(traced.graph, modules)
        called = {str(node.target) for node in traced.graph.nodes if node.op == "call_module"}
        whole = [(part, modules[part]) for part in sorted(called) if has_hooks(modules[part])]
        if found:
            chains = [_put_in(module, traced.graph, chain) for chain in found]
            install(module, traced)
            layers = list(dict.fromkeys(layer for chain in found for layer in chain.layers))
            chained.append(
                ChainedModule(
                    name=name, module=module, layers=[f"{name}.{layer}".lstrip(".") for layer in layers], chains=chains
                )
            )
            reason = None
    inside = [_chain(part, f"{name}.{part_name}".lstrip("."), chained) for part_name, part in whole]
    if reason is not None and not any(inside):
        chained[:] = [
            record for record in chained if record.chains or not record.name.startswith(f"{name}.".lstrip("."))
        ]
        chained.append(ChainedModule(name=name, module=module, layers=[], chains=[], reason=reason))
    return any(record.module is module and record.chains for record in chained) or any(inside)


def _put_in(module: nn.Module, graph: Any, found: FoundChain) -> str:
    """The chain in its nodes' place; the name it has in the module."""
    number = 0
    while hasattr(module, name := f"conv_chain_{number}"):
        number += 1
    places = {}
    for layer in found.layers:
        parent, _, own = layer.rpartition(".")
        places[id(module.get_submodule(layer))] = (module.get_submodule(parent)._modules, own)
    chain = PackedConvChain(
        found.steps,
        found.output in found.flat,
        [places[id(step.conv)] for step in found.steps if step.conv is not None],
        found.dropouts,
    )
    vars(module)[name] = chain.train(module.training)
    with graph.inserting_after(found.nodes[-1]):
        # Not found.source, which may be the output of a chain that was put in before.
        call = graph.call_module(name, (found.nodes[0].args[0],))
    assert found.output is not None
    found.output.replace_all_uses_with(call)
    for node in reversed(found.nodes):
        graph.erase_node(node)
    return name


# ---- the recorded forward against the module's own ----------------------------------------------


def _difference(module: nn.Module, call: Call) -> str | None:
    """A clause that says how the outputs differ, "" where they do not; None where the module's own forward raises."""
    args, kwargs = call
    with torch.no_grad():
        try:
            expected = type(module).forward(module, *tree_map(_copied, args), **tree_map(_copied, kwargs))
        except Exception:  # no input of this model
            return None
        try:
            came = module.forward(*tree_map(_copied, args), **tree_map(_copied, kwargs))
        except Exception as error:
            return f"its forward as torch.fx recorded it raises {type(error).__name__} where its own does not"
    ours, theirs = ([leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)] for output in (came, expected))
    alike = len(ours) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and _close(a, b) for a, b in zip(ours, theirs, strict=True)
    )
    if alike:
        return ""
    return "its forward as torch.fx recorded it gives other outputs than its own, so it depends on more than its calls"


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(finite, torch.isfinite(a)):
        return False
    a, b = a[finite], b[finite]
    return float((a - b).norm()) <= _TOLERANCE * float(b.norm())


def _variants(calls: Iterable[Call]) -> Iterator[Call]:
    """Each call, and the same with another number of samples and with smaller images."""
    for call in calls:
        yield call
        leading = {leaf.shape[0] if leaf.ndim else 0 for leaf in tree_leaves(call) if isinstance(leaf, Tensor)}
        if len(leading) == 1 and (samples := leading.pop()) > 0:
            yield tree_map(lambda leaf: _rows(leaf, samples), call)
        yield tree_map(_cropped, call)


def _rows(leaf: Any, samples: int) -> Any:
    """One sample of several, or two of one."""
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf[:1] if samples > 1 else torch.cat([leaf, leaf])


def _cropped(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim < 4:
        return leaf
    height, width = (max(1, 3 * size // 4) for size in leaf.shape[-2:])
    return leaf[..., :height, :width].contiguous()


def _copied(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
