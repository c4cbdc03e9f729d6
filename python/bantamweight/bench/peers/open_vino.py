"""OpenVINO's compressed weights: u2, u4 and u8 constants, activations quantized as they come.

The zero point has to be a constant of the same type as the weights: with any other the plugin folds the weight to
float32 and says nothing. The graph is therefore asked, once it has run, which weight type its matmul has; a peer
that lost its bits counts as a 32-bit one.
"""

import importlib.util
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .peer import Peer, Rounded, Source, pack_codes

# bits, group size (0: the row), float type that what is not int8 is computed in
_VARIANTS = ((2, 128, "f32"), (4, 128, "f32"), (4, 128, "bf16"), (8, 128, "f32"), (8, 0, "f32"))


def missing() -> str | None:
    if importlib.util.find_spec("openvino") is None:
        return "the package openvino is not installed"
    return None


def build(source: Source, threads: int) -> Iterator[Peer]:
    in_features = source.weight.shape[1]
    for bits, group_size, precision in _VARIANTS:
        rounded = source.rounded(bits, group_size or in_features)
        if rounded is None:
            continue
        compiled = _compile(rounded, threads, precision)
        kernel, kept = _kernel(compiled, in_features)
        scheme = f"W{bits}" + (f"-g{group_size}" if group_size else "")
        yield Peer(
            name=f"openvino {scheme}" + (" bf16" if precision == "bf16" else ""),
            bits=bits if kept == f"u{bits}" else 32,
            bytes=rounded.codes.numel() * bits // 8 + 2 * rounded.scale.numel(),
            kernel=f"{kernel}, {kept} weights",
            pool="openvino",
            prepare=_preparer(compiled),
            dequantize=rounded.dequantize,
        )


def _compile(rounded: Rounded, threads: int, precision: str) -> Any:
    openvino, op = import_module("openvino"), import_module("openvino.opset13")
    kind = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}[rounded.bits]

    def constant(codes: Tensor) -> Any:
        tensor = openvino.Tensor(kind, openvino.Shape(list(codes.shape)))
        flat = codes.reshape(-1)
        if rounded.bits < 8:
            per_byte = 8 // rounded.bits
            flat = pack_codes(torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)), rounded.bits)
        tensor.data.reshape(-1).view(np.uint8)[: flat.numel()] = flat.numpy()
        return op.constant(tensor)

    out_features, groups, group_size = rounded.codes.shape
    zero = torch.full((out_features, groups, 1), rounded.zero, dtype=torch.uint8)
    centered = op.subtract(op.convert(constant(rounded.codes), "f32"), op.convert(constant(zero), "f32"))
    scaled = op.multiply(centered, op.constant(rounded.scale.numpy()))
    weight = op.reshape(scaled, op.constant(np.array([out_features, groups * group_size], np.int64)), False)
    x = op.parameter([-1, groups * group_size], openvino.Type.f32)
    model = openvino.Model([op.result(op.matmul(x, weight, False, True))], [x])
    configuration = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(group_size, 128),
    }
    return openvino.Core().compile_model(model, "CPU", configuration)


def _kernel(compiled: Any, in_features: int) -> tuple[str, str]:
    """The implementation and the weight type of the one matmul, known once it has run."""
    compiled.create_infer_request().infer([np.zeros((32, in_features), np.float32)])
    for node in compiled.get_runtime_model().get_ops():
        info = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
        if info.get("layerType") in ("FullyConnected", "MatMul"):
            return str(info.get("primitiveType")), str(info.get("runtimePrecision"))
    return "", "unknown"


def _preparer(compiled: Any) -> Callable[[Tensor], Callable[[], Tensor]]:
    def prepare(x: Tensor) -> Callable[[], Tensor]:
        openvino = import_module("openvino")
        request = compiled.create_infer_request()
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.infer(share_outputs=True)  # gives the output its shape
        y = torch.from_numpy(request.get_output_tensor().data)
        infer = request.infer

        def call(kept: Tensor = x) -> Tensor:  # the request holds an address only
            infer(share_outputs=True)
            return y

        return call

    return prepare
