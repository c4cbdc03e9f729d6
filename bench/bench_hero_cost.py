"""What a step of SAM and HERO costs beside one of SGD: CPU time and memory, ResNet-20, one thread.

Time: each optimizer has processes of its own, as in use, because what the allocator keeps and what it gives back to
the system depends on what ran before; the processes take turns at a step each. The median over rounds and processes,
and the quartiles of the ratio to SGD's step of the same round. Memory: each alone in a fresh process, what three steps
add to the resident set at its peak (network, activations, gradients, optimizer).

    python bench/bench_hero_cost.py [--batch 64] [--rounds 5] [--processes 3]
"""

import argparse
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from time import process_time

import torch
from bantamweight import HERO
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (the name every torch user knows)


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.pad = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + shortcut)


class ResNet20(nn.Module):
    """He et al. (2015, arXiv 1512.03385), section 4.2, with the parameter-free shortcut."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(16, 16, 1)] * 3 + [(16, 32, 2)] + [(32, 32, 1)] * 2 + [(32, 64, 2)] + [(64, 64, 1)] * 2
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(*[ResidualBlock(*w) for w in widths])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.blocks(self.stem(x)).mean((2, 3)))


OPTIMIZERS = {
    "SGD": None,
    "SAM": {"lam": 0.0, "h": 0.1, "perturbation": "plain"},
    "ASAM": {"lam": 0.0, "h": 1.0},
    "HERO exact": {"mode": "exact"},
    "HERO fd": {"mode": "fd"},
}


def make_step(name: str, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    model, x, y = ResNet20(), torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    options, base = OPTIMIZERS[name], {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4}
    if options is None:
        sgd = torch.optim.SGD(model.parameters(), **base)

        def step() -> None:
            sgd.zero_grad()
            F.cross_entropy(model(x), y).backward()
            sgd.step()

        return step
    hero = HERO(model.parameters(), torch.optim.SGD, model=model, **options, **base)
    return lambda: hero.step(lambda: F.cross_entropy(model(x), y))


def time_steps(name: str, batch: int) -> None:
    """The other end of `Worker`: a step for each line that comes, its CPU time in seconds for an answer."""
    step = make_step(name, batch)
    for _ in range(2):
        step()
    for _ in sys.stdin:
        begin = process_time()
        step()
        print(process_time() - begin, flush=True)


class Worker:
    """A process that steps when asked."""

    def __init__(self, name: str, batch: int) -> None:
        command = [sys.executable, __file__, "--batch", str(batch), "--steps-of", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds(self) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def end(self) -> None:
        self.process.communicate()


def resident_peak() -> float:
    """MiB. Not getrusage: its peak is inherited from the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def memory(name: str, batch: int) -> float:
    """MiB; freed tensors go back to the system at once, so that the peak is of live ones."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--batch", str(batch), "--memory-of", name]
    return float(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def print_memory(name: str, batch: int) -> None:
    make_step("SGD", 2)()  # what torch itself loads on first use is not the optimizer's
    before = resident_peak()
    step = make_step(name, batch)
    for _ in range(3):
        step()
    print(resident_peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=3, help="of each optimizer")
    parser.add_argument("--memory-of", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    parser.add_argument("--steps-of", choices=OPTIMIZERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.memory_of:
        return print_memory(args.memory_of, args.batch)
    if args.steps_of:
        return time_steps(args.steps_of, args.batch)
    seconds: dict[str, list[float]] = {name: [] for name in OPTIMIZERS}
    for _ in range(args.processes):
        workers = {name: Worker(name, args.batch) for name in OPTIMIZERS}
        for _ in range(args.rounds):
            for name, worker in workers.items():
                seconds[name].append(worker.seconds())
        for worker in workers.values():
            worker.end()
    print(f"ResNet-20, batch {args.batch}, one thread, {platform.machine()}, torch {torch.__version__}\n")
    print("| optimizer | ms a step | times SGD (quartiles) | MiB added | times SAM |\n|---|---|---|---|---|")
    peak = {name: memory(name, args.batch) for name in OPTIMIZERS}
    for name, times in seconds.items():
        ratios = [t / s for t, s in zip(times, seconds["SGD"], strict=True)]
        low, _, high = quantiles(ratios, n=4)
        print(
            f"| {name} | {1e3 * median(times):.0f} | {median(ratios):.2f} ({low:.2f} to {high:.2f}) "
            f"| {peak[name]:.0f} | {peak[name] / peak['SAM']:.2f} |"
        )


if __name__ == "__main__":
    main()
