"""The report's page: one HTML file that opens offline, without scripts.

    Path("report.html").write_text(render(Report(Headline("My run", ...))), encoding="utf-8")

Text from datasets is hostile input: everything goes through `report_html.el`, which escapes it, and
the page's policy forbids all scripts and requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from pipelines.report_charts import legend, score_dots
from pipelines.report_content import *  # noqa: F403 (the content's classes are this page's API)
from pipelines.report_content import (
    AnswerExample,
    AnswerSection,
    CaptionExample,
    Headline,
    Report,
    RetrievalSection,
    Score,
    SweepSection,
    Trial,
    Where,
)
from pipelines.report_html import (
    Content,
    Html,
    duration,
    el,
    facts,
    figure,
    img,
    join,
    note,
    number,
    page,
    table,
)
from pipelines.report_sections import ingestion, tokenizers, training


def render(report: Report) -> str:
    """The page as one string. Sections without content are left out."""
    head = report.headline
    built = [
        ("scores", "Scores", _scores(head)),
        ("ingestion", "Ingestion", ingestion(report.ingestion)),
        ("tokenizers", "Tokenizers", tokenizers(report.tokenizers)),
        ("pretraining", "Pretraining", training(report.pretraining)),
        ("captions", "Captions", _captions(report.captions)),
        *(
            (f"answers-{i}", section.title, _answers(section))
            for i, section in enumerate(report.answers, 1)
        ),
        ("retrieval", "Retrieval", _retrieval(report.retrieval)),
        *(
            (f"sweep-{i}", section.title, _sweep(section))
            for i, section in enumerate(report.sweeps, 1)
        ),
        ("where", "Where to look", _where(report.where)),
    ]
    known = [
        ("Date", head.date),
        ("Code", head.code_version),
        ("Total time", duration(head.seconds)),
        *head.facts.items(),
    ]
    return page(head.title, head.summary, facts(known), built)


# -- headline -------------------------------------------------------------------------------------


def _scores(head: Headline) -> Html | None:
    if not head.scores:
        return None
    keys = legend(
        [("#98a2ae", "blind"), ("#c0752f", "from scratch"), ("#17607d", "pretrained, finetuned")]
    )
    columns = ["Task", "Metric", "Blind", "From scratch", "Pretrained", ""]
    return join(
        table(columns, map(_score_row, head.scores), left=["Metric"]), keys, note(head.note)
    )


def _score_row(score: Score) -> Html:
    values = [score.blind, score.scratch, score.pretrained]
    best = best_of(values, lower=score.lower_is_better)
    cells = [_value(v, best=v is not None and v == best, percent=score.percent) for v in values]
    words = [el("b", score.task), el("span", score.note, class_="small") if score.note else None]
    metric = score.metric + (" (lower is better)" if score.lower_is_better else "")
    return el(
        "tr",
        el("td", words),
        el("td", metric, class_="words left"),
        *cells,
        el("td", score_dots(score), class_="wide"),
    )


def best_of(values: Iterable[float | None], *, lower: bool = False) -> float | None:
    """The best of the known values."""
    known = [v for v in values if v is not None and not math.isnan(v)]
    return (min(known) if lower else max(known)) if known else None


def _value(value: float | None, *, best: bool, percent: bool) -> Html:
    shown = number(value, percent=percent)
    return el("td", el("strong", shown, class_="best-value") if best else shown)


# -- tasks ----------------------------------------------------------------------------------------


def _captions(examples: Sequence[CaptionExample]) -> Html | None:
    if not examples:
        return None
    shown = []
    for e in examples:
        below = [_said("pretrained", e.generated)]
        if e.baseline is not None:
            below.append(_said("from scratch", e.baseline))
        below += [_said("true" if i == 0 else "", words) for i, words in enumerate(e.truths)]
        shown.append(figure(e.image, f"generated caption: {e.generated}", below))
    return el("div", *shown, class_="grid wide")


def _said(who: str, words: Content, *, verdict: str = "") -> Html:
    said = el("span", words, class_=f"said {verdict}".strip())
    return el("p", el("span", who, class_="tag"), said, class_="saying")


def _answers(section: AnswerSection) -> Html | None:
    if not section.examples:
        return None
    shown = [_answer(example) for example in section.examples]
    return join(el("div", *shown, class_="grid wide"), note(section.note))


def _answer(e: AnswerExample) -> Html:
    right = e.pretrained == e.truth if e.right is None else e.right
    below = [el("p", el("b", e.question, class_="said"))] if e.question else []
    below.append(_said("pretrained", e.pretrained, verdict="good" if right else "bad"))
    if e.scratch is not None:
        right = e.scratch == e.truth if e.scratch_right is None else e.scratch_right
        below.append(_said("from scratch", e.scratch, verdict="good" if right else "bad"))
    below.append(_said("true", e.truth))
    alt = e.question or f"a picture of: {e.truth}"
    if len(e.images) == 1:
        return figure(e.images[0], alt, below)
    pictures = [img(p, f"{alt} ({i})", side=160) for i, p in enumerate(e.images, 1)]
    return el("figure", el("div", *pictures, class_="pair"), el("figcaption", *below))


def _retrieval(section: RetrievalSection | None) -> Html | None:
    if section is None or not (section.text_to_image or section.image_to_text):
        return None
    blocks: list[Content] = []
    if section.text_to_image:
        blocks.append(el("h3", "Text to image"))
        blocks.append(
            el("p", "The framed picture is the one that the text describes.", class_="note")
        )
    for query, found in section.text_to_image:
        ranked = [
            figure(r.image, f"result {i} for: {query}", _rank(i, r.score, r.right), side=200,
                   frame="right" if r.right else "")
            for i, r in enumerate(found, 1)
        ]  # fmt: skip
        blocks.append(
            el("div", el("p", f"“{query}”"), el("div", *ranked, class_="ranked"), class_="query")
        )
    if section.image_to_text:
        blocks.append(el("h3", "Image to text"))
    for picture, texts in section.image_to_text:
        items = [el("li", el("span", r.text, class_="good" if r.right else None)) for r in texts]
        shown = el("div", figure(picture, "a query picture"), el("ol", *items), class_="texts")
        blocks.append(el("div", shown, class_="query"))
    return join(blocks, note(section.note))


def _rank(place: int, score: float | None, right: bool) -> Html:
    words = f"{place}." + ("" if score is None else f" {number(score)}")
    return el("span", words, class_="good" if right else None)


# -- sweeps and places ----------------------------------------------------------------------------


def _sweep(section: SweepSection) -> Html | None:
    if not section.trials:
        return None
    names = list(dict.fromkeys(name for t in section.trials for name in t.parameters))
    best = best_of((t.score for t in section.trials), lower=section.lower_is_better)

    def rank(trial: Trial) -> tuple[bool, float]:
        if trial.score is None or math.isnan(trial.score):
            return True, 0.0
        return False, trial.score if section.lower_is_better else -trial.score

    rows = []
    for i, trial in enumerate(sorted(section.trials, key=rank), 1):
        won = trial.score is not None and trial.score == best
        values = [el("td", _parameter(trial.parameters.get(name))) for name in names]
        score = _value(trial.score, best=won, percent=section.percent)
        rest = [el("td", f"{trial.steps:,}"), el("td", trial.status)]
        name = el("td", trial.name or str(i))
        rows.append(el("tr", name, *values, score, *rest, class_="best" if won else None))
    head = ["Trial", *names, section.metric, "Steps", "Status"]
    return join(table(head, rows), note(section.note))


def _parameter(value: float | int | str | bool | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _where(places: Sequence[Where]) -> Html | None:
    if not places:
        return None
    rows = [el("tr", el("td", p.label), el("td", el("code", p.what))) for p in places]
    return table(["To see", "Look at"], rows, class_="words")
