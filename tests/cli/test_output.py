import pytest
from bantamweight.cli.output import staged
from bantamweight.errors import BantamweightError


def test_files_arrive_together_and_others_stay(tmp_path):
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    (out / "notes.txt").write_text("mine")
    (out / "report.json").write_text("old")
    with staged(out) as folder:
        (folder / "report.json").write_text("new")
        (folder / "model.safetensors").write_text("weights")
        assert (out / "report.json").read_text() == "old"
    assert {f.name: f.read_text() for f in out.iterdir()} == {
        "notes.txt": "mine",
        "report.json": "new",
        "model.safetensors": "weights",
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_results_whole(tmp_path, error):
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors").write_text("good")
    with pytest.raises(error), staged(out) as folder:
        (folder / "model.safetensors").write_text("half")
        raise error
    assert [(f.name, f.read_text()) for f in out.iterdir()] == [("model.safetensors", "good")]


def test_a_failure_removes_a_folder_made_for_it(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "out"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["file", "file/under", "file/under/deeper"])
def test_an_unwritable_place_is_named(tmp_path, place):
    (tmp_path / "file").write_text("precious")
    with pytest.raises(BantamweightError, match=r"--out .* cannot be written"), staged(tmp_path / place):
        pytest.fail("the body must not run")
    assert (tmp_path / "file").read_text() == "precious"
