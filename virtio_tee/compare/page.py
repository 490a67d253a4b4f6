"""The report as a page: one HTML file that needs nothing else. It is made of the report's JSON, and each figure in it
says by a ``data`` element which one of the JSON it is."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree as ET

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from virtio_tee.compare.report import duration, rate, size
from virtio_tee.compare.sequence import drawn

SHOWN = "registered-1MiB"
"""The workload by which it is shown who can read what."""
LATENCIES = ("open", "null", "values", "load", "storage", "sessions", "guests")
COUNTED = ("null", "temporary-64KiB", "registered-1MiB", "load")
SERIES = ("registered", "temporary")
MARKS = ("circle", "square", "diamond", "triangle", "downward")
MOST_ROWS = 90
"""Of one sequence diagram."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of the JSON: where it stands, and how it is shown."""

    at: str
    value: float
    text: str

    def __html__(self) -> str:
        return Markup('<data value="{}" data-at="{}">{}</data>').format(self.value, self.at, self.text)


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of a chart; ``share`` of its width, 0 to 1."""

    label: str
    path: int  #: number of the path: its colour
    figure: Figure
    share: float


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars, and what they are of."""

    title: str
    what: str
    bars: Sequence[Bar]


class Figures:
    """The report's figures, by what they are of."""

    def __init__(self, report: Mapping[str, Any]) -> None:
        self.report = report
        self.paths: Sequence[Mapping[str, Any]] = report["paths"]
        self._of = {(r["workload"], r["path"], r["mode"]): n for n, r in enumerate(report["results"])}
        self.workloads = {w["workload"]: w for w in report["workloads"]}

    def has(self, workload: str) -> bool:
        """Whether it was run."""
        return workload in self.workloads

    def of(self, workload: str, path: Mapping[str, Any], *keys: str) -> Any:
        """A figure's value; None where there is none."""
        value: Any = self.report["results"][self._of[workload, path["path"], path["mode"]]]
        for key in keys:
            value = value.get(key) if value is not None else None
        return value

    def figure(self, workload: str, path: Mapping[str, Any], *keys: str) -> Figure | None:
        """A figure, in its unit; None where there is none."""
        value = self.of(workload, path, *keys)
        if value is None:
            return None
        number = self._of[workload, path["path"], path["mode"]]
        return Figure(".".join(("results", str(number), *keys)), value, _text(keys, value))

    def chart(self, workload: str, *keys: str) -> Chart:
        """One bar for each path."""
        bars = []
        figures = [self.figure(workload, path, *keys) for path in self.paths]
        most = max((figure.value for figure in figures if figure is not None), default=0)
        for number, (path, figure) in enumerate(zip(self.paths, figures, strict=True)):
            if figure is not None:
                bars.append(Bar(path["label"], number, figure, figure.value / most if most else 0.0))
        return Chart(workload, self.workloads[workload]["what"], bars)


def _text(keys: Sequence[str], value: float) -> str:
    if keys[0] == "latency_us" and keys[-1] != "samples":
        return duration(value)
    if keys[-1] == "per_s":
        return rate(value)
    if keys[-1] == "mib_per_s":
        return f"{value:.0f} MiB/s" if value else "–"
    if keys[-1] == "bytes_copied" or keys[0] in ("readers", "payload"):
        return size(value)
    return f"{value:,}".replace(",", "\u202f")


# -- plots

_W, _H = 460, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 28, 12, 28


def latency_plot(figures: Figures, series: str) -> Markup | None:
    """Latency by size, both logarithmic, a line for each path; None where there is nothing to plot."""
    workloads = [w for w in figures.workloads.values() if w["group"] == f"{series} memory"]
    points = {
        number: [
            (w["bytes"], figures.figure(w["workload"], path, "latency_us", "p50"))
            for w in workloads
            if figures.of(w["workload"], path, "latency_us") is not None
        ]
        for number, path in enumerate(figures.paths)
    }
    values = [figure.value for line in points.values() for _, figure in line if figure is not None]
    sizes = sorted({w["bytes"] for w in workloads})
    if not values or len(sizes) < 2:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)

    def x(size_: int) -> float:
        return _LEFT + (_W - _LEFT - _RIGHT) * sizes.index(size_) / (len(sizes) - 1)

    def y(value: float) -> float:
        return _TOP + (_H - _TOP - _BOTTOM) * (high - math.log10(value)) / (high - low)

    title = f"Median latency of a call by bytes of {series} memory"
    svg = ET.Element("svg", {"viewBox": f"0 0 {_W} {_H}", "role": "img", "aria-label": title, "class": "plot"})
    ET.SubElement(svg, "title").text = title
    for power in range(low, high + 1):
        at = f"{y(10**power):.1f}"
        ET.SubElement(svg, "line", {"x1": f"{_LEFT}", "x2": f"{_W - _RIGHT}", "y1": at, "y2": at, "class": "grid"})
        text = ET.SubElement(svg, "text", {"x": f"{_LEFT - 6}", "y": at, "class": "tick y"})
        text.text = duration(10**power)
    for one in sizes:
        text = ET.SubElement(svg, "text", {"x": f"{x(one):.1f}", "y": f"{_H - _BOTTOM + 18}", "class": "tick x"})
        text.text = size(one)
    for number, line in points.items():
        found = [(x(bytes_), y(figure.value), figure) for bytes_, figure in line if figure is not None]
        group = ET.SubElement(svg, "g", {"class": f"line p{number}"})
        ET.SubElement(group, "polyline", {"points": " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in found)})
        for a, b, figure in found:
            mark = ET.SubElement(group, "path", {"d": _mark(MARKS[number % len(MARKS)], a, b), "data-at": figure.at})
            mark.set("data-value", str(figure.value))
            ET.SubElement(mark, "title").text = f"{figures.paths[number]['label']}: {figure.text}"
    return Markup(ET.tostring(svg, encoding="unicode"))


def _mark(kind: str, x: float, y: float, r: float = 4.5) -> str:
    corners = {
        "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
        "diamond": ((0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)),
        "triangle": ((0, -1.2), (1.2, 1), (-1.2, 1)),
        "downward": ((-1.2, -1), (1.2, -1), (0, 1.2)),
    }
    if kind == "circle":
        return f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0Z"
    return "M" + "L".join(f"{x + r * a:.1f},{y + r * b:.1f}" for a, b in corners[kind]) + "Z"


def mark(number: int) -> Markup:
    """A path's mark, for the legend."""
    return Markup('<svg viewBox="0 0 12 12" class="mark p{}" aria-hidden="true"><path d="{}"/></svg>').format(
        number, _mark(MARKS[number % len(MARKS)], 6, 6)
    )


# -- the page


def page(report: Mapping[str, Any]) -> str:
    """The whole of it."""
    figures = Figures(report)
    environment = Environment(
        loader=PackageLoader("virtio_tee.compare", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    titles = {party["party"]: party["title"] for party in report["parties"]}
    diagrams: dict[str, list[dict[str, Any]]] = {}
    for diagram in report["diagrams"]:
        number = next(
            n for n, p in enumerate(figures.paths) if (p["path"], p["mode"]) == (diagram["path"], diagram["mode"])
        )
        diagrams.setdefault(diagram["workload"], []).append(
            {
                "number": number,
                "path": figures.paths[number],
                "lanes": len(diagram["parties"]),
                "svg": drawn(diagram, titles, MOST_ROWS),
            }
        )
    shown = SHOWN if figures.has(SHOWN) else next(iter(figures.workloads))
    return environment.get_template("page.html").render(
        report=report,
        figures=figures,
        paths=figures.paths,
        titles=titles,
        shown=figures.workloads[shown],
        latencies=[figures.chart(name, "latency_us", "p50") for name in LATENCIES if figures.has(name)],
        rates=[figures.chart(name, "throughput", "per_s") for name in ("null", "values") if figures.has(name)],
        counted=[name for name in COUNTED if figures.has(name)],
        plots=[(name, plot) for name in SERIES if (plot := latency_plot(figures, name)) is not None],
        diagrams=diagrams,
        mark=mark,
        size=size,
        embedded=Markup(json.dumps(report).replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")),
    )
