"""The report: what is gathered, the page that shows it, and the pictures made for people."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import small_corpus
import torch
from PIL import Image

from beit3 import tasks
from beit3.tasks import Example
from pipelines import pictures, report, report_charts, run_logger, tracking
from pipelines import report_content as content
from pipelines.ingest import IMAGE_SCHEMA, TEXT_SCHEMA
from pipelines.lineage import fingerprint
from pipelines.report_content import (
    AnswerExample,
    AnswerSection,
    CaptionExample,
    Chart,
    Curve,
    Headline,
    Report,
    Score,
)
from pipelines.report_html import duration, number, opened, size
from pipelines.report_page import render
from pipelines.storage import Store, StoreError

HOSTILE = "<script>alert('x')</script> \" onload=x & \x00\ud800 \u202e"
RED = Image.new("RGB", (40, 30), "red")


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes.get("id") for attributes in self.all("section")]


def shown(report: Report) -> Page:
    page = Page(render(report))
    assert page.open == []  # every element was closed
    return page


def everything(words: str = "words") -> Report:
    """A report with something in every section; `words` are its texts, RED its pictures."""
    sample = content.Sample(RED, [words])
    source = content.IngestedSource(words, 9, 6, 12, 3400, {words: 2, "held out: x": 1}, [sample])
    texts = content.IngestedSource("texts", 3, 3, texts=[words])
    image = content.ImageTokenizer(
        8, 6, 3.5, 2, 0.75, usage=[4, 3, 2, 1, 1, 1, 0, 0],
        maps=[content.CodeMap(RED, [[1, 2], [3, 4]])], patches={3: [RED, RED]},
        facts={words: words},
    )  # fmt: skip
    masked = content.MaskedExample(
        RED, RED, [[1, 2], [3, 4]], [[1, 0], [3, 0]], [[True, True], [False, False]], words
    )
    curve = Curve(words, [(1, 2.0), (2, 1.5), (3, math.nan), (4, 1.0)])
    return Report(
        Headline(
            words, words, "today", "1.0", 75.0, {words: words},
            [Score(words, words, 0.1, 0.2, 0.9, note=words), Score("b", "CIDEr", percent=False)],
            note=words,
        ),
        content.IngestionSection([source, texts], words),
        content.TokenizerSection(content.TextTokenizer(99, [(words, [words, "b"])]), image),
        content.TrainingSection([Chart(words, [curve], baseline=1.2)], [masked], {words: words}),
        [CaptionExample(RED, words, words, [words, words])],
        [AnswerSection(words, [AnswerExample([RED], words, words, "no", words)], words)],
        content.RetrievalSection(
            [(words, [content.RankedImage(RED, True, 0.5)])],
            [(RED, [content.RankedText(words, True), content.RankedText("wrong")])],
        ),
        [content.SweepSection(words, words, [content.Trial({words: 0.1}, 0.5, 4, words)])],
        [content.Where(words, words)],
    )  # fmt: skip


# -- the page -------------------------------------------------------------------------------------


def test_every_section_is_shown_and_linked() -> None:
    page = shown(everything())
    wanted = [
        "scores", "ingestion", "tokenizers", "pretraining", "captions", "answers-1", "retrieval",
        "sweep-1", "where",
    ]  # fmt: skip
    assert page.sections == wanted
    assert [a["href"] for a in page.all("a")] == [f"#{name}" for name in wanted]
    assert len(page.all("img")) == 13 and len(page.all("svg")) == 3


def test_sections_without_content_are_left_out() -> None:
    assert shown(Report(Headline("Empty"))).sections == []
    empty = Report(
        Headline("Empty"), content.IngestionSection([]), content.TokenizerSection(),
        content.TrainingSection(), [], [AnswerSection("none", [])], content.RetrievalSection(),
        [content.SweepSection("none", "x", [])], [],
    )  # fmt: skip
    page = shown(empty)
    assert page.sections == [] and not page.all("nav") and "Empty" in page.words


def test_text_from_the_data_can_do_nothing() -> None:
    """No element, attribute or request comes of it, and it can be read."""
    page, plain = shown(everything(HOSTILE)), shown(everything())
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]
    names = [set(attributes) for _, attributes in page.elements]
    assert names == [set(attributes) for _, attributes in plain.elements]
    assert not page.all("script")
    assert page.words.count("<script>alert('x')</script>") > 20
    assert "\x00" not in page.words
    policy = [m["content"] for m in page.all("meta") if "http-equiv" in m]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    for attributes in page.all("img"):
        assert re.fullmatch(r"data:image/(png|jpeg);base64,[\w+/=]+", attributes["src"] or "")


def test_the_page_is_written_whatever_is_in_it(tmp_path: Path) -> None:
    path = report.write(everything(HOSTILE), tmp_path / "new" / "folder" / "report.html")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_picture_that_can_t_be_read_is_said() -> None:
    for broken in (b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"<svg onload=alert(1)/>"):
        page = shown(Report(Headline("x"), captions=[CaptionExample(broken, "words")]))
        assert "picture can't be read" in page.words and not page.all("img")
        assert opened(broken) is None


def test_pictures_are_encoded_anew_and_small() -> None:
    data = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "a secret place"
    Image.new("RGB", (2000, 1000), "blue").save(data, "JPEG", exif=exif)
    text = render(Report(Headline("x"), captions=[CaptionExample(data.getvalue(), "words")]))
    source = Page(text).all("img")[0]["src"] or ""
    stored = base64.b64decode(source.split(",")[1])
    assert b"secret" in data.getvalue() and b"secret" not in stored
    with Image.open(io.BytesIO(stored)) as image:
        assert max(image.size) == 240 and not image.getexif()


def test_scores_name_the_best_and_leave_gaps() -> None:
    table = [
        Score("up", "a", 0.1, 0.5, 0.25),
        Score("down", "b", 3.0, 2.0, 1.0, percent=False, lower_is_better=True),
        Score("gaps", "c", None, math.nan, 0.5),
    ]
    text = render(Report(Headline("x", scores=table)))
    best = re.findall(r'<strong class="best-value">([^<]+)', text)
    assert best == ["50.0 %", "1", "50.0 %"]
    assert text.count("<td>–</td>") == 2 and "(lower is better)" in text


def test_answers_are_judged() -> None:
    examples = [
        AnswerExample([RED], "two", "two", "three", "how many?"),
        AnswerExample([RED, RED], "yes", "no", "yes", right=True, scratch_right=False),
    ]
    text = render(Report(Headline("x"), answers=[AnswerSection("Questions", examples)]))
    said = re.findall(r'class="said (good|bad)">([^<]+)', text)
    assert said == [("good", "two"), ("bad", "three"), ("good", "no"), ("bad", "yes")]


def test_trials_are_ranked() -> None:
    trials = [
        content.Trial({"rate": 0.1}, 0.2, 4),
        content.Trial({"rate": 0.2}, None, 0, "failed"),
        content.Trial({"rate": 0.3, "drop": True}, 0.9, 8),
    ]
    text = render(Report(Headline("x"), sweeps=[content.SweepSection("S", "acc", trials)]))
    body = text[text.index("<tbody>") :]
    assert body.index("90.0 %") < body.index("20.0 %") < body.index("failed")
    assert '<tr class="best"><td>1</td><td>0.3</td><td>True</td>' in text
    lower = content.SweepSection("S", "loss", trials, lower_is_better=True)
    text = render(Report(Headline("x"), sweeps=[lower]))
    assert '<tr class="best"><td>1</td><td>0.1</td><td>–</td>' in text


def test_numbers_are_short() -> None:
    assert [number(v) for v in (None, math.nan, 3, 12345, 0.12345, 1e-5, 2.5e7, 1234.5)] == [
        "–", "–", "3", "12,345", "0.1235", "1.00e-05", "25,000,000", "1,234",
    ]  # fmt: skip
    assert number(0.5, percent=True) == "50.0 %"
    assert [size(n) for n in (0, 999, 1500, 250_000, 3_400_000_000)] == [
        "0 B", "999 B", "1.5 kB", "250 kB", "3.4 GB",
    ]  # fmt: skip
    assert [duration(s) for s in (None, 1.234, 75.0, 150.0, 3700.0)] == [
        "–", "1.23 s", "75 s", "2 min 30 s", "1 h 01 min",
    ]  # fmt: skip


# -- charts ---------------------------------------------------------------------------------------


def test_curves_lie_within_the_chart() -> None:
    curve = Curve("loss", [(float(n), 5.0 / n) for n in range(1, 900)])
    svg = Page(report_charts.line_chart(Chart("Loss", [curve], baseline=2.0, note="n")))
    places = [
        tuple(map(float, place.split(",")))
        for line in svg.all("polyline")
        for place in (line["points"] or "").split()
    ]
    assert len(svg.all("polyline")) == 2  # values, and their moving average
    assert 400 < len(places) <= 800  # thinned
    assert all(0 <= x <= 560 and 0 <= y <= 280 for x, y in places)
    assert "Strong lines: moving averages." in svg.words and "baseline (2)" in svg.words


def test_the_label_of_the_last_step_lies_within_the_chart() -> None:
    curve = Curve("loss", [(0.0, 1.0), (1_000_000.0, 2.0)])
    drawn = report_charts.line_chart(Chart("Loss", [curve]))
    found = re.search(r'<text x="([\d.]+)"[^>]*>1,000,000<', drawn) or pytest.fail("not there")
    assert 500 < float(found[1]) <= 560 - 7 * len("1,000,000") / 2


@pytest.mark.parametrize(
    "points",
    [[], [(1.0, math.nan)], [(5.0, 2.0)], [(1.0, 0.0), (2.0, 0.0)], [(1.0, -1e9), (2.0, 1e9)]],
)
def test_odd_curves_are_drawn_too(points: list[tuple[float, float]]) -> None:
    drawn = report_charts.line_chart(Chart("Odd", [Curve("a", points)]))
    known = [p for p in points if math.isfinite(p[1])]
    assert ("no values were logged" in drawn) == (not known)
    assert "nan" not in drawn.lower()


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.013, 0.019), (-3, 4), (5, 5), (0, 0), (1e-9, 3e-9), (0, 7e8)]
)
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    found = report_charts.ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 3 <= len(found) <= 12
    assert np.allclose(np.diff(found), found[1] - found[0])


def test_a_code_map_has_a_colour_for_each_code() -> None:
    plain = np.asarray(report_charts.code_map([[1, 2], [1, 3]]))
    assert plain.shape == (2, 2, 3)
    assert (plain[0, 0] == plain[1, 0]).all() and len(np.unique(plain.reshape(-1, 3), axis=0)) == 3
    dimmed = np.asarray(report_charts.code_map([[1, 2], [1, 3]], [[True, False], [False, True]]))
    assert (dimmed[0, 0] == plain[0, 0]).all() and (dimmed[1, 1] == plain[1, 1]).all()
    assert (dimmed[1, 0] != plain[1, 0]).any()


# -- gathering ------------------------------------------------------------------------------------


def test_ingestion_is_gathered_from_commits(tmp_path: Path) -> None:
    store = Store(tmp_path)
    parts = [small_corpus.image_rows("some", start, 10, captions=3) for start in (0, 10)]
    dataset, mark = store.dataset("images/some"), fingerprint("x", "y")
    records = [
        dataset.write_part(mark, str(i), pa.Table.from_pylist(rows, IMAGE_SCHEMA))
        for i, rows in enumerate(parts)
    ]
    stats = {"read": 25, "captions": 60, "bytes": 1234, "set_aside": {"http 404": 5}}
    dataset.publish(mark, records, job="x", schema=IMAGE_SCHEMA, stats=stats, config={})
    long = [{"id": "a", "text": "word " * 300, "source": "t"}]
    small_corpus.publish(store, "text/long", TEXT_SCHEMA, long)
    small_corpus.publish(store, "images/none", IMAGE_SCHEMA, [])
    found = report.gather_ingestion(store, ["images/some", "text/long", "images/none"], samples=4)
    some, texts, none = found.sources
    assert (some.name, some.read, some.rows, some.captions, some.bytes) == (
        "some",
        25,
        20,
        60,
        1234,
    )
    assert some.set_aside == {"http 404": 5} and len(some.samples) == 4
    pictures_of = {row["image"]["bytes"]: row["captions"][:2] for rows in parts for row in rows}
    assert all(pictures_of[bytes(s.image)] == s.captions for s in some.samples)  # type: ignore[arg-type]
    owners = [bytes(s.image) in {r["image"]["bytes"] for r in parts[0]} for s in some.samples]  # type: ignore[arg-type]
    assert owners == [True, True, False, False]  # from all over the dataset
    assert len(texts.texts[0]) < 405 and texts.texts[0].endswith("word …")
    assert (none.rows, none.samples) == (0, [])
    assert report.gather_ingestion(store, ["images/some"], samples=4).sources[0] == some
    with pytest.raises(StoreError, match="images/other does not exist"):
        report.gather_ingestion(store, ["images/other"])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("tracked"))


def test_curves_are_gathered_from_mlflow(store: Store) -> None:
    handle = tracking.start_run(store, "training", {})
    with run_logger.Logger(handle) as logger:
        for step in (3, 1, 2):
            logger.metrics(step, {"train/loss": 4.0 - step})
        for step in (1, 2, 3):
            logger.metrics(step, {"train/loss/image": step, "train/accuracy/image": step / 10})
    keys = {"train/loss/image": "images", "train/loss/text": "texts"}
    assert report.gather_curves(handle, handle.run_id, keys) == [
        Curve("images", [(1, 1.0), (2, 2.0), (3, 3.0)])
    ]


def test_page_and_pictures_go_to_mlflow(store: Store, tmp_path: Path) -> None:
    handle = tracking.start_run(store, "report", {})
    with run_logger.Logger(handle) as logger:
        report.to_mlflow(everything(HOSTILE), logger)
    tracker = tracking.client(handle.uri)

    def files(folder: str) -> list[str]:
        return [
            path
            for f in tracker.list_artifacts(handle.run_id, folder)
            for path in (files(f.path) if f.is_dir else [f.path])
        ]

    names = files("report")
    assert "report/report.html" in names and "report/captions/00/image.png" in names
    wanted = {f"report/{name}.png" for name, _ in report.pictures(everything(HOSTILE))}
    assert set(names) == wanted | {"report/report.html"} and len(wanted) == 10
    page = tracker.download_artifacts(handle.run_id, "report/report.html", str(tmp_path))
    assert Path(page).read_text(encoding="utf-8").startswith("<!doctype html>")


def test_chance_is_what_guessing_scores() -> None:
    """Four pictures with three texts each: worked out by hand."""
    texts = [Example(str(i), None, str(i // 3)) for i in range(12)]
    found = tasks.create("retrieval").blind((), texts)
    assert found["text_recall_1"] == pytest.approx(3 / 12)
    missed = (9 * 8 * 7 * 6 * 5) / (12 * 11 * 10 * 9 * 8)
    assert found["text_recall_5"] == pytest.approx(1 - missed)
    assert found["image_recall_1"] == 1 / 4 and found["image_recall_5"] == 1


# -- pictures for people ---------------------------------------------------------------------------


def test_some_pictures_come_from_all_over_a_dataset(tmp_path: Path) -> None:
    store = Store(tmp_path)
    rows = small_corpus.image_rows("few", 0, 7, captions=0)
    broken = rows[1] | {"image": {"bytes": b"no picture", "path": None}}
    small_corpus.publish(store, "images/few", IMAGE_SCHEMA, [broken], rows[:4], rows[4:])
    found = pictures.some_images(store.dataset("images/few"), 6, 16)
    assert found.shape == (6, 3, 16, 16) and found.dtype == torch.uint8
    everyone = pictures.some_images(store.dataset("images/few"), 99, 16)
    assert torch.equal(everyone[[0, 1, 2, 4, 5, 6]], found)  # three of each file
    assert len({image.numpy().tobytes() for image in found}) == 6


def test_masked_inputs_are_grey_where_they_are_hidden() -> None:
    images = torch.full((2, 3, 16, 16), 200, dtype=torch.uint8)
    hidden = torch.tensor([[True, False, False, False], [False, False, False, True]])
    words = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    guess = torch.tensor([[9, 0, 0, 0], [0, 0, 0, 8]])
    sheet = pictures.masked_predictions(images, hidden, words, guess, 8)
    side, gap = 16 * pictures.ZOOM, pictures.GAP
    assert sheet.size == (2 * (side + gap) + gap, 4 * (side + gap) + gap)

    def colour(column: int, row: int, patch: int) -> Any:
        y, x = divmod(patch, 2)
        left, top = gap + column * (side + gap), gap + row * (side + gap)
        return sheet.getpixel((left + x * side // 2 + 9, top + y * side // 2 + 9))

    assert [colour(0, 1, p) for p in range(4)] == [(128,) * 3] + [(200,) * 3] * 3
    assert [colour(0, 2, p) for p in range(4)] == [pictures.code_colour(w) for w in (1, 2, 3, 4)]
    assert [colour(0, 3, p) for p in range(4)] == [pictures.code_colour(w) for w in (9, 2, 3, 4)]
    assert [colour(1, 3, p) for p in range(4)] == [pictures.code_colour(w) for w in (5, 6, 7, 8)]


def test_code_sheets() -> None:
    images = torch.arange(2 * 3 * 16 * 16, dtype=torch.int64).reshape(2, 3, 16, 16).to(torch.uint8)
    codes = torch.tensor([[0, 0, 0, 1], [0, 2, 2, 0]])
    maps = pictures.code_maps(images, codes, 2, columns=1)
    side = 16 * pictures.ZOOM + pictures.GAP
    assert maps.size == (side + pictures.GAP, 4 * side + pictures.GAP)
    rows = pictures.code_patches(images, codes, 8, words=2, examples=3)
    patch = 8 * 4 + pictures.GAP
    assert rows.size == (3 * patch + pictures.GAP, 2 * patch + pictures.GAP)  # of codes 0 and 2
    cut = pictures.to_image(images[1, :, :8, 8:], zoom=4)  # the first patch of code 2
    place = (pictures.GAP, pictures.GAP + patch)
    assert rows.crop((*place, place[0] + 32, place[1] + 32)).tobytes() == cut.tobytes()
    colours = {pictures.code_colour(code) for code in range(512)}
    assert len(colours) > 500
