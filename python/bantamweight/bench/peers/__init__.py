"""Other libraries' ways to run one linear layer, for comparison in the same process. Each is optional."""

from collections.abc import Iterator, Sequence

from ...errors import BantamweightError
from . import ggml, onnx_runtime, open_vino, torch_layers
from .peer import Peer, Source

__all__ = ["LIBRARIES", "Peer", "Source", "build", "choose", "missing"]

LIBRARIES = {"torch": torch_layers, "onnxruntime": onnx_runtime, "openvino": open_vino, "ggml": ggml}


def choose(names: str | Sequence[str]) -> list[str]:
    """Names of libraries from "all", "torch,ggml" or a list; no check that they are installed.

    Raises:
        BantamweightError: an unknown name.

    Example:
        >>> choose("ggml,torch")
        ['ggml', 'torch']
    """
    listed = names.split(",") if isinstance(names, str) else list(names)
    if listed == ["all"]:
        return list(LIBRARIES)
    for name in listed:
        if name not in LIBRARIES:
            raise BantamweightError(
                f"peers is {','.join(listed)!r}, but {name!r} is no peer; allowed are all, or a list with commas of "
                f"{', '.join(LIBRARIES)}"
            )
    return listed


def missing(name: str) -> str | None:
    """Why the library cannot run here and what mends it, or None if it can."""
    return LIBRARIES[name].missing()


def build(names: Sequence[str], source: Source, threads: int) -> Iterator[Peer]:
    """Every peer of the libraries that are installed, one after the other: each keeps its own copy of the weight.

    Args:
        names: of `LIBRARIES`.
        source: the weight.
        threads: that each may use.
    """
    for name in names:
        if missing(name) is None:
            yield from LIBRARIES[name].build(source, threads)
