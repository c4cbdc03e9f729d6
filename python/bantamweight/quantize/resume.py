"""A folder that holds the layers of an unfinished run, so that a run that was killed goes on where it was.

One safetensors file a layer, written atomically, and a fingerprint of everything the layers depend on: a layer is
read back only by the run that would compute it again to the last bit.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import BantamweightError, FormatError
from ..weights import QuantizedWeight
from .method import LayerResult

_VERSION = "1"


def fingerprint(settings: Iterable[str], tensors: Iterable[Tensor]) -> str:
    """A digest of the settings and of the bytes, types and shapes of the tensors."""
    digest = hashlib.sha256(_VERSION.encode())
    for text in settings:
        digest.update(f"{len(text)}:{text}".encode())
    for tensor in tensors:
        whole = tensor.detach().cpu().contiguous()
        digest.update(f"{whole.dtype}{tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class ResumeFolder:
    """The finished layers of one run.

    Raises:
        BantamweightError: the folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str], run: str) -> None:
        self.folder = Path(folder)
        self.run = run
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BantamweightError(
                f"the resume folder {self.folder} cannot be made ({error.strerror}); name a folder that can be written"
            ) from None

    def load(self, name: str) -> LayerResult | None:
        """The layer as an earlier start of this run left it, or None.

        Raises:
            FormatError: the file is damaged, or of a run with other settings, weights or data.
        """
        path = self._path(name)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("bantamweight", "{}"))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise FormatError(f"{path} is damaged ({error}); delete it to quantize layer '{name}' again") from None
        if header.get("run") != self.run or header.get("layer") != name:
            raise FormatError(
                f"{self.folder} holds layers of a run with other settings, weights or calibration data; "
                "name another resume folder, or delete this one to start anew"
            )
        weight = QuantizedWeight(
            codes=tensors["codes"],
            scale=tensors["scale"],
            zero=tensors["zero"],
            levels=header["levels"],
            group_size=header["group_size"],
        )
        return LayerResult(weight=weight, bias=tensors.get("bias"), error=header["error"], notes=tuple(header["notes"]))

    def store(self, name: str, result: LayerResult) -> None:
        """Writes a layer; a reader sees it whole or not at all."""
        weight = result.weight
        tensors = {"codes": weight.codes, "scale": weight.scale, "zero": weight.zero}
        if result.bias is not None:
            tensors["bias"] = result.bias.detach().contiguous()
        header = {
            "run": self.run,
            "layer": name,
            "levels": weight.levels,
            "group_size": weight.group_size,
            "error": result.error,
            "notes": result.notes,
        }
        path = self._path(name)
        unfinished = path.with_suffix(".unfinished")
        try:
            unfinished.write_bytes(save(tensors, {"bantamweight": json.dumps(header)}))
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise BantamweightError(
                f"{path} cannot be written ({error.strerror}); free space, or name another resume folder"
            ) from None

    def _path(self, name: str) -> Path:
        # The digest keeps names apart that differ in characters a file name cannot hold.
        plain = "".join(c if c.isalnum() or c in "._-" else "_" for c in name)[:80]
        return self.folder / f"{plain}.{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"
