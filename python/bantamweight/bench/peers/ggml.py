"""ggml's matrix product (llama.cpp) through ctypes on its two shared libraries.

They come with the package llama-cpp-python, which pip builds from source for this CPU; BANTAMWEIGHT_GGML names
another folder that holds libggml-base.so and libggml-cpu.so, for one instruction set for instance. A weight type
runs from plain memory and, where ggml has it, from a buffer that repacks it: CPU_REPACK for 8 rows at a time, AMX
for AMX's tiles (and for VNNI at one row of activations).
"""

import ctypes
import importlib.util
import os
from collections.abc import Callable, Iterator
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .peer import Peer, Source

# name, ggml_type, bits, ternary weights only
_TYPES = (
    ("TQ1_0", 34, 2, True),
    ("TQ2_0", 35, 2, True),
    ("Q2_K", 10, 2, False),
    ("Q4_0", 2, 4, False),
    ("Q4_K", 12, 4, False),
    ("Q8_0", 8, 8, False),
)
_FLOAT32 = 0
_NAMES = ("libggml-base.so", "libggml-cpu.so")
_NODES = 4 << 20  # bytes of a graph's bookkeeping


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


class _TypeTraits(ctypes.Structure):
    _fields_ = [
        ("type_name", c_char_p),
        ("block_size", c_int64),
        ("block_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float", c_void_p),
    ]


def _folder() -> Path | None:
    named = os.environ.get("BANTAMWEIGHT_GGML")
    if named:
        return Path(named)
    package = importlib.util.find_spec("llama_cpp")
    return None if package is None or package.origin is None else Path(package.origin).parent / "lib"


def missing() -> str | None:
    folder = _folder()
    if folder is None:
        return "the package llama-cpp-python is not installed and BANTAMWEIGHT_GGML names no folder with ggml"
    for name in _NAMES:
        if not (folder / name).exists():
            return f"{folder} holds no {name}; set BANTAMWEIGHT_GGML to the folder of ggml's shared libraries"
    return None


class _Library:
    """The functions in use, with their signatures."""

    def __init__(self, folder: Path) -> None:
        base, cpu = (ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in _NAMES)

        def take(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            return function

        pointer, size = c_void_p, c_size_t
        self.init = take(base, "ggml_init", pointer, _InitParams)
        self.free = take(base, "ggml_free", None, pointer)
        self.new_matrix = take(base, "ggml_new_tensor_2d", pointer, pointer, c_int, c_int64, c_int64)
        self.mul_mat = take(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = take(base, "ggml_new_graph", pointer, pointer)
        self.expand = take(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.nbytes = take(base, "ggml_nbytes", size, pointer)
        self.data = take(base, "ggml_get_data", pointer, pointer)
        self.tensor_set = take(base, "ggml_backend_tensor_set", None, pointer, pointer, size, size)
        self.allocate = take(base, "ggml_backend_alloc_ctx_tensors_from_buft", pointer, pointer, pointer)
        self.free_buffer = take(base, "ggml_backend_buffer_free", None, pointer)
        self.quantize = take(
            base, "ggml_quantize_chunk", size, c_int, pointer, pointer, c_int64, c_int64, c_int64, pointer
        )
        self.traits = take(base, "ggml_get_type_traits", POINTER(_TypeTraits), c_int)
        self.compute = take(base, "ggml_backend_graph_compute", c_int, pointer, pointer)
        self.default_buffer = take(base, "ggml_backend_get_default_buffer_type", pointer, pointer)
        self.supports = take(base, "ggml_backend_dev_supports_op", c_bool, pointer, pointer)
        self.free_backend = take(base, "ggml_backend_free", None, pointer)
        self.set_threads = take(cpu, "ggml_backend_cpu_set_n_threads", None, pointer, c_int)
        self.new_backend = take(cpu, "ggml_backend_cpu_init", pointer)
        best_first = ("avx512_vnni", "avx512", "avx_vnni", "avx2", "matmul_int8", "dotprod", "neon")
        self.isa = next((name for name in best_first if take(cpu, f"ggml_cpu_has_{name}", c_int)()), "")
        # It announces every repacked weight on stderr.
        self._quiet = CFUNCTYPE(None, c_int, c_char_p, c_void_p)(lambda level, text, data: None)
        take(base, "ggml_log_set", None, pointer, pointer)(self._quiet, None)
        device_of = take(base, "ggml_backend_get_device", pointer, pointer)
        registry_of = take(base, "ggml_backend_dev_backend_reg", pointer, pointer)
        address_of = take(base, "ggml_backend_reg_get_proc_address", pointer, pointer, c_char_p)
        name_of = take(base, "ggml_backend_buft_name", c_char_p, pointer)
        self.device = device_of(self.new_backend())
        extra = CFUNCTYPE(POINTER(c_void_p), c_void_p)(
            address_of(registry_of(self.device), b"ggml_backend_dev_get_extra_bufts")
        )(self.device)
        self.extra_buffers: dict[str, int] = {}
        for buffer in extra:
            if not buffer:
                break
            self.extra_buffers[name_of(buffer).decode()] = buffer


@cache
def _library(folder: Path) -> _Library:
    return _Library(folder)


# ggml 0.25 configures the tiles once a thread, for the life of the process; when another library has released them
# since (oneDNN and our kernels do after each product), its next product is an illegal instruction. One row of
# activations runs on VNNI and is safe.
_MAX_ROWS = {"AMX": 1}


def build(source: Source, threads: int) -> Iterator[Peer]:
    folder = _folder()
    assert folder is not None
    library = _library(folder)
    out_features, in_features = source.weight.shape
    for name, kind, bits, ternary in _TYPES:
        traits = library.traits(kind).contents
        if in_features % traits.block_size:
            continue
        blob = source.once(
            ("ggml", folder, name), lambda kind=kind, ternary=ternary: _quantized(library, kind, source.weight, ternary)
        )
        for buffer_name in (None, *library.extra_buffers):
            layer = _Layer(library, kind, (out_features, in_features), buffer_name, threads)
            if not layer.supported():
                continue
            layer.load(blob)
            yield Peer(
                name=f"ggml {name}" + (f" {buffer_name.removeprefix('CPU_').lower()}" if buffer_name else ""),
                bits=bits,
                bytes=layer.bytes,
                kernel=library.isa,
                pool="openmp",
                prepare=layer.prepare,
                dequantize=lambda blob=blob, traits=traits: _dequantized(traits, blob, out_features, in_features),
                max_rows=_MAX_ROWS.get(buffer_name or ""),
            )


def _quantized(library: _Library, kind: int, weight: Tensor, ternary: bool) -> Tensor:
    out_features, in_features = weight.shape
    weight = _ternary(weight) if ternary else weight.contiguous()
    traits = library.traits(kind).contents
    blob = torch.empty(in_features // traits.block_size * traits.type_size * out_features, dtype=torch.uint8)
    library.quantize(kind, weight.data_ptr(), blob.data_ptr(), 0, out_features, in_features, None)
    return blob


def _ternary(weight: Tensor) -> Tensor:
    """-s, 0 or s as the mean of absolute values says, with one s for the matrix (TQ1_0, TQ2_0 hold no others)."""
    step = weight.abs().mean()
    return (weight / step).round_().clamp_(-1, 1).mul_(step)


def _dequantized(traits: Any, blob: Tensor, out_features: int, in_features: int) -> Tensor:
    weight = torch.empty(out_features, in_features)
    traits.to_float(blob.data_ptr(), weight.data_ptr(), weight.numel())
    return weight


class _Layer:
    """One weight in one kind of buffer, and a graph of one product for every batch prepared."""

    def __init__(
        self,
        library: _Library,
        kind: int,
        shape: tuple[int, int],
        buffer_name: str | None,
        threads: int,
    ) -> None:
        self.library, self.shape = library, shape
        self.backend = library.new_backend()
        library.set_threads(self.backend, threads)
        self.memory: list[tuple[int, int]] = []  # contexts and their buffers
        buffer = library.extra_buffers[buffer_name] if buffer_name else library.default_buffer(self.backend)
        context = library.init(_InitParams(_NODES, None, True))
        self.weight = library.new_matrix(context, kind, shape[1], shape[0])
        self.bytes = library.nbytes(self.weight)
        self.memory.append((context, library.allocate(context, buffer)))

    def supported(self) -> bool:
        """Whether the buffer takes weights of this type and shape on this CPU; loading any other crashes."""
        library = self.library
        context = library.init(_InitParams(_NODES, None, True))
        inputs = library.new_matrix(context, _FLOAT32, self.shape[1], 1)
        answer = library.supports(library.device, library.mul_mat(context, self.weight, inputs))
        library.free(context)
        return answer

    def load(self, blob: Tensor) -> None:
        self.library.tensor_set(self.weight, blob.data_ptr(), 0, self.bytes)

    def __del__(self) -> None:
        for context, buffer in self.memory:
            self.library.free_buffer(buffer)
            self.library.free(context)
        self.library.free_backend(self.backend)

    def prepare(self, x: Tensor) -> Callable[[], Tensor]:
        library, backend = self.library, self.backend
        context = library.init(_InitParams(_NODES, None, True))
        inputs = library.new_matrix(context, _FLOAT32, x.shape[1], x.shape[0])
        product = library.mul_mat(context, self.weight, inputs)
        graph = library.new_graph(context)
        library.expand(graph, product)
        self.memory.append((context, library.allocate(context, library.default_buffer(backend))))
        library.tensor_set(inputs, x.data_ptr(), 0, x.numel() * 4)
        count = x.shape[0] * self.shape[0]
        y = torch.frombuffer((ctypes.c_float * count).from_address(library.data(product)), dtype=torch.float32)
        y = y.view(x.shape[0], self.shape[0])
        compute = library.compute

        def call(kept: "_Layer" = self) -> Tensor:  # the memory is the layer's
            status = compute(backend, graph)
            if status != 0:
                raise RuntimeError(f"ggml_backend_graph_compute returned {status}")
            return y

        return call
