"""A dataset's report says what is in the dataset, and what the data say can do nothing."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines import data_report, tracking
from pipelines.data_report import UNSURE, DataReportConfig, gather, metrics, run
from pipelines.data_report_page import render
from pipelines.dataset import Commit, Dataset
from pipelines.ingest import IMAGE_SCHEMA, TEXT_SCHEMA
from pipelines.storage import Store, StoreError

MARK = "f" * 16
HOSTILE = "<script>alert('x')</script> \" onload=x & \u202e"
GERMAN = "ein kleiner Hund läuft über die grüne Wiese hinter dem Haus"
ENGLISH = "a small dog runs over the green meadow behind the house"
# Reason, stage, URL, detail of what is set aside; each so many times.
ASIDE = [
    ("http 404", "download", "http://a.example/x.jpg", "Not Found", 5),
    ("http 403", "download", "https://b.example:81/x.jpg", HOSTILE, 2),
    ("timed out", "download", "http://a.example/y.jpg", "", 1),
    ("truncated image", "decode", "http://A.example/z.jpg", "", 3),
    (HOSTILE, "decode", "http://[bad/", "", 1),
    ("empty caption", "annotations", "", "", 2),
    ("held out: COCO Karpathy val/test", "annotations", "http://c.example/1", "", 4),
    ("held out: same picture as tasks/vqa/test", "filter", "http://a.example/2", "9: 3 bits", 2),
    ("caption: too few words", "caption", "http://a.example/0", "1: one", 3),
    ("duplicate: same bytes", "duplicates", "http://a.example/3", "images/cc3m: 17", 3),
    ("duplicate: same picture", "duplicates", "http://a.example/4", "images/cc3m: 18: 2 bits", 2),
    ("duplicate: same picture", "duplicates", "http://a.example/5", "images/some: 1: 2 bits", 1),
]


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []  # every element was closed

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in {"td", "th"}:
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the table whose columns begin so."""
        (found,) = (t[1:] for t in self.tables if t[0][: len(head)] == list(head))
        return found


def rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        width, height = (int(v) for v in rng.integers(20, 200, 2))
        out = io.BytesIO()
        Image.new("RGB", (width, height), (number % 256, 90, 40)).save(out, "JPEG")
        captions = [" ".join(["wörd"] * int(rng.integers(0, 30))) for _ in range(number % 4)]
        if number % 10 == 1:
            captions[0] = HOSTILE
        elif captions:
            captions[0] = GERMAN if number % 4 == 2 else ENGLISH
        host = ("a.example", "b.example", "d.example")[number % 3]
        made.append(
            {"id": f"some/{number}", "image": {"bytes": out.getvalue(), "path": None},
             "width": width, "height": height, "captions": captions,
             "url": f"http://{host}/{number}", "source": "some" if number % 5 else "other"}
        )  # fmt: skip
    return made


def aside() -> list[dict[str, Any]]:
    return [
        {"id": f"aside/{i}", "url": url, "reason": reason, "detail": detail, "stage": stage}
        for reason, stage, url, detail, count in ASIDE
        for i in range(count)
    ]


def publish(
    dataset: Dataset, made: Sequence[dict[str, Any]], gone: Sequence[dict[str, Any]],
    schema: pa.Schema = IMAGE_SCHEMA, **changes: Any,
) -> Commit:  # fmt: skip
    """Three parts, one of them empty; what is set aside stands in two."""
    third, half = len(made) // 3, len(gone) // 2
    parts = [(made[:third], gone[:half]), (made[third:], []), ([], gone[half:])]
    records = [
        dataset.write_part(MARK, f"{i}", pa.Table.from_pylist(list(kept), schema), set_aside=lost)
        for i, (kept, lost) in enumerate(parts)
    ]
    config = {"source": "some", "shard_size": 25, "note": HOSTILE, **changes}
    inputs = [{"file": "list.tsv", "sha256": "ab" * 32, "bytes": 12345},
              {"dataset": "tasks/vqa/test", "commit": "cd" * 8}]  # fmt: skip
    return dataset.publish(MARK, records, job="ingest", schema=schema, stats={}, config=config,
                           inputs=inputs)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    publish(store.dataset("images/some"), rows(70), aside())
    texts = [{"id": f"words/{i}", "text": "ä" * i, "source": "words"} for i in range(50)]
    texts.append({"id": "words/x", "text": HOSTILE, "source": "words"})
    publish(store.dataset("text/words"), texts, [], TEXT_SCHEMA)
    return store


def report(store: Store, name: str, **options: Any) -> tuple[dict[str, Any], Page]:
    dataset = store.dataset(name)
    stats, chosen = gather(dataset, dataset.commit(), here=True, **options)
    return stats, Page(render(stats, data_report.shown(dataset, chosen)))


# -- numbers --------------------------------------------------------------------------------------


def test_counts_are_those_of_the_dataset(store: Store) -> None:
    stats, _ = report(store, "images/some")
    made, gone = rows(70), [row for row in aside() if row["stage"] != "caption"]
    captions = [c for row in made for c in row["captions"]]
    assert (stats["read"], stats["kept"], stats["set_aside"]) == (96, 70, 26)
    assert stats["captions"] == len(captions)
    assert stats["bytes"] == sum(len(row["image"]["bytes"]) for row in made)
    known = stats["histograms"]
    for name, values in {
        "width": [row["width"] for row in made],
        "height": [row["height"] for row in made],
        "captions_per_image": [len(row["captions"]) for row in made],
        "words": [len(c.split()) for c in captions],
        "characters": [len(c) for c in captions],
    }.items():
        assert known[name] == {str(k): n for k, n in sorted(Counter(values).items())}
    for bin, count in known["bytes"].items():
        sizes = [len(row["image"]["bytes"]) for row in made]
        assert count == sum(2 ** (int(bin) / 4) <= s < 2 ** ((int(bin) + 1) / 4) for s in sizes)
    assert sum(known["bytes"].values()) == sum(known["aspect"].values()) == 70

    reasons = Counter(row["reason"] for row in gone)
    assert stats["sources"] == {
        "other": {"read": 14, "kept": 14, "set_aside": {}},
        "some": {"read": 82, "kept": 56, "set_aside": dict(sorted(reasons.items()))},
    }
    stages = Counter((row["stage"], row["reason"]) for row in gone)
    found = {(s, r): n for s, of in stats["stages"].items() for r, n in of.items()}
    assert found == dict(stages)
    assert stats["http"] == {"403": 2, "404": 5}
    assert stats["leaks"] == {"COCO Karpathy val/test": 4, "tasks/vqa/test": 2}
    assert stats["duplicates"] == {"images/cc3m": {"same bytes": 3, "same picture": 2},
                                   "images/some": {"same picture": 1}}  # fmt: skip
    # A caption that an image lost is no record of its own.
    assert stats["captions_set_aside"] == {"caption: too few words": 3}
    said = [caption for row in made for caption in row["captions"]]
    assert sum(stats["languages"].values()) == len(said)
    assert stats["languages"]["de"] >= said.count(GERMAN) > 0
    assert stats["languages"]["en"] >= said.count(ENGLISH) > 0
    assert stats["languages"][UNSURE] > 0


def test_domains_answer_for_downloads_and_decoding_only(store: Store) -> None:
    stats, page = report(store, "images/some")
    kept = Counter(("a.example", "b.example", "d.example")[i % 3] for i in range(70))
    assert stats["domains"] == [
        {"domain": "a.example", "kept": kept["a.example"], "set_aside": 9,
         "reasons": {"http 404": 5, "truncated image": 3, "timed out": 1}},
        {"domain": "b.example", "kept": kept["b.example"], "set_aside": 2,
         "reasons": {"http 403": 2}},
        {"domain": "(none)", "kept": 0, "set_aside": 1, "reasons": {HOSTILE: 1}},
        {"domain": "d.example", "kept": kept["d.example"], "set_aside": 0, "reasons": {}},
    ]  # fmt: skip
    table = page.table("Domain")
    assert [row[0] for row in table] == ["a.example", "b.example", "(none)"]
    assert table[0][1:4] == ["9", "24", "27.3 %"]


def test_the_page_shows_the_same_numbers(store: Store) -> None:
    stats, page = report(store, "images/some")
    assert "70 images of 96 records: 72.9 %" in page.words
    assert page.table("Source") == [
        ["other", "14", "14", "0", "0 B", "0", "0"],
        ["some", "82", "56", "0", "0 B", "26", "6"],
    ]
    by_stage = {(r[0], r[1]): r[2:] for r in page.table("Stage")}
    assert by_stage["download", "http 404"] == ["5", "5.2 %"]
    assert len(by_stage) == sum(map(len, stats["stages"].values()))
    assert page.table("Status") == [["403", "2"], ["404", "5"]]
    assert page.table("Benchmark") == [["COCO Karpathy val/test", "4"], ["tasks/vqa/test", "2"]]
    assert page.table("Repeats a row of", "same bytes", "same picture") == [
        ["images/cc3m", "3", "2"], ["images/some", "0", "1"],
    ]  # fmt: skip
    assert page.table("Reason", "Captions") == [["caption: too few words", "3"]]
    assert dict(page.table("Language")) == {k: f"{n}" for k, n in stats["languages"].items()}
    assert page.table("Input") == [["list.tsv", "12,345", "ab" * 32],
                                   ["tasks/vqa/test", "·", "cd" * 8]]  # fmt: skip
    assert ["shard_size", "25"] in page.table("Field")
    assert ["fingerprint", MARK] in page.table("What")
    # Each histogram's bars hold every value.
    whole = {"Width, pixels": 70, "Stored bytes of an image": 70, "Captions of an image": 70}
    for title, count in {**whole, "Words of a caption": stats["captions"]}.items():
        (chart,) = (s for s in page.all("svg") if (s["aria-label"] or "").startswith(title + "."))
        bars = re.findall(r": ([\d,]+)(?:, |$)", chart["aria-label"] or "")
        assert sum(int(b.replace(",", "")) for b in bars) == count, title


def test_texts_have_a_report_too(store: Store) -> None:
    stats, page = report(store, "text/words")
    assert stats["kept"] == stats["read"] == 51 and stats["captions"] == 0
    assert stats["bytes"] == sum(2 * i for i in range(50)) + len(HOSTILE.encode())
    counts = stats["histograms"]["text_characters"]
    assert counts["-1"] == 1 and counts["0"] == 1 and sum(counts.values()) == 51
    assert "51 documents of 51 records" in page.words and not page.all("img")
    names = [a["href"] for a in page.all("a")]
    assert names == ["#yield", "#texts", "#duplicates", "#leaks", "#samples", "#lineage"]


def test_an_empty_dataset_has_a_report(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store.dataset("images/none"), [], [])
    stats, page = report(store, "images/none")
    assert stats["read"] == 0 and "0 images of 0 records" in page.words


# -- samples --------------------------------------------------------------------------------------


def test_samples_are_drawn_by_the_commit_alone(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = store.dataset("images/some")
    commit = dataset.commit()
    _, chosen = gather(dataset, commit, samples=9, here=True)
    monkeypatch.setattr(data_report, "_BATCH", 7)
    assert gather(dataset, commit, samples=9, here=True)[1] == chosen
    assert gather(dataset, commit, samples=5, here=True)[1] == chosen[:5]
    assert len({(c["path"], c["row"]) for c in chosen}) == 9
    assert len({c["path"] for c in chosen}) == 2
    made = rows(70)
    for place, sample in zip(chosen, data_report.shown(dataset, chosen), strict=True):
        row = made[place["row"] + (23 if "part-1" in place["path"] else 0)]
        assert sample.picture is not None and sample.id == row["id"]
        assert sample.picture.image == row["image"]["bytes"]
        assert sample.picture.captions == row["captions"]


# -- safety ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images/some", "text/words"])
def test_what_the_data_say_can_do_nothing(store: Store, name: str) -> None:
    _, page = report(store, name, samples=100)
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert page.words.count("<script>alert('x')</script>") >= 2
    allowed = {"class", "style", "id", "href", "src", "alt", "loading", "title", "aria-label"}
    for tag, attributes in page.elements:
        assert not [a for a in attributes if a.startswith("on")]
        if tag == "a":
            assert (attributes["href"] or "").startswith("#")
        if tag == "img":
            assert re.fullmatch(r"data:image/jpeg;base64,[\w+/=]+", attributes["src"] or "")
        if tag in {"td", "p", "figure", "span", "blockquote"}:
            assert set(attributes) <= allowed | {"role"}
        for value in attributes.values():
            assert tag == "svg" or not re.match(r"(https?:)?//", value or "")
    (policy,) = (m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_domains_are_counted_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_report, "MOST_DOMAINS", 10)
    gone = [
        {"id": f"{i}", "url": f"http://rare{i}.example/", "reason": "http 404", "detail": "",
         "stage": "download"}
        for i in range(40)
    ] + [
        {"id": "x", "url": "http://often.example/", "reason": "http 404", "detail": "",
         "stage": "download"}
    ] * 5  # fmt: skip
    dataset = Store(tmp_path).dataset("images/some")
    publish(dataset, rows(3), gone[::-1])
    stats, _ = gather(dataset, dataset.commit(), here=True)
    assert stats["domains"][0]["domain"] == "often.example"
    assert stats["domains"][0]["set_aside"] == 5
    counted = sum(of["set_aside"] + of["kept"] for of in stats["domains"])
    assert stats["rows_of_rare_domains"] > 0
    assert counted + stats["rows_of_rare_domains"] == 48


@pytest.mark.parametrize(
    ("name", "source", "shown"),
    [
        ("text/wiki", "wikipedia", "wiki"),
        ("images/mine", "table", "mine"),
        ("images/trial", "cc3m", "cc3m"),
    ],
)
def test_kept_and_set_aside_rows_are_of_one_source(
    name: str, source: str, shown: str, tmp_path: Path
) -> None:
    dataset = Store(tmp_path).dataset(name)
    text = name.startswith("text/")
    made = rows(6) if not text else [{"id": f"{i}", "text": "a word"} for i in range(6)]
    made = [row | {"source": shown} for row in made]
    gone = [{"id": "x", "url": "", "reason": "empty text", "detail": "", "stage": "filter"}] * 2
    schema, short = TEXT_SCHEMA if text else IMAGE_SCHEMA, name.partition("/")[2]
    commit = publish(dataset, made, gone, schema, source=source, name=short)
    stats, _ = gather(dataset, commit, here=True)
    assert stats["sources"] == {shown: {"read": 8, "kept": 6, "set_aside": {"empty text": 2}}}


# -- the job --------------------------------------------------------------------------------------


def test_it_is_written_once_for_each_commit(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataReportConfig(store=store.uri, dataset="images/some", track=False)
    folder = run(config, here=True)
    commit = store.dataset("images/some").commit()
    assert folder == f"reports/images/some/{commit.identity}"
    stats = store.read_json(f"{folder}/stats.json")
    assert stats == report(store, "images/some")[0]
    assert Page(store.read(f"{folder}/report.html").decode()).words
    monkeypatch.setattr(data_report, "gather", None)
    assert run(config, here=True) == folder
    assert "already there" in capsys.readouterr().out


def test_a_commit_with_other_reasons_only_has_a_report_of_its_own(tmp_path: Path) -> None:
    store = Store(tmp_path)
    dataset = store.dataset("images/some")
    first = publish(dataset, rows(3), aside())
    config = DataReportConfig(store=store.uri, dataset="images/some", track=False)
    folders = [run(config, here=True)]
    for status in (500, 403):
        lost = {"id": "x", "url": "", "reason": f"http {status}", "detail": "", "stage": "download"}
        other = dataset.write_table(f"data/{status}.parquet", pa.Table.from_pylist([lost]))
        dataset.amend(files=first.files, set_aside=[other], stats={}, note={"job": "retry"})
        folders += [run(config, here=True), run(config, here=True)]
        assert store.read_json(f"{folders[-1]}/stats.json")["http"] == {f"{status}": 1}
    own = f"reports/images/some/{first.identity}"
    assert folders == [own, *[f"{own}-1"] * 2, *[f"{own}-2"] * 2]
    assert store.read_json(f"{own}/stats.json")["http"] == {"403": 2, "404": 5}


def test_mlflow_has_the_same(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    stats, _ = report(store, "images/some")
    folder = "reports/tracked"
    data_report.to_mlflow(store, folder, stats, b"<p>page")
    handle = tracking.RunHandle(**store.read_json(f"{folder}/mlflow.json"))
    client = tracking.client(handle.uri)
    run_ = client.get_run(handle.run_id)
    assert run_.info.status == "FINISHED" and run_.data.params["version"] == stats["version"]
    assert run_.data.metrics == metrics(stats)
    assert run_.data.metrics["data/yield"] == 70 / 96
    assert run_.data.metrics["data/duplicates"] == 6
    assert run_.data.metrics["data/leaks/tasks/vqa/test"] == 2
    local = Path(client.download_artifacts(handle.run_id, "data", str(tmp_path)))
    assert (local / "report.html").read_bytes() == b"<p>page"
    assert json.loads((local / "stats.json").read_text()) == stats


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        run(DataReportConfig(store=str(tmp_path), dataset="images/none"))
    with pytest.raises(ValueError, match="samples"):
        DataReportConfig(samples=-1)
    with pytest.raises(ValueError, match="not a dataset's name"):
        DataReportConfig(dataset="../x y")


@pytest.mark.usefixtures("ray_session")
def test_ray_counts_the_same(store: Store, s3_store: str) -> None:
    remote = Store(s3_store).dataset("images/some")
    commit = publish(remote, rows(70), aside())
    there, chosen = gather(remote, commit)
    here, expected = gather(store.dataset("images/some"), commit, here=True)
    assert there == here and chosen == expected
    folder = run(DataReportConfig(store=s3_store, dataset="images/some", track=False))
    assert Store(s3_store).read_json(f"{folder}/stats.json")["kept"] == 70
