"""Every option of every subcommand. Imports nothing heavy: `--help` must be instant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

from ..errors import BantamweightError

METHODS = ("gpfq", "nearest")
BITS = ("ternary", "2", "3", "4", "8")
ACTIVATIONS = ("int8", "int8-block", "int16")
METRICS = ("lambda_max", "trace", "ggn", "omega")
OPTIMIZERS = ("sgd", "sam", "asam", "hero")


class Parser(argparse.ArgumentParser):
    """Raises bad usage as one sentence instead of printing the whole usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise BantamweightError(f"{message}; `{self.prog} --help` lists what is allowed")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = Parser(prog="bantamweight", description="Make trained PyTorch networks small and run them fast.")
    parser.add_argument("--version", action="version", version=f"bantamweight {_version()}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="compress | evaluate | info | bench | train | sensitivity"
    )
    _add_compress(commands)
    _add_evaluate(commands)
    _add_info(commands)
    _add_bench(commands)
    _add_train(commands)
    _add_sensitivity(commands)
    return parser.parse_args(argv)


def _version() -> str:
    try:
        return metadata.version("bantamweight")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _add_compress(commands) -> None:
    parser = commands.add_parser(
        "compress",
        help="quantize a trained network, pack it, run it and report",
        description="Quantize a trained network, pack it for the low-bit kernels, run it and write a report. Without "
        "--model it does all that to an embedded example: scikit-learn's digits and a small residual network.",
    )
    own = parser.add_argument_group("your network (give all four, or none for the embedded example)")
    own.add_argument("--model", metavar="FILE.py:FUNCTION", help="function without arguments that returns an nn.Module")
    own.add_argument("--weights", type=Path, metavar="FILE", help="its trained state dict, a safetensors file")
    own.add_argument("--calibration", type=Path, metavar="FILE", help="npz with inputs x [n, ...]")
    own.add_argument("--test", type=Path, metavar="FILE", help="npz with inputs x [n, ...] and labels y [n]")
    _add_preprocessing(own)
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=METHODS, default="gpfq", help="gpfq (default), or nearest rounding")
    how.add_argument("--bits", choices=BITS, default="4", help="bits a weight (default 4); the example runs 4, 3, 2 "
                     "and ternary")  # fmt: skip
    steps = how.add_mutually_exclusive_group()
    steps.add_argument("--group-size", type=_positive, metavar="K", help="one step for every K inputs of a neuron")
    steps.add_argument("--per-channel", action="store_true", help="one step for every output channel (the default)")
    how.add_argument("--activations", choices=ACTIVATIONS, default="int8",
                     help="how linear layers round their inputs: int8 a row (default), int8-block: on their own for "
                     "every 128 columns, or int16 (convolutions stay int8)")  # fmt: skip
    how.add_argument("--ignore", action="append", default=[], metavar="LAYER",
                     help="keep this layer in float (a name or a regular expression; may be repeated)")  # fmt: skip
    how.add_argument("--max-drop", type=_fraction, metavar="D", help="give the worst layers 8 bits until accuracy "
                     "drops by at most D (0.01 is one point)")  # fmt: skip
    how.add_argument("--strict", action="store_true", help="refuse a network with layers that would stay in float")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("out"), help="folder for model.safetensors, report.json and "
                     "report.html (default out)")  # fmt: skip
    out.add_argument("--resume", action="store_true", help="go on where an interrupted run into --out stopped")
    _add_machine(parser)


def _add_evaluate(commands) -> None:
    parser = commands.add_parser(
        "evaluate",
        help="run a packed network: accuracy, latency, size",
        description="Load a packed file, run it on test data and print accuracy, latency and size. The Python file of "
        "--model is imported, so name only code that you trust; the packed file itself runs no code.",
    )
    parser.add_argument("packed", type=Path, help="the folder that compress wrote, or a packed safetensors file")
    parser.add_argument("--test", type=Path, metavar="FILE", help="npz with x and y (the embedded example has its own)")
    parser.add_argument(
        "--model", metavar="FILE.py:FUNCTION", help="the model's code (the embedded example has its own)"
    )
    _add_preprocessing(parser)
    parser.add_argument("--batch-size", type=_positive, default=64, help="images a batch when timing (default 64)")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_machine(parser)


def _add_info(commands) -> None:
    parser = commands.add_parser(
        "info", help="versions, CPU features and the kernels that would run",
        description="Versions, CPU features, the kernel picked for each operation and why the others are off.",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_debug(parser)


def _add_bench(commands) -> None:
    parser = commands.add_parser("bench", help="time the kernels", description="Time the kernels on this machine.")
    parser.add_argument("operation", choices=["linear"], help="linear: packed weights times int8 activations")
    parser.add_argument("--peers", nargs="?", const="all", metavar="NAMES", help="also time other libraries: all that "
                        "are installed, or those named, such as torch,onnxruntime,openvino,ggml")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two shapes and three batch sizes")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    _add_machine(parser)


def _add_train(commands) -> None:
    parser = commands.add_parser(
        "train",
        help="train with HERO, SAM, ASAM or SGD and see what is left after quantization",
        description="Train a classifier with one or several optimizers, quantize each to 8, 4, 3 and 2 bits, and write "
        "a report: accuracies, curvature, loss surface, cost of a step. Without --model it does so on the embedded "
        "example, scikit-learn's digits.",
    )
    _add_own_network(
        parser,
        train="npz with inputs x [n, ...] and labels y [n]",
        test="npz with x and y that training does not see",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--optimizer", choices=OPTIMIZERS, nargs="+", default=["hero"],
                     help="one or several to compare (default hero)")  # fmt: skip
    how.add_argument("--epochs", type=_positive, default=30, help="passes over the training data (default 30)")
    how.add_argument("--batch-size", type=_positive, default=64, help="inputs a step (default 64)")
    how.add_argument("--lr", type=_at_least_zero, default=0.1, help="learning rate, with a cosine schedule "
                     "(default 0.1)")  # fmt: skip
    how.add_argument("--momentum", type=_fraction, default=0.9, help="default 0.9")
    how.add_argument("--weight-decay", type=_at_least_zero, default=5e-4, help="default 0.0005")
    how.add_argument("--h", type=_at_least_zero, help="radius of the perturbation, rho of SAM and ASAM (default: hero "
                     "0.5, asam 1, sam 0.1)")  # fmt: skip
    how.add_argument("--lam", type=_at_least_zero, default=5.0, help="HERO's lambda (default 5)")
    how.add_argument("--mode", choices=["exact", "fd"], default="exact",
                     help="HERO's Hessian product: exact (default), or fd: cheaper, by finite differences")  # fmt: skip
    how.add_argument("--reduction", choices=["mean", "sum"], default="mean",
                     help="divide lambda by each layer's size (mean, the default) or not (sum)")  # fmt: skip
    how.add_argument("--label-noise", type=_fraction, default=0.0, help="share of training labels made wrong")
    how.add_argument("--augment", action="store_true", help="shift and mirror the training images at random")
    how.add_argument("--seeds", type=_positive, default=1, metavar="N", help="networks an optimizer (default 1)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("out"), help="folder for report.json, report.html and runs/ "
                     "(default out)")  # fmt: skip
    out.add_argument("--resume", action="store_true", help="keep the finished runs of a stopped run into --out")
    _add_machine(parser)


def _add_sensitivity(commands) -> None:
    parser = commands.add_parser(
        "sensitivity",
        help="which layers mind rounding most, and the bits that fit a budget",
        description="Measure the curvature of the loss along every layer's weights, print a table and write a report; "
        "with a budget, also find the bit width of every layer. Without --model it does so on the embedded example, "
        "scikit-learn's digits.",
    )
    _add_own_network(
        parser,
        weights="its trained state dict, a safetensors file",
        data="npz with inputs x [n, ...] and labels y [n]",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--metric", choices=METRICS, default="lambda_max",
                     help="top eigenvalue (default), trace, one-pass Gauss-Newton, or Q-BERT's Omega")  # fmt: skip
    how.add_argument("--per", choices=("layer", "block"), default="layer", help="layers (default) or blocks of them")
    how.add_argument("--subsets", type=_positive, default=10, help="random subsets of the data (default 10)")
    how.add_argument("--fraction", type=_fraction, default=0.1, help="part of the data in each subset (default 0.1)")
    how.add_argument("--batch-size", type=_positive, default=128, help="inputs a batch (default 128)")
    how.add_argument("--group-size", type=_positive, metavar="K", help="one step for every K inputs of a neuron")
    how.add_argument("--ignore", action="append", default=[], metavar="LAYER",
                     help="leave this layer out (a regular expression; may be repeated)")  # fmt: skip
    budget = parser.add_argument_group("budget (both hold if both are given)")
    budget.add_argument("--average-bits", type=float, metavar="B", help="mean bits a weight, such as 3.5")
    budget.add_argument("--max-bytes", type=_positive, metavar="N", help="bytes of all weights on disk")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, default=Path("out"), help="folder for sensitivity.json, plan.json and "
                     "report.html (default out)")  # fmt: skip
    _add_machine(parser)


def _add_own_network(parser, **files: str) -> None:
    """--model and the files that go with it, by the names of their options and what they hold."""
    own = parser.add_argument_group("your network (give all three, or none for the embedded example)")
    own.add_argument("--model", metavar="FILE.py:FUNCTION", help="function without arguments that returns an nn.Module")
    for name, text in files.items():
        own.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    _add_preprocessing(own)


def _add_preprocessing(parser) -> None:
    parser.add_argument("--mean", type=_numbers, metavar="M[,M...]", help="for uint8 x: (x / 255 - mean) / std")
    parser.add_argument("--std", type=_numbers, metavar="S[,S...]", help="one number, or one a channel")


def _add_machine(parser) -> None:
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's choice)")
    _add_debug(parser)


def _add_debug(parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the whole traceback of an error")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a number from 0 to 1, such as 0.01 for one point of accuracy"
        )
    return value


def _at_least_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number of 0 or more")
    return value


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not numbers with commas between, such as 0.49,0.48,0.45"
        ) from None
