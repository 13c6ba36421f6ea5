"""The report's sections on data, tokenizers and pretraining."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.report_charts import (
    HELD_OUT,
    KEPT,
    code_map,
    legend,
    line_chart,
    reason_colours,
    stacked,
    usage_chart,
)
from pipelines.report_content import (
    ImageTokenizer,
    IngestedSource,
    IngestionSection,
    MaskedExample,
    TextTokenizer,
    TokenizerSection,
    TrainingSection,
)
from pipelines.report_html import (
    Html,
    el,
    facts,
    figure,
    img,
    join,
    note,
    number,
    size,
    table,
)

# -- ingestion ------------------------------------------------------------------------------------


def ingestion(section: IngestionSection | None) -> Html | None:
    if section is None or not section.sources:
        return None
    sources = section.sources
    head = ("Source", "Records read", "Kept", "Captions", "Stored", "Set aside", "Held out")
    rows = []
    for s in sources:
        held = sum(n for reason, n in s.set_aside.items() if reason.startswith("held out"))
        counts = (s.read, s.rows, s.captions, None, sum(s.set_aside.values()), held)
        cells = [el("td", size(s.bytes) if c is None else f"{c:,}") for c in counts]
        rows.append(el("tr", el("td", el("b", s.name)), *cells))
    return join(
        table(head, rows),
        _failures(sources),
        [_gallery(source) for source in sources],
        note(section.note),
    )


def _failures(sources: Sequence[IngestedSource]) -> Html | None:
    totals: dict[str, int] = {}
    for source in sources:
        for reason, count in source.set_aside.items():
            totals[reason] = totals.get(reason, 0) + count
    reasons = sorted(totals, key=lambda r: (r.startswith("held out"), -totals[r], r))
    if not reasons:
        return None
    colours = reason_colours(reasons)
    bars = []
    for s in sources:
        aside = {r: s.set_aside[r] for r in reasons if r in s.set_aside}
        share = s.rows / s.read if s.read else 0.0
        kept = el("span", f"{100 * share:.1f} % kept")
        bars += [el("span", s.name), stacked(s.name, s.rows, aside, colours), kept]
    dark = any(r.startswith("held out") for r in reasons)
    entries = [(KEPT, "kept"), *((colours[r], r) for r in reasons if colours[r] != HELD_OUT)]
    entries += [(HELD_OUT, "held out: in a benchmark")] if dark else []
    with_any = [s for s in sources if s.set_aside]
    rows = [
        el("tr", el("td", reason), *(_count(s.set_aside.get(reason, 0)) for s in with_any),
           el("td", f"{totals[reason]:,}"))
        for reason in reasons
    ]  # fmt: skip
    return join(
        el("h3", "What was kept, and why the rest was set aside"),
        el("div", *bars, class_="bars"),
        legend(entries),
        el("h3", "Reasons"),
        table(["Reason", *(s.name for s in with_any), "All"], rows),
    )


def _count(count: int) -> Html:
    return el("td", f"{count:,}" if count else "·")


def _gallery(source: IngestedSource) -> Html | None:
    if not source.samples and not source.texts:
        return None
    pictures = [
        figure(sample.image, f"sample of {source.name}", [el("p", c) for c in sample.captions])
        for sample in source.samples
    ]
    return join(
        el("h3", source.name),
        el("div", *pictures, class_="grid") if pictures else None,
        [el("blockquote", words) for words in source.texts],
    )


# -- tokenizers -----------------------------------------------------------------------------------


def tokenizers(section: TokenizerSection | None) -> Html | None:
    if section is None or (section.text is None and section.image is None):
        return None
    return join(_text_tokenizer(section.text), _image_tokenizer(section.image))


def _text_tokenizer(text: TextTokenizer | None) -> Html | None:
    if text is None:
        return None
    shown = []
    for whole, pieces in text.examples:
        cut = [el("span", piece) for piece in pieces]
        shown += [el("div", whole, class_="small"), el("div", *cut, class_="pieces")]
    known = [("Vocabulary", f"{text.vocabulary:,} pieces"), *text.facts.items()]
    return join(el("h3", "Text"), facts(known), shown)


def _image_tokenizer(image: ImageTokenizer | None) -> Html | None:
    if image is None:
        return None
    known = [
        ("Codebook", f"{image.codes:,} codes"),
        ("Used", "–" if image.used is None else f"{image.used:,} of {image.codes:,}"),
        ("Dead", number(image.dead)),
        ("Perplexity", number(image.perplexity)),
        ("Cosine to the teacher", number(image.cosine)),
        *image.facts.items(),
    ]
    maps = [
        el("div", img(m.image, "a tokenized picture", side=160),
           img(code_map(m.codes), "its code map: one colour a code", exact=True), class_="pair")
        for m in image.maps
    ]  # fmt: skip
    codes = [
        el("div", el("b", f"code {code}"),
           el("div", *(img(p, f"patch of code {code}", side=48, exact=True) for p in patches)),
           class_="code")
        for code, patches in image.patches.items()
    ]  # fmt: skip
    return join(
        el("h3", "Image"),
        facts(known),
        el("div", usage_chart(image.usage), class_="charts") if image.usage else None,
        (el("h4", "Pictures and their codes"), el("div", *maps, class_="grid wide"))
        if maps
        else None,
        (el("h4", "Patches that share a code"), el("div", *codes, class_="codes"))
        if codes
        else None,
    )


# -- pretraining ----------------------------------------------------------------------------------


def training(section: TrainingSection | None) -> Html | None:
    if section is None or not (section.charts or section.masked or section.facts):
        return None
    charts = [line_chart(chart) for chart in section.charts]
    masked = [_masked(example) for example in section.masked]
    return join(
        facts(section.facts.items()),
        el("div", *charts, class_="charts") if charts else None,
        (
            el("h3", "What the model puts in the place of hidden patches"),
            el("div", *masked, class_="grid wide"),
        )
        if masked
        else None,
        note(section.note),
    )


def _masked(example: MaskedExample) -> Html:
    said = "the codes that the model predicts"
    pictures = [
        img(example.image, "the picture", side=160),
        img(example.masked, "the picture with hidden patches", side=160),
    ]
    below = []
    if example.predicted is not None:
        pictures.append(img(code_map(example.predicted, example.hidden), said, exact=True))
    if example.true is not None:
        pictures.append(img(code_map(example.true, example.hidden), "the true codes", exact=True))
    if example.predicted is not None and example.true is not None:
        right, total = _agreement(example)
        below.append(el("p", f"Below: predicted, true. {right} of {total} hidden patches right."))
    if example.text:
        below.append(el("p", example.text, class_="said"))
    caption = el("figcaption", *below) if below else None
    return el("figure", el("div", *pictures, class_="pair"), caption)


def _agreement(example: MaskedExample) -> tuple[int, int]:
    """Number of hidden patches predicted correctly, and of all hidden patches."""
    right = total = 0
    for r, row in enumerate(example.true or ()):
        for c, code in enumerate(row):
            if example.hidden is None or example.hidden[r][c]:
                total += 1
                right += int(example.predicted is not None and example.predicted[r][c] == code)
    return right, total
