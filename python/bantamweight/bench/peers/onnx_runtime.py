"""ONNX Runtime's `com.microsoft.MatMulNBits`: 2, 4 and 8 bits, float or int8 activations inside.

accuracy_level 4 asks for int8 activations. `mlas.use_lut_gemm` swaps the 2-bit kernel for table lookups. The
library does not tell which instruction set its kernels picked.
"""

import importlib.util
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .peer import Peer, Rounded, Source

_DOMAIN = "com.microsoft"
# bits, group size, 2-bit tables
_VARIANTS = ((2, 128, False), (2, 128, True), (2, 32, False), (4, 128, False), (4, 32, False), (8, 128, False))


def missing() -> str | None:
    for package in ("onnxruntime", "onnx"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed; install onnxruntime and onnx"
    return None


def build(source: Source, threads: int) -> Iterator[Peer]:
    for bits, group_size, tables in _VARIANTS:
        rounded = source.rounded(bits, group_size)
        if rounded is None:
            continue
        session = _session(rounded, threads, tables)
        name = f"onnxruntime W{bits}-g{group_size}" + (" lut" if tables else "")
        yield Peer(
            name=name,
            bits=bits,
            bytes=rounded.codes.numel() * bits // 8 + 4 * rounded.scale.numel(),
            kernel="",
            pool=name,  # threads belong to a session,
            prepare=_preparer(session, source.weight.shape[0]),
            dequantize=rounded.dequantize,
        )


def _session(rounded: Rounded, threads: int, tables: bool) -> Any:
    onnxruntime = import_module("onnxruntime")
    helper, numpy_helper = import_module("onnx.helper"), import_module("onnx.numpy_helper")
    float32 = import_module("onnx").TensorProto.FLOAT
    out_features, groups, group_size = rounded.codes.shape
    in_features = groups * group_size
    node = helper.make_node(
        "MatMulNBits",
        ["x", "codes", "scale"],  # the zero point left out is the middle of the range, 2 ** (bits - 1)
        ["y"],
        domain=_DOMAIN,
        K=in_features,
        N=out_features,
        bits=rounded.bits,
        block_size=group_size,
        accuracy_level=4,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", float32, ["rows", in_features])],
        [helper.make_tensor_value_info("y", float32, ["rows", out_features])],
        [
            numpy_helper.from_array(rounded.packed().numpy(), "codes"),
            numpy_helper.from_array(rounded.scale.reshape(out_features, groups).numpy(), "scale"),
        ],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(_DOMAIN, 1)], ir_version=10
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # By default its threads spin for 30 ms after a call and slow whatever comes next; calls in a row are as fast so.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "1000")
    if tables:
        options.add_session_config_entry("mlas.use_lut_gemm", "1")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _preparer(session: Any, out_features: int) -> Callable[[Tensor], Callable[[], Tensor]]:
    def prepare(x: Tensor) -> Callable[[], Tensor]:
        y = torch.empty(x.shape[0], out_features)
        binding = session.io_binding()
        for bind, name, tensor in ((binding.bind_input, "x", x), (binding.bind_output, "y", y)):
            bind(name, "cpu", 0, np.float32, tuple(tensor.shape), tensor.data_ptr())
        run, options = session.run_with_iobinding, import_module("onnxruntime").RunOptions()

        def call(kept: Tensor = x) -> Tensor:  # the binding holds an address only
            run(binding, options)
            return y

        return call

    return prepare
