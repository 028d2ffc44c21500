"""The chart is well-formed SVG and shows what it was given."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from kvmesh.bench.plot import COLOURS, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def test_each_line_has_its_points_and_its_name():
    text = line_chart("a < b", "x & y", "GB/s", {"tcp": [(8.0, 2.0), (1.0, 1.0)], "one": [(1.0, 0.0)]})
    root = ET.fromstring(text)  # noqa: S314  (our own)
    lines = root.findall(f"{SVG}polyline")
    assert [len(line.get("points").split()) for line in lines] == [2, 1]
    across = [float(point.split(",")[0]) for point in lines[0].get("points").split()]
    assert across == sorted(across)
    said = [element.text for element in root.iter(f"{SVG}text")]
    assert {"a < b", "x & y", "GB/s", "tcp", "one", "1", "8"} <= set(said)


def test_more_lines_than_colours():
    lines = {str(number): [(1.0, float(number))] for number in range(2 * len(COLOURS))}
    assert len(ET.fromstring(line_chart("t", "x", "y", lines)).findall(f"{SVG}polyline")) == len(lines)  # noqa: S314  (our own)
