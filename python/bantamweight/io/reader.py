"""Reading a safetensors file that may be damaged or hostile."""

import os
from collections.abc import Iterable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError
from .header import METADATA_KEY, ModelHeader

# safetensors' names of the dtypes that are not floats.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.complex64: "C64",
}
_FLOATS = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
)
DTYPES = frozenset((*_NAMES, *_FLOATS))  # of the tensors that a file can hold


class Reader:
    """A safetensors file opened with suspicion: every read checks the dtype and the shape first."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path

    def __enter__(self) -> "Reader":
        if not os.path.isfile(self.path):
            raise FormatError(f"{self.path} is not a file; pass the path of a model file that save wrote")
        try:
            self.file = safe_open(os.fspath(self.path), framework="pt", device="cpu")
            self.file.__enter__()
            metadata = self.file.metadata() or {}
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(
                f"{self.path} cannot be read as a safetensors file ({error}); it is cut short, damaged or of another "
                "kind, get a whole copy"
            ) from None
        if METADATA_KEY not in metadata:
            self.__exit__(None, None, None)
            raise FormatError(
                f"{self.path} is a safetensors file without a {METADATA_KEY} header; pass one that bantamweight saved, "
                "or load a float checkpoint with safetensors.torch.load_file"
            )
        self.header = ModelHeader.from_json(metadata[METADATA_KEY], self.path)
        self.names = set(self.file.keys())
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.file.__exit__(*exc_info)

    def check_names(self, expected: Iterable[str]) -> None:
        wanted = set(expected)
        for names, what in ((wanted - self.names, "lacks"), (self.names - wanted, "has")):
            if names:
                others = f" and {len(names) - 1} more" if len(names) > 1 else ""
                rest = "which the model needs" if what == "lacks" else "which the model does not know"
                raise FormatError(
                    f"{self.path} {what} {min(names)!r}{others}, {rest}; pass the make_model() it was saved from"
                )

    def check(self, name: str, dtype: str, shape: list[int]) -> None:
        found = self.file.get_slice(name)
        if found.get_dtype() != dtype or found.get_shape() != shape:
            raise FormatError(
                f"{self.path}: {name!r} is {found.get_dtype()} {found.get_shape()}, but its header calls for {dtype} "
                f"{shape}; the file is damaged, get a whole copy"
            )

    def check_like(self, name: str, value: Tensor) -> None:
        """A float tensor takes any width that fits the model's; of integers only the model's own keeps every value."""
        found = self.file.get_slice(name)
        is_float = "F" in found.get_dtype()  # F64, F32, F16, BF16, F8_*
        like = is_float if value.is_floating_point() else found.get_dtype() == _NAMES.get(value.dtype)
        if not like or found.get_shape() != list(value.shape):
            raise FormatError(
                f"{self.path}: {name!r} is {found.get_dtype()} {found.get_shape()}, but the model has {value.dtype} "
                f"{list(value.shape)}; pass the make_model() it was saved from"
            )

    def tensor(self, name: str) -> Tensor:
        """In memory of its own: the file may be cut or replaced later."""
        return self.file.get_tensor(name).clone()
