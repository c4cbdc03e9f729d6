"""Hessian eigenvalues against PyHessian 0.1, hessian-eigenthings 1.0.0a5 and curvlinops 3.0.1, in one process.

    BANTAMWEIGHT_DATA=... python bench/bench_curvature.py [--models resnet20 encoder] [--tasks top1 top5 layers trace]
        [--batch 128] [--peers PyHessian] [--threads 1] [--json]

Tasks: the top eigenvalue, the top five, and the top one of every layer's weight (exactly, and by the one-pass
Gauss-Newton ranking), and, on a network whose Hessian can be written out, how often the trace's error bar covers the
truth. Models: CIFAR-10 ResNet-20 with its trained weights on test images, and a 4-layer encoder of
width 256 trained for a few steps on made-up tokens. Every method gets the tolerance 1e-3 and a fresh random start;
errors are against Lanczos run to 1e-8 (1e-5 per layer). Times are CPU seconds of this process, everything included
(the graph, too); HVPs are Hessian-vector products, or block products where a task is per layer.
"""
# The peers have no types, and need not be installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

import argparse
import importlib
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bantamweight.curvature import Hessian, gauss_newton_eigenvalues
from bantamweight.curvature.eigenvalues import eigenvalues_of
from bantamweight.curvature.ggn import weight_layers
from bantamweight.curvature.trace import trace_of
from bantamweight.demo import load_digits
from torch import Tensor, nn
from torch.nn import functional

TOL = 1e-3
TASKS = ["top1", "top5", "layers", "trace"]


class EncoderLayer(nn.Module):
    def __init__(self, width: int = 256, heads: int = 4, hidden: int = 1024) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        scores = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
        x = self.norm1(x + self.o((scores @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


class Encoder(nn.Module):
    def __init__(self, words: int = 1000, width: int = 256) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([EncoderLayer(width) for _ in range(4)])
        self.pool, self.head = nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.word(tokens))
        for layer in self.layers:
            x = layer(x)
        return self.head(torch.tanh(self.pool(x[:, 0])))


def encoder(_: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model, tokens = Encoder(), torch.randint(0, 1000, (16, 32))
    labels = (tokens[:, :8].float().mean(1) > 500).long()
    optimizer = torch.optim.Adam(model.parameters(), 3e-4)
    for _ in range(6):
        optimizer.zero_grad()
        functional.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval(), (tokens, labels)


class Digits(nn.Module):
    """A convolution network so small (1,106 parameters) that its Hessian can be written out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm1(self.conv1(x)))
        return self.head(functional.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def digits() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Trained on the package's handwritten digits; 256 of its test images, in float64."""
    data = load_digits()
    x, y = data.x_train.double(), data.y_train
    torch.manual_seed(0)
    model = Digits().double()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(30):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    model.zero_grad()
    return model.eval(), (data.x_test[:256].double(), data.y_test[:256])


def trace_coverage(products: int = 60, repeats: int = 30) -> list[dict[str, Any]]:
    """How often the 95% interval covers the trace summed from unit vectors, and PyHessian's last average beside it."""
    model, data = digits()
    hessian = Hessian(model, functional.cross_entropy, data)
    unit, truth = torch.zeros(hessian.size, dtype=torch.float64), 0.0
    for i in range(hessian.size):
        unit[i] = 1.0
        truth += float((hessian @ unit)[i])
        unit[i] = 0.0
    rows = []
    for method in ("hutchinson", "hutch++"):
        start = time.process_time()
        found = [trace_of(hessian, method=method, products=products, seed=seed) for seed in range(repeats)]
        covered = sum(low <= truth <= high for low, high in (trace.interval(0.95) for trace in found))
        errors = [trace.value / truth - 1 for trace in found]
        rows.append(
            {
                "method": method, "truth": truth, "covered": covered, "repeats": repeats, "hvps": products,
                "error": float(np.sqrt(np.mean(np.square(errors)))),
                "claimed": float(np.mean([trace.standard_error for trace in found])) / abs(truth),
                "seconds": (time.process_time() - start) / repeats,
            }
        )  # fmt: skip
    try:
        pyhessian = importlib.import_module("pyhessian.hessian")
    except ImportError:
        return rows
    torch.manual_seed(0)
    start = time.process_time()
    probes = [
        pyhessian.hessian(model, nn.CrossEntropyLoss(), data=data, cuda=False).trace(maxIter=products)
        for _ in range(repeats)
    ]
    errors = [float(np.mean(values)) / truth - 1 for values in probes]
    rows.append(
        {
            "method": "PyHessian (no error bar)", "truth": truth, "covered": None, "repeats": repeats,
            "hvps": float(np.mean([len(values) for values in probes])), "claimed": None,
            "error": float(np.sqrt(np.mean(np.square(errors)))), "seconds": (time.process_time() - start) / repeats,
        }
    )  # fmt: skip
    return rows


def resnet20(batch: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    folder = Path(os.environ["BANTAMWEIGHT_DATA"])
    spec = importlib.util.spec_from_file_location("data_models", folder / "models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.load(module.CifarResNet(20), folder / "cifar10_resnet20.safetensors")
    with np.load(folder / "cifar10.npz") as data:
        x = torch.from_numpy(data["x_test"][:batch]).permute(0, 3, 1, 2).float() / 255
        y = torch.from_numpy(data["y_test"][:batch]).long()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.MEAN, model.STD))
    return model, ((x - mean) / std, y)


Answer = tuple[list[float], int]  # eigenvalues, Hessian-vector products


def ours(model: nn.Module, data: Any, k: int) -> Answer:
    result = eigenvalues_of(Hessian(model, functional.cross_entropy, data), k=k, tol=TOL, seed=1)
    return result.values.tolist(), result.products


def ours_layers(model: nn.Module, data: Any) -> Answer:
    hessian = Hessian(model, functional.cross_entropy, data, blocks=[f"{name}.weight" for name in weight_layers(model)])
    results = [eigenvalues_of(hessian.block(f"{n}.weight"), tol=TOL, seed=1) for n in weight_layers(model)]
    return [float(r.values[0]) for r in results], sum(r.products for r in results)


def ours_layers_warm(model: nn.Module, data: Any) -> Answer:
    quick = gauss_newton_eigenvalues(model, functional.cross_entropy, data, vectors=True)
    hessian = Hessian(model, functional.cross_entropy, data, blocks=[f"{name}.weight" for name in weight_layers(model)])
    results = [
        eigenvalues_of(hessian.block(f"{n}.weight"), tol=TOL, start=quick.vectors[n][n].reshape(1, -1))
        for n in weight_layers(model)
    ]
    return [float(r.values[0]) for r in results], sum(r.products for r in results)


def ours_ranking(model: nn.Module, data: Any, check: bool) -> Answer:
    found = gauss_newton_eigenvalues(model, functional.cross_entropy, data, check=check)
    return list(found.values.values()), len(found.checks)


def reference(model: nn.Module, data: Any, k: int) -> list[float]:
    hessian = Hessian(model, functional.cross_entropy, data)
    return eigenvalues_of(hessian, k=k, tol=1e-8, max_products=300, seed=2).values.tolist()


def reference_layers(model: nn.Module, data: Any) -> list[float]:
    hessian = Hessian(model, functional.cross_entropy, data)
    return [
        float(eigenvalues_of(hessian.block(f"{n}.weight"), tol=1e-5, max_products=300, seed=2).values[0])
        for n in weight_layers(model)
    ]


def peers() -> tuple[dict[str, Callable[[nn.Module, Any, int], Answer]], list[str]]:
    """The peers that are installed, and the names of the others."""
    found: dict[str, Callable[[nn.Module, Any, int], Answer]] = {}
    missing = []
    try:
        pyhessian = importlib.import_module("pyhessian.hessian")  # the package hides it behind its class

        def with_pyhessian(model: nn.Module, data: Any, k: int) -> Answer:
            count, product = 0, pyhessian.hessian_vector_product

            def counted(*args: Any) -> Any:
                nonlocal count
                count += 1
                return product(*args)

            pyhessian.hessian_vector_product = counted
            try:
                values, _ = pyhessian.hessian(model, nn.CrossEntropyLoss(), data=data, cuda=False).eigenvalues(
                    tol=TOL, top_n=k
                )
            finally:
                pyhessian.hessian_vector_product = product
                for p in model.parameters():
                    p.grad = None
            return list(values), count

        found["PyHessian"] = with_pyhessian
    except ImportError:
        missing.append("PyHessian==0.1")
    try:
        import hessian_eigenthings as eigenthings

        def with_eigenthings(model: nn.Module, data: Any, k: int) -> Answer:
            names = {n for n, p in model.named_parameters() if p.requires_grad}
            operator = eigenthings.HessianOperator(
                model, [data], eigenthings.supervised_loss(nn.CrossEntropyLoss()),
                param_filter=lambda name, _: name in names,
            )  # fmt: skip
            steps = 10 if k == 1 else 6 * k  # its default of 2 k steps misses the fifth
            result = eigenthings.lanczos(operator, k=k, max_iter=steps, tol=TOL, seed=1)
            return [float(v) for v in result.eigenvalues], steps

        found["eigenthings"] = with_eigenthings
    except ImportError:
        missing.append("hessian-eigenthings==1.0.0a5")
    try:
        from curvlinops import HessianLinearOperator
        from scipy.sparse.linalg import LinearOperator, eigsh

        def with_curvlinops(model: nn.Module, data: Any, k: int) -> Answer:
            named = {n: p for n, p in model.named_parameters() if p.requires_grad}
            try:
                operator = HessianLinearOperator(model, nn.CrossEntropyLoss(), named, [data], check_deterministic=False)
            except (TypeError, AttributeError):
                operator = HessianLinearOperator(
                    model, nn.CrossEntropyLoss(), list(named.values()), [data], check_deterministic=False
                )
            inner, count = operator.to_scipy(), 0

            def product(v: np.ndarray) -> np.ndarray:
                nonlocal count
                count += 1
                return inner @ v.astype(np.float32)

            size = inner.shape[0]
            matrix = LinearOperator((size, size), matvec=product, dtype=np.float32)  # type: ignore[call-arg]
            start = np.random.default_rng(1).standard_normal(size).astype(np.float32)
            values = eigsh(matrix, k=k, which="LM", tol=TOL, v0=start, return_eigenvectors=True)[0]
            return sorted(map(float, values), key=lambda v: -abs(v)), count

        found["curvlinops + eigsh"] = with_curvlinops
    except ImportError:
        missing.append("curvlinops-for-pytorch==3.0.1")
    return found, missing


def layer_by_layer(method: Callable[[nn.Module, Any, int], Answer], model: nn.Module, data: Any) -> Answer:
    """As a peer's users do it: requires_grad on one weight at a time."""
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    values, products = [], 0
    layers = list(weight_layers(model))
    try:
        for layer in layers:
            for name, p in model.named_parameters():
                p.requires_grad_(name == f"{layer}.weight")
            (value,), used = method(model, data, 1)
            values.append(value)
            products += used
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(before[name])
    return values, products


def run(name: str, call: Callable[[], Answer], truth: list[float], repeats: int) -> dict[str, Any]:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        values, products = call()
        times.append(time.process_time() - start)
    errors = [abs(v - t) / abs(t) for v, t in zip(values, truth, strict=True)]
    order = [sorted(range(len(x)), key=lambda i: -abs(x[i])) for x in (values, truth)]
    return {
        "method": name, "seconds": min(times), "hvps": products, "worst_error": max(errors),
        "same_order": order[0] == order[1], "rank_correlation": rank_correlation(values, truth), "values": values,
    }  # fmt: skip


def rank_correlation(values: list[float], truth: list[float]) -> float:
    """Spearman's, of the magnitudes."""
    found, true = (np.argsort(np.argsort(np.abs(x))) for x in (values, truth))
    return float(np.corrcoef(found, true)[0, 1]) if len(values) > 1 else 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["resnet20", "encoder"], default=["resnet20", "encoder"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--batch", type=int, default=128, help="images for ResNet-20")
    parser.add_argument("--peers", nargs="*", help="only these (PyHessian eigenthings curvlinops)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, missing = peers()
    if args.peers is not None:
        found = {name: call for name, call in found.items() if name.split()[0] in args.peers}
    report: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(), "threads": args.threads, "torch": torch.__version__,
        "missing": missing, "batch": args.batch, "results": [],
    }  # fmt: skip
    if not args.json:
        print(f"{report['machine']}, {args.threads} threads, torch {torch.__version__}; CPU seconds")
        print(f"missing peers: {', '.join(missing) or 'none'}")
    for name in args.models:
        model, data = {"resnet20": resnet20, "encoder": encoder}[name](args.batch)
        for task in [task for task in args.tasks if task != "trace"]:
            if task == "layers":
                truth = reference_layers(model, data)
                methods = {
                    "one-pass Gauss-Newton": lambda m=model, d=data: ours_ranking(m, d, False),
                    "the same, checked": lambda m=model, d=data: ours_ranking(m, d, True),
                    "Lanczos from Gauss-Newton": lambda m=model, d=data: ours_layers_warm(m, d),
                    "Lanczos": lambda m=model, d=data: ours_layers(m, d),
                } | {
                    peer: lambda f=call, m=model, d=data: layer_by_layer(f, m, d)
                    for peer, call in found.items()
                    if peer != "curvlinops + eigsh"  # minutes, and no faster than the other two
                }
            else:
                k = int(task[3:])
                truth = reference(model, data, k)
                methods = {"Lanczos": lambda m=model, d=data, k=k: ours(m, d, k)} | {
                    peer: lambda f=call, m=model, d=data, k=k: f(m, d, k) for peer, call in found.items()
                }
            rows = [run(method, call, truth, args.repeats) for method, call in methods.items()]
            report["results"].append({"model": name, "task": task, "truth": truth, "rows": rows})
            if not args.json:
                base = next((row["seconds"] for row in rows if row["method"] == "PyHessian"), None)
                print(f"\n{name}, {task}: {len(truth)} eigenvalues, largest {max(truth, key=abs):.4g}")
                for row in rows:
                    ratio = f"{base / row['seconds']:6.2f}x PyHessian" if base else ""
                    print(
                        f"  {row['method']:<26} {row['seconds']:8.2f} s  {row['hvps']:4d} HVPs  worst error "
                        f"{100 * row['worst_error']:7.2f}%  order {'kept' if row['same_order'] else 'LOST'}  "
                        f"Spearman {row['rank_correlation']:.3f}  {ratio}",
                        flush=True,
                    )
    if "trace" in args.tasks:
        report["trace"] = trace_coverage()
        if not args.json:
            print(f"\ndigits network, trace {report['trace'][0]['truth']:.4g}: 30 repeats, 95% intervals")
            for row in report["trace"]:
                bar = "" if row["covered"] is None else f"  mean standard error {100 * row['claimed']:5.2f}%  "
                bar += "" if row["covered"] is None else f"covered {row['covered']} of {row['repeats']}"
                print(
                    f"  {row['method']:<26} {row['seconds']:8.2f} s  {row['hvps']:4.0f} HVPs  "
                    f"rms error {100 * row['error']:5.2f}%{bar}"
                )
    if args.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
