"""The embedded default of `bantamweight compress`: scikit-learn's handwritten digits and a small residual network.

Digits: 1,797 grey 8x8 images of ten classes (E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits",
UCI, 1998), shipped inside scikit-learn, so the demo downloads nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)
from tqdm import tqdm

from .errors import BantamweightError

TRAINING_IMAGES = 1000
CALIBRATION_IMAGES = 512
EPOCHS = 12
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3


@dataclass(frozen=True, kw_only=True, eq=False)
class Digits:
    """Images float32 [n, 1, 8, 8] with values in [0, 1], labels int64 [n]."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_digits() -> Digits:
    """The digits in their own order: the first 1,000 images to train on, the other 797 to test on.

    Raises:
        BantamweightError: scikit-learn, which carries the images, is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise BantamweightError(
            "the demo reads its images from scikit-learn, which is not installed; "
            "install it with `pip install scikit-learn`, or pass --model, --weights, --calibration and --test"
        ) from None
    pixels, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(labels, dtype=torch.int64)
    train, test = slice(0, TRAINING_IMAGES), slice(TRAINING_IMAGES, None)
    return Digits(x_train=x[train], y_train=y[train], x_test=x[test], y_test=y[test])


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class DigitsNet(nn.Module):
    """Nine convolutions and a linear head, 0.22 million parameters: [n, 1, 8, 8] -> logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = ResidualBlock(32, 32, 1)
        self.layer2 = ResidualBlock(32, 64, 2)
        self.layer3 = ResidualBlock(64, 96, 2)
        self.linear = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def make_model() -> DigitsNet:
    """A fresh, untrained demo network (what `--model net.py:make_model` names for a network of your own)."""
    return DigitsNet()


def train(digits: Digits) -> DigitsNet:
    """Trains the demo network with a fixed seed: AdamW, one learning-rate cycle, shifts of one pixel as augmentation.

    On one thread: batches this small gain little from a second one, and lose much to it on a busy machine. Returns the
    network in eval mode; the caller's random state and threads are left as they were.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _fit(make_model().train(), digits).eval()
    finally:
        torch.set_num_threads(threads)


def _fit(model: DigitsNet, digits: Digits) -> DigitsNet:
    steps = len(digits.x_train) // BATCH_SIZE
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=EPOCHS * steps)
    for _ in tqdm(range(EPOCHS), desc="train the digits network", unit="epoch", disable=None):
        order = torch.randperm(len(digits.x_train))
        for step in range(steps):
            rows = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
            loss = F.cross_entropy(model(_shift(digits.x_train[rows])), digits.y_train[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


def _shift(x: Tensor) -> Tensor:
    """Moves the whole batch by -1, 0 or 1 pixels along each axis, filling with the background."""
    dy, dx = (int(d) for d in torch.randint(0, 3, (2,)))
    return F.pad(x, (1, 1, 1, 1))[..., dy : dy + x.shape[-2], dx : dx + x.shape[-1]]
