"""What sizes that do not fill a tile cost: the time of an odd size over that of the next full one.

    python bench/bench_tails.py [--kernels amx avx512_vnni avx_vnni avx2] [--size 768] [--threads 1] [--above 1.1]

For each kernel (forced by BANTAMWEIGHT_FORCE_KERNEL) and kind of weight, one layer of size x size: with 1, 17 and 63
outputs fewer and 1, 3 and 100 inputs fewer, against the next multiple of 64, at 1, 32 and 128 rows; and with 7, 15, 31,
33 and 127 rows against 8, 16, 32, 48 and 128. The two calls of a cell alternate in one process; each time is the least
of many, and the cell is measured again where the ratio is above --above, so that a neighbour's noise does not stay.
Printed are the cells above --above, and for each kernel and weight the largest and the median ratio.
"""

import argparse
import json
import os
import platform
import statistics
import time

import torch
from bantamweight import _C, QuantizedWeight
from bantamweight.nn import PackedLinear
from torch import Tensor

SCHEMES = {"ternary": (3, None), "W4": (16, None), "W4-g128": (16, 128), "W8": (256, None)}
ROWS = {7: 8, 15: 16, 31: 32, 33: 48, 127: 128}
FEWER_OUTPUTS = (1, 17, 63)
FEWER_INPUTS = (1, 3, 100)

Size = tuple[int, int, int]  # rows, inputs, outputs


def cells(size: int) -> list[tuple[str, Size, Size]]:
    """What is odd, the odd size, and the full one."""
    found = []
    for rows in (1, 32, 128):
        for fewer in FEWER_OUTPUTS:
            odd = size - fewer
            found.append((f"N = {odd}", (rows, size, odd), (rows, size, -(-odd // 64) * 64)))
        for fewer in FEWER_INPUTS:
            odd = size - fewer
            found.append((f"K = {odd}", (rows, odd, size), (rows, -(-odd // 64) * 64, size)))
    return found + [(f"M = {odd}", (odd, size, size), (full, size, size)) for odd, full in ROWS.items()]


class Layers:
    """Packed layers of one kernel and kind of weight, each made once."""

    def __init__(self, kernel: str, scheme: str) -> None:
        self.levels, self.group_size = SCHEMES[scheme]
        self.made: dict[tuple[int, int], PackedLinear] = {}
        os.environ["BANTAMWEIGHT_FORCE_KERNEL"] = kernel

    def get(self, k: int, n: int) -> PackedLinear:
        if (k, n) not in self.made:
            codes = torch.randint(0, self.levels, (n, k), dtype=torch.uint8)
            groups = 1 if self.group_size is None else -(-k // self.group_size)
            zero = (self.levels - 1) // 2 if self.levels % 2 else self.levels / 2
            weight = QuantizedWeight.from_codes(
                codes, torch.rand(n, groups) + 0.5, zero, group_size=self.group_size, levels=self.levels
            )
            self.made[k, n] = PackedLinear.from_quantized(weight)
        return self.made[k, n]


def least_times(pair: list[tuple[PackedLinear, Tensor]], seconds: float) -> list[float]:
    """The least time of each call in microseconds, the calls alternating."""
    for layer, x in pair:
        layer(x)
    begin = time.perf_counter()
    pair[1][0](pair[1][1])
    group = max(1, int(2e-4 / (time.perf_counter() - begin)))
    least = [float("inf")] * len(pair)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for i, (layer, x) in enumerate(pair):
            begin = time.perf_counter()
            for _ in range(group):
                layer(x)
            least[i] = min(least[i], (time.perf_counter() - begin) / group * 1e6)
    return least


def measure(kernel: str, scheme: str, size: int, seconds: float, above: float) -> list[dict]:
    layers, records = Layers(kernel, scheme), []
    for what, odd, full in cells(size):
        pair = [(layers.get(k, n), torch.randn(m, k)) for m, k, n in (odd, full)]
        if pair[0][0].kernel != kernel:
            raise SystemExit(f"{kernel} was asked for and {pair[0][0].kernel} ran: this machine lacks it")
        times = least_times(pair, seconds)
        for _ in range(2):
            if times[0] > above * times[1]:
                times = [min(pair) for pair in zip(times, least_times(pair, 2 * seconds), strict=True)]
        records.append(
            {"kernel": kernel, "scheme": scheme, "odd": what, "rows": odd[0], "us": times[0], "us_full": times[1]}
        )
    return records


def show(records: list[dict], above: float) -> None:
    print(f"{'kernel':<12} {'weight':<9} {'odd':<9} {'rows':>4} {'us':>9} {'us full':>9} {'ratio':>6}")
    for r in records:
        if r["us"] > above * r["us_full"]:
            ratio = r["us"] / r["us_full"]
            head = f"{r['kernel']:<12} {r['scheme']:<9} {r['odd']:<9} {r['rows']:>4}"
            print(f"{head} {r['us']:>9.2f} {r['us_full']:>9.2f} {ratio:>6.2f}")
    print(f"\n{'kernel':<12} {'weight':<9} {'cells':>5} {'above':>5} {'median':>6} {'largest':>7}")
    for kernel, scheme in dict.fromkeys((r["kernel"], r["scheme"]) for r in records):
        of = [r["us"] / r["us_full"] for r in records if (r["kernel"], r["scheme"]) == (kernel, scheme)]
        head = f"{kernel:<12} {scheme:<9} {len(of):>5} {sum(ratio > above for ratio in of):>5}"
        print(f"{head} {statistics.median(of):>6.2f} {max(of):>7.2f}")


def main() -> None:
    here = [name for name, missing in _C.linear_variants() if not missing and name != "reference"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=here, default=here)
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--size", type=int, default=768)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.08, help="a cell")
    parser.add_argument("--above", type=float, default=1.1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    records = []
    with torch.no_grad():
        for kernel in args.kernels:
            for scheme in args.schemes:
                records += measure(kernel, scheme, args.size, args.seconds, args.above)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    if args.json:
        print(json.dumps({**machine, "threads": args.threads, "size": args.size, "records": records}, indent=2))
        return
    print(f"{args.size}x{args.size}, {machine['machine']}, {args.threads} of {machine['cores']} cores\n")
    show(records, args.above)


if __name__ == "__main__":
    main()
