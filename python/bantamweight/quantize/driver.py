"""quantize and quantize_: a layer-wise method over a whole model, in forward order."""

import copy
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import BantamweightError
from ..nn import fold
from ..nn.embedding import SimulatedEmbedding
from ..nn.simulated import SimulatedConv2d, SimulatedLinear
from ..weights import QuantizedWeight
from .calibrate import Batch, Streams, TargetLayer, build_problem, call_tensors, collect_batches
from .embedding_table import quantize_embedding
from .gpfq import GPFQ
from .method import LayerResult, LayerwiseMethod
from .report import LayerReport, QuantizationReport, SkippedLayer
from .resume import ResumeFolder, fingerprint
from .select import Selection, select_layers
from .streams import TooMuchMemoryError, replay, trace, walk_graph

Calibration = Iterable[Any] | Tensor | Callable[[nn.Module], Any]


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
    """A copy of the model with quantized (simulated) linear and 2d convolution layers.

    Layers are taken in forward order; each sees its inputs in the analog network and in the network quantized so far.
    Where the model can be traced by torch.fx, both are kept at layer boundaries and every layer runs once. Else, or
    where that would take more than `max_memory`, both networks are run up to each layer anew.

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
        strict: refuse a model with layers of other kinds instead of leaving them in float.
        progress: a progress bar, if standard error is a terminal.
        max_memory: bytes of activations to keep at most.

    Returns:
        The quantized copy; its attribute `quantization` is a QuantizationReport.

    Raises:
        BantamweightError: a pattern that fits no layer, NaN or infinity in weights, a resume folder of another run.
        CalibrationError: calibration data that is empty, not finite, or no input of the model.
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
    analog = copy.deepcopy(model).eval()
    folded: Sequence[str] = ()
    if fold_batchnorm:
        analog, folded = fold.fold_batchnorm(analog)
    selection = select_layers(
        analog, config, ignore=ignore, overrides=overrides, layers=layers, embeddings=embeddings, strict=strict
    )
    with torch.no_grad():
        batches = collect_batches(analog, calibration, held_out=config.held_out, seed=config.seed)
        run = _Run(analog, selection, batches, _resume_folder(resume, analog, selection, batches))
        with tqdm(
            total=len(selection.layers) + len(selection.tables),
            desc="quantize",
            unit="layer",
            disable=None if progress else True,
        ) as bar:
            mode = run.go(bar, max_memory)
    never = [
        SkippedLayer(name=name, kind=type(layer).__name__, reason="the calibration data never reaches it")
        for name, layer in selection.layers.items()
        if name not in run.reports
    ]
    run.quantized.quantization = QuantizationReport(  # type: ignore[assignment]
        config=config.to_json(),
        layers=tuple(run.reports.values()),
        skipped=(*selection.skipped, *never),
        folded=tuple(folded),
        mode=mode,
        samples=sum(len(batch.held_out) for batch in batches),
        seconds=time.perf_counter() - started,
    )
    return run.quantized


def quantize_(model: nn.Module, config: LayerwiseMethod | str, **options: Any) -> nn.Module:
    """`quantize` in place: the children of `model` become the quantized ones. Options and errors as there.

    Returns:
        The model itself, in evaluation mode. It is unchanged if an error is raised.
    """
    if isinstance(model, nn.Linear | nn.Conv2d):
        raise BantamweightError("quantize_ cannot change a bare layer in place; use quantize, which gives the new one")
    quantized = quantize(model, config, **options)
    for name, child in quantized.named_children():
        setattr(model, name, child)
    model.quantization = quantized.quantization
    model.folded_batchnorms = getattr(quantized, "folded_batchnorms", {})  # type: ignore[assignment]  # for save
    return model.eval()


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

    def go(self, bar: tqdm, max_memory: int) -> str:
        """Visits every layer that the data reaches; returns how."""
        self.bar = bar
        for name, table in self.selection.tables.items():
            self.round_table(name, table)
        layers = self.selection.layers
        # A bare layer has no graph around it.
        graph = None if "" in layers else trace(self.analog, layers.values(), self.batches[0])
        if graph is not None:
            # Tracing may have put constants on the network.
            tables = {name: self.quantized.get_submodule(name) for name in self.selection.tables}
            self.quantized = copy.deepcopy(self.analog)
            for name, table in tables.items():
                self._put(name, table)
            try:
                walk_graph(
                    graph,
                    self.analog,
                    self.quantized,
                    self.batches,
                    layers,
                    self.visit,
                    max_memory,
                    changed=set(tables),
                )
                return "graph"
            except TooMuchMemoryError:
                layers = {name: layer for name, layer in layers.items() if name not in self.reports}
        replay(self.analog, self.quantized, self.batches, layers, self.visit)
        return "replay" if graph is None else "graph, then replay"

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
        notes = (*result.notes, f"called {calls} times, calibrated on the first") if calls > 1 else result.notes
        seconds = 0.0 if restored else time.perf_counter() - started
        self._report(name, layer, result.weight, result.error, notes, seconds)
        self.bar.update()

    def round_table(self, name: str, table: nn.Embedding) -> None:
        """Quantizes an embedding table and puts it in place."""
        started = time.perf_counter()
        self.bar.set_postfix_str(name)
        weight, error = quantize_embedding(table, self.selection.configs[name])
        simulated = SimulatedEmbedding.from_float(table, weight)
        self._put(name, simulated.to(device=table.weight.device, dtype=table.weight.dtype).eval())
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
        device, dtype = layer.weight.device, layer.weight.dtype
        bias = None if result.bias is None else result.bias.to(dtype)
        kind = SimulatedLinear if isinstance(layer, nn.Linear) else SimulatedConv2d
        simulated = kind.from_float(layer, result.weight, bias, activation_bits=config.activation_bits)  # type: ignore[arg-type]
        self._put(name, simulated.to(device=device, dtype=dtype).eval())

    def _put(self, name: str, simulated: nn.Module) -> None:
        # A module that is used under several names is replaced under all of them.
        original = self.quantized.get_submodule(name) if name else self.quantized
        modules = list(self.quantized.named_modules(remove_duplicate=False))
        for alias in [alias for alias, module in modules if module is original]:
            if alias == "":
                self.quantized = simulated
                continue
            parent, _, child = alias.rpartition(".")
            setattr(self.quantized.get_submodule(parent), child, simulated)


def _bias_of(layer: TargetLayer) -> Tensor | None:
    return None if layer.bias is None else layer.bias.detach().to("cpu", torch.float32)
