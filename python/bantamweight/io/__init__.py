"""Files: canonical bit packing, the model file, and writing that never loses what was there."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .model_file import load, read_header, save

__all__ = ["load", "read_header", "save"]


def __getattr__(name: str) -> Any:
    # On first use, because the layers that a model file needs themselves import io.bitpack.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import model_file

    return getattr(model_file, name)
