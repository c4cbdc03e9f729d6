"""The vector work of one step of Lanczos or power iteration, apart from the Hessian-vector product.

    python bench/bench_vector_ops.py [--vectors 2 10 30] [--threads N] [--seconds 1] [--json]

A step gets the product as a list of tensors. "Lanczos": against k basis vectors, of which the last two matter and the
rest is reorthogonalisation; "power": the Rayleigh quotient, and deflation against k eigenvectors. Each peer does it its
own way on a fresh copy of the product: PyHessian 0.1 with its own functions in the order of its density() and
eigenvalues(); torch._foreach on lists of tensors, one Gram-Schmidt pass and as few calls as we could find; "flat gemv",
the same in two matrix-vector products on flat storage, the best that torch alone can do. dot, norm and axpy: ours on
flat storage, where our vectors live, and ("lists") on the same lists as the peers.

All alternate in one process; times are wall time, minimum (median). The bytes a step of ours has to move are put
against the bandwidth of torch.dot on as much memory, measured in the same run.
"""
# torch._foreach_* have no public names.
# pyright: reportPrivateImportUsage=false, reportMissingImports=false

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from bantamweight import _C
from bantamweight.curvature import vectors
from bantamweight.curvature.vectors import Basis, new_rows
from torch import Tensor

try:
    from pyhessian.utils import group_add, group_product, normalization, orthnormal
except ImportError:
    group_add = group_product = normalization = orthnormal = None


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


class Problem:
    """k orthonormal vectors, in our basis, flat, and as lists, and a product against them."""

    def __init__(self, shapes: list[tuple[int, ...]], k: int, lanczos: bool) -> None:
        self.shapes, self.k = shapes, k
        self.size = sum(int(np.prod(shape)) for shape in shapes)
        self.basis = Basis(self.size, torch.float32, torch.device("cpu"))
        for seed in range(k):
            self.basis.append(self.basis.orthogonalise(random_list(shapes, seed)).after)
        self.matrix = self.basis.combine(np.eye(k))
        self.rows = [cut(row, shapes) for row in self.matrix]
        product = random_list(shapes, 1000)
        self.known = None
        if lanczos and k:  # beta v_{k-2} + alpha v_{k-1} + something new
            norm = self.basis.orthogonalise(product).after
            flat = self.basis.free_row() + 0.5 * norm * self.matrix[-1]
            self.known = np.zeros(k - 1)
            self.beta = 0.25 * norm if k > 1 else 0.0
            if k > 1:
                flat += self.beta * self.matrix[-2]
                self.known[-1] = self.beta
            product = cut(flat, shapes)
        self.product = product
        self.spare = torch.empty(self.size)
        start = torch.randn(self.size, generator=torch.Generator().manual_seed(7))
        start -= self.matrix.T @ (self.matrix @ start)
        self.v = start / start.norm()
        self.v_list = cut(self.v.clone(), shapes)

    def fresh(self) -> list[Tensor]:
        return [part.clone() for part in self.product]


def foreach_dot(x: list[Tensor], y: list[Tensor]) -> float:
    return float(torch.stack([p.sum() for p in torch._foreach_mul(x, y)]).sum())


def foreach_norm(x: list[Tensor]) -> float:
    return float(torch.stack(torch._foreach_norm(x)).norm())


def foreach_orthogonalise(w: list[Tensor], rows: list[list[Tensor]]) -> float:
    for row in rows:
        torch._foreach_add_(w, row, alpha=-foreach_dot(w, row))
    norm = foreach_norm(w)
    torch._foreach_div_(w, norm)
    return norm


def flat_orthogonalise(product: list[Tensor], matrix: Tensor) -> float:
    w = torch.cat([part.reshape(-1) for part in product])
    w.addmv_(matrix.T, matrix @ w, alpha=-1)
    norm = float(w.norm())
    w /= norm
    return norm


def lanczos_step(p: Problem) -> dict:
    """Each takes a fresh product and returns the norm of what is left of it."""
    found = {
        "ours": lambda w: p.basis.orthogonalise(w, known=p.known).after,
        "torch._foreach": lambda w: foreach_orthogonalise(w, p.rows),
        "torch flat gemv": lambda w: flat_orthogonalise(w, p.matrix),
    }
    if group_product is not None and group_add is not None and orthnormal is not None:
        add, inner, unit = group_add, group_product, orthnormal

        def pyhessian(w: list[Tensor]) -> float:
            w = add(w, p.rows[-1], alpha=-inner(w, p.rows[-1]))
            if p.k > 1:
                w = add(w, p.rows[-2], alpha=-p.beta)
            beta = torch.sqrt(inner(w, w)).cpu().item()
            unit(w, p.rows)
            return beta

        found["PyHessian"] = pyhessian
    return found


def power_step(p: Problem) -> dict:
    """Each takes a fresh product H v and returns <v, H v>; v is orthogonal to the k vectors."""

    def ours(w: list[Tensor]) -> float:
        return p.basis.orthogonalise(w, along=p.v, into=p.spare).inner

    def foreach(w: list[Tensor]) -> float:
        value = foreach_dot(w, p.v_list)
        foreach_orthogonalise(w, p.rows)
        return value

    def flat(w: list[Tensor]) -> float:
        x = torch.cat([part.reshape(-1) for part in w])
        value = float(torch.dot(x, p.v))
        if p.k:
            x.addmv_(p.matrix.T, p.matrix @ x, alpha=-1)
        x /= float(x.norm())
        return value

    found = {"ours": ours, "torch._foreach": foreach, "torch flat gemv": flat}
    if group_product is not None and normalization is not None and orthnormal is not None:
        inner, unit, deflate = group_product, normalization, orthnormal

        def pyhessian(w: list[Tensor]) -> float:
            value = inner(w, p.v_list).cpu().item()
            deflate(unit(w), p.rows)
            return value

        found["PyHessian"] = pyhessian
    return found


def single_operations(p: Problem) -> dict[str, dict]:
    x, flat = p.v_list, p.v
    rows = new_rows(2, p.size, torch.float32, torch.device("cpu"))
    rows.copy_(flat)
    mine, target = rows[0], rows[1]
    table = {
        "dot": {
            "ours": lambda w: vectors.dot([mine], [target]),
            "ours, lists": lambda w: vectors.dot(x, w),
            "torch._foreach": lambda w: foreach_dot(x, w),
        },
        "norm": {
            "ours": lambda w: vectors.norm([mine]),
            "ours, lists": lambda w: vectors.norm(x),
            "torch._foreach": lambda w: foreach_norm(x),
        },
        "axpy": {
            "ours": lambda w: vectors.axpy(1e-6, [mine], [target]),
            "ours, lists": lambda w: vectors.axpy(1e-6, x, w),
            "torch._foreach": lambda w: torch._foreach_add_(w, x, alpha=1e-6),
        },
    }
    if group_product is not None and group_add is not None:
        inner, add = group_product, group_add
        table["dot"]["PyHessian"] = lambda w: float(inner(x, w))
        table["norm"]["PyHessian"] = lambda w: float(inner(x, x)) ** 0.5
        table["axpy"]["PyHessian"] = lambda w: add(w, x, alpha=1e-6)
    return table


def measure(candidates: dict, fresh: Callable[[], list[Tensor]], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each, taken in turns."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["ours"]) < 5:
        for name, call in candidates.items():
            product = fresh()
            start = time.perf_counter()
            call(product)
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: t[1:] for name, t in times.items()}


def bandwidth(vectors_read: int, size: int) -> float:
    """Bytes a second that torch.dot reads of `vectors_read` vectors one after the other."""
    rows = new_rows(max(2, vectors_read), size, torch.float32, torch.device("cpu"))
    rows.normal_()
    flat = rows.as_strided((len(rows) * size,), (1,))
    half = len(flat) // 2
    best = math.inf
    for _ in range(7):
        start = time.perf_counter()
        torch.dot(flat[:half], flat[half : 2 * half])
        best = min(best, time.perf_counter() - start)
    return 8 * half / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, nargs="+", default=[2, 10, 30], help="basis vectors k")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="per row of the table")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if group_product is None:
        print("missing: pyhessian (pip install PyHessian==0.1)")
    rows = []
    for shapes in (resnet20_shapes(), encoder_shapes()):
        cases: list[tuple[str, Problem, dict, int]] = []  # name, problem, candidates, vectors that ours must move
        for k in args.vectors:
            p = Problem(shapes, k, True)
            cases.append((f"Lanczos step, k={k}", p, lanczos_step(p), k + 4))
        for k in (0, 4):
            p = Problem(shapes, k, False)
            cases.append((f"power step, k={k}", p, power_step(p), 2 * k + 4 if k else 3))
        for name, candidates in single_operations(cases[-1][1]).items():
            cases.append((name, cases[-1][1], candidates, {"dot": 2, "norm": 1, "axpy": 3}[name]))
        for case, p, candidates, moved in cases:
            if "step" in case:
                answers = {name: float(call(p.fresh())) for name, call in candidates.items()}
                spread = max(answers.values()) - min(answers.values())
                assert spread < 1e-2 * abs(answers["ours"]) + 1e-3, answers  # the same work, but for float32 sums
            times = measure(candidates, p.fresh, args.seconds)
            best = {name: min(t) for name, t in times.items()}
            speed = 4 * p.size * moved / best["ours"] * 1e3
            rows.append(
                {
                    "parameters": p.size, "tensors": len(shapes), "case": case,
                    "ms": {
                        name: {"min": min(t), "median": statistics.median(t), "repeats": len(t)}
                        for name, t in times.items()
                    },
                    "ratio": {name: value / best["ours"] for name, value in best.items() if name != "ours"},
                    "bytes_per_second": speed, "of_bandwidth": speed / bandwidth(moved, p.size),
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
    print("ms: minimum (median); GB/s and % of torch.dot's; x: minimum of the peer over ours")
    for row in rows:
        ours = row["ms"]["ours"]
        line = f"{row['parameters']:>11,} {row['case']:<18} ours {ours['min']:8.3f} ({ours['median']:8.3f})"
        line += f" {row['bytes_per_second'] / 1e9:5.1f} GB/s = {100 * row['of_bandwidth']:3.0f}%"
        for name, ratio in row["ratio"].items():
            line += f"   {name} {row['ms'][name]['min']:9.3f} = {ratio:5.2f}x"
        print(line)


if __name__ == "__main__":
    main()
