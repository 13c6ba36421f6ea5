"""Charts as inline SVG and HTML: lines, dots, stacked bars, code maps."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from pipelines.report_content import Chart, Codes, Curve, Score
from pipelines.report_html import Html, el, number

COLOURS = ("#17607d", "#c0752f", "#5b8c3e", "#8a4f8f", "#b3423a", "#3f6fb5", "#7a6a3a", "#4b9a94")
KEPT, HELD_OUT = "#9cc4cf", "#1b2430"
_ASIDE = ("#c0752f", "#d9a15f", "#b3423a", "#8a4f8f", "#7a6a3a", "#d6786c", "#a88bb0", "#c9b458")
_ASIDE += ("#6b7683", "#a35a7a")
_MOST_POINTS = 400
_SMOOTH_FROM = 60
_WIDTH, _HEIGHT = 560, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 14, 42
_LETTER = 7.0  # width, about


def line_chart(chart: Chart) -> Html:
    """Values over steps, with axes, legend and, if given, a baseline."""
    curves = [(c.label, _finite(c)) for c in chart.curves]
    curves = [(label, points) for label, points in curves if points]
    if not curves:
        return el("figure", el("h4", chart.title), el("p", "no values were logged", class_="note"))
    xs = [x for _, points in curves for x, _ in points]
    ys = [y for _, points in curves for _, y in points]
    if chart.baseline is not None:
        ys.append(chart.baseline)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_from, x_to = min(xs), max(max(xs), min(xs) + 1e-9)
    y_from, y_to = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def x(value: float) -> float:
        return _LEFT + (value - x_from) / (x_to - x_from) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_from) / (y_to - y_from) * (_HEIGHT - _TOP - _BOTTOM)

    marks: list[Html] = []
    for tick in y_ticks:
        level, right = f"{y(tick):.1f}", _WIDTH - _RIGHT
        marks.append(el("line", x1=_LEFT, x2=right, y1=level, y2=level, class_="grid-line"))
        label = f"{100 * tick:g} %" if chart.percent else f"{tick:g}"
        marks.append(el("text", label, x=_LEFT - 8, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    for tick in (t for t in x_ticks if x_from <= t <= x_to):
        label = f"{tick:,.0f}" if tick == int(tick) else f"{tick:g}"
        place = min(x(tick), _WIDTH - len(label) * _LETTER / 2)  # the last must not be cut off
        marks.append(
            el("text", label, x=f"{place:.1f}", y=_HEIGHT - _BOTTOM + 18, text_anchor="middle")
        )
    marks.append(
        el(
            "text",
            chart.x_label,
            x=_WIDTH - _RIGHT,
            y=_HEIGHT - 6,
            text_anchor="end",
            class_="axis",
        )
    )
    if chart.baseline is not None:
        level = f"{y(chart.baseline):.1f}"
        marks.append(
            el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=level, y2=level, stroke="#5a6675",
               stroke_dasharray="5 4", stroke_width=1.4)
        )  # fmt: skip
    smoothed = False
    for (_, points), colour in zip(curves, _cycle(COLOURS, len(curves)), strict=True):
        shown = _thin(points)
        if chart.smooth and len(shown) >= _SMOOTH_FROM:
            smoothed = True
            marks.append(_path(shown, x, y, colour, 1, 0.28))
            shown = _smooth(shown)
        if len(shown) == 1:
            (px, py) = shown[0]
            marks.append(el("circle", cx=f"{x(px):.1f}", cy=f"{y(py):.1f}", r=4, fill=colour))
        marks.append(_path(shown, x, y, colour, 2, 1))
    last = "; ".join(
        f"{label}: {number(points[0][1], percent=chart.percent)} to "
        f"{number(points[-1][1], percent=chart.percent)}"
        for label, points in curves
    )
    svg = el(
        "svg", el("title", f"{chart.title}: {last}"), *marks,
        view_box=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=f"{chart.title}. {last}",
    )  # fmt: skip
    entries = [
        (c, label) for (label, _), c in zip(curves, _cycle(COLOURS, len(curves)), strict=True)
    ]
    dashed = None
    if chart.baseline is not None:
        dashed = f"{chart.baseline_label} ({number(chart.baseline, percent=chart.percent)})"
    keys = legend(entries, dashed)
    words = chart.note + (" Strong lines: moving averages." if smoothed else "")
    below = el("p", words.strip(), class_="note") if words else None
    return el("figure", el("h4", chart.title), svg, keys, below)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round values from at or below `low` to at or above `high`."""
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def score_dots(score: Score) -> Html:
    """Blind, scratch and pretrained on one line from 0 to 1, or to the largest value."""
    values = {"blind": score.blind, "from scratch": score.scratch, "pretrained": score.pretrained}
    known = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
    if not known:
        return el("span")
    top = max([1.0 if score.percent else 0.0, *known.values()]) or 1.0
    low = min(0.0, *known.values())
    style = {"blind": "#98a2ae", "from scratch": "#c0752f", "pretrained": "#17607d"}

    def x(value: float) -> str:
        return f"{8 + (value - low) / (top - low) * 184:.1f}"

    places = [x(v) for v in known.values()]
    marks = [
        el("line", x1=8, x2=192, y1=10, y2=10, class_="grid-line"),
        el("line", x1=min(places, key=float), x2=max(places, key=float), y1=10, y2=10,
           stroke="#c3cbd4", stroke_width=3),
    ]  # fmt: skip
    marks += [el("circle", cx=x(v), cy=10, r=5.5, fill=style[k]) for k, v in known.items()]
    said = ", ".join(f"{k} {number(v, percent=score.percent)}" for k, v in known.items())
    alt = f"{score.task}, {score.metric}: {said}"
    return el("svg", el("title", alt), *marks, view_box="0 0 200 20", role="img", aria_label=alt)


def histogram(title: str, bars: Sequence[tuple[str, int]], *, note: str = "") -> Html:
    """Counts as bars, from left to right, with labels below as many bars as there is room for."""
    if not any(count for _, count in bars):
        return el("figure", el("h4", title), el("p", "nothing to count", class_="note"))
    most = max(count for _, count in bars)
    y_ticks = [t for t in ticks(0, most, 4) if t == int(t)]
    top = max(y_ticks[-1], most)
    width = (_WIDTH - _LEFT - _RIGHT) / len(bars)
    floor = _HEIGHT - _BOTTOM

    def y(value: float) -> float:
        return floor - value / top * (floor - _TOP)

    marks: list[Html] = []
    for tick in y_ticks:
        level = f"{y(tick):.1f}"
        marks.append(
            el("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=level, y2=level, class_="grid-line")
        )
        label = f"{tick:,.0f}"
        marks.append(el("text", label, x=_LEFT - 8, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    longest = max(len(label) for label, _ in bars)
    every = math.ceil((_LETTER * longest + 10) / width)
    for place, (label, count) in enumerate(bars):
        left = _LEFT + place * width
        marks.append(
            el("rect", el("title", f"{label}: {count:,}"), x=f"{left + 0.06 * width:.1f}",
               y=f"{y(count):.1f}", width=f"{0.88 * width:.1f}", height=f"{floor - y(count):.1f}",
               fill=COLOURS[0])
        )  # fmt: skip
        if place % every == 0:
            middle = f"{left + width / 2:.1f}"
            marks.append(el("text", label, x=middle, y=floor + 18, text_anchor="middle"))
    said = ", ".join(f"{label}: {count:,}" for label, count in bars if count)
    svg = el("svg", el("title", title), *marks, view_box=f"0 0 {_WIDTH} {_HEIGHT}", role="img",
             aria_label=f"{title}. {said}")  # fmt: skip
    return el("figure", el("h4", title), svg, el("p", note, class_="note") if note else None)


def stacked(label: str, kept: int, aside: Mapping[str, int], colours: Mapping[str, str]) -> Html:
    """How much of a source was kept, and why the rest was not: one bar over the whole width."""
    total = max(1, kept + sum(aside.values()))
    parts = [("kept", kept, KEPT)] + [(r, n, colours[r]) for r, n in aside.items()]
    spans = [
        el("span", title=f"{reason}: {count:,}", style=f"width:{100 * count / total:.3f}%;"
           f"background:{colour}")
        for reason, count, colour in parts if count
    ]  # fmt: skip
    said = ", ".join(f"{reason} {count:,}" for reason, count, _ in parts)
    return el("div", *spans, class_="bar", role="img", aria_label=f"{label}: {said}")


def reason_colours(reasons: Sequence[str]) -> dict[str, str]:
    """A colour for each reason; all reasons to hold out share one that stands out."""
    others = [r for r in reasons if not r.startswith("held out")]
    colours = dict(zip(others, _cycle(_ASIDE, len(others)), strict=True))
    return colours | {r: HELD_OUT for r in reasons if r.startswith("held out")}


def legend(entries: Sequence[tuple[str, str]], dashed: str | None = None) -> Html:
    """The meaning of each colour, and of a dashed line."""
    keys = [el("span", el("i", style=f"background:{colour}"), words) for colour, words in entries]
    if dashed is not None:
        keys.append(el("span", el("i", class_="dashed"), dashed))
    return el("div", *keys, class_="legend")


def usage_chart(usage: Sequence[float]) -> Html:
    """Codes by rank: how evenly a codebook is used."""
    counts = sorted((float(u) for u in usage), reverse=True)
    total = sum(counts) or 1.0
    points = [(float(rank + 1), count / total) for rank, count in enumerate(counts)]
    even = 1 / max(1, len(counts))
    chart = Chart(
        "Codebook usage", [Curve("share of patches", points)], x_label="codes, the commonest first",
        baseline=even, baseline_label="even use", smooth=False, percent=True,
    )  # fmt: skip
    return line_chart(chart)


def code_map(codes: Codes, hidden: Sequence[Sequence[bool]] | None = None) -> Image.Image:
    """One pixel per patch: each code has its own colour; patches that aren't hidden are dimmed."""
    grid = np.asarray(codes, dtype=np.int64)
    names, places = np.unique(grid, return_inverse=True)
    palette = np.array([_code_colour(int(code)) for code in names], dtype=np.float32)
    pixels = palette[places.reshape(-1)].reshape(*grid.shape, 3)
    if hidden is not None:
        seen = ~np.asarray(hidden, dtype=bool)
        pixels[seen] = 0.18 * pixels[seen] + 0.82 * 240
    return Image.fromarray(pixels.round().astype(np.uint8))


def _code_colour(code: int) -> tuple[float, float, float]:
    """A colour for a code, distinct from those of nearby codes."""
    hue = code * 0.61803398875 % 1.0
    lightness = 0.42 + 0.3 * (code * 0.7548776662 % 1.0)
    r, g, b = colorsys.hls_to_rgb(hue, lightness, 0.55)
    return 255 * r, 255 * g, 255 * b


def _finite(curve: Curve) -> list[tuple[float, float]]:
    return [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]


def _cycle(colours: Sequence[str], count: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(count)]


def _thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_MOST_POINTS` points, each the mean of its neighbours: a page needs no more."""
    if len(points) <= _MOST_POINTS:
        return points
    groups = np.array_split(np.asarray(points, dtype=np.float64), _MOST_POINTS)
    return [(float(g[:, 0].mean()), float(g[:, 1].mean())) for g in groups]


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average over a twentieth of the curve."""
    half = max(1, len(points) // 40)
    values = np.asarray(points, dtype=np.float64)
    means = [values[max(0, i - half) : i + half + 1, 1].mean() for i in range(len(points))]
    return [(x, float(mean)) for (x, _), mean in zip(points, means, strict=True)]


def _path(points, x, y, colour: str, width: float, opacity: float) -> Html:  # type: ignore[no-untyped-def]
    places = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    return el(
        "polyline", points=places, fill="none", stroke=colour, stroke_width=width,
        stroke_opacity=opacity, stroke_linejoin="round",
    )  # fmt: skip
