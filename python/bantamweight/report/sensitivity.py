"""The sensitivity report as one self-contained page: no script, no network, pictures inside."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..curvature import Sensitivity
from ..quantize.plan import BitPlan
from .html import STYLE, paragraph, table


@dataclass(frozen=True, kw_only=True)
class Picture:
    title: str
    caption: str
    figure: Any  # a matplotlib Figure


def page(network: str, found: Sensitivity, plan: BitPlan | None, pictures: Sequence[Picture], notes: str) -> str:
    """The whole HTML document."""
    sharpest = found.ranking[0]
    body = [
        f'<p class="kicker">bantamweight \u00b7 {escape(network)}</p>',
        f"<h1>The loss is sharpest along {escape(sharpest or 'the one layer')}</h1>",
        f"<p>Measured on {found.subsets} subsets of {found.samples} samples. {escape(notes)}</p>",
    ]
    for picture in pictures:
        body.append(f"<h2>{escape(picture.title)}</h2>")
        body.append(f"<figure><figcaption>{escape(picture.caption)}</figcaption>{_svg(picture.figure)}</figure>")
    body += ["<h2>Every layer</h2>", _layers(found), *map(paragraph, _remarks(found))]
    if plan is not None:
        body += ["<h2>The plan</h2>", _plan(plan), paragraph(_last_line(plan))]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(network)}, sensitivity</title>\n<style>{STYLE}\n"
        "figure svg { background: #ffffff; }</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _layers(found: Sensitivity) -> str:
    bits = sorted(found.layers[0].errors)
    header = ["layer", "weights", "score", "std over subsets", *(f"+ loss at {b} bits" for b in bits)]
    body = [
        [
            layer.name or "(model)",
            f"{layer.weights:,}",
            f"{layer.score:.4g}",
            f"{layer.std:.2g}" if found.subsets > 1 else "\u2013",
            *(f"{layer.loss_increase(b):.3g}" for b in bits),
        ]
        for layer in found.layers
    ]
    return table(header, body)


def _remarks(found: Sensitivity) -> list[str]:
    """What stands under the table in the terminal, too."""
    return str(found).splitlines()[1 + len(found.layers) :]


def _plan(plan: BitPlan) -> str:
    body = [
        [
            layer.name or "(model)",
            f"{layer.weights:,}",
            str(layer.bits),
            f"{layer.bytes:,}",
            f"{layer.loss_increase:.3g}",
        ]
        for layer in plan.layers
    ]
    return table(["layer", "weights", "bits", "bytes", "+ loss"], body)


def _last_line(plan: BitPlan) -> str:
    return str(plan).splitlines()[-1]


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]  # without the XML prologue, which has no place inside a page
