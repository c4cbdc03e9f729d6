"""Writes the results of a run whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import BantamweightError


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder to write into; its files take their places in `out` one rename each, once all of them are whole.

    After an error or Ctrl-C `out` is as it was: earlier results stay, and a folder made here is removed again if
    nothing is in it.

    Raises:
        BantamweightError: `out` is a file, lies under one, or cannot be written.
    """
    existed = out.is_dir()
    try:
        out.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    except OSError as error:
        raise BantamweightError(
            f"--out {out} cannot be written ({error.strerror}); name a folder where you may create files"
        ) from None
    try:
        yield staging
        for file in sorted(staging.iterdir()):
            _flush(file)
        for file in sorted(staging.iterdir()):
            os.replace(file, out / file.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with contextlib.suppress(OSError):
                out.rmdir()


def _flush(file: Path) -> None:
    """Onto the disk before the rename, so that a crash cannot leave an empty file under a good name."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
