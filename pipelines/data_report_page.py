"""Renders the page of a dataset's report (`pipelines.data_report`) from statistics and samples.

Reasons, domains, captions and names come from the data and are hostile input: all of it goes
through `report_html.el`, which escapes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report_charts import histogram, ticks
from pipelines.report_content import IngestedSource, IngestionSection, Sample
from pipelines.report_html import Html, el, facts, figure, join, note, number, page, size, table
from pipelines.report_sections import ingestion

_MOST_BARS = 30
_MOST_ROWS = 40  # in a table whose length depends on the data
_CAPTIONS = 3  # shown per picture
_BARS = "A bar is labelled with the value at which it begins."
_TAIL = 0.005  # share of the values that may be merged in the last bar


@dataclass(frozen=True)
class Shown:
    """A sample: a picture with captions, or a text."""

    id: str
    picture: Sample | None = None
    text: str = ""


def render(stats: Mapping[str, Any], samples: Sequence[Shown]) -> str:
    """The page as one string. Sections without content are left out."""
    lineage = stats["lineage"]
    code = lineage.get("code", {})
    texts = "text_characters" in stats["histograms"]
    kept = "documents" if texts else "images"
    known = [
        ("Commit", stats["version"]),
        ("Created", stats["created"]),
        ("Job", stats["job"]),
        ("Code", " ".join(filter(None, (code.get("beit3-ray"), code.get("git", "")[:12])))),
        ("Files", f"{stats['files']:,}, {size(stats['file_bytes'])}"),
        (kept.capitalize(), f"{stats['kept']:,}, {size(stats['bytes'])}"),
        ("Captions", f"{stats['captions']:,}" if stats["captions"] else ""),
    ]
    share = number(stats["kept"] / stats["read"] if stats["read"] else None, percent=True)
    summary = f"{stats['kept']:,} {kept} of {stats['read']:,} records: {share}"
    sections = [
        ("yield", "Yield", _yield(stats)),
        ("failures", "Failures", _failures(stats)),
        ("sizes", "Image sizes", _sizes(stats)),
        ("texts", "Texts" if texts else "Captions", _words(stats)),
        ("duplicates", "Duplicates", _duplicates(stats)),
        ("leaks", "Leaks", _leaks(stats)),
        ("samples", "Samples", _samples(samples)),
        ("lineage", "Lineage", _lineage(stats)),
    ]
    return page(stats["dataset"], summary, facts(known), sections)


# -- yield and failures ---------------------------------------------------------------------------


def _yield(stats: Mapping[str, Any]) -> Html | None:
    sources = stats["sources"]
    alone = len(sources) == 1  # then the whole dataset's counts are that source's
    return ingestion(
        IngestionSection(
            [
                IngestedSource(
                    name, of["read"], of["kept"], set_aside=of["set_aside"],
                    captions=stats["captions"] if alone else 0,
                    bytes=stats["bytes"] if alone else 0,
                )
                for name, of in sources.items()
            ],
            "" if alone else "Captions and bytes are not counted by source.",
        )
    )  # fmt: skip


def _failures(stats: Mapping[str, Any]) -> Html | None:
    if not stats["set_aside"]:
        return None
    rows = [
        el("tr", el("td", stage), el("td", reason, class_="words left"), el("td", f"{count:,}"),
           el("td", number(count / stats["read"], percent=True)))
        for stage, reasons in stats["stages"].items()
        for reason, count in _most(reasons)
    ]  # fmt: skip
    http = [(status, count) for status, count in stats["http"].items()]
    return join(
        el("h3", "By stage"),
        table(["Stage", "Reason", "Records", "Of all read"], rows[:_MOST_ROWS], left=["Reason"]),
        note(_more(rows)),
        (el("h3", "By HTTP status"), _pairs(["Status", "Records"], http)) if http else None,
        _domains(stats),
    )


def _domains(stats: Mapping[str, Any]) -> Html | None:
    failing = [of for of in stats["domains"] if of["set_aside"]]
    if not failing:
        return None
    rows = []
    for of in failing:
        total = of["kept"] + of["set_aside"]
        reasons = ", ".join(f"{reason} ({n:,})" for reason, n in list(of["reasons"].items())[:4])
        cells = [el("td", f"{of['set_aside']:,}"), el("td", f"{of['kept']:,}")]
        cells.append(el("td", number(of["set_aside"] / total, percent=True)))
        words = el("td", reasons, class_="words left small")
        rows.append(el("tr", el("td", of["domain"], class_="words"), *cells, words))
    rare = stats["rows_of_rare_domains"]
    return join(
        el("h3", "By domain"),
        table(["Domain", "Failed", "Kept", "Share", "Why"], rows, left=["Why"]),
        note(
            "Those with most failures in downloading and decoding."
            + (f" Of {rare:,} rows of rare domains the domain was not counted." if rare else "")
        ),
    )


# -- contents -------------------------------------------------------------------------------------


def _sizes(stats: Mapping[str, Any]) -> Html | None:
    known = stats["histograms"]
    charts = []
    if "width" in known:
        charts += [_numbers("Width, pixels", known["width"]),
                   _numbers("Height, pixels", known["height"])]  # fmt: skip
        charts.append(histogram("Width : height", _aspects(known["aspect"])))
    if "bytes" in known:
        mean = stats["bytes"] / max(1, stats["kept"])
        charts.append(
            histogram("Stored bytes of an image", _octaves(known["bytes"], size),
                      note=f"mean {size(round(mean))}")
        )  # fmt: skip
    return join(el("div", *charts, class_="charts"), note(_BARS)) if charts else None


def _words(stats: Mapping[str, Any]) -> Html | None:
    known = stats["histograms"]
    charts = []
    if stats["captions"]:
        charts += [
            _numbers("Captions of an image", known["captions_per_image"]),
            _numbers("Words of a caption", known["words"]),
            _numbers("Characters of a caption", known["characters"]),
        ]
    if "text_characters" in known:
        bars = _octaves(known["text_characters"], lambda n: f"{n:,}")
        charts.append(histogram("Characters of a document", bars))
    languages = stats["languages"]
    said = _most(languages)[:_MOST_ROWS]
    aside = _most(stats["captions_set_aside"])[:_MOST_ROWS]
    return join(
        (el("div", *charts, class_="charts"), note(_BARS)) if charts else None,
        (el("h3", "Captions set aside, of images that are kept"),
         _pairs(["Reason", "Captions"], aside)) if aside else None,
        (el("h3", "Languages"), _pairs(["Language", "Texts"], said)) if languages else None,
    )  # fmt: skip


def _numbers(title: str, counts: Mapping[str, int]) -> Html:
    """A histogram of integers with equal bins; the largest few may share the last bar."""
    values = sorted((int(v), n) for v, n in counts.items())
    total = sum(n for _, n in values)
    low, high = values[0][0], _quantile(values, 1 - _TAIL)
    step = 1
    if high - low >= _MOST_BARS:
        marks = ticks(low, high, _MOST_BARS - 5)
        step = max(1, math.ceil(marks[1] - marks[0]))
    first, last = low // step, high // step
    bars = [0] * (last - first + 1)
    over = 0
    for value, n in values:
        if value // step <= last:
            bars[value // step - first] += n
        else:
            over += n
    labels = [(f"{(first + i) * step:,}", n) for i, n in enumerate(bars)]
    if over:
        labels.append((f"{(last + 1) * step:,}+", over))
    mean = sum(v * n for v, n in values) / total
    words = f"median {_quantile(values, 0.5):,}, mean {number(mean)}, from {low:,} to "
    return histogram(title, labels, note=f"{words}{values[-1][0]:,}")


def _quantile(values: Sequence[tuple[int, int]], share: float) -> int:
    """The smallest value that at least `share` of all values do not exceed."""
    total, seen = sum(n for _, n in values), 0
    for value, n in values:
        seen += n
        if seen >= share * total:
            return value
    return values[-1][0]


def _aspects(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """Bars of a tenth of a doubling each, labelled with the ratio at which they begin."""
    places = [int(k) for k in counts]
    return [
        (f"{2 ** ((k - 0.5) / 10):.2f}", counts.get(str(k), 0))
        for k in range(min(places), max(places) + 1)
    ]


def _octaves(counts: Mapping[str, int], say: Any) -> list[tuple[str, int]]:
    """Bars of a quarter of a doubling each, labelled with where they begin."""
    places = [int(k) for k in counts if int(k) >= 0]
    bars = [("0", counts["-1"])] if "-1" in counts else []
    if places:
        bars += [
            (say(math.ceil(2 ** (k / 4))), counts.get(str(k), 0))
            for k in range(min(places), max(places) + 1)
        ]
    return bars


# -- duplicates and leaks -------------------------------------------------------------------------


def _duplicates(stats: Mapping[str, Any]) -> Html:
    if not stats["duplicates"]:
        return el("p", "No row was set aside as a duplicate.", class_="note")
    kinds = sorted({kind for of in stats["duplicates"].values() for kind in of})
    rows = [
        el("tr", el("td", name), *(el("td", f"{of.get(kind, 0):,}") for kind in kinds))
        for name, of in stats["duplicates"].items()
    ]
    return table(["Repeats a row of", *kinds], rows)


def _leaks(stats: Mapping[str, Any]) -> Html:
    if not stats["leaks"]:
        return el("p", "No row was set aside because a benchmark has its picture.", class_="note")
    return _pairs(["Benchmark", "Rows held out"], _most(stats["leaks"]))


# -- samples --------------------------------------------------------------------------------------


def _samples(samples: Sequence[Shown]) -> Html | None:
    if not samples:
        return None
    pictures = [_figure(s, s.picture) for s in samples if s.picture is not None]
    texts = [
        join(el("div", s.id, class_="small"), el("blockquote", s.text))
        for s in samples
        if s.picture is None
    ]
    return join(el("div", *pictures, class_="grid") if pictures else None, texts)


def _figure(sample: Shown, picture: Sample) -> Html:
    said = [el("p", caption) for caption in picture.captions[:_CAPTIONS]]
    more = len(picture.captions) - _CAPTIONS
    if more > 0:
        said.append(el("p", f"and {more} more", class_="small"))
    return figure(
        picture.image or b"", f"sample {sample.id}", said, el("p", sample.id, class_="tag")
    )


# -- lineage --------------------------------------------------------------------------------------


def _lineage(stats: Mapping[str, Any]) -> Html:
    lineage = stats["lineage"]
    inputs = [_input(of) for of in lineage.get("inputs", ())]
    config = [
        el("tr", el("td", key), el("td", _value(value), class_="words left"))
        for key, value in sorted(lineage.get("config", {}).items())
    ]
    code = [
        el("tr", el("td", key), el("td", value, class_="words left"))
        for key, value in lineage.get("code", {}).items()
    ]
    fingerprint = el("tr", el("td", "fingerprint"), el("td", stats["fingerprint"], class_="left"))
    return join(
        el("h3", "Inputs"),
        table(["Input", "Bytes", "SHA-256, or commit"], inputs[:_MOST_ROWS],
              left=["SHA-256, or commit"]) if inputs else note("none"),
        note(_more(inputs)),
        el("h3", "Configuration"),
        table(["Field", "Value"], config, left=["Value"]),
        el("h3", "Code"),
        table(["What", "Version"], [*code, fingerprint], left=["Version"]),
    )  # fmt: skip


def _input(of: Mapping[str, Any]) -> Html:
    """A published file with its checksum, or another dataset with its commit."""
    name, check = of.get("file") or of.get("dataset"), of.get("sha256") or of.get("commit")
    count = of.get("bytes")
    return el(
        "tr",
        el("td", name, class_="words"),
        el("td", "·" if count is None else f"{count:,}"),
        el("td", el("code", check) if check else "not taken", class_="words left"),
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# -- tables ---------------------------------------------------------------------------------------


def _most(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _pairs(head: Sequence[str], rows: Sequence[tuple[str, int]]) -> Html:
    return table(head, [el("tr", el("td", k), el("td", f"{n:,}")) for k, n in rows])


def _more(rows: Sequence[Html]) -> str:
    hidden = len(rows) - _MOST_ROWS
    return f"And {hidden:,} more in stats.json." if hidden > 0 else ""
