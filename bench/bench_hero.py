"""What HERO, SAM, ASAM and SGD leave after quantization and label noise: digits, Fashion-MNIST and CIFAR-10.

Every optimizer's own hyper-parameters (SGD's lr, rho, h and lam) are chosen on validation data, by the mean over the
selection seeds: of per-tensor accuracy at 3 bits (CIFAR-10: 4, as 3 leave next to nothing) without label noise, of
float accuracy on the (just as noisy) validation labels with it. Then each is trained on all training data with other
seeds, and tested once. A finished run is a line of DIR/runs.jsonl and is not run again, so a killed benchmark goes on.

    python bench/bench_hero.py --results DIR [--tasks digits digits-shuffled fashion cifar10] [--finished-only]

Prints a table a task and draws DIR/TASK.png, accuracy against bits.

Fashion-MNIST and CIFAR-10 are read from the folder in BANTAMWEIGHT_DATA (fashion_mnist.npz; cifar10.npz,
cifar10_test_jpeg.npz, cifar10_resnet20.safetensors and models.py), subsets on schedules that fit two CPU cores. On
CIFAR-10 every optimizer goes on from the same trained ResNet-20. It knows all training images, so that nothing can be
chosen on some of them: the choice is made on test images that are not among the ones tested on, kept as JPEG.
"""

import argparse
import io
import itertools
import json
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from bantamweight import GPFQ, RoundToNearest, quantize
from bantamweight.curvature import top_eigenvalues
from bantamweight.demo import load_digits
from bantamweight.train import loop
from bantamweight.train.loop import TrainConfig
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)

BITS = (8, 4, 3, 2)
SELECTION_SEEDS, FINAL_SEEDS = (100, 101), (0, 1, 2, 3, 4)
Data = tuple[Tensor, Tensor, Tensor, Tensor]  # x_train, y_train, x_test, y_test


@dataclass(frozen=True, kw_only=True)
class Task:
    """A data set, a network, a schedule, and the candidates for every optimizer."""

    load: Callable[[], Data]
    make_model: Callable[[], nn.Module]
    base: TrainConfig
    noises: tuple[float, ...]
    candidates: dict[str, list[dict[str, Any]]]
    select_at: dict[float, float] = field(default_factory=dict)  # noise -> the noise its candidate is chosen at
    held_out: int = 0  # images of the training data to choose the candidates on,
    load_validation: Callable[[], tuple[Tensor, Tensor]] | None = None  # or others
    selection_bits: int = 3  # the per-tensor accuracy that decides where no labels are wrong
    selection_seeds: tuple[int, ...] = SELECTION_SEEDS
    final_seeds: tuple[int, ...] = FINAL_SEEDS
    calibration_images: int = 512  # of the training data, for GPFQ
    curvature_images: int = 1000  # of the training data, for lambda_max
    curvature_tol: float = 1e-2


# ---- data and networks ----------------------------------------------------------------------------------------


def digits() -> Data:
    d = load_digits()
    return d.x_train, d.y_train, d.x_test, d.y_test


def shuffled_digits() -> Data:
    """Digits drawn at random: the file's last 797 are by other writers than its first 1,000, and harder."""
    d = load_digits()
    x, y = torch.cat([d.x_train, d.x_test]), torch.cat([d.y_train, d.y_test])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[: len(d.x_train)], order[len(d.x_train) :]
    return x[train], y[train], x[test], y[test]


@cache
def fashion_arrays() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All 60,000 training and 10,000 test images, standardised by the first 2,000, which are trained on."""
    with np.load(data_folder() / "fashion_mnist.npz") as file:
        x_train, x_test = (torch.from_numpy(file[k]).float()[:, None] for k in ("x_train", "x_test"))
        y_train, y_test = (torch.from_numpy(file[k]).long() for k in ("y_train", "y_test"))
    mean, std = x_train[:2000].mean(), x_train[:2000].std()
    return (x_train - mean) / std, y_train, (x_test - mean) / std, y_test


def fashion() -> Data:
    """The first 2,000 training and 5,000 test images."""
    x_train, y_train, x_test, y_test = fashion_arrays()
    return x_train[:2000], y_train[:2000], x_test[:5000], y_test[:5000]


def fashion_validation() -> tuple[Tensor, Tensor]:
    """The last 20,000 training images: as many as noisy labels need to tell candidates apart."""
    x, y, *_ = fashion_arrays()
    return x[-20000:], y[-20000:]


def cifar10() -> Data:
    """The first 8,000 training images and the 1,000 lossless test images, as the network expects them."""
    with np.load(data_folder() / "cifar10.npz") as file:
        parts = [(file[f"x_{k}"][:n], file[f"y_{k}"][:n]) for k, n in (("train", 8000), ("test", 1000))]
    (x_train, y_train), (x_test, y_test) = ((cifar_images(x), torch.from_numpy(y).long()) for x, y in parts)
    return x_train, y_train, x_test, y_test


@cache
def cifar10_validation() -> tuple[Tensor, Tensor]:
    """1,000 test images, every ninth of the JPEG files (all classes) that are not among the lossless ones."""
    from PIL import Image

    with np.load(data_folder() / "cifar10_test_jpeg.npz") as file:
        others = np.setdiff1d(np.arange(len(file["y"])), file["lossless_row_to_jpeg"])[::9]
        stream, offsets, labels = file["jpg"], file["off"], file["y"]
    pictures = [Image.open(io.BytesIO(stream[offsets[k] : offsets[k + 1]].tobytes())).convert("RGB") for k in others]
    return cifar_images(np.stack([np.asarray(p) for p in pictures])), torch.from_numpy(labels[others]).long()


def cifar_images(x: np.ndarray) -> Tensor:
    """uint8 [n, 32, 32, 3] standardised as the network expects, channels last."""
    network = cifar_models().CifarResNet
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (network.MEAN, network.STD))
    return (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255 - mean) / std


def trained_resnet20() -> nn.Module:
    models = cifar_models()
    model = models.load(models.CifarResNet(20), data_folder() / "cifar10_resnet20.safetensors")
    return model.to(memory_format=torch.channels_last)


def cifar_models() -> Any:
    if str(data_folder()) not in sys.path:
        sys.path.insert(0, str(data_folder()))
    import models  # type: ignore[import-not-found]

    return models


def data_folder() -> Path:
    return Path(os.environ["BANTAMWEIGHT_DATA"])


def three_convolutions(first_stride: int) -> nn.Module:
    """Three convolutions with BatchNorm, then the mean over pixels: 24 thousand parameters."""

    def block(channels_in: int, channels: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        return [convolution, nn.BatchNorm2d(channels), nn.ReLU()]

    layers = [*block(1, 16, first_stride), *block(16, 32, 2), *block(32, 64, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def channels_last_convolutions() -> nn.Module:
    """The same with a first stride of 2; the layout saves 15 % of a step here."""
    model: Any = three_convolutions(2)
    return model.to(memory_format=torch.channels_last)


DIGITS = Task(
    load=digits,
    make_model=lambda: three_convolutions(1),
    base=TrainConfig(epochs=40, batch_size=50, lr=0.1),
    noises=(0.0, 0.4),
    held_out=200,
    candidates={
        "sgd": [{"lr": lr} for lr in (0.03, 0.1)],
        "sam": [{"h": h} for h in (0.1, 0.2, 0.5, 1.0)],
        "asam": [{"h": h} for h in (0.5, 1.0, 2.0, 4.0)],
        "hero": [
            {"h": h, "lam": lam} for h, lam in ((0.5, 5.0), (1.0, 50.0), (1.0, 500.0), (2.0, 500.0), (4.0, 500.0))
        ],
    },
)

TASKS = {
    "digits": DIGITS,
    "digits-shuffled": replace(DIGITS, load=shuffled_digits),
    "fashion": Task(
        load=fashion,
        load_validation=fashion_validation,
        make_model=channels_last_convolutions,
        base=TrainConfig(epochs=30, batch_size=100, lr=0.1, mode="fd"),
        noises=(0.0, 0.2, 0.4, 0.6, 0.8),
        select_at={0.6: 0.4, 0.8: 0.4},
        candidates={
            "sgd": [{"lr": lr} for lr in (0.03, 0.1, 0.2)],
            "sam": [{"h": h} for h in (0.05, 0.1, 0.2, 0.5, 1.0)],
            "asam": [{"h": h} for h in (0.25, 0.5, 1.0, 2.0, 4.0)],
            "hero": [
                {"h": h, "lam": lam} for h, lam in ((0.25, 5.0), (0.5, 5.0), (1.0, 50.0), (2.0, 50.0), (2.0, 500.0))
            ],
        },
        selection_seeds=SELECTION_SEEDS[:1],
    ),
    "cifar10": Task(
        load=cifar10,
        load_validation=cifar10_validation,
        make_model=trained_resnet20,
        base=TrainConfig(epochs=1, batch_size=64, lr=0.005, mode="fd", augment=True),
        noises=(0.0,),
        candidates={
            "sgd": [{"lr": lr} for lr in (0.0025, 0.005, 0.01)],
            "sam": [{"h": h} for h in (0.1, 0.3)],
            "asam": [{"h": h} for h in (0.5, 1.0)],
            "hero": [{"h": 0.5, "lam": lam} for lam in (5.0, 50.0)],
        },
        selection_bits=4,
        selection_seeds=SELECTION_SEEDS[:1],
        calibration_images=64,
        curvature_images=64,
        curvature_tol=0.05,
    ),
}


# ---- runs -----------------------------------------------------------------------------------------------------


class UnfinishedError(Exception):
    """A run is missing, and only finished ones are wanted."""


class Runs:
    """Finished runs, one JSON line each."""

    def __init__(self, folder: Path, compute: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.compute = folder / "runs.jsonl", compute
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {r["key"]: r for r in map(json.loads, lines)}

    def get(self, stage: str, task: str, config: TrainConfig, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = json.dumps([stage, task, asdict(config)], sort_keys=True)
        if key not in self.done:
            if not self.compute:
                raise UnfinishedError
            self.done[key] = {"key": key, "stage": stage, "task": task, "config": asdict(config), **measure()}
            with self.path.open("a") as file:
                file.write(json.dumps(self.done[key]) + "\n")
            how = (config.optimizer, config.label_noise, config.lr, config.h, config.lam, config.seed)
            print(stage, task, *how, flush=True)
        return self.done[key]


def fit(task: Task, x: Tensor, y: Tensor, config: TrainConfig) -> tuple[nn.Module, float]:
    torch.manual_seed(config.seed)
    model = task.make_model()
    return model, loop.train(model, x, y, config).seconds_per_step


def quantized(model: nn.Module, method: GPFQ | RoundToNearest, x: Tensor, fold: bool) -> nn.Module:
    return quantize(model, method, calibration=x, fold_batchnorm=fold, progress=False)


def per_tensor(model: nn.Module, bits: int, x: Tensor) -> nn.Module:
    """Rounded to nearest with one symmetric step a layer that reaches its largest weight, BatchNorm in float."""
    return quantized(model, RoundToNearest(bits=bits, granularity="layer", alphabet="symmetric"), x[:8], False)


def validate(task: Task, data: Data, config: TrainConfig) -> dict[str, Any]:
    x, y = data[:2]
    generator = torch.Generator().manual_seed(config.seed)
    y = loop.add_label_noise(y, config.label_noise, generator)
    if task.load_validation is not None:
        x_held, y_held = task.load_validation()
        y_held = loop.add_label_noise(y_held, config.label_noise, generator)
    else:
        order = torch.randperm(len(x), generator=generator)
        held, kept = order[: task.held_out], order[task.held_out :]
        x_held, y_held, x, y = x[held], y[held], x[kept], y[kept]
    model, _ = fit(task, x, y, replace(config, label_noise=0.0))
    right = loop.accuracy(model, x_held, y_held)
    small = per_tensor(model, task.selection_bits, x)
    return {"float": right, f"w{task.selection_bits}": loop.accuracy(small, x_held, y_held)}


def test(task: Task, data: Data, config: TrainConfig) -> dict[str, Any]:
    x, y, x_test, y_test = data
    model, seconds = fit(task, x, y, config)
    result: dict[str, Any] = {"seconds_per_step": seconds, "float": loop.accuracy(model, x_test, y_test)}
    for bits in BITS:
        forms = {
            f"tensor{bits}": per_tensor(model, bits, x),
            f"channel{bits}": quantized(model, RoundToNearest(bits=bits), x[:8], True),
            f"gpfq{bits}": quantized(model, GPFQ(bits=bits), x[: task.calibration_images], True),
        }
        result |= {name: loop.accuracy(form, x_test, y_test) for name, form in forms.items()}
    # Of the mean loss over clean training images, as the deployed network computes it (evaluation mode).
    some = (x[: task.curvature_images], y[: task.curvature_images])
    top = top_eigenvalues(model, F.cross_entropy, some, tol=task.curvature_tol, progress=True)
    return result | {"lambda_max": float(top.values[0]), "lambda_converged": top.converged}


def choose(runs: Runs, name: str, data: Data, noise: float, optimizer: str) -> dict[str, Any]:
    """The candidate with the best mean on validation; the first of equals."""
    task = TASKS[name]
    candidates = task.candidates[optimizer]
    if len(candidates) == 1:
        return candidates[0]
    at = task.select_at.get(noise, noise)
    metric = "float" if at else f"w{task.selection_bits}"

    def score(candidate: dict[str, Any]) -> float:
        configs = [
            replace(task.base, optimizer=optimizer, label_noise=at, seed=seed, **candidate)
            for seed in task.selection_seeds
        ]
        return mean(runs.get("select", name, c, lambda c=c: validate(task, data, c))[metric] for c in configs)

    return max(candidates, key=score)


Row = tuple[float, str, dict[str, Any], list[dict[str, Any]]]  # noise, optimizer, its choice, a record a seed


def final_runs(runs: Runs, name: str) -> list[Row]:
    """A row a noise and optimizer, of the seeds that are finished; seed by seed, so that all advance together."""
    task, data = TASKS[name], TASKS[name].load()
    chosen: dict[tuple[float, str], dict[str, Any]] = {}
    records: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for key in itertools.product(task.noises, task.candidates):
        with suppress(UnfinishedError):
            chosen[key] = choose(runs, name, data, *key)
    for seed in task.final_seeds:
        for (noise, optimizer), candidate in chosen.items():
            config = replace(task.base, optimizer=optimizer, label_noise=noise, seed=seed, **candidate)
            with suppress(UnfinishedError):
                record = runs.get("test", name, config, lambda c=config: test(task, data, c))
                records.setdefault((noise, optimizer), []).append(record)
    return [(noise, optimizer, chosen[noise, optimizer], done) for (noise, optimizer), done in records.items()]


# ---- tables ---------------------------------------------------------------------------------------------------


def spread(records: list[dict[str, Any]], key: str, scale: float = 100.0) -> str:
    values = [r[key] * scale for r in records]
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def plot(name: str, rows: list[Row], path: Path) -> None:
    """Accuracy against bits, rounded to nearest: a column for every noise, a row for one step a layer or a channel."""
    from matplotlib.figure import Figure

    noises = sorted({noise for noise, *_ in rows})
    figure = Figure(figsize=(4.2 * len(noises), 6.4), layout="constrained")
    grid = figure.subplots(2, len(noises), squeeze=False, sharex=True)
    for (line, form), (column, noise) in itertools.product(enumerate(("tensor", "channel")), enumerate(noises)):
        panel, keys = grid[line, column], ["float", *(f"{form}{b}" for b in BITS)]
        for at, optimizer, _, records in rows:
            if at == noise:
                values = np.array([[100 * r[key] for key in keys] for r in records])
                spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(keys))
                label = f"{optimizer.upper()}, {len(records)} seeds"
                panel.errorbar(range(len(keys)), values.mean(0), spread, marker="o", capsize=3, label=label)
        panel.set_xticks(range(len(keys)), ["float", *(f"W{b}" for b in BITS)])
        labels = f", {noise:.0%} of the labels wrong" if noise else ""
        panel.set_title(f"{name}{labels}\none step a {'layer' if form == 'tensor' else form}")
        panel.set_ylabel("test accuracy, %")
        panel.grid(alpha=0.3)
    grid[0, 0].legend()
    figure.savefig(path, dpi=120)


def table(rows: list[Row]) -> str:
    forms = {"tensor": "tensor", "channel": "channel", "gpfq": "GPFQ"}
    columns = {"float": "float"} | {f"{key}{b}": f"W{b} {form}" for key, form in forms.items() for b in BITS}
    lines = [f"| noise | optimizer | chosen | {' | '.join(columns.values())} | lambda_max | seeds |"]
    lines.append("|" + "---|" * (len(columns) + 5))
    for noise, optimizer, candidate, records in sorted(rows, key=lambda row: row[0]):
        cells = [spread(records, key) for key in columns]
        chosen = ", ".join(f"{k} {v:g}" for k, v in candidate.items())
        row = [f"{noise:.0%}", optimizer.upper(), chosen, *cells, spread(records, "lambda_max", 1.0), str(len(records))]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="folder for finished runs, outside the repository")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--finished-only", action="store_true", help="run nothing, show the seeds that are finished")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = Runs(args.results, compute=not args.finished_only)
    for name in args.tasks:
        rows = final_runs(runs, name)
        print(f"\n### {name} ({platform.machine()}, torch {torch.__version__}, 1 thread)\n\n{table(rows)}")
        if rows:
            plot(name, rows, args.results / f"{name}.png")


if __name__ == "__main__":
    main()
