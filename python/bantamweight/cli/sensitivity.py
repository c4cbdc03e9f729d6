"""`bantamweight sensitivity`: how much the loss minds rounding each layer, and the bits that fit a budget.

read and check -> sensitivity on subsets -> plan -> pictures -> table, JSON, report
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import demo
from ..curvature import loss_surface, spectral_density, top_eigenvalues
from ..curvature.sensitivity import METRICS, Sensitivity, sensitivity
from ..quantize.plan import BitPlan, plan
from ..report import sensitivity as report
from . import inputs
from .output import staged

PICTURED_SAMPLES = 128  # the density and the loss surface are of the first batch


def run(args: argparse.Namespace) -> None:
    if args.threads:
        torch.set_num_threads(args.threads)
    with staged(args.out) as staging:
        # The user's model may print; stdout is for the result.
        with contextlib.redirect_stdout(sys.stderr):
            network, model, x, y = _own(args) if inputs.is_own(args, "weights", "data") else _example()
            batches = list(zip(x.split(args.batch_size), y.split(args.batch_size), strict=True))
            found = sensitivity(
                model,
                functional.cross_entropy,
                batches,
                per=args.per,
                metric=args.metric,
                subsets=args.subsets,
                fraction=args.fraction,
                group_size=args.group_size,
                ignore=args.ignore,
            )
            chosen = _plan(args, found)
            pictures, note = _pictures(model, x, y, found, chosen)
        found.to_json(staging / "sensitivity.json")
        if chosen is not None:
            chosen.to_json(staging / "plan.json")
        (staging / "report.html").write_text(report.page(network, found, chosen, pictures, note), encoding="utf-8")
    print(found)
    if chosen is not None:
        print(f"\n{chosen}")
    print(f"\n{args.out / 'report.html'} shows it{'' if pictures else '; ' + note}")


def _own(args: argparse.Namespace) -> tuple[str, nn.Module, Tensor, Tensor]:
    x, y = inputs.load_test(args.data, inputs.preprocessing(args.mean, args.std))
    model = inputs.load_model(args.model)
    inputs.load_weights(model, args.weights)
    classes = inputs.check_fits(model, x, str(args.data))
    inputs.check_labels(y, classes, str(args.data))
    return args.model, model, x, y


def _example() -> tuple[str, nn.Module, Tensor, Tensor]:
    digits = demo.load_digits()
    return inputs.EMBEDDED_MODEL, demo.train(digits).eval(), digits.x_train, digits.y_train


def _plan(args: argparse.Namespace, found: Sensitivity) -> BitPlan | None:
    if args.average_bits is None and args.max_bytes is None:
        return None
    return plan(found, average_bits=args.average_bits, max_bytes=args.max_bytes)


def _pictures(
    model: nn.Module, x: Tensor, y: Tensor, found: Sensitivity, chosen: BitPlan | None
) -> tuple[list[report.Picture], str]:
    """The report's pictures, and what to say about them."""
    if importlib.util.find_spec("matplotlib") is None:
        return [], "it has no pictures, since matplotlib is not installed"
    data = (x[:PICTURED_SAMPLES], y[:PICTURED_SAMPLES])
    spread = ", with the standard deviation over subsets" if found.subsets > 1 else ""
    pictures = [
        report.Picture(
            title="Sensitivity of every layer",
            caption=f"{METRICS[found.metric]}{spread}",
            figure=found.plot(),
        )
    ]
    if chosen is not None:
        pictures.append(report.Picture(title="Bits of every layer", caption="The exact optimum.", figure=chosen.plot()))
    density = spectral_density(model, functional.cross_entropy, data, probes=2, steps=20)
    pictures.append(report.Picture(title="Spectrum of the Hessian", caption=str(density), figure=density.plot()))
    top = top_eigenvalues(model, functional.cross_entropy, data, k=2, which="largest")
    surface = loss_surface(model, functional.cross_entropy, data, top)
    pictures.append(
        report.Picture(title="Loss along the top eigenvectors", caption=str(surface), figure=surface.plot())
    )
    return pictures, f"Spectrum and surface are of the first {len(data[1])} samples."
