"""The training loop: it learns, repeats itself, and its noise and augmentation are what they say."""

import pytest
import torch
from bantamweight.errors import BantamweightError
from bantamweight.train import loop
from torch import nn


def blobs(n=120, classes=3):
    generator = torch.Generator().manual_seed(1)
    y = torch.arange(n) % classes
    return torch.randn(n, 6, generator=generator) + 4 * nn.functional.one_hot(y, 6), y


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


@pytest.mark.parametrize("optimizer", loop.OPTIMIZERS)
def test_learns_and_repeats_itself(optimizer):
    x, y = blobs()
    config = loop.TrainConfig(optimizer=optimizer, epochs=5, batch_size=32, h=0.1, label_noise=0.1)
    models = [network(), network()]
    epochs = []
    results = [loop.train(m, x, y, config, after_epoch=lambda e, loss: epochs.append((e, loss))) for m in models]
    assert loop.accuracy(models[0], x, y) > 0.95
    assert results[0].losses == results[1].losses and results[0].losses[-1] < results[0].losses[0]
    assert epochs[:5] == list(enumerate(results[0].losses))
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_last_batch_of_one_is_left_out():
    x, y = blobs(33)
    loop.train(network(), x, y, loop.TrainConfig(optimizer="sgd", epochs=1, batch_size=32))


def test_label_noise_changes_the_stated_share_to_other_classes():
    y = torch.arange(1000) % 10
    noisy = loop.add_label_noise(y, 0.4, torch.Generator().manual_seed(0))
    changed = noisy != y
    assert int(changed.sum()) == 400 and set(noisy.tolist()) == set(range(10))
    assert torch.bincount((noisy - y)[changed] % 10, minlength=10)[1:].min() > 20


def test_shift_and_mirror_moves_whole_images():
    image = torch.arange(1, 26, dtype=torch.float32).view(1, 1, 5, 5)
    padded = nn.functional.pad(image, (2, 2, 2, 2))
    allowed = [
        flipped[:, :, a : a + 5, b : b + 5] for a in range(5) for b in range(5) for flipped in (padded, padded.flip(3))
    ]
    out = loop.shift_and_mirror(image.expand(64, 1, 5, 5), 2, torch.Generator().manual_seed(0))
    found = {next(i for i, option in enumerate(allowed) if torch.equal(option[0], one)) for one in out}
    assert len(found) > 20 and {i % 2 for i in found} == {0, 1}


def test_bad_input_gets_a_sentence():
    x, y = blobs()
    with pytest.raises(BantamweightError, match="one of sgd, sam, asam, hero"):
        loop.TrainConfig(optimizer="adam")
    with pytest.raises(BantamweightError, match=r"label_noise is 1\.5"):
        loop.TrainConfig(label_noise=1.5)
    with pytest.raises(BantamweightError, match="batch_size is 1"):
        loop.TrainConfig(batch_size=1)
    with pytest.raises(BantamweightError, match=r"y has shape \(3,\)"):
        loop.train(network(), x, y[:3], loop.TrainConfig())
    with pytest.raises(BantamweightError, match=r"torch\.float32"):
        loop.accuracy(network(), x, y.float())
    with pytest.raises(BantamweightError, match="not finite"):
        loop.train(network(), x * float("nan"), y, loop.TrainConfig(epochs=1))
    with pytest.raises(BantamweightError, match="in epoch 1"):
        loop.train(network(), x * float("nan"), y, loop.TrainConfig(epochs=1, optimizer="sgd"))
    with pytest.raises(BantamweightError, match="two classes"):
        loop.add_label_noise(torch.zeros(4, dtype=torch.int64), 0.5, torch.Generator())
