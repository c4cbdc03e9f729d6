"""Which layers of a model are quantized, each with which config, and why the others are not."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BantamweightError, UnsupportedLayerError
from ..patterns import fits
from .calibrate import TargetLayer
from .method import LayerwiseMethod
from .report import SkippedLayer

# What normalizes, entry by entry, has no product to quantize, even where its weight has several dimensions.
_ENTRYWISE = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The layers to quantize with their configs, and the others."""

    layers: dict[str, TargetLayer]
    tables: dict[str, nn.Embedding]
    configs: dict[str, LayerwiseMethod]
    skipped: tuple[SkippedLayer, ...]
    counts: dict[str, int]  # weights of all that holds parameters of two dimensions or more, by its name


def select_layers(
    model: nn.Module,
    config: LayerwiseMethod,
    *,
    ignore: Iterable[str],
    overrides: Mapping[str, LayerwiseMethod | None],
    layers: Iterable[str] | None,
    embeddings: LayerwiseMethod | None = None,
    strict: bool,
    reasons: Mapping[str, str] | None = None,
) -> Selection:
    """Picks the linear and 2d convolution layers, and with `embeddings` (their config) the embedding tables.

    A pattern is a name, the name of a module that contains the layer, or a regular expression for the whole name.
    What holds a parameter of two dimensions or more and is not picked is listed in `skipped`: a layer by its name, a
    parameter of a module that has layers of its own by the parameter's.

    Args:
        reasons: why a module, by name, is no linear or convolution layer, where that is known.

    Raises:
        BantamweightError: a pattern that is no regular expression or fits no layer; NaN or infinity in a weight;
            nothing to quantize.
        UnsupportedLayerError: a layer of a kind that cannot be quantized, with `strict`.
    """
    chosen: dict[str, TargetLayer] = {}
    tables: dict[str, nn.Embedding] = {}
    configs: dict[str, LayerwiseMethod] = {}
    skipped: list[SkippedLayer] = []
    patterns = {
        "ignore": [ignore] if isinstance(ignore, str) else list(ignore),
        "overrides": list(overrides),
        "layers": [layers] if isinstance(layers, str) else list(layers or ()),
    }
    unused = {(argument, pattern) for argument, listed in patterns.items() for pattern in listed}

    def find(argument: str, name: str) -> str | None:
        """The first pattern of an argument that fits; every one that fits counts as used."""
        fitting = [pattern for pattern in patterns[argument] if fits(argument, pattern, name)]
        unused.difference_update((argument, pattern) for pattern in fitting)
        return fitting[0] if fitting else None

    for name, module, count in _holders(model):
        kind = type(module).__name__
        supported = (embeddings is not None and _is_table(module)) or is_target(module)

        def skip(reason: str, name: str = name, kind: str = kind, count: int = count) -> None:
            skipped.append(SkippedLayer(name=name, kind=kind, reason=reason, weights=count))

        ignored, override, listed = find("ignore", name), find("overrides", name), find("layers", name)
        if ignored is not None:
            skip(f"ignored by '{ignored}'")
        elif layers is not None and listed is None:
            skip("not among the layers asked for")
        elif override is not None and overrides[override] is None:
            skip(f"left in float by the override '{override}'")
        elif not supported:
            reason = "embeddings is None" if _is_table(module) else (reasons or {}).get(name) or _why_not(module)
            if strict:
                raise UnsupportedLayerError(
                    f"layer '{name}' is a {kind}, which cannot be quantized ({reason}); add it to ignore, or leave "
                    "strict off"
                )
            skip(reason)
        else:
            assert isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
            if module.weight.numel() == 0:
                skip("its weight is empty")
                continue
            for part, tensor in (("weight", module.weight), ("bias", getattr(module, "bias", None))):
                if tensor is not None and not bool(torch.isfinite(tensor).all()):
                    raise BantamweightError(
                        f"the {part} of layer '{name}' holds NaN or infinity; load trained weights that are finite, "
                        "or add the layer to ignore"
                    )
            special = overrides[override] if override is not None else None
            if isinstance(module, nn.Embedding):
                tables[name] = module
                assert embeddings is not None
                configs[name] = special or embeddings
            else:
                chosen[name] = module
                configs[name] = special or config
    if unused:
        argument, pattern = min(unused)
        raise BantamweightError(
            f"{argument} names '{pattern}', which fits no layer; layers are {_some(chosen, skipped)}"
        )
    if not chosen and not tables:
        raise BantamweightError(
            "the model has no linear or 2d convolution layer left to quantize; pass another model, or ignore fewer"
        )
    counts = {name: count for name, _, count in _holders(model)}
    return Selection(layers=chosen, tables=tables, configs=configs, skipped=tuple(skipped), counts=counts)


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """What holds weights: name, the module they belong to, and how many; a tied parameter at its first place."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, _ENTRYWISE):
            continue
        own = [(key, p) for key, p in module.named_parameters(recurse=False) if p.ndim >= 2]
        is_layer = not module._modules and any(key == "weight" for key, _ in own)
        counts = [(key, p.numel() if id(p) not in seen else 0) for key, p in own]
        seen.update(id(p) for _, p in own)
        if is_target(module) or isinstance(module, nn.Embedding) or (is_layer and own):
            yield name, module, sum(count for _, count in counts)
        else:
            for key, count in counts:
                yield f"{name}.{key}" if name else key, module, count


def is_target(module: nn.Module) -> bool:
    """Linear and Conv2d; a subclass only if it computes what they do, from a weight of its own."""
    if "forward" in vars(module) or "weight" not in module._parameters:
        return False
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward


def _is_table(module: nn.Module) -> bool:
    """An embedding that gathers rows and does nothing to them."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None


def _why_not(module: nn.Module) -> str:
    """Why a module's weights stay float."""
    kind = type(module).__name__
    if "forward" in vars(module):
        return f"forward was set on this {kind} itself"
    if isinstance(module, nn.Linear | nn.Conv2d) and "weight" not in module._parameters:
        return f"the weight of this {kind} is made anew at every call"
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding) and type(module).__module__.split(".")[0] != "torch":
        return f"{kind} has a forward of its own"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "max_norm changes its rows at every call"
    return f"a {kind} cannot be quantized"


def _some(chosen: Mapping[str, TargetLayer], skipped: Iterable[SkippedLayer]) -> str:
    names = [*chosen, *(layer.name for layer in skipped)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
