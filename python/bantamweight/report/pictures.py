"""The report's three pictures, drawn as SVG. Colours are the page's CSS variables, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .results import Outcome, Report
from .tables import compared, images, milliseconds, percent, size

WIDTH = 720
FLOAT = "var(--float)"
SERIES = ("var(--s0)", "var(--s1)", "var(--s2)", "var(--s3)")


def error_per_layer(report: Report) -> str:
    """A dot for every layer and network: relative output error on held-out calibration data."""
    names = [layer.name for layer in report.best.layers]
    left, right, top, row = _label_width(names), 24, 8, 22
    height = top + row * len(names) + 46
    errors = [layer.error for outcome in report.packed for layer in outcome.layers]
    ticks = _ticks(max(errors, default=0.1))
    scale = (WIDTH - left - right) / ticks[-1]
    parts = []
    for tick in ticks:
        x = left + tick * scale
        parts.append(_line(x, top, x, top + row * len(names), "grid"))
        parts.append(_text(x, top + row * len(names) + 18, _number(tick), "middle"))
    parts.append(_text(left + (WIDTH - left - right) / 2, height - 8, "relative output error, 0 is exact", "middle"))
    for index, name in enumerate(names):
        y = top + row * (index + 0.5)
        parts.append(_text(left - 12, y + 4, _shorten(name), "end", "mono"))
        found = [
            (number, outcome, layer)
            for number, outcome in enumerate(report.packed)
            for layer in outcome.layers
            if layer.name == name
        ]
        ends = [left + layer.error * scale for _, _, layer in found]
        parts.append(_line(left if len(found) == 1 else min(ends), y, max(ends), y, "stem"))
        parts += [
            _dot(left + layer.error * scale, y, _colour(number), f"{name}, {outcome.label}: {layer.error:.4f}")
            for number, outcome, layer in found
        ]
    return _svg(height, parts, "Relative output error of every layer")


def accuracy_against_size(report: Report) -> str:
    """Bytes on disk, each gridline twice the one before, against accuracy."""
    left, right, top, bottom, height = 64, 32, 24, 52, 320
    points = [(report.baseline, FLOAT), *((o, _colour(i)) for i, o in enumerate(report.packed))]
    exponents = [math.log2(outcome.bytes) for outcome, _ in points]
    low_x, high_x = math.floor(min(exponents) - 0.15), math.ceil(max(exponents) + 0.15)
    accuracies = [100 * outcome.accuracy for outcome, _ in points]
    step = _step((max(accuracies) - min(accuracies) or 1) / 3)
    low_y = math.floor(min(accuracies) / step - 0.3) * step
    high_y = math.ceil(max(accuracies) / step + 0.3) * step

    def at(exponent: float, accuracy: float) -> tuple[float, float]:
        x = left + (exponent - low_x) / (high_x - low_x) * (WIDTH - left - right)
        return x, height - bottom - (accuracy - low_y) / (high_y - low_y) * (height - top - bottom)

    parts = []
    for exponent in range(low_x, high_x + 1):
        x, y = at(exponent, low_y)
        parts += [_line(x, top, x, y, "grid"), _text(x, y + 20, _power_of_two(exponent), "middle")]
    for number in range(round((high_y - low_y) / step) + 1):
        tick = low_y + number * step
        x, y = at(low_x, tick)
        if tick <= 100 + 1e-9:
            parts += [_line(x, y, WIDTH - right, y, "grid"), _text(x - 10, y + 4, f"{_number(tick)} %", "end")]
    parts.append(_text(left + (WIDTH - left - right) / 2, height - 8, "size on disk", "middle"))
    spots = [at(e, a) for e, a in zip(exponents, accuracies, strict=True)]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(spots))
    parts.append(f'<polyline points="{path}" class="stem" fill="none"/>')
    # Labels above and below in turn, in order of size, so that neighbours do not collide.
    for turn, index in enumerate(sorted(range(len(points)), key=lambda i: spots[i][0])):
        (outcome, colour), (x, y) = points[index], spots[index]
        told = f"{outcome.label}: {percent(outcome.accuracy)}, {size(outcome.bytes)}"
        anchor = "end" if x > WIDTH - 110 else "start" if x < left + 50 else "middle"
        parts += [
            _dot(x, y, colour, told),
            _text(x, y - 12 if turn % 2 else y + 22, outcome.label, anchor, "strong"),
        ]
    return _svg(height, parts, "Accuracy against size on disk")


def latency(report: Report) -> str:
    """Bars of milliseconds a batch, one panel a batch size, each with its own scale from zero."""
    networks = [(report.baseline, FLOAT), *((o, _colour(i)) for i, o in enumerate(report.packed))]
    left, right, row, title = _label_width([o.label for o, _ in networks]), 190, 26, 34
    parts, y = [], 0.0
    for batch in report.baseline.latency:
        longest = max(outcome.latency[batch] for outcome, _ in networks)
        parts.append(_text(0, y + 20, f"{images(batch)} at once", "start", "strong"))
        y += title
        for outcome, colour in networks:
            ms = outcome.latency[batch]
            width = max(1.0, (WIDTH - left - right) * ms / longest)
            parts += [
                _text(left - 12, y + row / 2 + 4, outcome.label, "end"),
                f'<rect x="{left}" y="{y + 4:.1f}" width="{width:.1f}" height="{row - 8}" rx="2" fill="{colour}"/>',
                _text(left + width + 8, y + row / 2 + 4, milliseconds(ms) + compared(report, outcome, batch), "start"),
            ]
            y += row
        y += 14
    return _svg(y, parts, "Milliseconds a batch")


def legend(outcomes: Sequence[Outcome]) -> str:
    """HTML: the colour of every quantized network."""
    marks = (
        f'<span><i style="background:{_colour(number)}"></i>{escape(outcome.label)}</span>'
        for number, outcome in enumerate(outcomes)
    )
    return f'<p class="legend">{"".join(marks)}</p>'


# ---- drawing --------------------------------------------------------------------------------------


def _colour(series: int) -> str:
    return SERIES[series % len(SERIES)]


def _svg(height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{escape(text)}</text>'


def _dot(x: float, y: float, colour: str, told: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"><title>{escape(told)}</title></circle>'


def _label_width(labels: Sequence[str]) -> int:
    return 24 + round(7.2 * max((len(_shorten(label)) for label in labels), default=0))


def _shorten(name: str) -> str:
    """The end of a long layer name says the most."""
    return name if len(name) <= 30 else "\u2026" + name[-29:]


def _step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * nice for nice in (1, 2, 5, 10) if power * nice >= rough * (1 - 1e-9))


def _ticks(highest: float) -> list[float]:
    """From 0 past `highest` in about five round steps."""
    step = _step(max(highest, 1e-6) / 5)
    return [step * i for i in range(math.ceil(highest / step) + 1)] if highest > 0 else [0.0, step]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _power_of_two(exponent: int) -> str:
    for power, unit in ((20, "MiB"), (10, "KiB")):
        if exponent >= power:
            return f"{2 ** (exponent - power)} {unit}"
    return f"{2**exponent} B"
