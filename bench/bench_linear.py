"""Packed linear layers against torch, ONNX Runtime, OpenVINO and ggml, alternating in one process.

`bantamweight bench linear --peers` with every choice open:

python bench/bench_linear.py [--shapes 768x3072 ...] [--rows 1 8 ...] [--weights ternary W4 ...]
                             [--kernels amx avx512_vnni avx2] [--threads 1 2] [--seconds 0.05]
                             [--peers torch,onnxruntime,openvino,ggml | --no-peers] [--json]
"""

import argparse
import json
import platform
import sys

import torch
from bantamweight.bench import linear


def shape(text: str) -> tuple[int, int]:
    try:
        in_features, out_features = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 768x3072 (inputs x outputs)") from None
    return in_features, out_features


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", type=shape, nargs="+", default=linear.SHAPES)
    parser.add_argument("--rows", type=int, nargs="+", default=linear.ROWS)
    parser.add_argument("--weights", nargs="+", default=["ternary", "W4", "W4-g128"])
    parser.add_argument("--kernels", nargs="+", help=f"of {', '.join(linear.available_kernels())}; default the best")
    parser.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    parser.add_argument("--seconds", type=float, default=0.05, help="for each cell and way to compute it")
    parser.add_argument("--peers", default="all", help="of torch,onnxruntime,openvino,ggml; default all installed")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = linear.run(
        shapes=arguments.shapes,
        rows=arguments.rows,
        weights=arguments.weights,
        kernels=arguments.kernels,
        threads=arguments.threads,
        peers=() if arguments.no_peers else arguments.peers,
        seconds=arguments.seconds,
        progress=lambda row: print(f"{row.name}, M = {row.rows}: {row.microseconds:.1f} us", file=sys.stderr),
    )
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    if arguments.json:
        print(json.dumps({"machine": machine, "rows": [row.as_dict() for row in rows]}))
    else:
        print(machine)
        print(linear.format_table(rows))
        print(linear.format_kernels(rows))


if __name__ == "__main__":
    main()
