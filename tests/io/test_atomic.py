"""A failed write leaves what was there, and nothing else."""

import errno
import os
import resource
import signal
from pathlib import Path

import pytest
from bantamweight.errors import BantamweightError
from bantamweight.io.atomic import write_atomically


def test_writes_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    path.chmod(0o600)
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two" and path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"good")

    def fail(*args: object) -> None:
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((BantamweightError, KeyboardInterrupt)) as caught:
        write_atomically(path, b"never")
    monkeypatch.undo()
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]
    if isinstance(error, OSError):
        assert str(caught.value).startswith(f"cannot write {path}: No space left on device; choose")


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BantamweightError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "file.bin", b"x")
    with pytest.raises(BantamweightError, match="it is a folder"):
        write_atomically(tmp_path, b"x")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(BantamweightError, match="Not a directory"):
        write_atomically(tmp_path / "file" / "below", b"x")


def test_a_write_that_stops_halfway_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    write_atomically(path, b"good")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(BantamweightError, match=r"cannot write .*: File too large"):
            write_atomically(path, bytes(1 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"good" and list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_bytes() == b"new"
