"""torch's own ways to run a linear layer: float32, bfloat16, dynamic int8, and its weight-only int4 operator.

bfloat16 layers get bfloat16 inputs, as they would inside a bfloat16 network.
"""

import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from .peer import Peer, Source


def missing() -> str | None:
    return None


def build(source: Source, threads: int) -> Iterator[Peer]:
    """torch's threads are the process's: `threads` has to be set with torch.set_num_threads."""
    weight = source.weight
    yield _float_layer(weight, torch.float32, "torch fp32")
    yield _float_layer(weight, torch.bfloat16, "torch bf16")
    for engine in ("x86", "onednn", "qnnpack"):
        if engine in torch.backends.quantized.supported_engines and (engine != "qnnpack" or _on_arm()):
            yield _dynamic_int8(weight, engine)
    if hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        peer = _weight_only_int4(weight, 128)
        if peer is not None:
            yield peer


def _on_arm() -> bool:
    return os.uname().machine in ("aarch64", "arm64")


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def _float_layer(weight: Tensor, dtype: torch.dtype, name: str) -> Peer:
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    probe = torch.zeros(32, in_features, dtype=dtype)
    return Peer(
        name=name,
        bits=8 * dtype.itemsize,
        bytes=weight.numel() * dtype.itemsize,
        kernel=_onednn_kernel(lambda: layer(probe)) or f"mkl ({_capability()})",
        pool="openmp",
        prepare=_preparer(layer, dtype),
        dequantize=lambda: layer.weight.detach().float(),
    )


def _dynamic_int8(weight: Tensor, engine: str) -> Peer:
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = engine
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces the removal of its quantization
            quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear}, dtype=torch.qint8)[0]
    finally:
        torch.backends.quantized.engine = before
    probe = torch.zeros(32, in_features)
    return Peer(
        name=f"torch int8 {engine}",
        bits=8,
        bytes=weight.numel(),
        kernel=_onednn_kernel(lambda: quantized(probe)) or f"fbgemm ({_capability()})",
        pool="openmp",
        prepare=_preparer(quantized, torch.float32),
        dequantize=lambda: quantized.weight().dequantize(),  # pyright: ignore[reportCallIssue]
    )


def _weight_only_int4(weight: Tensor, group_size: int) -> Peer | None:
    """int4 codes with a scale and a minimum for every group, bfloat16 activations and sums."""
    out_features, in_features = weight.shape
    if in_features % group_size or out_features % 16:
        return None
    groups = weight.reshape(out_features, -1, group_size)
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).bfloat16().float()
    middle = (low + 8 * scale).bfloat16().float()
    codes = ((groups - middle) / scale + 8).round().clamp(0, 15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.flatten(1).int(), 8)
    scale_and_middle = torch.cat([scale, middle], dim=2).transpose(0, 1).contiguous().bfloat16()
    return Peer(
        name=f"torch W4-g{group_size}",
        bits=4,
        bytes=weight.numel() // 2 + 2 * scale_and_middle.numel(),
        kernel=_capability(),
        pool="openmp",
        prepare=_preparer(
            lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scale_and_middle),
            torch.bfloat16,
        ),
        dequantize=lambda: ((codes - 8) * scale + middle).flatten(1),
    )


def _preparer(layer: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Callable[[], Tensor]]:
    def prepare(x: Tensor) -> Callable[[], Tensor]:
        x = x.to(dtype)
        return lambda: layer(x)

    return prepare


def _onednn_kernel(call: Callable[[], Tensor]) -> str:
    """The implementation that oneDNN reports for `call`; "" if oneDNN did not run.

    oneDNN prints from C, so its output is caught at the file descriptor.
    """
    with tempfile.TemporaryFile() as caught, torch.inference_mode():
        call()  # reorders of the weight are done before the report
        kept = os.dup(1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                os.dup2(caught.fileno(), 1)
                call()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        caught.seek(0)
        said = caught.read().decode(errors="replace")
    found = re.findall(r"exec,cpu,(?:matmul|inner_product|convolution),([^,]+),", said)
    return found[-1] if found else ""
