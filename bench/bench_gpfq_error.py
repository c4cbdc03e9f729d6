"""Errors of one layer on data that nothing was fitted to or chosen on: nearest, GPFQ as published, and our defaults.

    python bench/bench_gpfq_error.py [--shapes 784x512 768x3072 2048x512] [--threads 1]

The layer stands behind a ReLU layer rounded to 4 bits and inputs with a decaying spectrum. m rows are solved on, m / 4
choose the step and the refinement, m more give the error ||XW - X~Q|| / ||XW||. "published" is one step a layer out
of the same candidates, inputs in their own order; all without a bias.
"""

import argparse
import dataclasses

import torch
from bantamweight import GPFQ, RoundToNearest
from bantamweight.quantize import LayerwiseMethod
from bantamweight.quantize.layer_problem import ProblemBuilder
from torch import Tensor

STEPS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 1.0)
BITS = {"ternary": {"levels": 3}, "3 bits": {"bits": 3}, "4 bits": {"bits": 4}}
METHODS: dict[str, LayerwiseMethod] = {
    "nearest": RoundToNearest(granularity="layer", steps=STEPS),
    "published": GPFQ(granularity="layer", order="natural", damping=0, centered=False, refine=None, steps=STEPS),
    "by channel": GPFQ(refine=None),
    "descent": GPFQ(refine="coordinate_descent"),
    "aligned": GPFQ(refine="aligned"),
    "default": GPFQ(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["784x512", "2048x512"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'d x N, m':>15} {'':8}" + "".join(f" {name:>11}" for name in METHODS))
    for shape in options.shapes:
        d, neurons = (int(part) for part in shape.split("x"))
        for rows in options.rows:
            x, x_tilde, weight = layer(d, neurons, 2 * rows + rows // 4)
            for name, bits in BITS.items():
                methods = [dataclasses.replace(method, bias_correction=False, **bits) for method in METHODS.values()]
                errors = [fresh_error(method, x, x_tilde, weight, rows) for method in methods]
                cells = "".join(f" {error:11.4f}" for error in errors)
                print(f"{f'{shape}, {rows}':>15} {name:8}{cells}", flush=True)


def layer(d: int, neurons: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """X and X~ [rows, d], and the weight [d, N]."""
    generator = torch.Generator().manual_seed(d + rows)
    width = max(64, d // 2)
    before = torch.randn(d, width, generator=generator) / width**0.5
    step = float(before.abs().amax(1).mean()) / 7
    rounded = (before / step).round().clamp(-7, 7) * step
    spectrum = (1 + torch.arange(width).float()) ** -0.5
    z = torch.randn(rows, width, generator=generator) * spectrum * (width / spectrum.square().sum()) ** 0.5
    weight = torch.randn(d, neurons, generator=generator) / d**0.5
    return (z @ before.T).relu(), (z @ rounded.T).relu(), weight


def fresh_error(method: LayerwiseMethod, x: Tensor, x_tilde: Tensor, weight: Tensor, rows: int) -> float:
    builder = ProblemBuilder("layer", weight[None])
    chosen = rows + rows // 4
    builder.add(x[None, :rows], x_tilde[None, :rows], held_out=False)
    builder.add(x[None, rows:chosen], x_tilde[None, rows:chosen], held_out=True)
    q = method.quantize_layer(builder.finish(), None).weight.dequantize()
    reference = x[chosen:] @ weight
    return float((reference - x_tilde[chosen:] @ q.T).norm() / reference.norm())


if __name__ == "__main__":
    main()
