"""`bantamweight train`: networks trained by several optimizers, and what each keeps at 8 to 2 bits.

read and check the data -> for every optimizer and seed: train, quantize, test, keep -> cost, loss surface, report
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .. import _C, __version__, demo
from ..errors import BantamweightError
from ..report import tables, training
from ..report.results import Machine, cpu_name
from ..train.loop import TrainConfig, train
from ..train.robustness import relative_cost, robustness
from ..train.surface import filter_normalised_surface
from . import inputs
from .output import staged

RUNS_FOLDER = "runs"
DEFAULT_H = {"sgd": 0.0, "sam": 0.1, "asam": 1.0, "hero": 0.5}
SURFACE_SAMPLES = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """What to train on, read and checked."""

    network: str
    make_model: Callable[[], nn.Module]
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor

    @cached_property
    def digest(self) -> str:
        """Of the data and of the network's first weights: the runs of other ones are not resumed."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            weights = self.make_model().state_dict()
        digest = hashlib.sha256()
        data = {"x_train": self.x_train, "y_train": self.y_train, "x_test": self.x_test, "y_test": self.y_test}
        for name, tensor in (data | weights).items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if args.threads:
        torch.set_num_threads(args.threads)
    with staged(args.out) as staging:
        job = _own_job(args) if inputs.is_own(args, "train", "test") else _example_job()
        _check_fits(job)
        runs_folder = args.out / RUNS_FOLDER
        runs_folder.mkdir(exist_ok=True)
        try:
            contenders = [_contender(job, name, args, runs_folder) for name in dict.fromkeys(args.optimizer)]
        except KeyboardInterrupt:
            raise BantamweightError(
                f"stopped by Ctrl-C; finished runs are in {runs_folder}, run the same command with --resume to go on"
            ) from None
        report = training.TrainingReport(
            network=job.network,
            contenders=contenders,
            train_inputs=len(job.x_train),
            test_inputs=len(job.x_test),
            machine=Machine(
                cpu=cpu_name(),
                threads=torch.get_num_threads(),
                kernel=_C.isa_ceiling(),
                torch=torch.__version__,
                bantamweight=__version__,
            ),
            seconds=time.perf_counter() - started,
        )
        (staging / "report.json").write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
        (staging / "report.html").write_text(training.page(report), encoding="utf-8")
    print(f"\n{tables.text_table(training.columns(report), training.rows(report))}\n")
    print(f"{args.out / 'report.html'} shows it all; {runs_folder} holds the trained networks.")


# ---- inputs -------------------------------------------------------------------------------------


def _own_job(args: argparse.Namespace) -> Job:
    pixels = inputs.preprocessing(args.mean, args.std)
    x_train, y_train = inputs.load_test(args.train, pixels)
    x_test, y_test = inputs.load_test(args.test, pixels)
    return Job(
        network=args.model,
        make_model=lambda: inputs.load_model(args.model),
        x_train=x_train,
        y_train=y_train,
        x_test=x_test,
        y_test=y_test,
    )


def _example_job() -> Job:
    digits = demo.load_digits()
    return Job(
        network=inputs.EMBEDDED_MODEL,
        make_model=demo.make_model,
        x_train=digits.x_train,
        y_train=digits.y_train,
        x_test=digits.x_test,
        y_test=digits.y_test,
    )


def _check_fits(job: Job) -> None:
    """One forward pass, so that a network that does not fit its data is a sentence and not a traceback."""
    if len(job.x_train) < 2:
        raise BantamweightError(f"--train holds {len(job.x_train)} input, but at least two are needed")
    model = job.make_model().eval()
    try:
        with torch.no_grad():
            logits = model(job.x_train[:2])
    except RuntimeError as error:
        shape = list(job.x_train.shape)
        first = str(error).splitlines()[0]
        raise BantamweightError(f"{job.network} does not take inputs x {shape} ({first}); mend either") from None
    highest, lowest = max(int(y.max()) for y in (job.y_train, job.y_test)), int(job.y_train.min())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or highest >= logits.shape[1] or lowest < 0:
        came = f"{list(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise BantamweightError(
            f"{job.network} returned {came} for 2 inputs, but must return logits [2, classes] with more classes than "
            f"the largest label, {highest}"
        )


# ---- runs ---------------------------------------------------------------------------------------


def _contender(job: Job, optimizer: str, args: argparse.Namespace, folder: Path) -> training.Contender:
    configs = [_config(optimizer, seed, args) for seed in range(args.seeds)]
    runs = [_finished(job, config, folder, args.resume) for config in configs]
    model = job.make_model()
    inputs.load_state(model, load_file(folder / runs[0].file))
    surface = filter_normalised_surface(model, job.x_train[:SURFACE_SAMPLES], job.y_train[:SURFACE_SAMPLES])
    batch = slice(0, args.batch_size)
    return training.Contender(
        name=optimizer,
        runs=runs,
        relative_cost=relative_cost(model, job.x_train[batch], job.y_train[batch], configs[0]),
        surface_offsets=surface.offsets.tolist(),
        surface=surface.losses.tolist(),
    )


def _config(optimizer: str, seed: int, args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        optimizer=optimizer,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        h=DEFAULT_H[optimizer] if args.h is None else args.h,
        lam=args.lam,
        mode=args.mode,
        reduction=args.reduction,
        label_noise=args.label_noise,
        augment=args.augment,
        seed=seed,
    )


def _finished(job: Job, config: TrainConfig, folder: Path, resume: bool) -> training.Run:
    """The run as it was kept, if it is the same one on the same data; else trained now, tested and kept."""
    name = f"{config.optimizer}-seed{config.seed}"
    record, weights = folder / f"{name}.json", folder / f"{name}.safetensors"
    kept = _kept(record, weights) if resume else None
    if kept is not None and (kept.config, kept.job) == (config, job.digest):
        return kept
    torch.manual_seed(config.seed)
    model = job.make_model()
    result = train(model, job.x_train, job.y_train, config)
    done = training.Run(
        job=job.digest,
        config=config,
        robustness=robustness(model, job.x_train, job.y_train, job.x_test, job.y_test),
        final_loss=result.losses[-1],
        seconds_per_step=result.seconds_per_step,
        file=weights.name,
    )
    partial = folder / f".partial-{name}"
    separate = {k: v.clone(memory_format=torch.contiguous_format) for k, v in model.state_dict().items()}
    save_file(separate, partial)  # safetensors refuses tied weights that share memory
    os.replace(partial, weights)
    partial.write_text(json.dumps(done.to_json(), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, record)
    print(f"{name}: {tables.percent(done.robustness.float_accuracy)}", file=sys.stderr)
    return done


def _kept(record: Path, weights: Path) -> training.Run | None:
    if not (record.is_file() and weights.is_file()):
        return None
    try:
        return training.Run.from_json(json.loads(record.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):  # written by another version, or by somebody else: train again
        return None
