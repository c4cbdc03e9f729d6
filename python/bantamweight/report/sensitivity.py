"""The sensitivity report as one self-contained page: no script, no network, pictures inside."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..curvature import Sensitivity
from ..quantize.plan import BitPlan
from .html import STYLE


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
    body.append(f"<h2>Every layer</h2><pre>{escape(str(found))}</pre>")
    if plan is not None:
        body.append(f"<h2>The plan</h2><pre>{escape(str(plan))}</pre>")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(network)}, sensitivity</title>\n<style>{STYLE}\n"
        "pre { overflow-x: auto; font-size: .8rem; } figure svg { background: #ffffff; }</style>\n</head>\n<body>\n"
        "<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def _svg(figure: Any) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    drawing = text.getvalue()
    return drawing[drawing.index("<svg") :]  # without the XML prologue, which has no place inside a page
