"""`bantamweight compress`: a trained network in; a packed file, a table and a report out.

read and check the inputs -> for every trial: quantize, pack, save, load the file again, measure -> choose, report
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import _C, __version__, demo, io
from ..errors import BantamweightError
from ..nn import pack
from ..quantize import GPFQ, QuantizationReport, RoundToNearest, quantize
from ..report import html, measure, tables
from ..report.results import Layer, Machine, Outcome, Report, cpu_name
from . import inputs
from .evaluate import MODEL_FILE
from .output import staged
from .run_header import RunHeader

RESUME_FOLDER = ".bantamweight-resume"  # a name that no folder of the user's has: it is deleted at the end
BATCH_SIZES = (1, 64)
CALIBRATION_BATCH = 64
MEASURE_SECONDS = 0.6  # for each network and batch size
ROUNDING = 1e-9  # 0.915 - 0.905 is a little more than 0.01
EXAMPLE_BITS = ("4", "3", "2", "ternary")
EXAMPLE_TOLERANCE = 0.01  # the example keeps the smallest network that loses at most this much accuracy

Config = GPFQ | RoundToNearest


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What to compress and how: inputs that were read and checked."""

    network: str
    spec: str
    method: str
    model: nn.Module
    calibration: Tensor
    x_test: Tensor
    y_test: Tensor
    pixels: inputs.Preprocessing | None
    trials: Mapping[str, Config]
    ignore: Sequence[str]
    strict: bool
    max_drop: float | None
    activations: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """One quantized network, saved, loaded again and measured (but for its latency)."""

    label: str
    file: Path
    model: nn.Module
    accuracy: float
    layers: Sequence[Layer]
    skipped: Mapping[str, str]
    notes: Sequence[str]


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    _check_combinations(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    resume = args.out / RESUME_FOLDER
    with staged(args.out) as staging, _resumable(resume):
        job = _own_job(args) if args.model else _example_job(args)
        if not args.resume:
            shutil.rmtree(resume, ignore_errors=True)
        report = _compress(job, staging, resume if args.model else None, started)
        (staging / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        (staging / "report.html").write_text(html.page(report), encoding="utf-8")
    shutil.rmtree(resume, ignore_errors=True)
    print(_summary(report, args.out))


@contextlib.contextmanager
def _resumable(folder: Path) -> Iterator[None]:
    """Says where a stopped run's finished layers are, so that --resume goes on from there."""
    try:
        yield
    except KeyboardInterrupt:
        if not folder.is_dir() or not any(folder.iterdir()):
            raise
        raise BantamweightError(
            f"stopped by Ctrl-C; the finished layers are kept in {folder}, run the same command with --resume to go on"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # where no layer was finished


def _summary(report: Report, out: Path) -> str:
    table = tables.text_table(tables.columns(report), tables.rows(report))
    kept = [f"{name} stays in float: {reason}" for name, reason in report.skipped.items()]
    kept += filter(None, [*report.notes, report.busy])
    where = f"{out / MODEL_FILE} holds the network with {report.best.label}; {out / 'report.html'} shows it all."
    return "\n".join(["", table, "", tables.headline(report), *kept, where])


# ---- inputs -------------------------------------------------------------------------------------


def _check_combinations(args: argparse.Namespace) -> None:
    own = {"--model": args.model, "--weights": args.weights, "--calibration": args.calibration, "--test": args.test}
    missing = [option for option, value in own.items() if value is None]
    if missing and len(missing) < len(own):
        raise BantamweightError(
            f"{' and '.join(missing)} missing; a network of your own needs {', '.join(own)} (none of them for the "
            "embedded example)"
        )
    if missing:
        for option, given in {"--resume": args.resume, "--max-drop": args.max_drop is not None}.items():
            if given:
                raise BantamweightError(f"{option} is for a network of your own; pass {', '.join(own)} too")


def _own_job(args: argparse.Namespace) -> Job:
    pixels = inputs.preprocessing(args.mean, args.std)
    calibration = inputs.load_calibration(args.calibration, pixels)
    x_test, y_test = inputs.load_test(args.test, pixels)
    model = inputs.load_model(args.model)
    inputs.load_weights(model, args.weights)
    for path, x in ((args.calibration, calibration), (args.test, x_test)):
        classes = inputs.check_fits(model, x, str(path))
    inputs.check_labels(y_test, classes, str(args.test))
    file, function = inputs.split_spec(args.model)
    return Job(
        network=f"{type(model).__name__} of {file.name}",
        spec=f"{file.resolve()}:{function}",
        method=_method(args),
        model=model,
        calibration=calibration,
        x_test=x_test,
        y_test=y_test,
        pixels=pixels,
        trials={_label(args.bits): _config(args, args.bits)},
        ignore=args.ignore,
        strict=args.strict,
        max_drop=args.max_drop,
        activations=args.activations,
    )


def _example_job(args: argparse.Namespace) -> Job:
    digits = demo.load_digits()
    return Job(
        network="a small residual network on scikit-learn's digits",
        spec=inputs.EMBEDDED_MODEL,
        method=_method(args),
        model=demo.train(digits),
        calibration=digits.x_train[: demo.CALIBRATION_IMAGES],
        x_test=digits.x_test,
        y_test=digits.y_test,
        pixels=None,
        trials={_label(bits): _config(args, bits) for bits in EXAMPLE_BITS},
        ignore=args.ignore,
        strict=args.strict,
        max_drop=None,
        activations=args.activations,
    )


def _label(bits: str) -> str:
    return "ternary weights" if bits == "ternary" else f"{bits}-bit weights"


def _method(args: argparse.Namespace) -> str:
    name = "GPFQ (Zhang, Zhou and Saab, 2023)" if args.method == "gpfq" else "rounding to nearest"
    steps = f"{args.group_size} inputs of a neuron" if args.group_size else "output channel"
    return f"{name}, one step for every {steps}, {args.activations} activations"


def _config(args: argparse.Namespace, bits: str) -> Config:
    method = GPFQ if args.method == "gpfq" else RoundToNearest
    return method(
        bits=2 if bits == "ternary" else int(bits),
        levels=3 if bits == "ternary" else None,
        group_size=args.group_size,
        granularity="channel" if args.per_channel else None,
        activation_bits=8,  # what the kernels round the inputs to, so that the errors told are those of the packed run
    )


# ---- trials -------------------------------------------------------------------------------------


def _compress(job: Job, staging: Path, resume: Path | None, started: float) -> Report:
    baseline_accuracy = measure.accuracy(job.model, job.x_test, job.y_test)
    fp32_bytes = measure.float_bytes(job.model)
    header = RunHeader(
        model=job.spec,
        fp32_bytes=fp32_bytes,
        baseline_accuracy=baseline_accuracy,
        mean=job.pixels.mean if job.pixels else None,
        std=job.pixels.std if job.pixels else None,
    )
    trials = []
    for number, (label, config) in enumerate(job.trials.items()):
        _progress(f"{label}: quantizing")
        file = staging / f"trial{number}.safetensors"
        trial = _try(job, header, label, config, file, resume=resume)
        if job.max_drop is not None:
            trial = _within_drop(job, header, trial, config)
        _progress(f"{label}: accuracy {tables.percent(trial.accuracy)}, fp32 {tables.percent(baseline_accuracy)}")
        trials.append(trial)
    networks = {"fp32 torch": job.model, **{trial.label: trial.model for trial in trials}}
    times = {
        size: measure.latency(networks, job.x_test, size, seconds=MEASURE_SECONDS * len(networks))
        for size in BATCH_SIZES
    }

    def outcome(label: str, accuracy: float, size: int, layers: Sequence[Layer] = ()) -> Outcome:
        latency = {batch: times[batch][label] for batch in BATCH_SIZES}
        return Outcome(label=label, accuracy=accuracy, bytes=size, latency=latency, layers=layers)

    baseline = outcome("fp32 torch", baseline_accuracy, fp32_bytes)
    packed = [outcome(t.label, t.accuracy, t.file.stat().st_size, t.layers) for t in trials]
    chosen = _choose(packed, baseline_accuracy)
    for number, trial in enumerate(trials):
        if number == chosen:
            trial.file.rename(staging / MODEL_FILE)
        else:
            trial.file.unlink()
    return Report(
        network=job.network,
        method=job.method,
        baseline=baseline,
        packed=packed,
        chosen=chosen,
        calibration_inputs=len(job.calibration),
        test_inputs=len(job.y_test),
        skipped=trials[chosen].skipped,
        max_drop=job.max_drop,
        notes=trials[chosen].notes,
        busy=measure.busy_note(),
        machine=Machine(
            cpu=cpu_name(),
            threads=torch.get_num_threads(),
            kernel=_C.isa_ceiling(),
            torch=torch.__version__,
            bantamweight=__version__,
        ),
        seconds=time.perf_counter() - started,
    )


def _try(
    job: Job,
    header: RunHeader,
    label: str,
    config: Config,
    file: Path,
    *,
    raised: Mapping[str, Config] | None = None,
    resume: Path | None = None,
) -> Trial:
    """Quantizes, packs, saves, loads and checks one network; `raised` are the layers with a config of their own."""
    quantized = quantize(
        job.model,
        config,
        calibration=job.calibration.split(CALIBRATION_BATCH),
        ignore=job.ignore,
        overrides=raised,
        resume=resume,
        strict=job.strict,
    )
    found = quantized.quantization
    assert isinstance(found, QuantizationReport)
    io.save(pack(quantized, activations=job.activations), file, extra=header.to_extra())
    # Measured is what a user gets: the file, loaded into a fresh model.
    model = io.load(file, inputs.load_model(job.spec)).eval()
    kernels = {name: getattr(module, "kernel", "float") for name, module in model.named_modules()}
    layers = [
        Layer(
            name=layer.name,
            shape=tuple(layer.shape),
            bits=layer.bits,
            scheme=layer.scheme,
            group_size=layer.group_size,
            error=layer.error,
            kernel=kernels[layer.name],
        )
        for layer in found.layers
    ]
    folded = f"BatchNorm was folded into the layer before it, in {len(found.folded)} places."
    return Trial(
        label=label,
        file=file,
        model=model,
        accuracy=measure.accuracy(model, job.x_test, job.y_test),
        layers=layers,
        skipped={layer.name: layer.reason for layer in found.skipped},
        notes=(folded,) if found.folded else (),
    )


def _within_drop(job: Job, header: RunHeader, first: Trial, config: Config) -> Trial:
    """Gives 8 bits to the 1, 2, 4, ... layers with the largest error until accuracy drops by at most --max-drop."""
    assert job.max_drop is not None
    worst = sorted((layer for layer in first.layers if layer.bits < 8), key=lambda layer: -layer.error)
    trial, count = first, 0
    while header.baseline_accuracy - trial.accuracy > job.max_drop + ROUNDING and count < len(worst):
        count = min(max(1, 2 * count), len(worst))
        _progress(f"accuracy {tables.percent(trial.accuracy)}: giving 8 bits to the {count} layer(s) with most error")
        raised = {layer.name: replace(config, bits=8, levels=None) for layer in worst[:count]}
        label = f"{first.label}, {count} of {len(first.layers)} layers at 8 bits"
        trial = _try(job, header, label, config, first.file, raised=raised)
    drop, allowed = 100 * max(0.0, header.baseline_accuracy - trial.accuracy), 100 * job.max_drop
    verdict = "met" if drop <= allowed + 100 * ROUNDING else f"missed by {drop - allowed:.2f} points"
    note = f"--max-drop of {allowed:.2f} points {verdict}: accuracy drops by {drop:.2f} points with {count} of "
    note += f"{len(first.layers)} layers at 8 bits, those with the largest errors, checked on the test set itself."
    return replace(trial, notes=(*trial.notes, note))


def _choose(packed: Sequence[Outcome], baseline_accuracy: float) -> int:
    """The smallest network that loses at most a point, else the most accurate one."""
    good = [
        n for n, outcome in enumerate(packed) if baseline_accuracy - outcome.accuracy <= EXAMPLE_TOLERANCE + ROUNDING
    ]
    if good:
        return min(good, key=lambda n: packed[n].bytes)
    return max(range(len(packed)), key=lambda n: packed[n].accuracy)


def _progress(line: str) -> None:
    print(line, file=sys.stderr)
