"""Whole networks as users bring them: how much of each is quantized and packed, how right it is, and how fast.

    python bench/bench_any_network.py [NAME ...] [--bits 8 4] [--samples N] [--quick] [--json]

One row a network of zoo.py. Columns: millions of weights (parameters of two dimensions or more; embedding tables
apart); the share of them that sits in packed layers, and of the tables with `embeddings=bw.RoundToNearest(bits=8)`;
the relative L2 error of the packed network's output on fresh inputs for each number of bits (8 rounded to nearest,
fewer by GPFQ, transformers in groups of 128), and the same at 8 bits with tables; seconds of GPFQ; torch's time over
the packed network's, for one input on one thread, taken in turns; whether a saved and loaded network answers bit for
bit alike. Below it, what was raised, and what stayed in float (the largest first) and why. A network whose package is
missing is named in one sentence.
"""

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import bantamweight as bw
import torch
import zoo
from bantamweight.bench.timing import Turn, take_turns
from bantamweight.nn import PackedEmbedding, SimulatedEmbedding
from bantamweight.nn.layer import QuantizedLayer
from bantamweight.report.results import cpu_name
from torch import Tensor, nn
from zoo_inputs import Inputs, call


@dataclass(kw_only=True)
class Row:
    """One network. None where it was not measured, or failed."""

    network: str
    weights: float = 0.0  # millions, tables apart
    tables: float = 0.0
    share: float | None = None
    table_share: float | None = None
    errors: dict[str, float] = field(default_factory=dict)  # by bits; "8+tables" with tables
    seconds: float | None = None
    times_torch: float | None = None
    loads_alike: bool | None = None
    float_layers: int = 0
    float_largest: list[str] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # what was tried -> the last line of what it raised


@dataclass(frozen=True, kw_only=True)
class Effort:
    batches: int
    batch: int
    seconds: float


FULL, QUICK = Effort(batches=2, batch=16, seconds=1.0), Effort(batches=1, batch=8, seconds=0.1)


# ---- counting ------------------------------------------------------------------------------------


def float_weights(model: nn.Module) -> dict[str, tuple[int, bool]]:
    """Elements of every parameter of two dimensions or more, and whether it is an embedding table.

    A tied one is counted under each module that owns it: as a table and as a head it is quantized apart.
    """
    return {
        f"{name}.{own}".removeprefix("."): (parameter.numel(), isinstance(module, nn.Embedding))
        for name, module in model.named_modules()
        if not isinstance(module, QuantizedLayer)
        for own, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2
    }


def quantized_weights(model: nn.Module, form: str) -> tuple[int, int]:
    """Elements that quantized layers of a form hold as codes, and those of them in tables."""
    counts = [0, 0]
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, QuantizedLayer) or id(module) in inside:
            continue
        inside |= {id(part) for part in module.modules()}
        if module.form == form:
            grids = [value for key, value in module.state_dict().items() if key.rpartition(".")[2] == "grid"]
            table = isinstance(module, PackedEmbedding | SimulatedEmbedding)
            counts[table] += sum(int(grid[0] * grid[1]) for grid in grids)
    return counts[0], counts[1]


def left_in_float(quantized: nn.Module, packed: nn.Module) -> list[str]:
    """What is no packed layer, the largest first, with the reason that a report gives; tables apart."""
    reasons = {layer.name: layer.reason for layer in quantized.quantization.skipped}  # type: ignore[union-attr]
    owners: dict[str, int] = defaultdict(int)
    for name, (size, table) in float_weights(packed).items():
        if not table:
            owners[name.rpartition(".")[0] or name] += size
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLayer) and module.form == "simulated":
            owners[name] += module.rows * module.columns
            reasons.setdefault(name, "simulated")
    for record in packed.packing.layers:  # type: ignore[union-attr]
        if record.kernel is None:
            reasons[record.name] = f"simulated: {record.reason}"
    largest = sorted(owners.items(), key=lambda item: -item[1])
    return [f"{name} {size / 1e3:.1f}k ({reasons.get(name, 'no report names it')})" for name, size in largest]


# ---- one network ---------------------------------------------------------------------------------


def measure(name: str, network: zoo.Network, bits: list[int], effort: Effort) -> Row:
    row = Row(network=name)
    model = network.make()
    weights = float_weights(model).values()
    row.weights = sum(size for size, table in weights if not table) / 1e6
    row.tables = sum(size for size, table in weights if table) / 1e6
    calibration = [network.inputs(effort.batch, 10 + i) for i in range(effort.batches)]
    fresh = network.inputs(16, 100)

    def answer(candidate: nn.Module) -> Tensor:
        return network.output(call(candidate, fresh)).double()

    expected = answer(model)

    def tried(what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # the table says what every network did
            row.failures[what] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            return None

    def error_of(candidate: nn.Module) -> float:
        return float((answer(candidate) - expected).norm() / expected.norm())

    packed: nn.Module | None = None
    for width in bits:
        config = config_of(width, network)
        began = time.perf_counter()
        quantized = tried(f"quantize {width}", lambda config=config: quantize(model, config, calibration))
        if quantized is not None and width < 8:
            row.seconds = time.perf_counter() - began
        form = tried(f"pack {width}", lambda q=quantized: bw.pack(q)) if quantized is not None else None
        if quantized is None or form is None:
            continue
        packed = form
        row.share = quantized_weights(packed, "packed")[0] / 1e6 / row.weights
        left = left_in_float(quantized, packed)
        row.float_layers, row.float_largest = len(left), left[:4]
        error = tried(f"run {width}", lambda p=packed: error_of(p))
        if error is not None:
            row.errors[str(width)] = error
    if packed is None:
        row.share = 0.0
        row.float_layers, row.float_largest = len(weights), [f"all of its {len(weights)} weights"]
    if row.tables:
        tried("tables", lambda: with_tables(row, model, calibration, error_of))
    if packed is not None and not any(key.startswith("run") for key in row.failures):
        row.loads_alike = tried("save and load", lambda: loads_alike(packed, network, answer))
        row.times_torch = tried("time", lambda: times_torch(model, packed, network.inputs(1, 200), effort.seconds))
    if float((answer(model) - expected).abs().max()) > 0:
        row.failures["original"] = "the model that was passed in answers differently afterwards"
    return row


def config_of(bits: int, network: zoo.Network) -> Any:
    return bw.RoundToNearest(bits=8) if bits == 8 else bw.GPFQ(bits=bits, group_size=network.group_size)


def quantize(model: nn.Module, config: Any, calibration: list[Inputs], **options: Any) -> nn.Module:
    return bw.quantize(model, config, calibration=calibration, progress=False, **options)


def with_tables(row: Row, model: nn.Module, calibration: list[Inputs], error_of: Callable[[nn.Module], float]) -> None:
    nearest = bw.RoundToNearest(bits=8)
    packed = bw.pack(quantize(model, nearest, calibration, embeddings=nearest))
    row.table_share = quantized_weights(packed, "packed")[1] / 1e6 / row.tables
    row.errors["8+tables"] = error_of(packed)


def loads_alike(packed: nn.Module, network: zoo.Network, answer: Callable[[nn.Module], Tensor]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        bw.save(packed, path)
        return torch.equal(answer(bw.load(path, network.make())), answer(packed))


def times_torch(model: nn.Module, packed: nn.Module, one: Inputs, seconds: float) -> float:
    turns = [Turn(call=lambda m=m: call(m, one), pool="torch") for m in (model, packed)]
    for turn in turns:
        turn.call()
    theirs, ours = take_turns(turns, seconds, threads=1)
    return theirs.median / ours.median


# ---- the table -----------------------------------------------------------------------------------


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def header(bits: list[int]) -> str:
    errors = "".join(f"{f'error W{width}':>10}" for width in bits)
    return (
        f"{'network':19}{'M':>7}{'packed':>8}{'tables M':>9}{'packed':>8}{errors}{'W8+table':>10}"
        f"{'GPFQ s':>8}{'x torch':>9}{'loads':>7}{'float':>6}"
    )


def line(row: Row, bits: list[int]) -> str:
    errors = "".join(f"{_cell(row.errors.get(str(width)), '.4f'):>10}" for width in bits)
    loads = "-" if row.loads_alike is None else "alike" if row.loads_alike else "WRONG"
    return (
        f"{row.network:19}{row.weights:7.2f}{_cell(row.share, '.1%'):>8}{row.tables:9.2f}"
        f"{_cell(row.table_share, '.1%'):>8}{errors}{_cell(row.errors.get('8+tables'), '.4f'):>10}"
        f"{_cell(row.seconds, '.1f'):>8}{_cell(row.times_torch, '.2f'):>9}{loads:>7}{row.float_layers:>6}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(zoo.NETWORKS)}; default all")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[8, 4])
    parser.add_argument("--quick", action="store_true", help="8 calibration samples and short timings")
    parser.add_argument("--samples", type=int, help="calibration samples, in batches of 32; default 32")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    args = parser.parse_args()
    if unknown := set(args.names) - set(zoo.NETWORKS):
        parser.error(f"no network is called {', '.join(sorted(unknown))}; they are {', '.join(zoo.NETWORKS)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    effort = QUICK if args.quick else FULL
    if args.samples:
        effort = replace(effort, batches=-(-args.samples // 32), batch=min(32, args.samples))
    rows: list[Row] = []
    missing: list[str] = []
    if not args.json:
        print(f"{cpu_name()}, one thread, torch {torch.__version__}\n{header(args.bits)}")
    with torch.no_grad():
        for name in args.names or zoo.NETWORKS:
            try:
                row = measure(name, zoo.NETWORKS[name], args.bits, effort)
            except zoo.MissingPackageError as error:
                missing.append(f"{name} is left out: {error}")
                continue
            rows.append(row)
            if not args.json:
                print(line(row, args.bits), flush=True)
    if args.json:
        print(json.dumps({"torch": torch.__version__, "missing": missing, "rows": [asdict(row) for row in rows]}))
        return
    for row in rows:
        for what, how in row.failures.items():
            print(f"{row.network}: {what} failed: {how}")
    for row in rows:
        if row.float_largest:
            print(f"{row.network}, in float: {'; '.join(row.float_largest)}")
    print("\n".join(missing), end="\n" if missing else "")


if __name__ == "__main__":
    main()
