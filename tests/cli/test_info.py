import json
import subprocess
import sys

import pytest
from bantamweight.__main__ import main


def test_info_names_the_picked_kernel_and_why_not_the_others(capsys, monkeypatch):
    monkeypatch.delenv("BANTAMWEIGHT_FORCE_KERNEL", raising=False)
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["instruction_sets"]["reference"] == "available"
    for operation in ("linear", "quantize_rows"):
        states = list(info["kernels"][operation].values())
        assert states.count("picked") == 1
        assert all(state == "picked" or state.startswith("off: ") for state in states)
    assert info["cuda"].startswith("off")


def test_a_forced_kernel_is_a_ceiling(capsys, monkeypatch):
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "reference")
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert all(kernel["reference"] == "picked" for kernel in info["kernels"].values())
    assert main(["info"]) == 0
    assert "is a ceiling" in capsys.readouterr().out


def test_a_forced_kernel_of_no_name_is_bad_input(capsys, monkeypatch):
    monkeypatch.setenv("BANTAMWEIGHT_FORCE_KERNEL", "sse9")
    assert main(["info"]) == 2
    assert "names no kernel" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["info", "--nonsense"], ["sing"], []])
def test_bad_usage_is_one_sentence(capsys, argv):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("bantamweight: ")


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom bantamweight.__main__ import main\n"
        "try:\n    main(['compress', '--help'])\nexcept SystemExit as done:\n    assert done.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--calibration" in done.stdout


def test_the_extension_never_loads_before_torch():
    code = "import sys\nfrom bantamweight import _C\nassert 'torch' in sys.modules and _C.isa_table()"
    subprocess.run([sys.executable, "-c", code], check=True)
