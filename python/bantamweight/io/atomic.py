"""Writing a file so that its old content is never lost."""

import os
import tempfile
from pathlib import Path

from ..errors import BantamweightError


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Puts `data` at `path` at once or not at all: a temporary file beside it, synced, then renamed over it.

    Raises:
        BantamweightError: the folder is missing or not writable, the disk is full, or the path is a folder; a file
            that was there is as before.
    """
    path = Path(os.path.realpath(path))  # a link stays one, and what it points to is replaced
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:100]}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _mode_of(path))
            os.replace(temporary, path)
        except BaseException:  # Ctrl-C too
            os.unlink(temporary)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise BantamweightError(
            f"cannot write {path}: {error.strerror or error}; choose a file in a folder that exists, is writable and "
            "has room (nothing that was there has changed)"
        ) from error


def _mode_of(path: Path) -> int:
    """The permissions of the file to replace, or those a new file gets (mkstemp's own are for one user only)."""
    try:
        return path.stat().st_mode & 0o777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    """Makes the rename itself survive a power cut, where the file system lets a folder be synced."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
