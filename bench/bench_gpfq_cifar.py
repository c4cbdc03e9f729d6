"""CIFAR-10 ResNets by GPFQ and by rounding to nearest: accuracy simulated with float inputs, and packed with int8 ones.

    BANTAMWEIGHT_DATA=DATA python bench/bench_gpfq_cifar.py [--depths 20 56] [--images 1000] [--threads 1] [--quick]

DATA holds cifar10.npz, cifar10_resnet{20,56}.safetensors and models.py. Calibrated on the first `--images` training
images; accuracy on the 1,000 lossless test images, where one standard error is 0.9 points.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import bantamweight as bw
import numpy as np
import torch
from torch import Tensor, nn

SCHEMES = {
    "8 bits": {"bits": 8},
    "4 bits": {"bits": 4},
    "3 bits": {"bits": 3},
    "2 bits": {"bits": 2},
    "ternary": {"levels": 3},
}
QUICK = ("4 bits", "3 bits", "ternary")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[20, 56], choices=[20, 32, 44, 56])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="4 bits, 3 bits and ternary only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = Path(
        os.environ.get("BANTAMWEIGHT_DATA") or sys.exit("set BANTAMWEIGHT_DATA to the folder with cifar10.npz")
    )
    sys.path.insert(0, str(folder))
    from models import CifarResNet, load  # type: ignore[import-not-found]

    data = np.load(folder / "cifar10.npz")
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (CifarResNet.MEAN, CifarResNet.STD))

    def prepare(images: np.ndarray) -> Tensor:
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std

    calibration = prepare(data["x_train"][: options.images])
    test, labels = prepare(data["x_test"]), torch.from_numpy(data["y_test"]).long()

    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        predicted = torch.cat([model(part).argmax(1) for part in test.split(100)])
        return 100 * float((predicted == labels).float().mean())

    def disk_bytes(model: nn.Module) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.safetensors"
            bw.save(model, path)
            return path.stat().st_size

    print(f"{options.images} calibration images, {options.threads} threads, torch {torch.__version__}")
    for depth in options.depths:
        weights = folder / f"cifar10_resnet{depth}.safetensors"
        network = load(CifarResNet(depth), str(weights))
        size = sum(4 * parameter.numel() for parameter in network.parameters())
        print(f"\nResNet-{depth}: fp32 {accuracy(network):.1f}, {size / 1024:.0f} KiB of parameters")
        print(f"{'':8} {'nearest':>8} {'GPFQ':>7} {'packed, int8':>13} {'error':>7} {'seconds':>8} {'disk':>9}")
        for name in QUICK if options.quick else SCHEMES:
            nearest = bw.quantize(network, bw.RoundToNearest(**SCHEMES[name]), calibration=calibration, progress=False)
            started = time.perf_counter()
            followed = bw.quantize(network, bw.GPFQ(**SCHEMES[name]), calibration=calibration, progress=False)
            seconds = time.perf_counter() - started
            packed = bw.pack(followed)
            layers = followed.quantization.layers
            print(
                f"{name:8} {accuracy(nearest):8.1f} {accuracy(followed):7.1f} {accuracy(packed):13.1f} "
                f"{sum(layer.error for layer in layers) / len(layers):7.4f} {seconds:8.1f} "
                f"{disk_bytes(packed) / 1024:5.0f} KiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
