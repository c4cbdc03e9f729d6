"""`bantamweight evaluate`: accuracy, latency and size of a packed file, from that file and the model's code alone."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import demo, io
from ..errors import BantamweightError
from ..report import measure, tables
from . import inputs
from .run_header import RunHeader, run_header

MODEL_FILE = "model.safetensors"


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    # The user's model may print; stdout is for the result.
    with contextlib.redirect_stdout(sys.stderr):
        result = evaluate(args)
    print(json.dumps(result) if args.json else describe(result))


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the packed network on test data; the plain result that --json prints."""
    path = packed_file(args.packed)
    header = run_header(io.read_header(path).extra, path)
    spec = args.model or _example_of(header, path)
    print(f"model code: {spec}", file=sys.stderr)
    x, y = _test_data(args, spec, header)

    model = io.load(path, inputs.load_model(spec)).eval()
    classes = inputs.check_fits(model, x, str(args.test or spec))
    inputs.check_labels(y, classes, str(args.test or spec))
    # Untrained weights take as long as trained ones, so the float network needs no weights to be timed.
    networks = {"packed": model, "fp32": inputs.load_model(spec)}
    times = measure.latency(networks, x, args.batch_size, seconds=2.0)
    return {
        "accuracy": measure.accuracy(model, x, y),
        "baseline_accuracy": header.baseline_accuracy if header else None,
        "images": len(y),
        "bytes": path.stat().st_size,
        "fp32_bytes": header.fp32_bytes if header else measure.float_bytes(networks["fp32"]),
        "ms_per_batch": times["packed"],
        "fp32_ms_per_batch": times["fp32"],
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
    }


def packed_file(path: Path) -> Path:
    """The safetensors file that `path` is or holds."""
    file = path / MODEL_FILE if path.is_dir() else path
    if not file.is_file():
        raise BantamweightError(f"{file} does not exist; give the folder that `bantamweight compress --out` wrote")
    return file


def _example_of(header: RunHeader | None, path: Path) -> str:
    """The embedded example's spec. A packed file may come from anybody: it does not choose which code runs here."""
    if header is None:
        raise BantamweightError(f"{path} does not say which code makes its model; pass --model FILE.py:FUNCTION")
    if header.model != inputs.EMBEDDED_MODEL:
        raise BantamweightError(
            f"which code makes the model is missing; {path} names code, which runs only if you say so: pass --model "
            f"{_quoted(header.model)} if you trust it"
        )
    return header.model


def _quoted(text: str) -> str:
    """For a shell to read; what a terminal would act on is escaped."""
    return shlex.quote(text) if text.isprintable() else ascii(text)


def describe(result: dict[str, Any]) -> str:
    ms, fp32_ms = result["ms_per_batch"], result["fp32_ms_per_batch"]
    before = "" if result["baseline_accuracy"] is None else f", {tables.percent(result['baseline_accuracy'])} in fp32"
    return "\n".join(
        [
            f"accuracy  {tables.percent(result['accuracy'])} of {result['images']} images{before}",
            f"size      {tables.size(result['bytes'])} on disk, {tables.size(result['fp32_bytes'])} in fp32, "
            f"{result['fp32_bytes'] / result['bytes']:.2f}x smaller",
            f"latency   {tables.milliseconds(ms)} for {tables.images(result['batch_size'])} at once, "
            f"{tables.milliseconds(fp32_ms)} for fp32 torch, {tables.faster(fp32_ms, ms)} "
            f"({result['threads']} thread{'s' if result['threads'] > 1 else ''})",
        ]
    )


def _test_data(args: argparse.Namespace, spec: str, header: RunHeader | None) -> tuple[Tensor, Tensor]:
    if args.test is not None:
        pixels = inputs.preprocessing(args.mean, args.std) or (header.pixels if header else None)
        return inputs.load_test(args.test, pixels)
    if spec != inputs.EMBEDDED_MODEL:
        raise BantamweightError("which data to test on is missing; pass --test FILE.npz with x and y")
    digits = demo.load_digits()
    return digits.x_test, digits.y_test
