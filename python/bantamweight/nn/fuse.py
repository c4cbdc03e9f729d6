"""From a packed model to one whose neighbouring layers run in one call."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..errors import BantamweightError
from .conv_chain import chain_convolutions, use_int8_maps
from .transformer_blocks import fused_block


@dataclass(frozen=True, kw_only=True)
class FusionRecord:
    """What became of one transformer block or convolution.

    Attributes:
        name: of the module.
        kind: its class.
        reason: why it stayed as it was; None where it is fused.
    """

    name: str
    kind: str
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {self.kind} {'fused' if self.reason is None else f'as it was, {self.reason}'}"


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """A record a transformer block, and one a convolution in a chain; `model.fusion` after `fuse`."""

    records: tuple[FusionRecord, ...]

    @property
    def names(self) -> list[str]:
        """Of what is fused."""
        return [record.name for record in self.records if record.reason is None]

    def __str__(self) -> str:
        return "\n".join(str(record) for record in self.records)


def fuse(
    model: nn.Module, *, calibration: Iterable[Any] | Tensor | Callable[[nn.Module], Any] | None = None
) -> nn.Module:
    """A copy of a packed model in which neighbouring layers run as one call, what lies between them included.

    - Transformer blocks, torch's and BERT's: queries, keys and values from rows rounded once; the feed-forward block
      with activation, residual and layer norm in one call (`PackedLinears`, `PackedChain`, `PackedFFN`).
    - Chains of convolutions with ReLU, residual sums and poolings between them, where torch.fx can trace the model
      (`PackedConvChain`).

    Outputs equal the packed model's up to float rounding, unless there is calibration data: then the feature maps
    inside each chain of convolutions are int8 with one scale a map (`PackedConvChain`), which is faster and costs some
    tenths of a per cent of accuracy at most where the data is like the model's inputs (a hundred images do; values
    beyond those seen are cut off).

    ``model.fusion`` (a `FusionReport`) says what became of each block. The copy is for running, and its state dict has
    other names: save the packed model, and fuse what was loaded.

    Args:
        model: of `bw.pack`, in eval mode.
        calibration: inputs in any form that `bw.quantize` takes; None keeps the scales that every layer finds for
            every image.

    Raises:
        BantamweightError: nothing in the model can be fused, or it is fused already; calibration data without a chain
            of convolutions, or that is empty, not finite, or no input of the model.

    Example:
        >>> import torch
        >>> import bantamweight as bw
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3))
        >>> packed = bw.pack(bw.quantize(net, "W4", calibration=torch.randn(4, 3, 8, 8), progress=False))
        >>> fused = bw.nn.fuse(packed)
        >>> fused.fusion.names
        ['0', '2']
        >>> static = bw.nn.fuse(packed, calibration=torch.randn(4, 3, 8, 8))
    """
    if getattr(model, "fusion", None) is not None:
        raise BantamweightError(f"this {type(model).__name__} is fused already; fuse the packed model once")
    kind = type(model).__name__
    model = copy.deepcopy(model)
    records: list[FusionRecord] = []
    for name, block in list(model.named_modules()):
        try:
            fused, reason = fused_block(block), None
        except BantamweightError as error:
            fused, reason = None, str(error)
        if fused is None and reason is None:
            continue
        records.append(FusionRecord(name=name, kind=type(block).__name__, reason=reason))
        if fused is None:
            continue
        if name:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, fused)
        else:
            model = fused  # the model is the block
    model, convolutions = chain_convolutions(model)
    records += [FusionRecord(name=name, kind="PackedConv2d") for name in convolutions]
    if not any(record.reason is None for record in records):
        found = "; ".join(map(str, records)) or (
            "it has no nn.TransformerEncoderLayer, no block with the attributes of BERT's, and no chain of packed "
            "convolutions that torch.fx can trace"
        )
        raise BantamweightError(f"nothing in this {kind} can be fused: {found}")
    if calibration is not None:
        if not convolutions:
            raise BantamweightError(
                f"calibration data is for the maps between convolutions, but this {kind} has no chain of them that can "
                "be fused; leave calibration out"
            )
        from ..data import collect_batches

        # The ranges are those of every sample; which ones are held out matters to solvers of weights alone.
        use_int8_maps(model, collect_batches(model, calibration, held_out=0.0, seed=0))
    setattr(model, "fusion", FusionReport(records=tuple(records)))  # noqa: B010  (nn.Module types attributes as tensors)
    return model
