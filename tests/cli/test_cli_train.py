"""`bantamweight train`, run as a user runs it."""

import json

import numpy as np
import pytest
import torch
from bantamweight.__main__ import main
from bantamweight.cli import train as train_command
from safetensors.torch import load_file

NETWORK = """
from torch import nn

def make_model():
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))

def other():
    return nn.Linear(5, 3)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(36, 36), nn.Linear(36, 36), nn.Linear(36, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x.flatten(1)).relu()).relu())
"""


@pytest.fixture
def files(tmp_path):
    generator = np.random.default_rng(0)
    for name, n in (("train", 90), ("test", 45)):
        y = np.arange(n) % 3
        x = generator.normal(size=(n, 1, 6, 6)).astype(np.float32)
        x[np.arange(n), 0, y * 2] += 3
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    (tmp_path / "net.py").write_text(NETWORK)
    return tmp_path


def arguments(files, *more, function="make_model"):
    own = [f"--model={files}/net.py:{function}", f"--train={files}/train.npz", f"--test={files}/test.npz"]
    return ["train", *own, f"--out={files}/out", "--epochs=3", "--batch-size=30", *more]


def test_compares_optimizers_and_writes_a_report(files, capsys):
    names = ["sgd", "sam", "asam", "hero"]
    assert main(arguments(files, "--seeds=2", "--label-noise=0.1", "--optimizer", *names)) == 0
    report = json.loads((files / "out/report.json").read_text())
    assert [c["optimizer"] for c in report["contenders"]] == names
    for contender in report["contenders"]:
        assert contender["accuracy"] > 0.8 and len(contender["runs"]) == 2
        assert contender["gpfq"].keys() == contender["nearest"].keys() == {"8", "4", "3", "2"}
        assert abs(contender["gpfq"]["8"] - contender["accuracy"]) < 0.05
        assert np.shape(contender["loss_surface"]["losses"]) == (11, 11)
        assert contender["lambda_max"] > 0 and contender["trace"] > 0 and contender["relative_cost"] > 0
        for run in contender["runs"]:
            assert run["config"]["label_noise"] == 0.1
            assert load_file(files / "out/runs" / run["file"])["4.weight"].shape == (3, 64)
    seeds = [load_file(files / f"out/runs/hero-seed{s}.safetensors")["0.weight"] for s in (0, 1)]
    assert not torch.equal(*seeds)
    page = (files / "out/report.html").read_text()
    assert page.count("<th>") == 5 and page.count("<tr>") == 1 + 12  # a column an optimizer, a row a quantity
    assert page.count("<rect") == 4 * 121 and "HERO" in page and "http" not in page
    printed = capsys.readouterr().out
    assert "W2 nearest" in printed and "ASAM" in printed


def test_a_stopped_run_goes_on(files, capsys, monkeypatch):
    trained = []
    real = train_command.train

    def counted(model, x, y, config):
        trained.append(config.seed)
        if trained == [0, 1]:
            raise KeyboardInterrupt
        return real(model, x, y, config)

    monkeypatch.setattr(train_command, "train", counted)
    assert main(arguments(files, "--seeds=3", "--optimizer", "sgd")) == 2
    assert "--resume" in capsys.readouterr().err
    assert not (files / "out/report.json").exists()
    assert main(arguments(files, "--seeds=3", "--optimizer", "sgd", "--resume")) == 0
    assert trained == [0, 1, 1, 2]
    assert main(arguments(files, "--seeds=3", "--optimizer", "sgd", "--resume", "--lr=0.05")) == 0
    assert trained == [0, 1, 1, 2, 0, 1, 2]  # another setting is another run


def test_runs_on_other_data_or_of_another_network_are_not_resumed(files, monkeypatch):
    trained = []
    real = train_command.train
    monkeypatch.setattr(train_command, "train", lambda *a: trained.append(1) or real(*a))
    for expected in (1, 1):
        assert main(arguments(files, "--optimizer=sgd", "--resume")) == 0
        assert len(trained) == expected
    with np.load(files / "train.npz") as file:
        np.savez(files / "train.npz", x=file["x"], y=file["y"][::-1])
    assert main(arguments(files, "--optimizer=sgd", "--resume")) == 0
    assert len(trained) == 2
    assert main(arguments(files, "--optimizer=sgd", "--resume", function="Tied")) == 0
    assert len(trained) == 3
    kept = load_file(files / "out/runs/sgd-seed0.safetensors")
    assert torch.equal(kept["first.weight"], kept["second.weight"])


@pytest.mark.parametrize(
    ("more", "function", "words"),
    [
        ([], "other", "does not take inputs"),
        (["--optimizer", "adam"], "make_model", "sgd"),
        (["--label-noise=1.2"], "make_model", "--label-noise"),
        (["--lr=-1"], "make_model", "--lr"),
        (["--lr=1e9", "--optimizer", "sgd"], "make_model", "lower lr"),
        (["--batch-size=1"], "make_model", "batch_size is 1"),
    ],
)
def test_bad_input_gets_one_sentence(files, capsys, more, function, words):
    assert main(arguments(files, *more, function=function)) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_labels_the_network_has_no_output_for(files, capsys):
    np.savez(files / "test.npz", x=np.zeros((4, 1, 6, 6), np.float32), y=np.array([0, 1, 2, 3]))
    assert main(arguments(files)) == 2
    assert "largest label, 3" in capsys.readouterr().err
    assert not (files / "out").exists()


def test_data_without_a_model(files, capsys):
    assert main(["train", f"--train={files}/train.npz", f"--out={files}/out"]) == 2
    assert "need --model" in capsys.readouterr().err
