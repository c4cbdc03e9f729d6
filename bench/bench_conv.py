"""Packed convolutions against torch's fp32 and bf16 (oneDNN, channels last), alternating in one process.

    python bench/bench_conv.py [--model resnet20 resnet50 mobilenet] [--batch 1 16] [--bits 4] [--threads N] [--json]

Each row is one layer; the time is the library call from a float tensor to a float tensor, activation
rounding included, and the minimum and the median over the repeats are wall time.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from bantamweight import QuantizedWeight
from bantamweight.ops.lowbit_conv2d import describe_conv2d, pack_conv2d, run_conv2d
from bantamweight.weights import conv_weight
from torch.nn import functional as F  # noqa: N812


@dataclass(frozen=True, kw_only=True)
class Layer:
    name: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int  # input height and width
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2


def layer(name: str, cin: int, cout: int, kernel: int, size: int, stride: int = 1, groups: int = 1) -> Layer:
    return Layer(name=name, in_channels=cin, out_channels=cout, kernel=kernel, size=size, stride=stride, groups=groups)


LAYERS = {
    "resnet20": [
        layer("stem", 3, 16, 3, 32),
        layer("stage1", 16, 16, 3, 32),
        layer("stage2 down", 16, 32, 3, 32, stride=2),
        layer("stage2", 32, 32, 3, 16),
        layer("stage3 down", 32, 64, 3, 16, stride=2),
        layer("stage3", 64, 64, 3, 8),
    ],
    "resnet50": [
        layer("stem", 3, 64, 7, 224, stride=2),
        layer("1x1 reduce", 256, 64, 1, 56),
        layer("3x3", 64, 64, 3, 56),
        layer("1x1 expand", 64, 256, 1, 56),
        layer("3x3 down", 128, 128, 3, 56, stride=2),
        layer("3x3", 128, 128, 3, 28),
        layer("1x1 expand", 128, 512, 1, 28),
        layer("3x3", 256, 256, 3, 14),
        layer("1x1 expand", 256, 1024, 1, 14),
        layer("1x1 down", 1024, 2048, 1, 14, stride=2),
        layer("3x3", 512, 512, 3, 7),
        layer("1x1 reduce", 2048, 512, 1, 7),
    ],
    "mobilenet": [
        layer("depthwise", 32, 32, 3, 112, groups=32),
        layer("depthwise", 96, 96, 3, 112, stride=2, groups=96),
        layer("depthwise", 192, 192, 3, 28, groups=192),
        layer("depthwise", 960, 960, 3, 7, groups=960),
        layer("grouped", 128, 128, 3, 56, groups=32),
    ],
}


@dataclass(frozen=True, kw_only=True)
class Row:
    model: str
    layer: str
    shape: str
    batch: int
    kernel: str
    ours_us: float
    ours_median_us: float
    torch_us: float
    torch_median_us: float
    bf16_us: float  # the minimum; bfloat16 inputs, weights and outputs
    ratio: float  # torch / ours, of the minima
    gops: float  # of ours, two operations a multiply-add


def timed(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def measure(model: str, spec: Layer, batch: int, bits: int, kernel: str | None, seconds: float) -> Row:
    columns = spec.kernel**2 * spec.in_channels // spec.groups
    codes = torch.randint(0, 2**bits, (spec.out_channels, columns), dtype=torch.uint8)
    weight = QuantizedWeight.from_codes(codes, 0.01, float(2 ** (bits - 1)), levels=2**bits)
    pair = (spec.kernel, spec.kernel)
    stride, padding = (spec.stride, spec.stride), (spec.padding, spec.padding)
    layout = pack_conv2d(
        weight,
        in_channels=spec.in_channels,
        kernel_size=pair,
        stride=stride,
        padding=padding,
        groups=spec.groups,
        kernel=kernel,
    )
    found = describe_conv2d(layout)
    bias = torch.randn(spec.out_channels)
    x = torch.randn(batch, spec.in_channels, spec.size, spec.size).contiguous(memory_format=torch.channels_last)
    dense = conv_weight(weight.dequantize(), *pair).contiguous(memory_format=torch.channels_last)

    def ours() -> torch.Tensor:
        return run_conv2d(x, layout, bias, found)

    def peer() -> torch.Tensor:
        return F.conv2d(x, dense, bias, stride, padding, 1, spec.groups)

    half_x, half_bias = x.to(torch.bfloat16), bias.to(torch.bfloat16)
    half = dense.to(torch.bfloat16)

    def peer_bf16() -> torch.Tensor:
        return F.conv2d(half_x, half, half_bias, stride, padding, 1, spec.groups)

    y, expected = ours(), peer()
    peer_bf16()
    error = float((y - expected).norm() / expected.norm())
    if error > 0.03:
        raise SystemExit(f"{spec.name}: relative error {error:.3f} to torch; the kernel is wrong")
    times: tuple[list[float], list[float], list[float]] = ([], [], [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        times[0].append(timed(ours))
        times[1].append(timed(peer))
        times[2].append(timed(peer_bf16))
    ours_us, torch_us = min(times[0]), min(times[1])
    macs = y.numel() * columns
    groups = f" g{spec.groups}" if spec.groups > 1 else ""
    return Row(
        model=model,
        layer=spec.name,
        shape=f"{spec.in_channels}>{spec.out_channels} {spec.kernel}x{spec.kernel}/{spec.stride} {spec.size}^2{groups}",
        batch=batch,
        kernel=found.kernel,
        ours_us=ours_us,
        ours_median_us=statistics.median(times[0]),
        torch_us=torch_us,
        torch_median_us=statistics.median(times[1]),
        bf16_us=min(times[2]),
        ratio=torch_us / ours_us,
        gops=2e-3 * macs / ours_us,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", choices=sorted(LAYERS), default=sorted(LAYERS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--kernel", help="a variant by name; default: the best of this machine")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.3, help="per layer")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    if not args.json:
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {args.threads} threads")
        print(f"{'model':10}{'layer':13}{'shape':28}{'batch':>6}  {'kernel':12}", end="")
        print(f"{'ours us':>9}{'median':>9}{'torch us':>10}{'median':>9}{'bf16 us':>9}{'ratio':>7}{'GOPS':>7}")
    with torch.inference_mode():
        for model in args.model:
            for batch in args.batch:
                for spec in LAYERS[model]:
                    row = measure(model, spec, batch, args.bits, args.kernel, args.seconds)
                    rows.append(asdict(row))
                    if args.json:
                        continue
                    print(f"{row.model:10}{row.layer:13}{row.shape:28}{row.batch:>6}  {row.kernel:12}", end="")
                    print(f"{row.ours_us:>9.1f}{row.ours_median_us:>9.1f}{row.torch_us:>10.1f}", end="")
                    print(
                        f"{row.torch_median_us:>9.1f}{row.bf16_us:>9.1f}{row.ratio:>7.2f}{row.gops:>7.0f}", flush=True
                    )
    if args.json:
        print(json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
