"""Sequence diagrams, drawn from recorded messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

from virtio_tee.compare.report import size

_ROW, _MARGIN, _HEAD = 30, 60, 44
_LANE, _LANE_FFA = 172, 228
"""Between two parties; what FF-A says is longer."""


def drawn(diagram: Mapping[str, Any], titles: Mapping[str, str], most: int) -> Markup:
    """One diagram, of its first ``most`` messages; ``titles`` name its parties."""
    parties, messages = diagram["parties"], diagram["messages"][:most]
    left = len(diagram["messages"]) - len(messages)
    lane = _LANE_FFA if any("FFA_" in message["name"] for message in messages) else _LANE
    # what parties copy for themselves hangs to the right of their lane
    width = 2 * _MARGIN + lane * (len(parties) - 1) + 30
    height = _HEAD + _ROW * (len(messages) + 1 + bool(left)) + 8
    lanes = {party: _MARGIN + lane * number for number, party in enumerate(parties)}
    title = f"{diagram['workload']} over {diagram['path']} {diagram['mode']}".strip()
    svg = ET.Element(
        "svg",
        {"viewBox": f"0 0 {width} {height}", "width": str(width), "height": str(height), "role": "img",
         "aria-label": f"Sequence diagram: {title}, {len(diagram['messages'])} steps", "class": "sequence"},
    )  # fmt: skip
    ET.SubElement(svg, "title").text = f"Sequence diagram: {title}"
    for party, x in lanes.items():
        ET.SubElement(
            svg, "line", {"x1": str(x), "x2": str(x), "y1": str(_HEAD - 8), "y2": str(height - 6), "class": "lane"}
        )
        box = {"x": str(x - 54), "y": "6", "width": "108", "height": "28", "rx": "6", "class": "party"}
        ET.SubElement(svg, "rect", box)
        ET.SubElement(svg, "text", {"x": str(x), "y": "25", "class": "name"}).text = titles[party]
    for number, message in enumerate(messages):
        _draw(svg, lanes, message, _HEAD + _ROW * (number + 1))
    if left:
        y = _HEAD + _ROW * (len(messages) + 1)
        ET.SubElement(svg, "text", {"x": "12", "y": str(y), "class": "what start"}).text = f"… and {left} more"
    return Markup(ET.tostring(svg, encoding="unicode"))


def _draw(svg: ET.Element, lanes: Mapping[str, int], message: Mapping[str, Any], y: int) -> None:
    start, end = lanes[message["from"]], lanes[message["to"]]
    group = ET.SubElement(svg, "g", {"class": f"message {message['kind']}{' rpc' if message['rpc'] else ''}"})
    text = message["name"] + (f" · {size(message['bytes'])}" if message["bytes"] else "")
    ET.SubElement(group, "title").text = f"{message['at_us']} µs: {message['from']} to {message['to']}: {text}"
    if message["kind"] == "copy":
        ET.SubElement(group, "circle", {"cx": str(start), "cy": str(y - 4), "r": "4"})
        ET.SubElement(group, "text", {"x": str(start + 10), "y": str(y), "class": "what start"}).text = text
        return
    sign = 1 if end > start else -1
    line = {"x1": str(start + 3 * sign), "x2": str(end - 9 * sign), "y1": str(y), "y2": str(y)}
    ET.SubElement(group, "line", line)
    tip = f"M{end - 2 * sign},{y}l{-9 * sign},-4.5v9Z"
    ET.SubElement(group, "path", {"d": tip})
    ET.SubElement(group, "text", {"x": str((start + end) / 2), "y": str(y - 6), "class": "what"}).text = _short(text)


def _short(text: str, most: int = 33) -> str:
    text = text.removeprefix("FFA_").replace("MSG_SEND_DIRECT_", "DIRECT_")
    return text if len(text) <= most else text[: most - 1] + "…"
