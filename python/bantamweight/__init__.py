"""Make trained PyTorch networks small and tough, and run them fast at 2 to 4 bits.

The verbs are `quantize`, `pack`, `save` and `load`; the README's tour shows them at work.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. They are imported on first use, so that `import bantamweight` is cheap.
_HOME = {
    "Beacon": "quantize",
    "GPFQ": "quantize",
    "HERO": "train.hero",
    "QuantizedWeight": "weights",
    "RoundToNearest": "quantize",
    "_C": "_C",
    "curvature": "curvature",
    "errors": "errors",
    "io": "io",
    "load": "io",
    "nn": "nn",
    "pack": "nn",
    "pack_": "nn",
    "plan": "quantize.plan",
    "quantize": "quantize",
    "quantize_": "quantize",
    "read_header": "io",
    "save": "io",
    "sensitivity": "curvature",
}

__all__ = [
    "GPFQ",
    "HERO",
    "Beacon",
    "QuantizedWeight",
    "RoundToNearest",
    "curvature",
    "errors",
    "io",
    "load",
    "nn",
    "pack",
    "pack_",
    "plan",
    "quantize",
    "quantize_",
    "read_header",
    "save",
    "sensitivity",
]

if TYPE_CHECKING:
    from . import curvature, errors, io, nn
    from .curvature import sensitivity
    from .io import load, read_header, save
    from .nn import pack, pack_
    from .quantize import GPFQ, Beacon, RoundToNearest, quantize, quantize_
    from .quantize.plan import plan
    from .train.hero import HERO
    from .weights import QuantizedWeight


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bantamweight' has no attribute {name!r}")
    import torch  # noqa: F401  (before the extension, so that both share torch's OpenMP threads)

    module = import_module(f".{_HOME[name]}", __name__)
    value = module if _HOME[name] == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOME))
