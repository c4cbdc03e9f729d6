"""Which layers of a model are quantized, each with which config, and why the others are not."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import BantamweightError, UnsupportedLayerError
from ..patterns import fits
from .calibrate import TargetLayer
from .method import LayerwiseMethod
from .report import SkippedLayer

# Layers with weights worth quantizing that no packed form exists for.
_UNSUPPORTED = (
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Embedding,
    nn.EmbeddingBag,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Selection:
    """The layers to quantize with their configs, and the others."""

    layers: dict[str, TargetLayer]
    tables: dict[str, nn.Embedding]
    configs: dict[str, LayerwiseMethod]
    skipped: tuple[SkippedLayer, ...]


def select_layers(
    model: nn.Module,
    config: LayerwiseMethod,
    *,
    ignore: Iterable[str],
    overrides: Mapping[str, LayerwiseMethod | None],
    layers: Iterable[str] | None,
    embeddings: LayerwiseMethod | None = None,
    strict: bool,
) -> Selection:
    """Picks the linear and 2d convolution layers, and with `embeddings` (their config) the embedding tables.

    A pattern is a name, the name of a module that contains the layer, or a regular expression for the whole name.

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

    for name, module in model.named_modules():
        kind = type(module).__name__
        is_table = embeddings is not None and _is_table(module)
        supported = is_table or _is_target(module)
        if not supported and not isinstance(module, _UNSUPPORTED):
            continue
        ignored, override, listed = find("ignore", name), find("overrides", name), find("layers", name)
        if ignored is not None:
            skipped.append(SkippedLayer(name=name, kind=kind, reason=f"ignored by '{ignored}'"))
        elif layers is not None and listed is None:
            skipped.append(SkippedLayer(name=name, kind=kind, reason="not among the layers asked for"))
        elif override is not None and overrides[override] is None:
            skipped.append(SkippedLayer(name=name, kind=kind, reason=f"left in float by the override '{override}'"))
        elif not supported:
            if strict:
                raise UnsupportedLayerError(
                    f"layer '{name}' is a {kind}, which cannot be quantized; add it to ignore, or leave strict off"
                )
            reason = "embeddings is None" if _is_table(module) else f"a {kind} cannot be quantized"
            skipped.append(SkippedLayer(name=name, kind=kind, reason=reason))
        else:
            assert isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding)
            if module.weight.numel() == 0:
                skipped.append(SkippedLayer(name=name, kind=kind, reason="its weight is empty"))
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
    return Selection(layers=chosen, tables=tables, configs=configs, skipped=tuple(skipped))


def _is_target(module: nn.Module) -> bool:
    """Linear and Conv2d; a subclass only if it computes what they do."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward


def _is_table(module: nn.Module) -> bool:
    """An embedding that gathers rows and does nothing to them."""
    if not isinstance(module, nn.Embedding) or type(module).forward is not nn.Embedding.forward:
        return False
    return module.max_norm is None


def _some(chosen: Mapping[str, TargetLayer], skipped: Iterable[SkippedLayer]) -> str:
    names = [*chosen, *(layer.name for layer in skipped)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"
