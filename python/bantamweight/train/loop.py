"""A plain training loop for classifiers in memory, with every optimizer this package compares."""

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from torch.optim import Optimizer
from tqdm import tqdm

from ..errors import BantamweightError
from .hero import HERO

OPTIMIZERS = ("sgd", "sam", "asam", "hero")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train; the defaults are HERO's published setting for ResNet-20 on CIFAR-10, with fewer epochs.

    optimizer: "sgd", "sam", "asam" or "hero". h: radius of the perturbation, SAM's and ASAM's rho. lam, mode,
    reduction, fd_step: see `HERO`, unused by the others. label_noise: share of training labels replaced by another
    class. augment: images are shifted by up to `pad` pixels and mirrored at random. seed: of the order, noise and
    augmentation (not of the weights, which the caller makes).
    """

    optimizer: str = "hero"
    epochs: int = 30
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    h: float = 0.5
    lam: float = 5.0
    mode: str = "exact"
    reduction: str = "mean"
    fd_step: float = 1e-3
    label_noise: float = 0.0
    augment: bool = False
    pad: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise BantamweightError(f"optimizer is {self.optimizer!r}, but must be one of {', '.join(OPTIMIZERS)}")
        if self.epochs < 1 or self.batch_size < 2:
            raise BantamweightError(
                f"epochs is {self.epochs} and batch_size is {self.batch_size}, but at least 1 and 2 are needed"
            )
        if not 0 <= self.label_noise < 1:
            raise BantamweightError(f"label_noise is {self.label_noise}, but must be a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """losses: mean training loss of every epoch; seconds_per_step: of one update, the median over epochs."""

    losses: list[float]
    seconds_per_step: float


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """The optimizer `config` names; all but SGD are one class (SAM: arXiv 2010.01412, ASAM: arXiv 2102.11600)."""
    base: dict[str, Any] = {"lr": config.lr, "momentum": config.momentum, "weight_decay": config.weight_decay}
    parameters = model.parameters()
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, **base)
    if config.optimizer == "hero":
        how: dict[str, Any] = {"mode": config.mode, "reduction": config.reduction, "fd_step": config.fd_step}
        return HERO(parameters, torch.optim.SGD, h=config.h, lam=config.lam, model=model, **how, **base)
    kind = "plain" if config.optimizer == "sam" else "adaptive"
    return HERO(parameters, torch.optim.SGD, h=config.h, lam=0.0, perturbation=kind, model=model, **base)


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    config: TrainConfig,
    *,
    after_epoch: Callable[[int, float], None] | None = None,
) -> TrainResult:
    """Trains `model` in place on inputs `x` [n, ...] and classes `y` [n], with a cosine schedule to 0.

    `after_epoch(epoch, loss)` is called after every epoch. Raises `BantamweightError` for data that does not fit
    and for a loss that is not finite.
    """
    _check_data(x, y)
    generator = torch.Generator().manual_seed(config.seed)
    if config.label_noise:
        y = add_label_noise(y, config.label_noise, generator)
    optimizer = make_optimizer(model, config)
    starts = [s for s in range(0, len(x), config.batch_size) if len(x) - s >= 2]  # BatchNorm needs two
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.epochs * len(starts))
    losses, seconds = [], []
    model.train()
    with tqdm(total=config.epochs * len(starts), desc=config.optimizer, unit="step", disable=None) as bar:
        for epoch in range(config.epochs):
            order, total, begin = (
                torch.randperm(len(x), generator=generator),
                torch.zeros((), device=x.device),
                perf_counter(),
            )
            for start in starts:
                chosen = order[start : start + config.batch_size]
                inputs = shift_and_mirror(x[chosen], config.pad, generator) if config.augment else x[chosen]
                total += update(model, optimizer, inputs, y[chosen])
                schedule.step()
                bar.update()
            seconds.append((perf_counter() - begin) / len(starts))
            losses.append(float(total) / len(starts))
            if not torch.isfinite(total):
                raise BantamweightError(f"the training loss is {losses[-1]} in epoch {epoch + 1}: lower lr")
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            if after_epoch is not None:
                after_epoch(epoch, losses[-1])
    model.eval()
    return TrainResult(losses=losses, seconds_per_step=sorted(seconds)[len(seconds) // 2])


def update(model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> Tensor:
    """One step on a batch; returns its mean loss before the step, detached."""

    def loss() -> Tensor:
        return F.cross_entropy(model(x), y)

    if isinstance(optimizer, HERO):
        return optimizer.step(loss)
    optimizer.zero_grad()
    value = loss()
    value.backward()
    optimizer.step()
    return value.detach()


def add_label_noise(y: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A copy of `y` in which round(share * n) labels, chosen at random, have become another class, uniformly."""
    classes = int(y.max()) + 1
    if classes < 2:
        raise BantamweightError("label noise needs two classes or more, but all labels are 0")
    chosen = torch.randperm(len(y), generator=generator)[: round(share * len(y))]
    away = torch.randint(1, classes, (len(chosen),), generator=generator)
    noisy = y.clone()
    noisy[chosen] = (y[chosen] + away) % classes
    return noisy


def shift_and_mirror(x: Tensor, pad: int, generator: torch.Generator) -> Tensor:
    """Each image [n, c, h, w] shifted by up to `pad` pixels (zeros move in) and mirrored with probability 1/2."""
    n, _, height, width = x.shape
    dy, dx = torch.randint(0, 2 * pad + 1, (2, n, 1), generator=generator)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    rows = dy + torch.arange(height)
    columns = torch.arange(width).expand(n, width)
    columns = dx + torch.where(mirrored, columns.flip(1), columns)
    padded = F.pad(x, (pad, pad, pad, pad))
    return padded.permute(0, 2, 3, 1)[torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None]].permute(
        0, 3, 1, 2
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, batch_size: int = 500) -> float:
    """Share of `x` that `model`, in evaluation mode, puts into its class in `y`."""
    _check_data(x, y)
    was_training = model.training
    model.eval()
    right = sum(
        int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(batch_size), y.split(batch_size), strict=True)
    )
    model.train(was_training)
    return right / len(x)


def _check_data(x: Tensor, y: Tensor) -> None:
    if len(x) != len(y) or y.ndim != 1 or len(x) < 2 or y.dtype != torch.int64:
        raise BantamweightError(
            f"x has shape {tuple(x.shape)} and y has shape {tuple(y.shape)} and type {y.dtype}, but two or more inputs "
            "and one int64 class for each are needed"
        )
