import json
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from bantamweight.report import html, pictures, tables
from bantamweight.report.results import Layer, Machine, Outcome, Report


def layer(name: str, error: float) -> Layer:
    return Layer(name=name, shape=(8, 4, 3, 3), bits=4, scheme="W4", group_size=None, error=error, kernel="avx2")


def outcome(label: str, accuracy: float, size: int, ms: float, errors: dict[str, float]) -> Outcome:
    layers = [layer(name, error) for name, error in errors.items()]
    return Outcome(label=label, accuracy=accuracy, bytes=size, latency={1: ms, 64: 40 * ms}, layers=layers)


def report(packed: list[Outcome], chosen: int = 0) -> Report:
    return Report(
        network="a <small> network",
        method="GPFQ",
        baseline=outcome("fp32 torch", 0.99, 800_000, 0.5, {}),
        packed=packed,
        chosen=chosen,
        calibration_inputs=512,
        test_inputs=800,
        skipped={"embed & co": "not supported"},
        max_drop=None,
        notes=["A note."],
        busy=None,
        machine=Machine(cpu="a CPU", threads=2, kernel="avx2", torch="2", bantamweight="0"),
        seconds=3.0,
    )


FOUR = outcome("4-bit weights", 0.985, 100_000, 0.25, {"conv1": 0.05, "linear": 0.07})
TERNARY = outcome("ternary weights", 0.9, 50_000, 1.0, {"conv1": 0.4, "linear": 0.0})


def test_the_headline_does_not_flatter():
    said = tables.headline(report([FOUR]))
    assert "98.50 %" in said and "0.50 points less" in said and "1/8.0 of the space" in said and "2.00x faster" in said
    assert "faster" not in tables.headline(replace(report([FOUR]), busy="The machine was busy."))
    said = tables.headline(report([FOUR, TERNARY], chosen=1))
    assert "9.00 points less" in said and "2.00x slower" in said


def test_the_table_lines_up():
    both = report([FOUR, TERNARY])
    lines = tables.text_table(tables.columns(both), tables.rows(both)).splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["fp32 torch", "4-bit weights", "ternary weights"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "97.7 KiB" in lines[3] and "8.00x" in lines[3] and "10.000 ms" not in lines[3]


@pytest.mark.parametrize("packed", [[FOUR], [FOUR, TERNARY]])
@pytest.mark.parametrize("draw", [pictures.error_per_layer, pictures.accuracy_against_size, pictures.latency])
def test_pictures_are_whole_svg_inside_their_frame(draw, packed):
    svg = ElementTree.fromstring(draw(report(packed)))
    _, _, width, height = (float(v) for v in svg.attrib["viewBox"].split())
    circles = svg.findall("circle")
    for mark in circles:
        assert 0 <= float(mark.attrib["cx"]) <= width and 0 <= float(mark.attrib["cy"]) <= height
    for bar in svg.findall("rect"):
        assert float(bar.attrib["width"]) > 0 and float(bar.attrib["x"]) + float(bar.attrib["width"]) <= width
    if draw is pictures.error_per_layer:
        assert len(circles) == 2 * len(packed)


def test_bars_are_as_long_as_their_times():
    svg = ElementTree.fromstring(pictures.latency(report([FOUR, TERNARY])))
    widths = [float(bar.attrib["width"]) for bar in svg.findall("rect")]
    assert widths[:3] == pytest.approx([widths[2] / 2, widths[2] / 4, widths[2]], rel=1e-2)


def test_one_network_without_errors_can_be_drawn():
    exact = outcome("8-bit weights", 0.99, 800_000, 0.5, {"a.very.long.name.of.a.layer.in.a.deep.network": 0.0})
    for draw in (pictures.error_per_layer, pictures.accuracy_against_size, pictures.latency):
        ElementTree.fromstring(draw(report([exact])))


def test_the_page_is_self_contained_and_escaped():
    page = html.page(report([FOUR, TERNARY]))
    assert "<small>" not in page and "embed &amp; co" in page and page.count("<svg") == 3
    fetching: list[str] = []

    class Fetches(HTMLParser):
        def handle_starttag(self, tag, attrs):
            fetching.extend(tag for name, _ in attrs if name in ("src", "href"))

    Fetches().feed(page)
    assert fetching == [] and "url(" not in page and "<script" not in page


def test_json_carries_what_scripts_read():
    data = json.loads(json.dumps(report([FOUR, TERNARY], chosen=1).to_json()))
    assert (data["baseline_accuracy"], data["accuracy"]) == (0.99, 0.9)
    assert (data["bytes"], data["fp32_bytes"]) == (50_000, 800_000)
    assert data["layers"][0] == {
        "name": "conv1",
        "shape": [8, 4, 3, 3],
        "bits": 4,
        "scheme": "W4",
        "group_size": None,
        "error": 0.4,
        "kernel": "avx2",
    }
    assert data["latency"][1] == {"batch_size": 64, "ms_per_batch": 40.0, "fp32_ms_per_batch": 20.0}
