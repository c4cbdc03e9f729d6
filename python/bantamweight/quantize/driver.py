"""`quantize`: takes a model, layer by layer in forward order, from float to a quantized copy."""

import copy
import os
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..data import Batch, Calibration, call_tensors, collect_batches
from ..errors import BantamweightError
from ..nn import fold
from ..nn.embedding import SimulatedEmbedding
from ..nn.fast_paths import leave_fast_paths
from ..nn.layer import QuantizedLayer
from ..nn.prepare import SETTLED, prepare
from ..nn.prepared.settle import settle_weights
from ..nn.simulated import SimulatedConv2d, SimulatedLinear
from ..nn.surgery import become
from ..patterns import fits
from ..weights import QuantizedWeight
from .calibrate import Streams, TargetLayer, build_problem
from .embedding_table import quantize_embedding
from .gpfq import GPFQ
from .method import LayerResult, LayerwiseMethod
from .model_copy import working_copy
from .passes import gates, replica, watched
from .report import LayerReport, QuantizationReport, SkippedLayer
from .resume import ResumeFolder, fingerprint
from .select import Selection, is_target, select_layers
from .streams import counterparts, survey, walk

# An output that differs by more than this many times the worst layer's own error is worth a warning.
_EXPLAINED = 10.0


def quantize(
    model: nn.Module,
    config: LayerwiseMethod | str,
    *,
    calibration: Calibration,
    ignore: Iterable[str] = (),
    overrides: Mapping[str, LayerwiseMethod | None] | None = None,
    layers: Iterable[str] | None = None,
    embeddings: LayerwiseMethod | None = None,
    fold_batchnorm: bool = True,
    resume: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: bool = True,
    max_memory: int = 8 << 30,
) -> nn.Module:
    """A copy of the model whose linear, convolution, recurrent and attention layers are quantized (simulated).

    Weights that hooks make anew (pruning, weight and spectral normalization) become plain, BatchNorms are folded, and
    other layers are rewritten, where they are, on linear, 2d convolution and embedding layers (`nn.prepare`): what is
    quantized are those, "lstm.input_l0", say.

    Layers are taken in forward order; each sees its inputs in the analog network and in the network quantized so far.
    Both run once, the model's own code, all batches side by side, and stop at each layer until it is quantized. Where
    that would take more than `max_memory`, or more than 128 batches came, both are run up to each layer anew.

    At the end the whole network runs beside the float one: ``quantization.output_error`` says how far apart they are,
    and a layer that the quantized network does not call where the float one does is an error.

    Memory: the model three times, the widest cut through its activations over all calibration samples twice (at most
    `max_memory`), and for one layer of d inputs two d x d float32 matrices, its held-out rows (`config.held_out` of
    `config.patches_per_layer`, times d, twice), and 6 bytes a weight for each candidate step that is tried
    at a time (at most 200 MB, or one candidate).

    Args:
        model: in evaluation mode or not; the copy is in evaluation mode.
        config: `GPFQ`, `RoundToNearest`, or a preset: ``"ternary"``, ``"W4"``, ``"W3A8"``, ``"W4A8-g128"``.
        calibration: a tensor of inputs, an iterable of batches such as a DataLoader (tensors, tuples that start with
            the model's arguments, or dicts of them), or a function that calls the model it is given on the data.
        ignore: layers to leave in float: names, names of modules that contain them, or regular expressions.
        overrides: other configs for some layers, by the same patterns; None leaves the layer in float.
        layers: if given, only these, by the same patterns.
        embeddings: the config whose grid nn.Embedding tables are rounded to, row by row, before any layer is
            calibrated: ``RoundToNearest(bits=8)``, say. None leaves them in float; an override by name has precedence.
        fold_batchnorm: fold each batch normalization into the layer before it first.
        resume: a folder to keep finished layers in; the same call goes on where an earlier one was stopped and gives
            the same result.
        strict: refuse a model with weights (parameters of two dimensions or more) that cannot be quantized, instead of
            leaving them in float. A layer with a forward of its own is quantized as the first calibration batch uses
            it, and computed in float where another batch uses it otherwise: strict refuses that too.
        progress: a progress bar, if standard error is a terminal.
        max_memory: bytes of activations to keep at most.

    Returns:
        The quantized copy; its attribute `quantization` is a QuantizationReport.

    Raises:
        BantamweightError: a model that cannot be copied or is quantized already, a pattern that fits no layer, NaN or
            infinity in weights, a resume folder of another run, or a network that does not run on quantized layers.
        CalibrationError: calibration data that is empty, not finite, or that the model does not run on.
        UnsupportedLayerError: with `strict`, a layer that cannot be quantized.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        >>> small = quantize(net, GPFQ(bits=4), calibration=torch.randn(32, 1, 8, 8))
        >>> [layer.scheme for layer in small.quantization.layers]
        ['W4', 'W4']
    """
    started = time.perf_counter()
    if isinstance(config, str):
        config = preset(config)
    if not isinstance(config, LayerwiseMethod):
        raise BantamweightError(
            f"config is a {type(config).__name__}, but must be GPFQ(...), RoundToNearest(...) or a preset's name"
        )
    overrides = dict(overrides or {})
    analog = working_copy(model)
    leave_fast_paths(analog)
    ignore = [ignore] if isinstance(ignore, str) else list(ignore)
    left_alone = [*ignore, *(pattern for pattern, special in overrides.items() if special is None)]
    with torch.no_grad():
        batches = collect_batches(analog, calibration, held_out=config.held_out, seed=config.seed)
        settled = settle_weights(analog)
        if fold_batchnorm:
            analog, _ = fold.fold_batchnorm(analog, batches[0].run)
        prepared = prepare(
            analog,
            skip=lambda name: any(fits("ignore", pattern, name) for pattern in left_alone),
            run=None if strict else batches[0].run,
        )
        selection = select_layers(
            analog,
            config,
            ignore=ignore,
            overrides=overrides,
            layers=layers,
            embeddings=embeddings,
            strict=strict,
            reasons=prepared.left,
        )
        run = _Run(analog, selection, batches, _resume_folder(resume, analog, selection, batches))
        with tqdm(
            total=len(selection.layers) + len(selection.tables),
            desc="quantize",
            unit="layer",
            disable=None if progress else True,
        ) as bar:
            mode = run.go(bar, max_memory, _layers_of(model))
        error, notes = run.compare()
    never = [
        SkippedLayer(
            name=name,
            kind=type(layer).__name__,
            reason="the calibration data never reaches it",
            weights=selection.counts[name],
        )
        for name, layer in selection.layers.items()
        if name not in run.reports
    ]
    made_plain = {name: {"kind": SETTLED, "by": by} for name, by in settled.items()}
    setattr(run.quantized, "prepared", {**made_plain, **prepared.records})  # noqa: B010  (nn.Module types attributes)
    run.quantized.quantization = QuantizationReport(  # type: ignore[assignment]
        config=config.to_json(),
        layers=tuple(run.reports.values()),
        skipped=(*selection.skipped, *never),
        folded=tuple(getattr(analog, "folded_batchnorms", ())),
        kept_batchnorms=dict(getattr(analog, "kept_batchnorms", {})),
        mode=mode,
        samples=sum(len(batch.held_out) for batch in batches),
        seconds=time.perf_counter() - started,
        weights=sum(selection.counts.values()),
        weights_quantized=sum(selection.counts[name] for name in run.reports),
        output_error=error,
        notes=notes,
    )
    return run.quantized


def quantize_(model: nn.Module, config: LayerwiseMethod | str, **options: Any) -> nn.Module:
    """`quantize` in place: the layers of `model` become the quantized ones. Options and errors as there.

    Whoever holds one of its layers (an alias, a list, a variable) holds the quantized one afterwards.

    Returns:
        The model itself, in evaluation mode. It is unchanged if an error is raised.
    """
    quantized = quantize(model, config, **options)
    _take_over(model, quantized)
    for name in ("quantization", "folded_batchnorms", "kept_batchnorms", "prepared"):
        if name in vars(quantized):
            setattr(model, name, vars(quantized)[name])
    return model.eval()


def _take_over(model: nn.Module, quantized: nn.Module) -> None:
    """Every module of `model` that is another one in `quantized` becomes that one."""
    if type(model) is not type(quantized) or _differ(model, quantized):
        become(model, quantized)
        return
    for name, child in model._modules.items():
        other = quantized._modules.get(name)
        if child is not None and other is not None and child is not other:
            _take_over(child, other)


def _differ(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one class have other tensors of their own: a layer that a BatchNorm was folded into."""
    first, second = ({**m._parameters, **m._buffers} for m in (a, b))
    if first.keys() != second.keys() or isinstance(a, QuantizedLayer):
        return True
    pairs = [(first[key], second[key]) for key in first]
    return any((x is None) != (y is None) or (x is not None and not torch.equal(x, y)) for x, y in pairs)


def preset(name: str) -> GPFQ:
    """The GPFQ config of a scheme's name: ``"ternary"`` or ``"W4"``, then ``"A8"``, then ``"-g128"``.

    Raises:
        BantamweightError: not such a name.
    """
    match = re.fullmatch(r"(?:ternary|W([2348]))(A8)?(?:-g([1-9]\d*))?", name)
    if match is None:
        raise BantamweightError(
            f"'{name}' is no preset; write 'ternary' or 'W' and 2, 3, 4 or 8 bits, then 'A8' for int8 inputs and "
            "'-g128' for groups, as in 'W4A8-g128'"
        )
    bits, int8, group = match.groups()
    return GPFQ(
        bits=int(bits or 2),
        levels=None if bits else 3,
        activation_bits=8 if int8 else None,
        group_size=int(group) if group else None,
    )


def _resume_folder(
    folder: str | os.PathLike[str] | None, analog: nn.Module, selection: Selection, batches: Sequence[Batch]
) -> ResumeFolder | None:
    if folder is None:
        return None
    state = analog.state_dict()
    settings = [*state, *(f"{name}={config.to_json()}" for name, config in selection.configs.items())]
    return ResumeFolder(folder, fingerprint(settings, [*state.values(), *call_tensors(batches)]))


def _layers_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_target(module)}


class _Run:
    """The state of one run: both networks, and the reports of the layers that are done."""

    def __init__(
        self, analog: nn.Module, selection: Selection, batches: Sequence[Batch], resume: ResumeFolder | None
    ) -> None:
        self.analog = analog
        self.quantized = copy.deepcopy(analog)
        self.selection = selection
        self.batches = batches
        self.resume = resume
        self.reports: dict[str, LayerReport] = {}

    def go(self, bar: tqdm, max_memory: int, originals: Mapping[str, nn.Module]) -> str:
        """Visits every layer that the data reaches; returns how."""
        self.bar = bar
        for name, table in self.selection.tables.items():
            self.round_table(name, table)
        layers = self.selection.layers
        with gates({f"original {name}": layer for name, layer in originals.items()}), gates(layers):
            self.seen = survey(self.analog, layers, self.batches)
            self._check_reached()
            with gates(counterparts(self.quantized, layers)):
                return walk(self.analog, self.quantized, layers, self.batches, self.seen, self.visit, max_memory)

    def _check_reached(self) -> None:
        if self.seen.order or not self.selection.layers:
            return
        raise BantamweightError(
            f"the calibration data reaches none of the {len(self.selection.layers)} layers "
            f"({', '.join(list(self.selection.layers)[:4])}, ...): the model computes without calling them; quantize "
            "the module whose forward calls its layers"
        )

    def compare(self) -> tuple[float | None, tuple[str, ...]]:
        """How far the quantized network's outputs are from the float one's on the first batch, and what to know of it.

        Raises:
            BantamweightError: the quantized network does not call a layer that the float one calls.
        """
        layers = self.selection.layers
        expected, calls = self._run_first(self.analog, layers)
        if not self._same_again(expected, layers):
            return None, ("the network draws at random, so that its outputs were not compared",)
        try:
            output, calls_now = self._run_first(self.quantized, counterparts(self.quantized, layers))
        except Exception as error:
            raise BantamweightError(
                f"the quantized network does not run where the float one does ({type(error).__name__}: {error}); its "
                "code asks something of a layer that the quantized one has not: add that layer to ignore"
            ) from error
        if lost := [name for name in self.reports if calls[name] and not calls_now[name]]:
            raise BantamweightError(
                f"layer '{lost[0]}' was quantized, but the quantized network does not call it where the float one "
                f"calls it {calls[lost[0]]} times; something else than the module tree holds it: add it to ignore"
            )
        error = fold.output_error(expected, output)
        if error == float("inf"):
            return None, ("the outputs of the float and of the quantized network have other shapes",)
        worst = max((report.error for report in self.reports.values()), default=0.0)
        if error > _EXPLAINED * worst + 1e-3:
            note = (
                f"the outputs differ by {error:.1%} on the first calibration batch, while the largest error of a layer "
                f"is {worst:.1%}: the network magnifies errors, or runs on other layers than those quantized"
            )
            warnings.warn(note, stacklevel=4)
            return error, (note,)
        return error, ()

    def _same_again(self, expected: Any, layers: Mapping[str, nn.Module]) -> bool:
        return fold.same_outputs(expected, self._run_first(self.analog, layers)[0], 1e-3)

    def _run_first(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> tuple[Any, Counter[str]]:
        calls: Counter[str] = Counter()
        with gates(layers):
            output = watched(replica(model, layers.values()), self.batches[0], lambda name, _: calls.update([name]))
        return output, calls

    def visit(self, name: str, streams: Iterable[Streams], rows: int, calls: int) -> None:
        """Quantizes a layer, or reads it back, and puts it in place."""
        started = time.perf_counter()
        layer, config = self.selection.layers[name], self.selection.configs[name]
        self.bar.set_postfix_str(name)
        result = self.resume.load(name) if self.resume is not None else None
        restored = result is not None
        if result is None:
            problem = build_problem(name, layer, streams, rows, config)
            result = config.quantize_layer(problem, _bias_of(layer))
            if self.resume is not None:
                self.resume.store(name, result)
        self._replace(name, layer, result, config)
        notes = (*result.notes, f"calibrated on all of its {calls} calls a pass") if calls > 1 else result.notes
        seconds = 0.0 if restored else time.perf_counter() - started
        self._report(name, layer, result.weight, result.error, notes, seconds)
        self.bar.update()

    def round_table(self, name: str, table: nn.Embedding) -> None:
        """Quantizes an embedding table and puts it in place."""
        started = time.perf_counter()
        self.bar.set_postfix_str(name)
        weight, error = quantize_embedding(table, self.selection.configs[name])
        simulated = SimulatedEmbedding.from_float(table, weight)
        self._put(name, table, simulated)
        self._report(name, table, weight, error, (), time.perf_counter() - started)
        self.bar.update()

    def _report(
        self, name: str, layer: nn.Module, weight: QuantizedWeight, error: float, notes: tuple[str, ...], seconds: float
    ) -> None:
        self.reports[name] = LayerReport(
            name=name,
            kind=type(layer).__name__,
            shape=tuple(layer.weight.shape),  # type: ignore[arg-type, union-attr]
            scheme=weight.scheme,
            bits=weight.bits,
            levels=weight.levels,
            group_size=weight.group_size if weight.n_groups > 1 else None,
            error=error,
            notes=notes,
            seconds=seconds,
        )

    def _replace(self, name: str, layer: TargetLayer, result: LayerResult, config: LayerwiseMethod) -> None:
        bias = None if result.bias is None else result.bias.to(layer.weight.dtype)
        kind = SimulatedLinear if isinstance(layer, nn.Linear) else SimulatedConv2d
        simulated = kind.from_float(layer, result.weight, bias, activation_bits=config.activation_bits)  # type: ignore[arg-type]
        self._put(name, layer, simulated)

    def _put(self, name: str, layer: nn.Module, simulated: nn.Module) -> None:
        weight: Any = layer.weight
        become(self.quantized.get_submodule(name), simulated.to(device=weight.device, dtype=weight.dtype).eval())


def _bias_of(layer: TargetLayer) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().to("cpu", torch.float32)
