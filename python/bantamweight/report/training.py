"""The report of `bantamweight train`: optimizers side by side, after training and after quantization."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from html import escape
from statistics import mean, stdev
from typing import Any

from ..train.loop import TrainConfig
from ..train.robustness import Robustness
from .html import STYLE, paragraph, table
from .pictures import WIDTH
from .results import Machine


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run, tested. job: of what network and data (a digest), so that a resumed run knows its own."""

    job: str
    config: TrainConfig
    robustness: Robustness
    final_loss: float
    seconds_per_step: float
    file: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Run:
        robust = value["robustness"]
        by_bits = {name: {int(b): a for b, a in robust[name].items()} for name in ("gpfq", "nearest")}
        return Run(
            **{**value, "config": TrainConfig(**value["config"]), "robustness": Robustness(**{**robust, **by_bits})}
        )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer: its runs, one a seed; its step's cost relative to SGD's; its first network's loss surface."""

    name: str
    runs: Sequence[Run]
    relative_cost: float
    surface_offsets: Sequence[float]
    surface: Sequence[Sequence[float]]

    def values(self, pick: Any) -> list[float]:
        return [pick(run.robustness) for run in self.runs]


@dataclass(frozen=True, kw_only=True)
class TrainingReport:
    network: str
    contenders: Sequence[Contender]
    train_inputs: int
    test_inputs: int
    machine: Machine
    seconds: float

    @property
    def bits(self) -> list[int]:
        return list(self.contenders[0].runs[0].robustness.gpfq)

    def to_json(self) -> dict[str, Any]:
        contenders = [
            {
                "optimizer": c.name,
                "relative_cost": c.relative_cost,
                "accuracy": mean(c.values(lambda r: r.float_accuracy)),
                "lambda_max": mean(c.values(lambda r: r.lambda_max)),
                "trace": mean(c.values(lambda r: r.trace)),
                "gpfq": {str(b): mean(c.values(lambda r, b=b: r.gpfq[b])) for b in self.bits},
                "nearest": {str(b): mean(c.values(lambda r, b=b: r.nearest[b])) for b in self.bits},
                "runs": [run.to_json() for run in c.runs],
                "loss_surface": {
                    "offsets": list(c.surface_offsets),
                    "losses": [[v if math.isfinite(v) else None for v in row] for row in c.surface],
                },
            }
            for c in self.contenders
        ]
        return {
            "version": 1,
            "network": self.network,
            "contenders": contenders,
            "train_inputs": self.train_inputs,
            "test_inputs": self.test_inputs,
            "machine": asdict(self.machine),
            "seconds": round(self.seconds, 2),
        }


def columns(report: TrainingReport) -> list[str]:
    return [
        "",
        "float",
        *(f"W{b} GPFQ" for b in report.bits),
        *(f"W{b} nearest" for b in report.bits),
        "lambda_max",
        "trace",
        "cost of a step",
    ]


def rows(report: TrainingReport) -> list[list[str]]:
    """A row an optimizer: mean and standard deviation over its seeds."""
    return [
        [
            c.name.upper(),
            _percent(c.values(lambda r: r.float_accuracy)),
            *(_percent(c.values(lambda r, b=b: r.gpfq[b])) for b in report.bits),
            *(_percent(c.values(lambda r, b=b: r.nearest[b])) for b in report.bits),
            _spread(c.values(lambda r: r.lambda_max), 1.0, 3),
            _spread(c.values(lambda r: r.trace), 1.0, 2),
            f"{c.relative_cost:.2f}x SGD",
        ]
        for c in report.contenders
    ]


def page(report: TrainingReport) -> str:
    """The whole HTML document, pictures inside."""
    config = report.contenders[0].runs[0].config
    seeds = len(report.contenders[0].runs)
    noise = f", {config.label_noise:.0%} of the training labels wrong" if config.label_noise else ""
    names = ", ".join(c.name.upper() for c in report.contenders)
    body = [
        f'<p class="kicker">bantamweight \u00b7 {escape(report.network)}</p>',
        f"<h1>{escape(names)}: accuracy after training and after quantization</h1>",
        paragraph(
            f"{config.epochs} epochs{noise}; "
            + (
                f"means over {seeds} seeds with the standard deviation"
                if seeds > 1
                else "one seed, so nothing is known of the spread"
            )
            + "; accuracies in percent. lambda_max and trace are of the training loss's Hessian: smaller is flatter."
        ),
        # A column an optimizer: with many bit widths and their spreads the rows of the terminal are too wide here.
        table(["", *(row[0] for row in rows(report))], _turned(report)),
        "<h2>Loss around the trained weights</h2>",
        paragraph(
            "Training loss on a plane of two random directions, scaled filter by filter; the network is in the middle, "
            "an edge is a displacement as large as the weights. A wide light basin is a flat minimum. All squares "
            "share one logarithmic scale, the darker the higher."
        ),
        f"<figure>{surfaces(report.contenders)}</figure>",
        "<h2>How it was run</h2>",
        _facts(report),
    ]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.network)}: {escape(names)}</title><style>{STYLE}</style>"
    )
    return f'<!doctype html><html lang="en"><head>{head}</head><body><main>{"".join(body)}</main></body></html>\n'


def _turned(report: TrainingReport) -> list[list[str]]:
    """The terminal's table, a row a quantity."""
    return [list(line) for line in list(zip(columns(report), *rows(report), strict=True))[1:]]


def surfaces(contenders: Sequence[Contender]) -> str:
    """SVG: one square a contender, dark where the loss is high, all on one logarithmic scale."""
    gap, top = 20, 26
    side = min(240.0, (WIDTH - gap * (len(contenders) - 1)) / len(contenders))
    finite = [v for c in contenders for row in c.surface for v in row if math.isfinite(v)]
    low, high = math.log(max(min(finite), 1e-6)), math.log(max(max(finite), 1e-6))
    parts = []
    for number, contender in enumerate(contenders):
        left, cell = number * (side + gap), side / len(contender.surface)
        centre = contender.surface[len(contender.surface) // 2][len(contender.surface) // 2]
        highest = max(loss for row in contender.surface for loss in row if math.isfinite(loss))
        parts.append(
            f'<text x="{left:.1f}" y="16" class="strong">{escape(contender.name.upper())}</text>'
            f'<text x="{left:.1f}" y="{top + side + 18:.1f}">{centre:.3g} in the middle, up to {highest:.3g}</text>'
        )
        for i, row in enumerate(contender.surface):
            for j, loss in enumerate(row):
                shade = 1.0 if not math.isfinite(loss) else (math.log(max(loss, 1e-6)) - low) / max(high - low, 1e-9)
                parts.append(
                    f'<rect x="{left + j * cell:.2f}" y="{top + i * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
                    f'fill="var(--s0)" fill-opacity="{shade:.3f}"><title>loss {loss:.4g}</title></rect>'
                )
    return (
        f'<svg viewBox="0 0 {WIDTH} {top + side + 24:.0f}" role="img" aria-label="loss surfaces" '
        'shape-rendering="crispEdges">'
        f"<title>loss surfaces</title>{''.join(parts)}</svg>"
    )


def _facts(report: TrainingReport) -> str:
    facts = {}
    for contender in report.contenders:
        c = contender.runs[0].config
        facts[contender.name.upper()] = (
            f"lr {c.lr:g}, batch {c.batch_size}, weight decay {c.weight_decay:g}"
            + ("" if c.optimizer == "sgd" else f", h {c.h:g}")
            + (f", lambda {c.lam:g} ({c.reduction}), {c.mode}" if c.optimizer == "hero" else "")
        )
    facts |= {
        "training": f"{report.train_inputs} inputs",
        "test": f"{report.test_inputs} inputs",
        "machine": f"{report.machine.cpu}, {report.machine.threads} thread(s)",
        "versions": f"bantamweight {report.machine.bantamweight}, torch {report.machine.torch}",
        "whole run": f"{report.seconds:.1f} s",
    }
    return f"<dl>{''.join(f'<dt>{escape(k)}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def _percent(values: Sequence[float]) -> str:
    return _spread(values, 100.0, 2)


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    middle = f"{scale * mean(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} \u00b1 {scale * stdev(values):.{digits}f}"
