"""From a packed model to one whose neighbouring layers run in one call."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..data import collect_batches
from ..errors import BantamweightError
from .conv_fusion import ChainedModule, chain_convolutions, check_on_calls, check_on_example, use_int8_maps
from .surgery import replace
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
        return (
            f"{self.name or 'the model'}: {self.kind} {'fused' if self.reason is None else f'as it was, {self.reason}'}"
        )


@dataclass(frozen=True, kw_only=True)
class FusionReport:
    """A record a transformer block, and one a convolution in a chain; `model.fusion` after `fuse`.

    A part of the model whose convolutions could not be put into chains has a record too.
    """

    records: tuple[FusionRecord, ...]

    @property
    def names(self) -> list[str]:
        """Of what is fused."""
        return [record.name for record in self.records if record.reason is None]

    def __str__(self) -> str:
        nothing = (
            "nothing to fuse: no nn.TransformerEncoderLayer, no block with the attributes of BERT's, and no chain of "
            "packed convolutions"
        )
        return "\n".join(map(str, self.records)) or nothing


def fuse(
    model: nn.Module, *, calibration: Iterable[Any] | Tensor | Callable[[nn.Module], Any] | None = None
) -> nn.Module:
    """A copy of a packed model in which neighbouring layers run as one call, what lies between them included.

    - Transformer blocks, torch's and BERT's: queries, keys and values from rows rounded once; the feed-forward block
      with activation, residual and layer norm in one call (`PackedLinears`, `PackedChain`, `PackedFFN`).
    - Chains of convolutions with ReLU, residual sums and poolings between them, in the parts of the model that torch.fx
      can trace (`PackedConvChain`). The model keeps its class, methods, hooks and layers; only its forward is another.
      A call that is not what was traced (another mode, an optional argument that is not at its default, an input that
      is no tensor) runs the packed layers one by one. Attributes that steer the forward are read when fusing.

    Outputs equal the packed model's up to float rounding, unless there is calibration data: then the feature maps
    inside each chain of convolutions are int8 with one scale a map (`PackedConvChain`), which is faster and costs some
    tenths of a per cent of accuracy at most where the data is like the model's inputs (a hundred images do; values
    beyond those seen are cut off).

    What was traced is held against the packed layers, on calibration data or else on random images where the model
    takes one; what gives other outputs stays as it was. ``model.fusion`` (a `FusionReport`) says what became of each
    block; without a name in ``model.fusion.names`` nothing was fused. The copy is for running: save the packed model,
    and fuse what was loaded. Hooks that are put on a layer of a chain later do not run. Pickled, chains of
    convolutions come back as the packed layers they are made of.

    Args:
        model: of `bw.pack`, in eval mode.
        calibration: inputs in any form that `bw.quantize` takes; None keeps the scales that every layer finds for
            every image.

    Raises:
        BantamweightError: the model is fused already; calibration data without a chain of convolutions, or that is
            empty, not finite, or no input of the model.

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
    model, records = _fuse_blocks(model)
    chained = chain_convolutions(model)
    if calibration is None:
        for part in chained:
            if part.chains:
                check_on_example(part)
    else:
        # The ranges are those of every sample; which ones are held out matters to solvers of weights alone.
        batches = collect_batches(model, calibration, held_out=0.0, seed=0)
        check_on_calls(model, chained, [batches[0].fresh()])
        if not any(part.chains for part in chained):
            reasons = "".join(f"; {record}" for record in _records_of(chained))
            raise BantamweightError(
                f"calibration data is for the maps between convolutions, but this {kind} has no chain of them that can "
                f"be fused{reasons}; leave calibration out"
            )
        use_int8_maps(model, batches)
    report = FusionReport(records=(*records, *_records_of(chained)))
    setattr(model, "fusion", report)  # noqa: B010  (nn.Module types attributes as tensors)
    return model


def _fuse_blocks(model: nn.Module) -> tuple[nn.Module, list[FusionRecord]]:
    """The model with its transformer blocks fused, and what became of each."""
    records: list[FusionRecord] = []
    for name, block in list(model.named_modules()):
        try:
            fused, reason = fused_block(block), None
        except BantamweightError as error:
            fused, reason = None, str(error)
        if fused is None and reason is None:
            continue
        records.append(FusionRecord(name=name, kind=type(block).__name__, reason=reason))
        if fused is not None:
            model = replace(model, block, fused)
    return model, records


def _records_of(chained: Iterable[ChainedModule]) -> list[FusionRecord]:
    """One a convolution in a chain, one a module that has none because of a reason."""
    records = []
    for part in chained:
        if part.reason is None:
            records += [FusionRecord(name=name, kind="PackedConv2d") for name in part.layers]
        else:
            records.append(FusionRecord(name=part.name, kind=type(part.module).__name__, reason=part.reason))
    return records
