"""What `import bantamweight` gives, and what it does not start."""

import subprocess
import sys

import bantamweight as bw
import pytest
from bantamweight import io, nn, ops


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.strip()


def test_every_exported_name_is_there() -> None:
    for module in (bw, io, nn, ops):
        assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(bw.__all__) <= set(dir(bw))
    with pytest.raises(AttributeError, match="no attribute 'qunatize'"):
        bw.qunatize  # noqa: B018


def test_importing_costs_little() -> None:
    assert python("import sys, bantamweight; print('torch' in sys.modules)") == "False"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_kernels_share_torchs_openmp() -> None:
    code = """
import bantamweight, os
from bantamweight import _C
paths = {line.split()[-1] for line in open("/proc/self/maps") if "omp" in os.path.basename(line.split()[-1])}
print(len({os.path.realpath(path) for path in paths if "gomp" in path or "iomp" in path}))
"""
    assert int(python(code)) <= 1
