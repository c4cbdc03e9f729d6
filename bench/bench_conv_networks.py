"""Whole convolutional networks, packed W4A8, against torch, ONNX Runtime and OpenVINO, alternating in one process.

    python bench/bench_conv_networks.py [--network resnet20 resnet50] [--batch 1 16] [--threads 1 2] [--json]

ResNet-20 for 32x32 images (its trained weights where BANTAMWEIGHT_DATA names the folder that holds them, random ones
elsewhere) and a ResNet-50-shaped network for 224x224 images with random weights. BatchNorm is folded for everybody;
the int8 peers are calibrated on random images. Weights are rounded to nearest: this table is about time. "error" is
the relative L2 error of the outputs against torch fp32; a peer that is not installed is named in one line.
"""

import argparse
import contextlib
import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bantamweight as bw
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads channels with zeros (He et al., 2015, option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return F.relu(y + x)


class ResNet20(nn.Module):
    size = 32

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(BasicBlock(16, 16, 1), BasicBlock(16, 16, 1), BasicBlock(16, 16, 1))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with four times the channels at its end; the stride is the 3x3 convolution's."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        return self.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ResNet50(nn.Module):
    size = 224

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        blocks, channels = [], 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                blocks.append(Bottleneck(channels, width, stride if index == 0 else 1))
                channels = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.average, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.head = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.flatten(self.average(self.blocks(self.pool(self.stem(x))))))


NETWORKS = {"resnet20": ResNet20, "resnet50": ResNet50}


def float_network(name: str) -> nn.Module:
    """In eval mode, BatchNorm folded."""
    network: nn.Module = NETWORKS[name]()
    folder = os.environ.get("BANTAMWEIGHT_DATA")
    if name == "resnet20" and folder:
        network.load_state_dict(load_file(str(Path(folder) / "cifar10_resnet20.safetensors")))
    else:
        with torch.no_grad():  # statistics that keep random activations at size 1
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = None
            network.train()(torch.randn(4, 3, NETWORKS[name].size, NETWORKS[name].size))
    return bw.nn.fold_batchnorm(network.eval())[0]


@dataclass(frozen=True)
class Candidate:
    name: str
    call: Callable[[], Any]  # the outputs of one batch
    ours: bool = False


def torch_candidates(network: nn.Module, x: Tensor) -> list[Candidate]:
    last = x.contiguous(memory_format=torch.channels_last)
    by_channels_last = bw.nn.fold_batchnorm(network)[0].to(memory_format=torch.channels_last)  # pyright: ignore
    half = bw.nn.fold_batchnorm(network)[0].to(torch.bfloat16).to(memory_format=torch.channels_last)  # pyright: ignore
    half_x = last.to(torch.bfloat16)
    return [
        Candidate("torch fp32", lambda: network(x)),
        Candidate("torch fp32 channels_last", lambda: by_channels_last(last)),
        Candidate("torch bf16 channels_last", lambda: half(half_x)),
    ]


def torch_int8(network: nn.Module, x: Tensor, engine: str) -> Candidate:
    """FX graph mode static quantization."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = engine
    prepared = prepare_fx(network, get_default_qconfig_mapping(engine), (x[:1],))
    for _ in range(4):
        prepared(torch.randn(4, *x.shape[1:]))
    converted = convert_fx(prepared)
    last = x.contiguous(memory_format=torch.channels_last)

    def call() -> Tensor:
        torch.backends.quantized.engine = engine
        return converted(last)

    return Candidate(f"torch int8 {engine}", call)


class OnnxFiles:
    """The network as ONNX, float and with QDQ nodes, made once for every batch and thread count."""

    def __init__(self, network: nn.Module, size: int, folder: Path) -> None:
        from onnxruntime.quantization import (  # pyright: ignore[reportMissingImports]
            CalibrationDataReader,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import (  # pyright: ignore[reportMissingImports]
            quant_pre_process,
        )

        class RandomImages(CalibrationDataReader):
            def __init__(self) -> None:
                self.left = 4

            def get_next(self) -> dict[str, Any] | None:  # type: ignore[override]
                self.left -= 1
                return {"x": torch.randn(4, 3, size, size).numpy()} if self.left >= 0 else None

        self.fp32, self.int8 = str(folder / "fp32.onnx"), str(folder / "int8.onnx")
        torch.onnx.export(
            network,
            (torch.randn(4, 3, size, size),),
            self.fp32,
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["y"],
            dynamic_axes={"x": {0: "n"}, "y": {0: "n"}},
        )
        prepared = str(folder / "prepared.onnx")
        quant_pre_process(self.fp32, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            self.int8,
            RandomImages(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def onnxruntime_candidate(name: str, path: str, x: Tensor, threads: int) -> Candidate:
    import onnxruntime  # pyright: ignore[reportMissingImports]

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return Candidate(name, lambda: torch.from_numpy(session.run(None, feed)[0]))


def openvino_candidate(name: str, path: str, x: Tensor, threads: int, precision: str) -> Candidate:
    import openvino  # pyright: ignore[reportMissingImports]

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape(list(x.shape))
    config = {
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(model, "CPU", config).create_infer_request()
    images = x.numpy()
    return Candidate(name, lambda: torch.from_numpy(request.infer({0: images}, share_inputs=True)[0]))


class Peers:
    """The candidates that may be missing here, and why they are."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.files: OnnxFiles | None = None

    def export(self, network: nn.Module, size: int, folder: Path) -> None:
        with contextlib.redirect_stdout(None):
            self.files = self.tried("ONNX Runtime", OnnxFiles, network, size, folder)

    def candidates(self, network: nn.Module, x: Tensor, threads: int) -> list[Candidate]:
        found = [self.tried(f"torch int8 {engine}", torch_int8, network, x, engine) for engine in ("x86", "onednn")]
        if self.files is not None:
            for kind, path in (("fp32", self.files.fp32), ("int8", self.files.int8)):
                name = f"ONNX Runtime {kind}"
                found.append(self.tried("ONNX Runtime", onnxruntime_candidate, name, path, x, threads))
            for kind, path, precision in (
                ("fp32", self.files.fp32, "f32"),
                ("bf16", self.files.fp32, "bf16"),
                ("int8", self.files.int8, "f32"),
            ):
                name = f"OpenVINO {kind}"
                found.append(self.tried("OpenVINO", openvino_candidate, name, path, x, threads, precision))
        return [candidate for candidate in found if candidate is not None]

    def tried(self, what: str, make: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return make(*arguments)
        except Exception as error:  # a peer that is not there, or no longer takes the model
            self.missing.setdefault(what, f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
            return None


def our_candidates(network: nn.Module, x: Tensor, bits: int) -> list[Candidate]:
    quantized = bw.quantize(network, bw.RoundToNearest(bits=bits), calibration=torch.randn_like(x[:2]), progress=False)
    packed = bw.pack(quantized)
    last = x.contiguous(memory_format=torch.channels_last)
    fused = bw.nn.fuse(packed)
    int8_maps = bw.nn.fuse(packed, calibration=[torch.randn(4, *x.shape[1:]) for _ in range(4)])
    return [
        Candidate(f"packed W{bits}A8", lambda: packed(last), ours=True),
        Candidate(f"packed W{bits}A8 fused", lambda: fused(last), ours=True),
        Candidate(f"packed W{bits}A8 fused, int8 maps", lambda: int8_maps(last), ours=True),
    ]


@dataclass(frozen=True, kw_only=True)
class Row:
    network: str
    batch: int
    threads: int
    candidate: str
    median_ms: float
    min_ms: float
    spread: float  # (third quartile - first) / median
    error: float
    times_ours: float  # this candidate's median over our fastest's


def measure(
    candidates: list[Candidate], network: str, batch: int, threads: int, rounds: int, seconds: float
) -> list[Row]:
    """Rounds over all candidates in turn, so that a slow stretch of the machine meets all of them."""
    expected = candidates[0].call().float()
    errors = [float((c.call().float() - expected).norm() / expected.norm()) for c in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    end = time.perf_counter() + seconds
    while len(times[0]) < rounds or (time.perf_counter() < end and len(times[0]) < 200):
        for candidate, taken in zip(candidates, times, strict=True):
            candidate.call()  # brings its weights back into the caches, as in a process that runs nothing else
            begin = time.perf_counter()
            candidate.call()
            taken.append(1e3 * (time.perf_counter() - begin))
    medians = [statistics.median(taken) for taken in times]
    ours = min(median for candidate, median in zip(candidates, medians, strict=True) if candidate.ours)
    rows = []
    for candidate, taken, median, error in zip(candidates, times, medians, errors, strict=True):
        low, _, high = statistics.quantiles(taken, n=4)
        rows.append(
            Row(
                network=network,
                batch=batch,
                threads=threads,
                candidate=candidate.name,
                median_ms=median,
                min_ms=min(taken),
                spread=(high - low) / median,
                error=error,
                times_ours=median / ours,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--network", nargs="+", choices=sorted(NETWORKS), default=sorted(NETWORKS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--rounds", type=int, default=5, help="at least so many a table")
    parser.add_argument("--seconds", type=float, default=4.0, help="a table of short calls goes on for so long")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    rows: list[Row] = []
    if not args.json:
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}")
        print(f"{'network':9} {'batch':>5} {'threads':>7}  {'candidate':28}", end="")
        print(f"{'ms':>9}{'min':>9}{'spread':>8}{'error':>9}{'x ours':>8}")
    peers = Peers()
    for name in args.network:
        network = float_network(name)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            peers.export(network, NETWORKS[name].size, Path(folder))
            for threads, batch in ((threads, batch) for threads in args.threads for batch in args.batch):
                torch.set_num_threads(threads)
                x = torch.randn(batch, 3, NETWORKS[name].size, NETWORKS[name].size)
                candidates = torch_candidates(network, x) + peers.candidates(network, x, threads)
                candidates += our_candidates(network, x, args.bits)
                for row in measure(candidates, name, batch, threads, args.rounds, args.seconds):
                    rows.append(row)
                    if not args.json:
                        print(f"{row.network:9} {row.batch:>5} {row.threads:>7}  {row.candidate:28}", end="")
                        print(f"{row.median_ms:>9.2f}{row.min_ms:>9.2f}{row.spread:>8.0%}", end="")
                        print(f"{row.error:>9.1e}{row.times_ours:>8.2f}", flush=True)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "missing": peers.missing, "rows": [asdict(r) for r in rows]}))
    else:
        print("missing peers: " + ("; ".join(f"{peer} ({why})" for peer, why in peers.missing.items()) or "none"))


if __name__ == "__main__":
    main()
