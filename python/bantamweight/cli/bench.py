"""`bantamweight bench linear`: throughput of the packed kernels of this CPU, and of peers, over common layer shapes."""

from __future__ import annotations

import argparse
import json
import sys

import torch
from tqdm import tqdm

from ..bench import linear, peers
from ..report.results import cpu_name

WEIGHTS = ("ternary", "W2", "W4", "W4-g128", "W8")
_QUICK_SHAPES, _QUICK_ROWS = ((768, 3072), (4096, 4096)), (1, 32, 512)


def run(args: argparse.Namespace) -> None:
    libraries = peers.choose(args.peers or ())
    for name in libraries:
        if (why := peers.missing(name)) is not None:
            print(f"{name} is left out: {why}", file=sys.stderr)
    threads = [args.threads] if args.threads else sorted({1, torch.get_num_threads()})
    # Beside peers the best kernel of this CPU; alone, each of them.
    kernels = None if libraries else linear.available_kernels() or None
    with tqdm(desc="bench linear", unit="row", disable=None) as bar:

        def tell(row: linear.Row) -> None:
            bar.set_postfix_str(f"{row.in_features}x{row.out_features}, M = {row.rows}, {row.name}")
            bar.update()

        rows = linear.run(
            shapes=_QUICK_SHAPES if args.quick else linear.SHAPES,
            rows=_QUICK_ROWS if args.quick else linear.ROWS,
            weights=WEIGHTS,
            kernels=kernels,
            threads=threads,
            peers=libraries,
            seconds=0.02,
            progress=tell,
        )
    machine = {"cpu": cpu_name(), "threads": threads, "torch": torch.__version__}
    if args.json:
        print(json.dumps({"machine": machine, "rows": [row.as_dict() for row in rows]}))
        return
    print(
        f"{machine['cpu']}, torch {torch.__version__}; M is the rows of a batch; limit: part of what "
        "reading the weight or the int8 operations alone would allow"
    )
    print(linear.format_table(rows))
    if libraries:
        print("x: the best peer's time over ours; kernels of the peers:")
        print(linear.format_kernels(rows))
