"""The MNIST network of GPFQ's predecessor (Lybrand and Saab 2021, arXiv:2010.15979, table 1), ternary and wider.

    BANTAMWEIGHT_DATA=DATA python bench/bench_gpfq_mnist.py [--images 25000] [--threads 1]

A 784-500-300-10 perceptron with batch normalization, trained here in under a minute; DATA holds mnist.npz. Published:
98.24 % in float, 97.39 % with ternary weights (93.30 % rounded to nearest), calibrated on 25,000 training images.
"""

import argparse
import itertools
import os
import sys
import time
from pathlib import Path

import bantamweight as bw
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

PAPER = {
    "granularity": "layer",
    "order": "natural",
    "damping": 0,
    "centered": False,
    "refine": None,
    "bias_correction": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=25_000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(os.environ.get("BANTAMWEIGHT_DATA") or sys.exit("set BANTAMWEIGHT_DATA to the folder with mnist.npz"))
    data = np.load(folder / "mnist.npz")
    x_train, x_test = (torch.from_numpy(data[name]).flatten(1).float() / 255 for name in ("x_train", "x_test"))
    y_train, y_test = (torch.from_numpy(data[name]).long() for name in ("y_train", "y_test"))
    network = train(x_train, y_train, options.epochs)
    calibration = list(x_train[: options.images].split(1000))

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        return 100 * float((model(x_test).argmax(1) == y_test).float().mean())

    print(f"float {accuracy(network):.2f} %, {options.images} calibration images, {options.threads} threads")
    for name, method in (
        ("ternary, nearest", bw.RoundToNearest(levels=3, steps=(0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0))),
        ("ternary, GPFQ as published", bw.GPFQ(levels=3, **PAPER)),
        ("ternary, GPFQ", bw.GPFQ(levels=3)),
        ("2 bits, GPFQ", bw.GPFQ(bits=2)),
        ("4 bits, GPFQ", bw.GPFQ(bits=4)),
    ):
        started = time.perf_counter()
        quantized = bw.quantize(network, method, calibration=calibration, progress=False)
        seconds = time.perf_counter() - started
        packed = bw.pack(quantized)
        print(f"{name:28} {accuracy(quantized):6.2f} %, packed {accuracy(packed):6.2f} %, {seconds:.1f} s", flush=True)


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = (784, 500, 300)
    hidden = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU())]
    network = nn.Sequential(*hidden, nn.Linear(300, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            optimizer.zero_grad()
            F.cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return network.eval()


if __name__ == "__main__":
    main()
