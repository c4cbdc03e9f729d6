"""The accuracies that a real network must keep: CIFAR-10 ResNet-20, every convolution and linear layer quantized."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bantamweight import GPFQ, pack, quantize
from torch import Tensor, nn

DATA = os.environ.get("BANTAMWEIGHT_DATA")
pytestmark = [pytest.mark.data, pytest.mark.skipif(not DATA, reason="BANTAMWEIGHT_DATA is not set")]


@pytest.fixture(scope="module")
def cifar(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The trained network, 200 calibration images, and the 1,000 test images with their labels."""
    folder = Path(str(DATA))
    sys.path.insert(0, str(folder))
    request.addfinalizer(lambda: sys.path.remove(str(folder)))
    from models import CifarResNet, load  # type: ignore[import-not-found]

    data = np.load(folder / "cifar10.npz")
    mean, std = (torch.tensor(part).view(3, 1, 1) for part in (CifarResNet.MEAN, CifarResNet.STD))

    def prepare(images: np.ndarray) -> Tensor:
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std

    network = load(CifarResNet(20), str(folder / "cifar10_resnet20.safetensors"))
    labels = torch.from_numpy(data["y_test"]).long()
    return network, prepare(data["x_train"][:200]), prepare(data["x_test"]), labels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    predicted = torch.cat([model(part).argmax(1) for part in images.split(100)])
    return 100 * float((predicted == labels).float().mean())


@pytest.mark.parametrize(("settings", "least"), [({"bits": 4}, 90.5), ({"bits": 3}, 90.0), ({"levels": 3}, 86.0)])
def test_resnet20_keeps_its_accuracy(
    cifar: tuple[nn.Module, Tensor, Tensor, Tensor], settings: dict[str, int], least: float
):
    network, calibration, images, labels = cifar
    quantized = quantize(network, GPFQ(**settings, patches_per_layer=8000), calibration=calibration)
    assert len(quantized.quantization.layers) == 20
    assert accuracy(pack(quantized), images, labels) >= least
