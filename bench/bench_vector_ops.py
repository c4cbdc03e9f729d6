"""The vector work of one Lanczos step, apart from the Hessian-vector product, against torch and PyHessian's lists.

    python bench/bench_vector_ops.py [--vectors 1 10 30] [--threads N] [--json]

A step orthogonalises a product, given as a list of tensors, against k basis vectors and normalises it. In a Lanczos
step only the coefficients on the last two vectors are not zero, the rest is reorthogonalisation: ours reads the basis
once. Nothing is known beforehand in the rows named "against k": ours reads it twice. The peers make one Gram-Schmidt
pass in both cases: torch._foreach on lists of tensors, PyHessian 0.1's own functions (group_product, group_add,
normalization) on Python lists, and, as the best that torch alone can do, two matrix-vector products on flat storage.
All alternate in one process; times are wall time, the minimum and the median over the repeats.
"""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import argparse
import json
import os
import platform
import statistics
import time

import numpy as np
import torch
from bantamweight import _C
from bantamweight.curvature import vectors
from bantamweight.curvature.vectors import Basis
from torch import Tensor

try:
    from pyhessian.utils import group_add, group_product, normalization
except ImportError:
    group_add = group_product = normalization = None


def resnet20_shapes() -> list[tuple[int, ...]]:
    """Every parameter of CIFAR's ResNet-20 with projection shortcuts: 272,474 in 65 tensors."""
    shapes: list[tuple[int, ...]] = [(16, 3, 3, 3), (16,), (16,)]
    width = 16
    for out in (16, 32, 64):
        for block in range(3):
            shapes += [(out, width, 3, 3), (out,), (out,), (out, out, 3, 3), (out,), (out,)]
            if block == 0 and out != width:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (10, 64), (10,)]


def encoder_shapes() -> list[tuple[int, ...]]:
    """The encoder of a BERT with 8 layers of 512: 25 million in 128 tensors."""
    layer: list[tuple[int, ...]] = [(512, 512), (512,)] * 4 + [(2048, 512), (2048,), (512, 2048), (512,)] + [(512,)] * 4
    return layer * 8


def cut(flat: Tensor, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def random_list(shapes: list[tuple[int, ...]], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def methods(shapes: list[tuple[int, ...]], k: int, lanczos: bool) -> dict:
    product = random_list(shapes, 1000)
    size = sum(part.numel() for part in product)
    basis = Basis(size, torch.float32, torch.device("cpu"))
    for seed in range(k):
        basis.append(basis.orthogonalise(random_list(shapes, seed))[2])
    matrix = basis.combine(np.eye(k))  # the same orthonormal vectors, flat, and as lists of tensors
    rows = [cut(row, shapes) for row in matrix]
    known = None
    if lanczos:
        _, _, norm = basis.orthogonalise(product)
        flat_product = basis.row(k) + 0.5 * norm * matrix[-1]
        known = np.zeros(k - 1)
        if k > 1:
            flat_product += 0.25 * norm * matrix[-2]
            known[-1] = 0.25 * norm
        product = cut(flat_product, shapes)

    def ours() -> float:
        return basis.orthogonalise(product, known=known)[2]

    def foreach() -> float:
        w = [part.clone() for part in product]
        for row in rows:
            c = torch.stack([part.sum() for part in torch._foreach_mul(product, row)]).sum()
            torch._foreach_add_(w, torch._foreach_mul(row, c), alpha=-1)
        norm = torch.stack(torch._foreach_norm(w)).norm()
        torch._foreach_div_(w, norm)
        return float(norm)

    def flat() -> float:
        w = torch.cat([part.reshape(-1) for part in product])
        w.addmv_(matrix.T, matrix @ w, alpha=-1)
        norm = w.norm()
        w /= norm
        return float(norm)

    found = {"ours": ours, "torch._foreach": foreach, "torch flat gemv": flat}
    if group_product is not None and group_add is not None and normalization is not None:
        add, inner, unit = group_add, group_product, normalization

        def pyhessian() -> float:
            w = [part.clone() for part in product]
            for row in rows:
                w = add(w, row, alpha=-inner(product, row))
            norm = float(inner(w, w)) ** 0.5
            unit(w)
            return norm

        found["PyHessian lists"] = pyhessian
    return found


def list_methods(shapes: list[tuple[int, ...]]) -> dict[str, dict]:
    """dot, norm and axpy over lists of tensors."""
    x, y = random_list(shapes, 0), random_list(shapes, 1)
    table = {
        "dot": {
            "ours": lambda: vectors.dot(x, y),
            "torch._foreach": lambda: float(torch.stack([p.sum() for p in torch._foreach_mul(x, y)]).sum()),
        },
        "norm": {
            "ours": lambda: vectors.norm(x),
            "torch._foreach": lambda: float(torch.stack(torch._foreach_norm(x)).norm()),
        },
        "axpy": {
            "ours": lambda: vectors.axpy(1e-6, x, y),
            "torch._foreach": lambda: torch._foreach_add_(y, x, alpha=1e-6),
        },
    }
    if group_product is not None and group_add is not None:
        inner, add = group_product, group_add
        table["dot"]["PyHessian lists"] = lambda: float(inner(x, y))
        table["norm"]["PyHessian lists"] = lambda: float(inner(x, x)) ** 0.5
        table["axpy"]["PyHessian lists"] = lambda: add(y, x, alpha=1e-6)
    return table


def measure(candidates: dict, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[1, 10, 30], help="basis vectors k")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="per row of the table")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if group_product is None:
        print("missing: pyhessian (pip install PyHessian==0.1)")
    rows = []
    for shapes in (resnet20_shapes(), encoder_shapes()):
        size = sum(int(np.prod(shape)) for shape in shapes)
        cases = {f"Lanczos step, k={k}": methods(shapes, k, True) for k in args.vectors}
        cases |= {f"against k={k}": methods(shapes, k, False) for k in args.vectors} | list_methods(shapes)
        for case, candidates in cases.items():
            if "k=" in case:
                answers = {name: float(call()) for name, call in candidates.items()}
                spread = max(answers.values()) - min(answers.values())
                assert spread < 1e-2 * answers["ours"], answers  # the same work, but for float32 sums
            times = measure(candidates, args.seconds)
            best = {name: min(t) for name, t in times.items()}
            rows.append(
                {
                    "parameters": size, "tensors": len(shapes), "case": case,
                    "ms": {
                        name: {"min": min(t), "median": statistics.median(t), "repeats": len(t)}
                        for name, t in times.items()
                    },
                    "ratio": {name: value / best["ours"] for name, value in best.items() if name != "ours"},
                }
            )  # fmt: skip
    report = {
        "machine": platform.processor() or platform.machine(), "threads": args.threads, "cpus": os.cpu_count(),
        "torch": torch.__version__, "kernel": _C.vector_select(), "rows": rows,
    }  # fmt: skip
    if args.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{report['machine']}, {args.threads} threads, torch {torch.__version__}, kernel {report['kernel']}")
    print("ms: minimum (median); x: minimum of the peer over ours")
    for row in rows:
        ours = row["ms"]["ours"]
        line = f"{row['parameters']:>11,} {row['case']:<20} ours {ours['min']:8.3f} ({ours['median']:8.3f})"
        for name, ratio in row["ratio"].items():
            line += f"   {name} {row['ms'][name]['min']:9.3f} = {ratio:5.2f}x"
        print(line)


if __name__ == "__main__":
    main()
