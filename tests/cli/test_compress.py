import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from bantamweight import demo
from bantamweight.__main__ import main
from bantamweight.cli import compress
from bantamweight.quantize import GPFQ
from safetensors.torch import load_file, save_file

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2)
        self.linear = nn.Linear(12, 4)

    def forward(self, x):
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.relu(x).mean((2, 3)))

def make_model():
    print("a model's code may print")
    return Net()

class Odd(Net):
    def __init__(self):
        super().__init__()
        self.up = nn.Conv3d(1, 1, 3, padding=1)

    def forward(self, x):
        return super().forward(x + self.up(x[:, None])[:, 0])

def make_odd():
    return Odd()
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(compress, "MEASURE_SECONDS", 0.01)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A folder with net.py, trained.safetensors, calib.npz and test.npz, and the network itself; the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return write_job("make_model")


def write_job(function: str) -> torch.nn.Module:
    torch.manual_seed(3)
    scope: dict = {}
    exec(NET, scope)
    model = scope[function]().eval()
    with torch.no_grad():
        model.bn1.running_mean.normal_(0, 0.1)
        model.bn1.running_var.uniform_(0.5, 1.5)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 2, 8, 8), dtype=np.float32)
    with torch.inference_mode():
        logits = model(torch.from_numpy(x))
        model.linear.bias -= logits.mean(0)  # so that every class is some image's
        y = (logits - logits.mean(0)).argmax(1).numpy()
    save_file(model.state_dict(), "trained.safetensors")
    np.savez("calib.npz", x=x[:100])
    np.savez("test.npz", x=x[100:], y=y[100:])
    return model


def arguments(*more: str, model: str = "net.py:make_model", out: str = "out") -> list[str]:
    own = ["--weights", "trained.safetensors", "--calibration", "calib.npz", "--test", "test.npz"]
    return ["compress", "--model", model, *own, "--out", out, *more]


def evaluation(packed: str = "out", model: str = "net.py:make_model") -> list[str]:
    return ["evaluate", packed, "--model", model, "--test", "test.npz"]


def report(out: str = "out") -> dict:
    with open(f"{out}/report.json") as file:
        return json.load(file)


def refused(capsys, argv: list[str]) -> str:
    """Runs a command that must end with exit code 2 and one sentence; returns the sentence."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if line.startswith("bantamweight: ")]
    assert len(said) == 1 and "Traceback" not in captured.err
    return said[0]


# ---- the main job -------------------------------------------------------------------------------


def test_a_new_process_gives_the_same_accuracy_from_the_packed_file_alone(job):
    assert main(arguments("--bits", "2")) == 0
    written = report()
    shutil.copytree("out", "elsewhere")
    for name in ("report.json", "report.html"):
        os.remove(f"elsewhere/{name}")
    for name in ("trained.safetensors", "calib.npz"):
        os.remove(name)
    command = [sys.executable, "-m", "bantamweight", *evaluation("elsewhere")]
    done = subprocess.run([*command, "--json", "--batch-size", "7"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)  # one object, in spite of the model's printing
    assert found["accuracy"] == written["accuracy"] and found["accuracy"] < 1
    assert found["bytes"] == written["bytes"] == os.path.getsize("out/model.safetensors")
    assert found["fp32_bytes"] == written["fp32_bytes"]
    assert found["batch_size"] == 7 and found["threads"] >= 1 and found["ms_per_batch"] > 0
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and f"{100 * found['accuracy']:.2f} %" in done.stdout


def test_the_report_describes_every_layer(job):
    assert main(arguments("--bits", "3", "--group-size", "8", "--ignore", "linear")) == 0
    written = report()
    assert written["baseline_accuracy"] == 1.0 and 0.7 < written["accuracy"] <= 1.0
    assert [(layer["name"], layer["shape"]) for layer in written["layers"]] == [
        ("conv1", [8, 2, 3, 3]),
        ("conv2", [12, 8, 3, 3]),
    ]
    for layer in written["layers"]:
        assert (layer["bits"], layer["group_size"]) == (3, 8) and 0 < layer["error"] < 0.5
        assert layer["kernel"] not in ("", "float")
    assert "ignored" in written["skipped"]["linear"]
    with open("out/report.html") as file:
        page = file.read()
    assert "conv2" in page and page.count("<svg") == 3
    assert sorted(os.listdir("out")) == ["model.safetensors", "report.html", "report.json"]


def test_more_bits_lose_less_and_take_more(job):
    for bits in ("ternary", "4", "8"):
        assert main(arguments("--bits", bits, out=bits)) == 0
    found = [report(bits) for bits in ("ternary", "4", "8")]
    errors = [sum(layer["error"] for layer in one["layers"]) for one in found]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert found[0]["bytes"] < found[1]["bytes"] < found[2]["bytes"]
    assert found[2]["accuracy"] >= 0.97


def test_gpfq_beats_rounding_to_nearest(job):
    assert main(arguments("--bits", "3", out="followed")) == 0
    assert main(arguments("--bits", "3", "--method", "nearest", "--per-channel", out="nearest")) == 0
    last = [report(out)["layers"][1]["error"] for out in ("followed", "nearest")]
    assert last[0] < last[1]


def test_uint8_images_are_scaled_as_recorded(job):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (120, 8, 8, 2), dtype=np.uint8).transpose(0, 3, 1, 2)
    with torch.inference_mode():
        y = job((torch.from_numpy(x.copy()).float() / 255 - 0.5) / torch.tensor([0.2, 0.3])[:, None, None]).argmax(1)
    np.savez("calib.npz", x=x)
    np.savez("test.npz", x=x, y=y.numpy())
    assert main(arguments("--mean", "0.5", "--std", "0.2,0.3", "--bits", "8")) == 0
    written = report()
    assert written["baseline_accuracy"] == 1.0
    command = [sys.executable, "-m", "bantamweight", *evaluation(), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["accuracy"] == written["accuracy"]


def test_max_drop_raises_the_worst_layers(job):
    assert main(arguments("--bits", "ternary", out="ternary")) == 0
    assert report("ternary")["accuracy"] < 0.95
    assert main(arguments("--bits", "ternary", "--max-drop", "0.05")) == 0
    written = report()
    assert written["accuracy"] >= 0.95 and {layer["bits"] for layer in written["layers"]} >= {8}
    assert any("--max-drop of 5.00 points met" in note for note in written["notes"])


def test_a_missed_max_drop_says_by_how_much(job, capsys, monkeypatch):
    def accuracy(model, x, y):
        return 1.0 if type(model.conv1) is torch.nn.Conv2d else 0.5

    monkeypatch.setattr(compress.measure, "accuracy", accuracy)
    assert main(arguments("--bits", "ternary", "--max-drop", "0.01")) == 0
    assert "missed by 49.00 points: accuracy drops by 50.00 points with 3 of 3" in capsys.readouterr().out
    assert [layer["bits"] for layer in report()["layers"]] == [8, 8, 8]


def test_a_drop_of_just_max_drop_is_met(job, capsys, monkeypatch):
    def accuracy(model, x, y):
        return 0.915 if type(model.conv1) is torch.nn.Conv2d else 0.905

    monkeypatch.setattr(compress.measure, "accuracy", accuracy)
    assert main(arguments("--max-drop", "0.01")) == 0
    assert "met: accuracy drops by 1.00 points with 0 of 3" in capsys.readouterr().out


def test_an_unsupported_layer_is_reported_or_refused(job, capsys):
    write_job("make_odd")
    odd = {"model": "net.py:make_odd"}
    assert "layer 'up' is a Conv3d" in refused(capsys, arguments("--strict", **odd))
    assert not os.path.exists("out")
    assert main(arguments(**odd)) == 0
    assert "up stays in float" in capsys.readouterr().out
    assert report()["skipped"] == {"up": "a Conv3d cannot be quantized"}


def test_constant_and_zero_inputs_work(job):
    arrays = dict(np.load("test.npz"))
    arrays["x"][:, 0] = 0.0
    arrays["x"][:, 1, :, :4] = 2.5
    np.savez("calib.npz", x=arrays["x"])
    np.savez("test.npz", **arrays)
    assert main(arguments()) == 0
    assert all(np.isfinite(layer["error"]) for layer in report()["layers"])


def test_the_embedded_example_needs_nothing(tmp_path, monkeypatch, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "EPOCHS", 3)
    monkeypatch.setattr(demo, "CALIBRATION_IMAGES", 100)
    monkeypatch.setattr(compress, "EXAMPLE_BITS", ("4", "ternary"))
    assert main(["compress"]) == 0
    said = capsys.readouterr().out
    assert all(label in said for label in ("fp32 torch", "4-bit weights", "ternary weights"))
    written = report()
    assert [tried["label"] for tried in written["tried"]] == ["4-bit weights", "ternary weights"]
    assert written["fp32_bytes"] / written["bytes"] > 7
    assert main(["evaluate", "out", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == written["accuracy"]


# ---- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (arguments("--bits", "5"), "invalid choice: '5'"),
        (arguments("--group-size", "0"), "--group-size"),
        (arguments("--group-size", "8", "--per-channel"), "not allowed with"),
        (arguments("--max-drop", "2"), "--max-drop"),
        (arguments("--threads", "none"), "--threads"),
        (arguments("--ignore", "no_such_layer"), "no_such_layer"),
        (arguments(model="net.py:nothing"), "has no function nothing"),
        (arguments(model="gone.py:make_model"), "gone.py does not exist"),
        (arguments("--weights", "gone"), "gone does not exist"),
        (arguments("--weights", "net.py"), "not a whole safetensors file"),
        (arguments("--calibration", "trained.safetensors"), "not a whole npz file"),
        (arguments("--test", "calib.npz"), "no array y"),
        (["compress", "--model", "net.py:make_model"], "--weights and --calibration and --test missing"),
        (["compress", "--max-drop", "0.1"], "--max-drop is for a network of your own"),
        (["evaluate", "out", "--model", "net.py:make_model"], "--test"),
        (["evaluate", "out", "--test", "test.npz"], "net.py:make_model if you trust it"),
        (["evaluate", "gone", "--test", "test.npz"], "gone does not exist"),
        (["evaluate", "trained.safetensors", "--test", "test.npz"], "trained.safetensors"),
        (["evaluate", "out", "--test", "test.npz", "--batch-size", "-1"], "--batch-size"),
    ],
)
def test_bad_arguments_are_one_sentence_and_spare_the_good_output(job, capsys, argv, named):
    assert main(arguments()) == 0
    before = {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}
    assert named in refused(capsys, argv)
    assert before == {name: os.stat(f"out/{name}").st_mtime_ns for name in os.listdir("out")}


def test_inputs_of_another_shape_are_refused(job, capsys):
    np.savez("calib.npz", x=np.zeros((9, 3, 8, 8), np.float32))
    assert "cannot run x of calib.npz, shaped [2, 3, 8, 8]" in refused(capsys, arguments())
    assert not os.path.exists("out")


def test_activations_that_overflow_are_refused(job, capsys):
    np.savez("calib.npz", x=np.full((9, 2, 8, 8), 3e38, np.float32))
    said = refused(capsys, arguments())
    assert "NaN or infinit" in said and "conv1" in said


@pytest.mark.parametrize("place", ["net.py", "net.py/out"])
def test_an_unwritable_out_is_refused(job, capsys, place):
    assert "--out" in refused(capsys, arguments(out=place))
    with open("net.py") as file:
        assert file.read() == NET


def test_a_full_disk_spares_the_good_output(job, capsys, monkeypatch):
    assert main(arguments()) == 0
    with open("out/model.safetensors", "rb") as file:
        good = file.read()

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "pace" in refused(capsys, arguments("--bits", "2"))
    with open("out/model.safetensors", "rb") as file:
        assert file.read() == good
    assert not [name for name in os.listdir("out") if name.startswith(".partial")]
    assert os.listdir(f"out/{compress.RESUME_FOLDER}")  # for --resume, once there is room


def test_a_file_size_limit_stops_the_write_itself(job):
    assert main(arguments()) == 0
    with open("out/model.safetensors", "rb") as file:
        good = file.read()
    done = subprocess.run(
        [sys.executable, "-m", "bantamweight", *arguments("--bits", "8")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)),
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    with open("out/model.safetensors", "rb") as file:
        assert file.read() == good


def test_ctrl_c_keeps_the_layers_that_are_done_and_resume_goes_on(job, capsys, monkeypatch):
    assert main(arguments(out="straight")) == 0
    quantize_layer, solved = GPFQ.quantize_layer, []

    def interrupted(self, problem, bias):
        if len(solved) == 2:
            raise KeyboardInterrupt
        solved.append(problem.name)
        return quantize_layer(self, problem, bias)

    monkeypatch.setattr(GPFQ, "quantize_layer", interrupted)
    said = refused(capsys, arguments())
    assert "Ctrl-C" in said and f"out/{compress.RESUME_FOLDER}" in said and "--resume" in said
    assert os.listdir("out") == [compress.RESUME_FOLDER]

    def counted(self, problem, bias):
        solved.append(problem.name)
        return quantize_layer(self, problem, bias)

    monkeypatch.setattr(GPFQ, "quantize_layer", counted)
    assert main(arguments("--resume")) == 0
    assert solved == ["conv1", "conv2", "linear"]
    assert sorted(os.listdir("out")) == ["model.safetensors", "report.html", "report.json"]
    resumed, straight = load_file("out/model.safetensors"), load_file("straight/model.safetensors")
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[name], straight[name]) for name in straight)


def test_resume_of_another_run_is_refused_and_starting_anew_works(job, capsys, monkeypatch):
    def interrupted(self, problem, bias, quantize_layer=GPFQ.quantize_layer):
        if problem.name == "linear":
            raise KeyboardInterrupt
        return quantize_layer(self, problem, bias)

    with monkeypatch.context() as patch:
        patch.setattr(GPFQ, "quantize_layer", interrupted)
        refused(capsys, arguments())
    assert "other settings" in refused(capsys, arguments("--resume", "--bits", "2"))
    assert main(arguments("--bits", "2")) == 0


def test_ctrl_c_before_any_layer_leaves_nothing(job, capsys, monkeypatch):
    def interrupted(*_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(GPFQ, "quantize_layer", interrupted)
    assert "Ctrl-C" in refused(capsys, arguments())
    assert not os.path.exists("out")


def test_a_bug_of_ours_is_exit_code_1(job, capsys, monkeypatch):
    def broken(*_args):
        raise RuntimeError("an\nunforeseen state")

    monkeypatch.setattr(compress, "_compress", broken)
    assert main(arguments()) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("bantamweight: internal error") and "RuntimeError: an unforeseen state" in said
    with pytest.raises(RuntimeError):
        main(arguments("--debug"))


# ---- hostile packed files -----------------------------------------------------------------------


def rewrite_header(change) -> None:
    with open("out/model.safetensors", "rb") as file:
        content = file.read()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["bantamweight"])
    change(ours)
    header["__metadata__"]["bantamweight"] = json.dumps(ours)
    text = json.dumps(header).encode()
    with open("out/model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + content[8 + length :])


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda h: h.update(format_version=99), "upgrade bantamweight"),
        (lambda h: h.update(layers=[1]), "layers"),
        (lambda h: h["extra"].update(run="x"), "damaged"),
        (lambda h: h["extra"]["run"].update(fp32_bytes="many"), "damaged"),
        (lambda h: h["extra"]["run"].update(mean=[[]], std=[1]), "damaged"),
        (lambda h: h["extra"]["run"].update(model="x.py; rm -r ~"), "pass --model 'x.py; rm -r ~' if you trust it"),
        (lambda h: h["extra"]["run"].update(model="a\x1b]0;b\u202e.py:f"), r"--model 'a\x1b]0;b\u202e.py:f' if"),
        (lambda h: h["extra"].pop("run"), "pass --model"),
    ],
)
def test_a_hostile_header_is_refused(job, capsys, change, named):
    assert main(arguments()) == 0
    rewrite_header(change)
    assert named in refused(capsys, ["evaluate", "out", "--test", "test.npz"])


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_packed_file_is_refused(job, capsys, keep):
    assert main(arguments()) == 0
    with open("out/model.safetensors", "rb") as file:
        content = file.read()
    with open("out/model.safetensors", "wb") as file:
        file.write(content[:keep])
    assert "out/model.safetensors" in refused(capsys, evaluation())


def test_another_models_code_is_refused(job, capsys):
    assert main(arguments()) == 0
    with open("other.py", "w") as file:
        file.write("from torch import nn\ndef other(): return nn.Sequential(nn.Flatten(), nn.Linear(128, 4))\n")
    assert "out/model.safetensors" in refused(capsys, evaluation(model="other.py:other"))


def test_a_layer_of_another_shape_is_refused(job, capsys):
    assert main(arguments()) == 0
    rewrite_header(lambda h: h["layers"]["conv1"].update(shape=[8, 19]))
    assert "conv1" in refused(capsys, evaluation())


def test_code_that_a_packed_file_names_does_not_run(job, capsys, tmp_path):
    assert main(arguments()) == 0
    ran = tmp_path / "ran"
    for name in ("evil.py", "out/evil.py"):
        with open(name, "w") as file:
            file.write(f"open({str(ran)!r}, 'w')\n{NET}")
    rewrite_header(lambda h: h["extra"]["run"].update(model=f"{tmp_path}/evil.py:make_model"))
    assert "evil.py:make_model if you trust it" in refused(capsys, ["evaluate", "out", "--test", "test.npz"])
    assert not ran.exists()
    assert main(evaluation()) == 0 and not ran.exists()


def test_control_characters_of_names_do_not_reach_the_terminal(job, capsys):
    assert main(arguments()) == 0
    rewrite_header(lambda h: h["layers"].update({"\x1b[2Jconv1": h["layers"].pop("conv1")}))
    assert "\x1b" not in refused(capsys, evaluation())


def test_the_models_file_runs_once(job):
    with open("net.py", "a") as file:
        file.write(
            "\nkept = torch.library.Library('bantamweight_once', 'DEF')\nkept.define('op(Tensor x) -> Tensor')\n"
        )
    for argv in (arguments("--bits", "ternary", "--max-drop", "0.01"), evaluation()):
        command = [sys.executable, "-m", "bantamweight", *argv]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_forced_kernel_of_another_cpu_is_bad_input(job, capsys, monkeypatch):
    other = "avx2" if platform.machine() == "aarch64" else "neon"
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", other)
    assert main(arguments("--bits", "2")) == 2
    assert f"BANTAMWEIGHT_FORCE_KERNEL={other} cannot run here" in capsys.readouterr().err
    assert not os.path.exists("out/model.safetensors")
