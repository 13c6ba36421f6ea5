"""A sweep's charts as inline SVG: parallel coordinates and learning curves, a line per trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipelines.report_charts import ticks
from pipelines.report_html import Html, el, number
from tuning.spaces import Choice, Range

BEST, GREY = "#c0752f", "#98a2ae"
_LOW, _HIGH = (0xD3, 0xDC, 0xE2), (0x17, 0x60, 0x7D)
_WIDTH = 1100
_CSS = """
.trial{fill:none;stroke-linejoin:round}.trial:hover{stroke:#1b2430;stroke-width:4.5;stroke-opacity:1}
svg.wide{min-width:680px}
"""


@dataclass(frozen=True)
class Line:
    """A trial, as it is drawn."""

    name: str
    values: Mapping[str, Any]
    score: float
    curve: Sequence[Sequence[float]]
    """Steps and scores."""
    best: bool = False

    def said(self, percent: bool) -> str:
        shown = ", ".join(f"{short(k)} {_value(v)}" for k, v in self.values.items())
        return f"{self.name}: {number(self.score, percent=percent)}; {shown}"


def short(name: str) -> str:
    """A hyperparameter's name for display."""
    return name.removeprefix("train.").replace("_", " ")


def styles() -> Html:
    """Styles that these charts need beside the page's own."""
    return el("style", Html(_CSS))


# -- parallel coordinates -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Axis:
    name: str
    marks: Sequence[tuple[str, float]]
    """Labels and where they stand, 0 at the bottom and 1 at the top."""
    place: Callable[[Line], float]


def parallel(
    fields: Mapping[str, Range | Choice], metric: str, lines: Sequence[Line], *, percent: bool
) -> Html:
    """An axis for each hyperparameter and for the score; each trial is a line over them."""
    height, left, right, top, bottom = 380, 70, 80, 50, 24
    axes = [_axis(name, field, lines) for name, field in fields.items()]
    axes.append(_score_axis(metric, lines, percent))
    step = (_WIDTH - left - right) / max(1, len(axes) - 1)

    def y(share: float) -> float:
        return height - bottom - share * (height - top - bottom)

    parts: list[Html] = []
    for i, axis in enumerate(axes):
        x = left + i * step
        parts.append(
            el("line", x1=x, x2=x, y1=y(0), y2=y(1), stroke="#c3cbd4", stroke_width=1.5)
        )  # fmt: skip
        parts.append(
            el("text", el("title", axis.name), short(axis.name), x=x, y=22, text_anchor="middle",
               style="font-weight:600;font-size:14px")
        )  # fmt: skip
    for line in _in_order(lines):
        places = [(left + i * step, y(axis.place(line))) for i, axis in enumerate(axes)]
        path = f"M{places[0][0]:.1f},{places[0][1]:.1f}"
        for (x0, y0), (x1, y1) in pairwise(places):
            bend = 0.4 * (x1 - x0)
            path += f"C{x0 + bend:.1f},{y0:.1f} {x1 - bend:.1f},{y1:.1f} {x1:.1f},{y1:.1f}"
        parts.append(
            el("path", el("title", line.said(percent)), d=path, class_="trial",
               **_stroke(line, lines))
        )  # fmt: skip
    for i, axis in enumerate(axes):  # over the lines, so that they can be read
        at_right = i == len(axes) - 1
        x = left + i * step + (8 if at_right else -8)
        for label, share in axis.marks:
            parts.append(
                el("text", label, x=x, y=f"{y(share) + 4:.1f}",
                   text_anchor="start" if at_right else "end",
                   style="paint-order:stroke;stroke:#fff;stroke-width:4px")
            )  # fmt: skip
    said = f"Parallel coordinates of {len(lines)} trials; the best is {_best(lines, percent)}"
    svg = el("svg", el("title", said), *parts, view_box=f"0 0 {_WIDTH} {height}", role="img",
             aria_label=said, class_="wide")  # fmt: skip
    return el("figure", el("div", svg, class_="scroll"), _key(lines, percent))


def _axis(name: str, field: Range | Choice, lines: Sequence[Line]) -> _Axis:
    if isinstance(field, Range):
        scale = math.log if field.log else float
        low, high = scale(field.low), scale(field.high)

        def share(value: float) -> float:
            return (scale(value) - low) / (high - low) if high > low else 0.5

        inner = [t for t in _marks(field) if field.low <= t <= field.high]
        marks = [(number(t), share(t)) for t in inner]
        return _Axis(name, marks, lambda line: share(line.values[name]))

    count = len(field.values)
    levels = {value: (i + 0.5) / count for i, value in enumerate(field.values)}
    # Trials of the same choice lie side by side, so that their lines can be told apart.
    of_choice: dict[Any, list[str]] = {}
    for line in _in_order(lines):
        of_choice.setdefault(line.values[name], []).append(line.name)

    def place(line: Line) -> float:
        beside = of_choice[line.values[name]]
        offset = (beside.index(line.name) + 0.5) / len(beside) - 0.5
        return levels[line.values[name]] + 0.35 * offset / count

    return _Axis(name, [(_value(v), level) for v, level in levels.items()], place)


def _score_axis(metric: str, lines: Sequence[Line], percent: bool) -> _Axis:
    scores = [line.score for line in lines]
    marks = ticks(min(scores), max(scores), 4)
    low, high = marks[0], marks[-1]
    shown = [(number(t, percent=percent), (t - low) / (high - low)) for t in marks]
    return _Axis(metric, shown, lambda line: (line.score - low) / (high - low))


def _marks(field: Range) -> list[float]:
    if not field.log:
        return ticks(field.low, field.high, 4)
    decades = range(math.floor(math.log10(field.low)), math.ceil(math.log10(field.high)) + 1)
    return [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]


# -- learning curves ------------------------------------------------------------------------------


def curves(metric: str, lines: Sequence[Line], *, percent: bool) -> Html:
    """Each trial's score at its evaluations."""
    height, left, right, top, bottom = 320, 70, 20, 14, 42
    points = [point for line in lines for point in line.curve if math.isfinite(point[1])]
    if not points:
        return el("p", "No evaluation was logged.", class_="note")
    levels = ticks(min(p[1] for p in points), max(p[1] for p in points))
    last = max(p[0] for p in points)

    def x(step: float) -> float:
        return left + step / last * (_WIDTH - left - right)

    def y(score: float) -> float:
        share = (score - levels[0]) / (levels[-1] - levels[0])
        return height - bottom - share * (height - top - bottom)

    parts: list[Html] = []
    for level in levels:
        at, label = f"{y(level):.1f}", number(level, percent=percent)
        parts.append(el("line", x1=left, x2=_WIDTH - right, y1=at, y2=at, class_="grid-line"))
        parts.append(el("text", label, x=left - 8, y=f"{y(level) + 4:.1f}", text_anchor="end"))
    parts += [
        el("text", f"{tick:,g}", x=f"{x(tick):.1f}", y=height - bottom + 18, text_anchor="middle")
        for tick in ticks(0, last)
        if tick <= last
    ]
    parts.append(el("text", "step", x=_WIDTH - right, y=height - 6, text_anchor="end"))
    for line in _in_order(lines):
        places = [(x(s), y(v)) for s, v in line.curve if math.isfinite(v)]
        stroke = _stroke(line, lines)
        parts.append(
            el("polyline", el("title", line.said(percent)), class_="trial",
               points=" ".join(f"{px:.1f},{py:.1f}" for px, py in places), **stroke)
        )  # fmt: skip
        if places:
            (px, py) = places[-1]
            parts.append(
                el("circle", cx=f"{px:.1f}", cy=f"{py:.1f}", r=3.5, fill=stroke["stroke"])
            )  # fmt: skip
    said = f"{metric} by step of {len(lines)} trials; the best ends as {_best(lines, percent)}"
    svg = el("svg", el("title", said), *parts, view_box=f"0 0 {_WIDTH} {height}", role="img",
             aria_label=said, class_="wide")  # fmt: skip
    return el("figure", el("div", svg, class_="scroll"), _key(lines, percent))


# -- what both share ------------------------------------------------------------------------------


def _in_order(lines: Sequence[Line]) -> list[Line]:
    """Worst first, so that better trials are drawn over worse."""
    return sorted(lines, key=lambda line: (line.best, line.score))


def _stroke(line: Line, lines: Sequence[Line]) -> dict[str, Any]:
    if line.best:
        return {"stroke": BEST, "stroke_width": 3.5}
    low, high = min(one.score for one in lines), max(one.score for one in lines)
    share = (line.score - low) / (high - low) if high > low else 1.0
    return {"stroke": _colour(share), "stroke_width": 2}


def _colour(share: float) -> str:
    mixed = (round(a + share * (b - a)) for a, b in zip(_LOW, _HIGH, strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _key(lines: Sequence[Line], percent: bool) -> Html:
    low, high = min(one.score for one in lines), max(one.score for one in lines)
    bar = f"width:120px;background:linear-gradient(90deg,{_colour(0)},{_colour(1)})"
    words = f"from {number(low, percent=percent)} to {number(high, percent=percent)}"
    keys = [
        el("span", el("i", style=bar), words),
        el("span", el("i", style=f"background:{BEST}"), "the best trial"),
    ]
    return el("div", *keys, class_="legend")


def _best(lines: Sequence[Line], percent: bool) -> str:
    return next((line.said(percent) for line in lines if line.best), "none")


def _value(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
