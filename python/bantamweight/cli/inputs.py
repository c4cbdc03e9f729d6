"""Reads and checks what the user names: the model's code, its weights, calibration and test data.

Every check ends in one sentence that says what came, what is allowed and how to mend it.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import math
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import BantamweightError, CalibrationError, FormatError

EMBEDDED_MODEL = "embedded digits"  # stands for a FILE.py:FUNCTION where the embedded example was compressed


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """uint8 x becomes (x / 255 - mean) / std, one number or one a channel; float x is model-ready already."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not all(math.isfinite(m) for m in self.mean):
            raise BantamweightError(f"--mean {self.mean} must be finite numbers; 0.5 is half of white")
        if not all(math.isfinite(s) and s > 0 for s in self.std):
            raise BantamweightError(f"--std {self.std} must be finite numbers above 0; leave it out for 1")
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise BantamweightError(
                f"--mean has {len(self.mean)} numbers and --std {len(self.std)}; give both one a channel, or one in all"
            )

    @property
    def channels(self) -> int:
        return max(len(self.mean), len(self.std))

    def __call__(self, pixels: np.ndarray, path: Path) -> Tensor:
        """uint8 [n, c, h, w], [n, h, w, c], [n, h, w] (one channel) or [n, features] -> model-ready float32."""
        if pixels.ndim == 3:
            pixels = pixels[:, None]
        elif pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
            pixels = pixels.transpose(0, 3, 1, 2)
        channels = pixels.shape[1] if pixels.ndim == 4 else 1
        if self.channels not in (1, channels):
            raise BantamweightError(
                f"{path}: --mean and --std have {self.channels} numbers, but x {list(pixels.shape)} has {channels} "
                "channels; give one number, or one a channel"
            )
        x = torch.from_numpy(np.ascontiguousarray(pixels)).to(torch.float32).div_(255)
        per_channel = (1, -1) + (1,) * (x.ndim - 2)
        return x.sub_(torch.tensor(self.mean).reshape(per_channel)).div_(torch.tensor(self.std).reshape(per_channel))


def preprocessing(mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Preprocessing | None:
    """What --mean and --std say; None where neither was given."""
    if mean is None and std is None:
        return None
    return Preprocessing(mean=mean or (0.0,), std=std or (1.0,))


def is_own(args: argparse.Namespace, first: str, second: str) -> bool:
    """Whether --model and the two other options name a network of the user's; none of them is the embedded example."""
    given = [getattr(args, name) is not None for name in (first, second)]
    if args.model and not all(given):
        raise BantamweightError(
            f"a network of your own needs --model, --{first} and --{second} (none of them for the example)"
        )
    if any(given) and not args.model:
        raise BantamweightError(f"--{first} and --{second} need --model (leave all three out for the embedded example)")
    return bool(args.model)


# ---- data ---------------------------------------------------------------------------------------


def load_calibration(path: Path, pixels: Preprocessing | None) -> Tensor:
    """x of calib.npz, float32 and finite, at least one row."""
    x = _load_x(_open_npz(path, ["x"])["x"], path, pixels)
    if len(x) == 0:
        raise CalibrationError(f"{path}: x {list(x.shape)} holds no inputs; calibrate on some tens to a thousand")
    return x


def load_test(path: Path, pixels: Preprocessing | None) -> tuple[Tensor, Tensor]:
    """x and y of test.npz: float32 [n, ...] and int64 [n]."""
    arrays = _open_npz(path, ["x", "y"])
    x, y = _load_x(arrays["x"], path, pixels), arrays["y"]
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise BantamweightError(f"{path}: y is {y.dtype} {list(y.shape)}, but must be class numbers, integers [n]")
    if len(y) != len(x) or len(y) == 0:
        raise BantamweightError(f"{path}: x has {len(x)} rows and y {len(y)}; both need the same number, at least one")
    return x, torch.from_numpy(y.astype(np.int64))


def _open_npz(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    _require_file(path, "an npz file made by numpy.savez")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise FormatError(
                f"{path} holds one bare array; save it with numpy.savez(path, {'=..., '.join(names)}=...)"
            )
        with file:
            missing = [name for name in names if name not in file.files]
            if missing:
                raise FormatError(
                    f"{path} has no array {' and no '.join(missing)}, only {', '.join(file.files) or 'nothing'}; "
                    f"save it with numpy.savez(path, {'=..., '.join(names)}=...)"
                )
            return {name: file[name] for name in names}
    except BantamweightError:
        raise
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        raise FormatError(f"{path} is not a whole npz file of plain arrays ({_first_line(error)}); save it again with "
                          "numpy.savez, without object arrays") from None  # fmt: skip


def _load_x(x: np.ndarray, path: Path, pixels: Preprocessing | None) -> Tensor:
    if x.ndim < 2:
        raise BantamweightError(f"{path}: x is {list(x.shape)}, but must be a batch of inputs [n, ...]")
    if x.dtype == np.uint8:
        if pixels is None:
            raise BantamweightError(f"{path}: x is uint8; pass --mean and --std (0 and 1 for plain x / 255)")
        return pixels(x, path)
    if x.dtype.kind != "f":
        raise BantamweightError(
            f"{path}: x is {x.dtype}, but must be model-ready float32, or uint8 with --mean and --std"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    if not bool(torch.isfinite(tensor).all()):
        row = int((~torch.isfinite(tensor.flatten(1)).all(1)).nonzero()[0])
        raise CalibrationError(f"{path}: x holds NaN or infinity, first in row {row}; leave such rows out")
    return tensor


# ---- the model ----------------------------------------------------------------------------------


_imported: dict[Path, ModuleType] = {}  # by absolute path


def load_model(spec: str) -> nn.Module:
    """Calls `FILE.py:FUNCTION` (or the embedded example's) and returns the module it makes, in eval mode on the CPU.

    The file runs once a process, however many models are asked for: code that registers something may not run twice.
    """
    if spec == EMBEDDED_MODEL:
        from .. import demo

        return demo.make_model().eval()
    path, function = split_spec(spec)
    with _importable(path.parent):
        make = _import_function(path, function)
        try:
            model = make()
            if isinstance(model, nn.Module):
                # A copy: the function may return one model of the file's again and again.
                return copy.deepcopy(model).cpu().eval()
        except (Exception, SystemExit) as error:
            raise BantamweightError(f"{spec} failed: {_describe(error)}; it must work without arguments") from error
    raise BantamweightError(f"{spec} returned a {type(model).__name__}, but must return a torch.nn.Module")


def split_spec(spec: str) -> tuple[Path, str]:
    """('net.py', 'make_model') of 'net.py:make_model'."""
    file, colon, function = spec.rpartition(":")
    if not colon or not file.endswith(".py") or not function.isidentifier():
        raise BantamweightError(
            f"--model {spec!r} must be a Python file and a function in it, such as net.py:make_model"
        )
    return Path(file), function


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The model's file may import its neighbours."""
    entry = str(folder.resolve())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(entry)


def _import_function(path: Path, function: str) -> Callable[[], object]:
    _require_file(path, "the Python file that makes your model")
    place = path.resolve()
    if place not in _imported:
        _imported[place] = _import_file(path)
    make = getattr(_imported[place], function, None)
    if not callable(make):
        raise BantamweightError(f"{path} has no function {function}; name one that returns your model")
    return make


def _import_file(path: Path) -> ModuleType:
    name = f"bantamweight_user_{path.stem}"
    if name in sys.modules:  # a file of this name in another folder
        name += f"_{len(_imported)}"
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py suffix always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise BantamweightError(f"importing {path} failed: {_describe(error)}") from error
    return module


def load_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The model's state from tensors that its own class wrote, versions included: a file of tensors has none.

    Modules that changed the names or shapes of their state between versions take a state without one for an old one.

    Raises:
        RuntimeError: what the model itself does not take.
    """
    state = OrderedDict(tensors)
    state._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    model.load_state_dict(state)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a float state dict into the model: same names, same shapes, finite values."""
    _require_file(path, "a safetensors file")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(
            f"{path} is not a whole safetensors file ({_first_line(error)}); "
            "write it again with safetensors.torch.save_file(model.state_dict(), path)"
        ) from None
    expected = model.state_dict()
    # Files of older torch versions lack BatchNorm's count of batches, which no network in eval mode reads.
    tensors = {name: count for name, count in expected.items() if name.endswith("num_batches_tracked")} | tensors
    for problem, names in (
        ("lacks", [name for name in expected if name not in tensors]),
        ("has unknown", [name for name in tensors if name not in expected]),
    ):
        if names:
            listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise BantamweightError(f"{path} {problem} {listed}; --weights and --model must belong to the same network")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BantamweightError(
                f"{path}: {name} is {list(tensor.shape)}, but the model wants {list(expected[name].shape)}; "
                "--weights and --model must belong to the same network"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BantamweightError(f"{path}: {name} holds NaN or infinity; look for where training diverged")
    try:
        load_state(model, tensors)
    except RuntimeError as error:
        raise BantamweightError(
            f"{path} does not load into the model ({_first_line(error)}); --weights and --model must belong to the "
            "same network"
        ) from error


def check_fits(model: nn.Module, x: Tensor, path: str) -> int:
    """Runs a few inputs through the model and returns its number of classes."""
    try:
        with torch.inference_mode():
            y = model(x[:2])
    except BantamweightError:
        raise
    except Exception as error:
        raise BantamweightError(
            f"the model cannot run x of {path}, shaped {list(x[:2].shape)}: {_describe(error)}; "
            "save x in the shape that the model takes"
        ) from error
    if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x[:2]):
        came = f"a tensor {list(y.shape)}" if isinstance(y, Tensor) else f"a {type(y).__name__}"
        raise BantamweightError(f"the model gave {came} for {len(x[:2])} inputs, but must give logits [n, classes]")
    check_finite(model, x[:64], path)
    return y.shape[1]


def check_finite(model: nn.Module, x: Tensor, path: str) -> None:
    """Names the first layer whose output is not finite."""
    culprits: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def note(_module: nn.Module, _inputs: tuple[Tensor, ...], output: object) -> None:
            if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
                culprits.append(name)

        return note

    handles = [
        module.register_forward_hook(watch(name or type(module).__name__))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.inference_mode():
            finite = bool(torch.isfinite(model(x)).all())
    finally:
        for handle in handles:
            handle.remove()
    if culprits or not finite:
        raise CalibrationError(
            f"the output of {culprits[0] if culprits else 'the model'} is NaN or infinite on x of {path}; "
            "check how x was scaled and that the weights are the trained ones"
        )


def check_labels(y: Tensor, classes: int, path: str) -> None:
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise BantamweightError(
            f"{path}: y goes from {low} to {high}, but the model has {classes} classes, 0 to {classes - 1}; "
            "number the classes from 0, as in training"
        )


def _require_file(path: Path, what: str) -> None:
    if path.is_dir():
        raise BantamweightError(f"{path} is a folder; give {what}")
    if not path.is_file():
        raise BantamweightError(f"{path} does not exist; give {what}")


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
