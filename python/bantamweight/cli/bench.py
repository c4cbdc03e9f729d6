"""`bantamweight bench linear`: throughput of every packed kernel of this CPU over common layer shapes."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

import torch
from tqdm import tqdm

from ..bench import linear
from ..report.results import cpu_name

WEIGHTS = ("ternary", "W4", "W4-g128", "W8")


def run(args: argparse.Namespace) -> None:
    threads = args.threads or torch.get_num_threads()
    with tqdm(desc="bench linear", unit="row", disable=None) as bar:

        def tell(row: linear.Row) -> None:
            bar.set_postfix_str(f"{row.in_features}x{row.out_features}, M = {row.rows}, {row.name}")
            bar.update()

        rows = linear.run(
            shapes=linear.SHAPES,
            rows=linear.ROWS,
            weights=WEIGHTS,
            kernels=linear.available_kernels() or None,
            threads=[threads],
            peers=args.peers,
            progress=tell,
        )
    machine = {"cpu": cpu_name(), "threads": threads, "torch": torch.__version__}
    if args.json:
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}))
    else:
        print(f"{machine['cpu']}, {threads} thread(s), torch {torch.__version__}; M is the rows of a batch")
        print(linear.format_table(rows))
