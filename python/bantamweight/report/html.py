"""The report as one self-contained page: no script, no network, pictures inside, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from . import pictures, tables
from .results import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c2330; --soft: #5b6575; --paper: #ffffff; --card: #f5f7fa; --line: #dde2ea;
  --float: #9aa3b0; --s0: #2459a8; --s1: #1f8f80; --s2: #d98a1f; --s3: #c8414f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaf0; --soft: #9ea8b8; --paper: #14181f; --card: #1d232d;
  --line: #333c4a; --float: #77808e; --s0: #6ea3f0; --s1: #4cc4b2; --s2: #f0b053; --s3: #f07a85; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto,
  "Helvetica Neue", "DejaVu Sans", sans-serif; }
main { max-width: 800px; margin: 0 auto; padding: 48px 24px 72px; }
h1 { font-size: 1.75rem; line-height: 1.3; margin: 0 0 8px; letter-spacing: -0.01em; text-wrap: balance; }
h2 { font-size: 1.15rem; margin: 48px 0 4px; }
p { margin: 4px 0 14px; } .soft, figcaption { color: var(--soft); }
.kicker { color: var(--soft); font-size: .9rem; margin: 0 0 16px; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px; margin: 28px 0; }
.figures div { background: var(--card); border-radius: 10px; padding: 16px 18px; }
.figures b { display: block; font-size: 1.7rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 0 7px 16px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; vertical-align: bottom; white-space: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.chosen td { font-weight: 600; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; font-size: .92em; }
figure { margin: 0; } svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 13px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg text.strong { fill: var(--ink); font-weight: 600; } svg text.mono { font-size: 12px; fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .stem { stroke: var(--line); stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .9rem; color: var(--soft); margin-bottom: 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 20px; font-size: .9rem; margin: 8px 0; }
dt { color: var(--soft); } dd { margin: 0; }
"""


def page(report: Report) -> str:
    """The whole HTML document."""
    several = len(report.packed) > 1
    legend = pictures.legend(report.packed) if several else ""
    body = [
        f'<p class="kicker">bantamweight \u00b7 {escape(report.network)}</p>',
        f"<h1>{escape(tables.headline(report))}</h1>",
        _key_figures(report),
        "<h2>The networks side by side</h2>",
        paragraph(
            "Every row was measured in the same run on the same test images; times are medians, taken in turns."
            + (f" The row in bold ({report.best.label}) is the one in model.safetensors." if several else "")
        ),
        table(tables.columns(report), tables.rows(report), chosen=report.chosen + 2 if several else None),
        *_picture(
            "Accuracy against size",
            "Each gridline is twice the size of the one before. Up and to the left is better.",
            pictures.accuracy_against_size(report),
        ),
        *_picture(
            "Time a batch",
            f"{report.machine.threads} thread(s) on {report.machine.cpu}. Shorter is better. {report.busy or ''}",
            pictures.latency(report),
        ),
        *_picture(
            "Error of every layer",
            "How far the output of a layer is from that of the float network, relative to its size, on calibration "
            "data that the quantizer did not see. Errors of earlier layers are included.",
            legend + pictures.error_per_layer(report),
        ),
        f"<h2>Layers{f' with {escape(report.best.label)}' if several else ''}</h2>",
        _layers(report),
        *_kept_in_float(report),
        "<h2>How this was made</h2>",
        _facts(report),
        *(paragraph(note) for note in report.notes),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.network)}, compressed</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _key_figures(report: Report) -> str:
    best, base = report.best, report.baseline
    batch = min(base.latency)
    figures = (
        (tables.percent(best.accuracy), f"accuracy; {tables.percent(base.accuracy)} in fp32"),
        (tables.size(best.bytes), f"on disk; {tables.size(base.bytes)} in fp32"),
        (
            tables.milliseconds(best.latency[batch]),
            f"for {tables.images(batch)}; {tables.milliseconds(base.latency[batch])} in fp32 torch",
        ),
    )
    return f'<div class="figures">{"".join(f"<div><b>{b}</b><span>{s}</span></div>" for b, s in figures)}</div>'


def _picture(title: str, caption: str, drawing: str) -> list[str]:
    return [f"<h2>{title}</h2>", f"<figure><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"]


def _layers(report: Report) -> str:
    header = ["layer", "shape", "scheme", "bits", "group size", "relative error", "kernel"]
    body = [
        [
            layer.name,
            "\u00d7".join(str(n) for n in layer.shape),
            layer.scheme,
            str(layer.bits),
            "whole row" if layer.group_size is None else str(layer.group_size),
            f"{layer.error:.4f}",
            layer.kernel,
        ]
        for layer in report.best.layers
    ]
    return table(header, body)


def _kept_in_float(report: Report) -> list[str]:
    if not report.skipped:
        return []
    rows = [[name, reason] for name, reason in report.skipped.items()]
    return ["<h2>Kept in float</h2>", table(["layer", "why"], rows)]


def _facts(report: Report) -> str:
    facts = {
        "method": report.method,
        "calibration": f"{report.calibration_inputs} inputs",
        "test": f"{report.test_inputs} inputs",
        "machine": f"{report.machine.cpu}, {report.machine.threads} thread(s), kernels up to {report.machine.kernel}",
        "versions": f"bantamweight {report.machine.bantamweight}, torch {report.machine.torch}",
        "whole run": f"{report.seconds:.1f} s",
    }
    return f"<dl>{''.join(f'<dt>{k}</dt><dd>{escape(v)}</dd>' for k, v in facts.items())}</dl>"


def paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def table(header: Sequence[str], body: Sequence[Sequence[str]], chosen: int | None = None) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    marked = ' class="chosen"'
    rows = (
        f"<tr{marked if number == chosen else ''}>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>"
        for number, row in enumerate(body, start=1)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
