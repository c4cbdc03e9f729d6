"""How a linear layer may round its inputs: the error and the time of int8, int8-block and int16 activations.

    python bench/bench_activation_modes.py [--threads N] [--seconds S] [--json]

Errors are ||y - x W^T|| / ||x W^T|| with W the same quantized weight in float64, on Gaussian inputs and on inputs of
which three columns are 40 times larger (as the outlier dimensions of BERT-like encoders are). Times are wall time of
one call through nn.PackedLinear, the modes of a row alternating in one process; minimum over the repeats, and ratio to
int8.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time

import torch
from bantamweight import QuantizedWeight
from bantamweight.nn import PackedLinear
from bantamweight.ops.lowbit_linear import ACTIVATIONS
from torch import Tensor

SCHEMES = {"ternary": (3, None), "W4": (15, None), "W4-g128": (15, 128), "W8": (255, None)}
SHAPES = [(768, 3072), (4096, 4096)]


def random_weight(n: int, k: int, levels: int, group_size: int | None) -> QuantizedWeight:
    groups = 1 if group_size is None else -(-k // group_size)
    codes = torch.randint(0, levels, (n, k), dtype=torch.uint8)
    return QuantizedWeight.from_codes(
        codes, torch.rand(n, groups) + 0.5, (levels - 1) / 2, group_size=group_size, levels=levels
    )


def inputs(rows: int, k: int) -> dict[str, Tensor]:
    gaussian = torch.randn(rows, k)
    outliers = gaussian.clone()
    outliers[:, [3, k // 2, k - 5]] *= 40
    return {"gaussian": gaussian, "outliers": outliers}


def error_rows(k: int, n: int) -> list[dict]:
    rows = []
    for scheme, (levels, group_size) in SCHEMES.items():
        weight = random_weight(n, k, levels, group_size)
        exact_weight = weight.dequantize().double()
        for name, x in inputs(64, k).items():
            exact = x.double() @ exact_weight.T
            row: dict = {"shape": f"{k}x{n}", "scheme": scheme, "inputs": name}
            for mode in ACTIVATIONS:
                y = PackedLinear.from_quantized(weight, activations=mode)(x)
                row[mode] = float((y.double() - exact).norm() / exact.norm())
            rows.append(row)
    return rows


def time_rows(k: int, n: int, seconds: float) -> list[dict]:
    rows = []
    for scheme, (levels, group_size) in SCHEMES.items():
        weight = random_weight(n, k, levels, group_size)
        layers = {mode: PackedLinear.from_quantized(weight, activations=mode) for mode in ACTIVATIONS}
        for m in (1, 32, 512):
            x = torch.randn(m, k)
            times: dict[str, list[float]] = {mode: [] for mode in layers}
            calls = max(1, round(2e8 / (m * k * n)))
            for layer in layers.values():
                layer(x)
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or len(times["int8"]) < 5:
                for mode, layer in layers.items():
                    begin = time.perf_counter()
                    for _ in range(calls):
                        layer(x)
                    times[mode].append((time.perf_counter() - begin) / calls * 1e6)
            least = {mode: min(found) for mode, found in times.items()}
            spread = {mode: statistics.median(found) / least[mode] for mode, found in times.items()}
            row = {"shape": f"{k}x{n}", "scheme": scheme, "m": m, "kernel": layers["int8"].kernel}
            rows.append({**row, "us": least, "ratio": {c: least[c] / least["int8"] for c in least}, "spread": spread})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="a row of the table of times")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        errors = list(itertools.chain(*(error_rows(k, min(n, 1024)) for k, n in SHAPES)))
        times = list(itertools.chain(*(time_rows(k, n, args.seconds) for k, n in SHAPES)))
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": args.threads}
    if args.json:
        print(json.dumps({**machine, "errors": errors, "times": times}, indent=2))
        return
    print(f"{machine['machine']}, {args.threads} of {machine['cores']} cores, kernel {times[0]['kernel']}\n")
    print(f"{'relative error':<20} {'inputs':<9}" + "".join(f" {mode:>11}" for mode in ACTIVATIONS))
    for row in errors:
        label = f"{row['shape']} {row['scheme']}"
        print(f"{label:<20} {row['inputs']:<9}" + "".join(f" {row[mode]:11.2e}" for mode in ACTIVATIONS))
    print(f"\n{'us (x int8)':<18} {'M':>4}" + "".join(f" {mode:>19}" for mode in ACTIVATIONS) + "  median/min")
    for row in times:
        cells = "".join(f" {row['us'][mode]:11.1f} ({row['ratio'][mode]:4.2f}x)" for mode in ACTIVATIONS)
        label = f"{row['shape']} {row['scheme']}"
        print(f"{label:<18} {row['m']:>4}{cells}  {max(row['spread'].values()):.2f}")


if __name__ == "__main__":
    main()
