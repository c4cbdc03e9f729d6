"""Attention between packed layers beside torch's scaled_dot_product_attention, in one process, in turns.

    python bench/bench_attention.py [--threads 1 2] [--seconds 0.1]

All start from the queries, keys and values side by side in one tensor, as packed layers write them, and end with rows
for the next layer, so that what torch needs to transpose is in its time. bf16: ours rounds float32 tensors to bfloat16
itself, where the CPU has AMX; torch takes bfloat16 tensors.
"""

import argparse
import platform
from functools import partial

import torch
from bantamweight.bench.timing import Turn, take_turns
from bantamweight.ops import attention
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

SHAPES = ((1, 16, 12, 32), (8, 32, 12, 32), (32, 128, 12, 32), (1, 384, 12, 64), (8, 128, 12, 64), (1, 2048, 12, 64))


def torchs(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=-1))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def ours(qkv: Tensor, heads: int, bfloat16: bool) -> Tensor:
    q, k, v = qkv.chunk(3, dim=-1)
    return attention(q, k, v, heads, bfloat16=bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=0.1, help="for each candidate of a line")
    arguments = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, us (spread)")
    names = ("ours fp32", "ours bf16", "torch fp32", "torch bf16")
    print(
        " batch tokens heads  size threads" + "".join(f"{name:>18}" for name in names) + "   fp32  bf16: torch's / ours"
    )
    with torch.inference_mode():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for batch, tokens, heads, size in SHAPES:
                qkv = torch.randn(batch, tokens, 3 * heads * size)
                low = qkv.bfloat16()
                torch.testing.assert_close(ours(qkv, heads, False), torchs(qkv, heads), rtol=1e-4, atol=1e-5)
                calls = [partial(ours, qkv, heads, bfloat16) for bfloat16 in (False, True)]
                calls += [partial(torchs, x, heads) for x in (qkv, low)]
                turns = [Turn(call=call, pool="torch") for call in calls]
                found = take_turns(turns, arguments.seconds, threads=threads)
                cells = "".join(f"{1e6 * x.median:11.1f} ({x.spread:4.0%})" for x in found)
                ratios = "  ".join(f"{found[i + 2].median / found[i].median:.2f}" for i in (0, 1))
                print(f"{batch:6} {tokens:6} {heads:5} {size:5} {threads:7}{cells}   {ratios}")


if __name__ == "__main__":
    main()
