import pytest
import torch
from bantamweight import demo

pytest.importorskip("sklearn")


def test_digits_split_in_two_without_overlap():
    digits = demo.load_digits()
    assert digits.x_train.shape == (1000, 1, 8, 8) and digits.x_test.shape == (797, 1, 8, 8)
    assert float(digits.x_train.min()) == 0.0 and float(digits.x_train.max()) == 1.0
    assert set(digits.y_test.tolist()) == set(range(10))
    train = {tuple(image.flatten().tolist()) for image in digits.x_train}
    assert not any(tuple(image.flatten().tolist()) in train for image in digits.x_test)


def test_training_is_seeded_and_leaves_the_callers_random_state(monkeypatch):
    digits = demo.load_digits()
    monkeypatch.setattr(demo, "EPOCHS", 3)
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first, second = demo.train(digits), demo.train(digits)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training
    with torch.inference_mode():
        right = (first(digits.x_test).argmax(1) == digits.y_test).float().mean()
    assert float(right) > 0.8
