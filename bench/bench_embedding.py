"""Lookups in a packed embedding table against torch's float and quantized ones.

    python bench/bench_embedding.py [--rows 30522] [--dims 384 768] [--tokens 1 128 4096 16384] [--threads N] [--json]

Ours: bw.nn.PackedEmbedding at 2, 4 and 8 bits, float32 rows out. Peers: nn.Embedding in float32 and bfloat16 (rows out
in bfloat16: half the bytes), torch.ops.quantized.embedding_4bit and embedding_byte (float32 out; each also as a layer
would call it). Indices are drawn anew for every call from a fixed pool, so that a small batch does not stay in cache.
All alternate in one process; times are wall time, minimum and median over the repeats; GB/s counts the bytes read from
the table and written to the output; the first ratio is torch's quantized table of the same bits (4 beside
our 2) over ours, the second torch's float32 table over each.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import time
import warnings

import torch
from bantamweight import QuantizedWeight
from bantamweight.nn import PackedEmbedding


def table(rows: int, dim: int, levels: int) -> QuantizedWeight:
    codes = torch.randint(0, levels, (rows, dim), dtype=torch.uint8)
    return QuantizedWeight.from_codes(codes, torch.rand(rows, 1), levels / 2, levels=levels)


def methods(rows: int, dim: int) -> dict:
    """Name -> (function of the indices, bytes a row of the table, bytes a row of the output)."""
    found = {}
    for bits in (2, 4, 8):
        layer = PackedEmbedding.from_quantized(table(rows, dim, 2**bits))
        found[f"ours W{bits}"] = (layer, (layer.layout.numel() - 64) // rows, 4 * dim)
    single = torch.nn.Embedding(rows, dim).requires_grad_(False)
    found["torch fp32"] = (single, 4 * dim, 4 * dim)
    found["torch bf16"] = (torch.nn.Embedding(rows, dim).bfloat16().requires_grad_(False), 2 * dim, 2 * dim)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # quantized tensors are deprecated, but still callable
        for name, dtype, op in (
            ("torch 4-bit", torch.quint4x2, torch.ops.quantized.embedding_4bit),
            ("torch byte", torch.quint8, torch.ops.quantized.embedding_byte),
        ):
            try:
                whole = torch.quantize_per_channel(single.weight, torch.full((rows,), 0.3), torch.zeros(rows), 0, dtype)
                packed = torch.ops.quantized.embedding_bag_prepack(whole)
            except (AttributeError, RuntimeError) as error:
                print(f"{name} is left out: {error}")
                continue
            size = dim // 2 + 4 if dtype == torch.quint4x2 else dim + 8
            found[name] = (lambda index, op=op, packed=packed: op(packed, index), size, 4 * dim)
    return found


def measure(found: dict, pool: list[torch.Tensor], seconds: float) -> dict[str, list[float]]:
    """Times of single calls in microseconds (of groups of calls where one is too short to time)."""
    times: dict[str, list[float]] = {name: [] for name in found}
    group = 64 if pool[0].numel() <= 16 else 4 if pool[0].numel() <= 512 else 1
    indices = itertools.cycle(pool)
    for call, _, _ in found.values():
        call(next(indices))
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["torch fp32"]) < 5:
        for name, (call, _, _) in found.items():
            batch = [next(indices) for _ in range(group)]
            begin = time.perf_counter()
            for index in batch:
                call(index)
            times[name].append((time.perf_counter() - begin) / group * 1e6)
    return times


def run(args: argparse.Namespace) -> list[dict]:
    records = []
    for dim in args.dims:
        found = methods(args.rows, dim)
        for tokens in args.tokens:
            count = max(8, min(256, 200_000 // tokens))
            pool = [torch.randint(0, args.rows, (tokens,)) for _ in range(count)]
            times = measure(found, pool, args.seconds)
            peers = {"ours W8": "torch byte"}
            for name, (_, table_bytes, out_bytes) in found.items():
                peer = peers.get(name, "torch 4-bit")
                least, middle = min(times[name]), statistics.median(times[name])
                records.append(
                    {
                        "table": f"{args.rows}x{dim}",
                        "tokens": tokens,
                        "method": name,
                        "us": least,
                        "us_median": middle,
                        "gb_per_s": tokens * (table_bytes + out_bytes) / least / 1e3,
                        "ratio": min(times[peer]) / least if name.startswith("ours") and peer in times else None,
                        "ratio_fp32": min(times["torch fp32"]) / least,
                    }
                )
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30522)
    parser.add_argument("--dims", type=int, nargs="+", default=[384, 768])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 128, 4096, 16384])
    parser.add_argument("--seconds", type=float, default=2.0, help="a table and number of tokens")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    with torch.no_grad():
        records = run(args)
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    if args.json:
        print(json.dumps({**machine, "threads": args.threads, "records": records}, indent=2))
        return
    print(f"{machine['machine']}, {args.threads} of {machine['cores']} cores, torch {machine['torch']}\n")
    print("table      tokens  method          us min    median   GB/s  x peer  x fp32")
    for r in records:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:7.2f}"
        print(
            f"{r['table']:<10} {r['tokens']:>6}  {r['method']:<12} {r['us']:9.2f} {r['us_median']:9.2f} "
            f"{r['gb_per_s']:6.1f} {ratio:>7} {r['ratio_fp32']:7.2f}"
        )


if __name__ == "__main__":
    main()
