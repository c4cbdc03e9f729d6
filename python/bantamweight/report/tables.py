"""Numbers in words and columns: what the terminal and the page say about a Report."""

from __future__ import annotations

from collections.abc import Sequence

from .results import Outcome, Report


def percent(accuracy: float) -> str:
    return f"{100 * accuracy:.2f} %"


def size(number: int) -> str:
    return f"{number / 1024:.1f} KiB" if number < 2**20 else f"{number / 2**20:.2f} MiB"


def milliseconds(value: float) -> str:
    return f"{value:.3f} ms" if value < 10 else f"{value:.1f} ms"


def images(count: int) -> str:
    return "1 image" if count == 1 else f"{count} images"


def faster(baseline_ms: float, ms: float) -> str:
    """'2.40x faster' or '1.30x slower', never flattering."""
    return f"{baseline_ms / ms:.2f}x faster" if ms <= baseline_ms else f"{ms / baseline_ms:.2f}x slower"


def compared(report: Report, outcome: Outcome, batch: int) -> str:
    """', 2.40x faster' where a network is not the float one and the times can be trusted, else nothing."""
    if outcome is report.baseline or report.busy:
        return ""
    return f", {faster(report.baseline.latency[batch], outcome.latency[batch])}"


def headline(report: Report) -> str:
    """The result in one sentence."""
    best, base = report.best, report.baseline
    points = 100 * (base.accuracy - best.accuracy)
    drop = f"{points:.2f} points less than in fp32" if points > 0 else "no less than in fp32"
    batch = min(base.latency)
    speed = f" and runs {images(batch)} {faster(base.latency[batch], best.latency[batch])} than torch does in fp32"
    return (
        f"With {best.label} the network is right on {percent(best.accuracy)} of {report.test_inputs} test images, "
        f"{drop}, and takes 1/{base.bytes / best.bytes:.1f} of the space{'' if report.busy else speed}."
    )


def columns(report: Report) -> list[str]:
    return ["", "accuracy", "on disk", "smaller", *(f"{images(n)} at once" for n in report.baseline.latency)]


def rows(report: Report) -> list[list[str]]:
    """One row a network, the float one first."""
    return [_row(report.baseline, report), *(_row(outcome, report) for outcome in report.packed)]


def _row(outcome: Outcome, report: Report) -> list[str]:
    base = report.baseline
    smaller = "" if outcome is base else f"{base.bytes / outcome.bytes:.2f}x"
    times = [milliseconds(ms) + compared(report, outcome, batch) for batch, ms in outcome.latency.items()]
    return [outcome.label, percent(outcome.accuracy), size(outcome.bytes), smaller, *times]


def text_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns lined up with blanks: the first to the left, the others to the right."""
    lines = [header, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    aligned = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    return "\n".join([aligned[0].rstrip(), "-" * len(aligned[0]), *(line.rstrip() for line in aligned[1:])])
