import numpy as np
import pytest
import torch
from bantamweight.cli import inputs
from bantamweight.errors import BantamweightError, CalibrationError, FormatError
from safetensors.torch import save_file
from torch import nn


def test_uint8_pixels_become_model_ready(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "nhwc.npz", x=x)
    np.savez(tmp_path / "nchw.npz", x=x.transpose(0, 3, 1, 2))
    pixels = inputs.preprocessing((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    found = inputs.load_calibration(tmp_path / "nhwc.npz", pixels)
    mean, std = np.array([0.5, 0.4, 0.3]), np.array([0.2, 0.3, 0.4])
    expected = ((x / 255 - mean) / std).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert torch.equal(found, inputs.load_calibration(tmp_path / "nchw.npz", pixels))


def test_grey_images_get_a_channel(tmp_path):
    np.savez(tmp_path / "grey.npz", x=np.full((4, 6, 6), 255, dtype=np.uint8))
    found = inputs.load_calibration(tmp_path / "grey.npz", inputs.preprocessing((0.0,), (1.0,)))
    assert found.shape == (4, 1, 6, 6) and bool((found == 1).all())


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"y": np.zeros(3)}, "no array x, only y"),
        ({"x": np.zeros((0, 4), np.float32)}, "holds no inputs"),
        ({"x": np.zeros(4, np.float32)}, "must be a batch"),
        ({"x": np.zeros((2, 4), np.int64)}, "model-ready float32, or uint8"),
        ({"x": np.zeros((2, 4), np.uint8)}, "pass --mean and --std"),
        ({"x": np.array([[1.0, 2.0], [np.nan, 1.0]])}, "NaN or infinity, first in row 1"),
        ({"x": np.array([[1.0, -np.inf]])}, "NaN or infinity, first in row 0"),
        ({"x": np.array([[object()]])}, "plain arrays"),
    ],
)
def test_bad_calibration_is_named(tmp_path, arrays, sentence):
    path = tmp_path / "calib.npz"
    np.savez(path, **arrays)
    with pytest.raises(BantamweightError, match=sentence) as caught:
        inputs.load_calibration(path, None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("damage", ["truncated", "text", "bare array", "folder", "missing"])
def test_a_file_that_is_no_npz_is_named(tmp_path, damage):
    path = tmp_path / "calib.npz"
    np.savez(path, x=np.zeros((50, 40), np.float32))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-4000])
    elif damage == "text":
        path.write_text("x")
    elif damage == "bare array":
        with path.open("wb") as file:
            np.save(file, np.zeros((5, 4)))
    else:
        path.unlink()
        if damage == "folder":
            path.mkdir()
    with pytest.raises(BantamweightError) as caught:
        inputs.load_calibration(path, None)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("y", "sentence"),
    [(np.zeros((3, 1), np.int64), "integers"), (np.zeros(3), "integers"), (np.zeros(2, np.int64), "same number")],
)
def test_bad_labels_are_named(tmp_path, y, sentence):
    np.savez(tmp_path / "test.npz", x=np.zeros((3, 4), np.float32), y=y)
    with pytest.raises(BantamweightError, match=sentence):
        inputs.load_test(tmp_path / "test.npz", None)


@pytest.mark.parametrize(("low", "high"), [(-1, 2), (0, 3)])
def test_labels_outside_the_classes_are_named(low, high):
    with pytest.raises(BantamweightError, match=f"from {low} to {high}, but the model has 3 classes"):
        inputs.check_labels(torch.tensor([low, high]), 3, "test.npz")


@pytest.mark.parametrize(
    ("mean", "std", "sentence"),
    [((0.5, 0.5), (1.0, 1.0, 1.0), "one a channel"), ((0.5,), (0.0,), "above 0"), ((float("nan"),), None, "finite")],
)
def test_bad_mean_and_std_are_named(mean, std, sentence):
    with pytest.raises(BantamweightError, match=sentence):
        inputs.preprocessing(mean, std)


# ---- the model ----------------------------------------------------------------------------------


def test_the_model_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_net.py").write_text("WIDTH = 7\n")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom neighbour_of_net import WIDTH\ndef make_model(): return torch.nn.Linear(3, WIDTH)\n"
    )
    model = inputs.load_model(f"{tmp_path}/net.py:make_model")
    assert isinstance(model, nn.Linear) and model.out_features == 7 and not model.training


def test_a_file_runs_once_and_its_models_are_apart(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nwith open(__file__ + '.runs', 'a') as file: file.write('1')\n"
        "only = torch.nn.Linear(2, 2)\ndef one(): return only\ndef other(): return torch.nn.ReLU()\n"
    )
    first = inputs.load_model(f"{tmp_path}/net.py:one")
    with torch.no_grad():
        first.weight.zero_()  # type: ignore[union-attr]
    again = inputs.load_model(f"{tmp_path}/../{tmp_path.name}/net.py:one")
    assert bool(again.weight.any())  # type: ignore[union-attr]
    assert isinstance(inputs.load_model(f"{tmp_path}/net.py:other"), nn.ReLU)
    assert (tmp_path / "net.py.runs").read_text() == "1"


def test_files_of_one_name_are_not_confused(tmp_path):
    for name, width in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "net.py").write_text(f"import torch\ndef make(): return torch.nn.Linear(2, {width})\n")
    widths = [inputs.load_model(f"{tmp_path}/{name}/net.py:make").out_features for name in "aba"]
    assert widths == [3, 5, 3]


class Versioned(nn.Module):
    """As MNASNet of torchvision: a state without a version is taken for one of the first."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        if local_metadata.get("version") is None:
            raise RuntimeError("a state of version 1")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def test_weights_have_the_versions_of_their_network(tmp_path):
    trained, model = Versioned(), nn.Sequential(Versioned())
    save_file(nn.Sequential(trained).state_dict(), tmp_path / "w.safetensors")
    inputs.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].layer.weight, trained.layer.weight)  # type: ignore[union-attr]


def test_weights_that_the_model_itself_refuses_are_a_sentence(tmp_path):
    class Refusing(Versioned):
        def _load_from_state_dict(self, *args):
            raise RuntimeError("no weights today")

    save_file(Versioned().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(BantamweightError, match=r"w\.safetensors does not load into the model \(no weights today\)"):
        inputs.load_weights(Refusing(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("def make_model(: pass", "importing .*net.py failed: SyntaxError"),
        ("import no_such_module_anywhere", "No module named 'no_such_module_anywhere'"),
        ("raise SystemExit(3)", "importing .*net.py failed"),
        ("x = 1", "no function make_model"),
        ("def make_model(): raise RuntimeError('oh no')", "RuntimeError: oh no"),
        ("def make_model(size): return None", "must work without arguments"),
        ("def make_model(): return 3", "returned a int"),
        ("import torch\ndef make_model(): return torch.nn.Linear(2, 2, device='meta')", "make_model failed"),
    ],
)
def test_model_code_that_fails_is_named(tmp_path, code, sentence):
    (tmp_path / "net.py").write_text(code)
    with pytest.raises(BantamweightError, match=sentence):
        inputs.load_model(f"{tmp_path}/net.py:make_model")


@pytest.mark.parametrize("spec", ["net.py", "net:make_model", "net.py:", "net.py:not a name", ""])
def test_a_model_must_name_file_and_function(spec):
    with pytest.raises(BantamweightError, match=r"such as net\.py:make_model"):
        inputs.load_model(spec)


def small_net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.pop("2.bias"), "lacks 2.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "has unknown extra"),
        (lambda s: s.update({"0.weight": torch.zeros(4, 5)}), r"0.weight is \[4, 5\], but the model wants \[5, 4\]"),
        (lambda s: s["2.weight"].fill_(float("nan")), "2.weight holds NaN"),
        (lambda s: s["0.bias"].fill_(float("inf")), "0.bias holds NaN or infinity"),
    ],
)
def test_weights_of_another_network_are_named(tmp_path, change, sentence):
    state = {name: tensor.clone() for name, tensor in small_net().state_dict().items()}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    model = small_net()
    before = model.state_dict()["0.weight"].clone()
    with pytest.raises(BantamweightError, match=sentence):
        inputs.load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(before, model.state_dict()["0.weight"])


def test_the_batch_count_of_batchnorm_may_be_missing(tmp_path):
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    state = model.state_dict()
    del state["1.num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    fresh = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    inputs.load_weights(fresh, tmp_path / "w.safetensors")
    assert torch.equal(fresh[0].weight, model[0].weight)


@pytest.mark.parametrize("content", [b"", b"\x80\x04pickle", b"\xff" * 200, b"\x10" + b"\0" * 7 + b"{broken json    "])
def test_a_file_that_is_no_safetensors_is_named(tmp_path, content):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a whole safetensors file"):
        inputs.load_weights(small_net(), path)


def test_inputs_that_do_not_fit_the_model_are_named():
    with pytest.raises(BantamweightError, match=r"cannot run x of calib\.npz, shaped \[2, 9\]"):
        inputs.check_fits(small_net(), torch.zeros(10, 9), "calib.npz")
    with pytest.raises(BantamweightError, match=r"must give logits \[n, classes\]"):
        inputs.check_fits(nn.Sequential(nn.Flatten(0)), torch.zeros(10, 9), "calib.npz")
    assert inputs.check_fits(small_net(), torch.zeros(1, 4), "calib.npz") == 3


def test_the_first_layer_that_is_not_finite_is_named():
    model = small_net()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(CalibrationError, match="output of 0 is NaN or infinite on x of calib"):
        inputs.check_fits(model, torch.full((2, 4), 9.0), "calib.npz")
