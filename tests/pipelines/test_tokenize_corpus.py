"""Images to visual words and texts to ids: the same bytes, whoever makes them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_corpus
import torch

from beit3.text import BOS, EOS
from beit3.transforms import View, apply_view, decode
from beit3.vqkd import SHAPE_FILE, VQKD, VQKDConfig, batch_that_fits
from pipelines import tokenize_corpus
from pipelines.dataset import Commit
from pipelines.ingest import IMAGE_SCHEMA
from pipelines.storage import Store, StoreError
from pipelines.task_data import SCHEMA as TASK_SCHEMA
from pipelines.tokenize_corpus import ImagePart, TokenizeConfig, image_tokens, run, stored_view
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer

SOURCES = ("images", "text", "tasks", "tokenizers")
NAMES = ("pairs", "alone", "words", "captioning/val")


def commits(store: Store) -> dict[str, Commit]:
    return {name: store.dataset(f"tokens/{name}").commit() for name in NAMES}


def files(commit: Commit) -> list[Any]:
    return [commit.files, commit.set_aside]


# -- what is made ---------------------------------------------------------------------------------


def replayed(store: Store, name: str) -> list[View]:
    """Stored views, which give the very words that are stored when encoded here."""
    tokenizer, _ = load_image_tokenizer(store, "vqkd")
    kind = "tasks" if "/" in name else "images"
    tokens, source = store.dataset(f"tokens/{name}"), store.dataset(f"{kind}/{name}")
    found = []
    for file, origin in zip(tokens.commit().files, source.commit().files, strict=True):
        rows = pq.read_table(store.path(tokens.name, file.path)).to_pylist()
        pictures = pq.read_table(store.path(source.name, origin.path)).to_pylist()
        for row in rows:
            owner = pictures[row["image_row"]]
            assert owner["id"] == row["id"] and len(row["views"]) == 2
            cell = owner["images"][0] if "images" in owner else owner["image"]
            views = [stored_view(v) for v in row["views"]]
            assert views[0] != views[1]
            pixels = [apply_view(decode(cell["bytes"]), v, small_corpus.SIZE) for v in views]
            words = tokenizer.encode(torch.from_numpy(np.stack(pixels))).numpy()
            assert np.array_equal(words, [v["words"] for v in row["views"]])
            found += views
    assert len(found) == 2 * tokens.commit().rows
    return found


@pytest.mark.parametrize("name", ["pairs", "alone", "captioning/val"])
def test_words_are_those_of_the_view_that_is_replayed(name: str, corpus: Store) -> None:
    views = replayed(corpus, name)
    assert {view.flip for view in views} == {True, False}
    assert {view.jitter for view in views} == {None}


def test_words_are_those_of_the_colours_that_are_replayed(copied: Callable[..., Store]) -> None:
    store = copied(*SOURCES)
    view = replace(small_corpus.VIEW, jitter=0.4)
    cfg = small_corpus.tokens(store, images=("pairs",), texts=(), view=view)
    run(cfg)
    for name, rows in (("pairs", 34), ("captioning/val", 9)):
        factors = np.array([view.jitter for view in replayed(store, name)])
        assert len(np.unique(factors)) == factors.size == 2 * rows * 3
        assert factors.min() < 0.65 and factors.max() > 1.35
        tokens = store.dataset(f"tokens/{name}").read_table()
        assert tokens.schema.equals(image_tokens(9, jitter=True))
        of_view = tokens.schema.field("views").type.value_type
        assert [field.name for field in of_view.fields] == ["box", "flip", "jitter", "words"]
        assert of_view.field("jitter").type == pa.list_(pa.float32(), 3)
    wanted = tokens["views"].to_pylist()
    store.delete("tokens")
    run(replace(cfg, in_step=True))
    made = store.dataset("tokens/captioning/val").read_table()
    assert made.schema.equals(image_tokens(0, jitter=True))
    for ours, theirs in zip(made["views"].to_pylist(), wanted, strict=True):
        assert [stored_view(v) for v in ours] == [stored_view(v) for v in theirs]


def test_each_picture_has_views_of_its_own(corpus: Store) -> None:
    rows = corpus.dataset("tokens/pairs").read_table().to_pylist()
    boxes = [tuple(view["box"]) for row in rows for view in row["views"]]
    assert len(set(boxes)) == len(boxes) == 2 * 34
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    assert 0.39 < min(areas) < 0.6 < max(areas) <= 1


def test_captions_become_ids(corpus: Store) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    tokens = corpus.dataset("tokens/pairs").read_table().to_pylist()
    rows = corpus.dataset("images/pairs").read_table().to_pylist()
    assert [row["id"] for row in tokens] == [row["id"] for row in rows]
    for row, source in zip(tokens, rows, strict=True):
        wanted = [[BOS, *tokenizer.encode(c)[:14], EOS] for c in source["captions"]]
        assert row["captions"] == wanted
    assert max(len(c) for row in tokens for c in row["captions"]) == 16  # some were cut
    alone = corpus.dataset("tokens/alone").read_table(["captions"]).to_pylist()
    assert all(row["captions"] == [] for row in alone)


def test_texts_are_cut_into_pieces_and_nothing_is_lost(corpus: Store) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    pieces = corpus.dataset("tokens/words").read_table().to_pylist()
    texts = corpus.dataset("text/words").read_table().to_pylist()
    assert len(pieces) > len(texts) == 25
    assert all(p["ids"][0] == BOS and p["ids"][-1] == EOS for p in pieces)
    assert max(len(p["ids"]) for p in pieces) == 24
    for text in texts:
        own = [p for p in pieces if p["id"].startswith(f"{text['id']}#")]
        assert [p["id"] for p in own] == [f"{text['id']}#{i}" for i in range(len(own))]
        assert [i for p in own for i in p["ids"][1:-1]] == tokenizer.encode(text["text"])
    stats = corpus.dataset("tokens/words").commit().stats
    assert stats["documents"] == 25 and stats["tokens"] == sum(len(p["ids"]) for p in pieces)


def test_texts_need_no_image_tokenizer(corpus: Store, copied: Callable[..., Store]) -> None:
    store = copied("text", "tokenizers/text")
    run(small_corpus.tokens(store, images=(), held_out=()))
    made = store.dataset("tokens/words").commit()
    assert made.identity == corpus.dataset("tokens/words").commit().identity
    assert made.fingerprint == corpus.dataset("tokens/words").commit().fingerprint


def test_a_picture_that_does_not_decode_is_set_aside(corpus: Store) -> None:
    dataset = corpus.dataset("tokens/alone")
    (aside,) = dataset.read_set_aside()
    assert (aside["id"], aside["reason"]) == (small_corpus.BROKEN, "does not decode")
    assert "cannot identify" in aside["detail"]
    rows = dataset.read_table(["id", "image_row"]).to_pylist()
    assert [row["image_row"] for row in rows] == [n for n in range(15) if n != 5]
    stats = dataset.commit().stats
    assert stats["set_aside"] == {"does not decode": 1} and stats["rows"] == 14


def test_a_commit_names_its_source_and_tokenizers(corpus: Store) -> None:
    for name, commit in commits(corpus).items():
        (lineage,) = commit.lineage["inputs"]
        kind = {"words": "text", "captioning/val": "tasks"}.get(name, "images")
        assert lineage["dataset"] == f"{kind}/{name}"
        assert lineage["identity"] == corpus.dataset(f"{kind}/{name}").commit().identity
        text = load_text_tokenizer(corpus, "sentencepiece").identity
        assert lineage["tokenizers"]["text"] == {"name": "sentencepiece", "identity": text}
        assert ("image" in lineage["tokenizers"]) == (name != "words")
    words = commits(corpus)["pairs"].stats["words"]
    assert sum(words.values()) == 34 * 2 * 9 and all(int(w) < small_corpus.CODES for w in words)


# -- who makes it ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("actors", "cpus"), [(2, 0.5), (1, 2.0), (3, 0.5)])
def test_any_number_of_actors_makes_the_same_bytes(
    actors: int, cpus: float, copied: Callable[..., Store]
) -> None:
    """As plain tasks, with any number of threads."""
    store = copied("tokenizers")
    parts = [small_corpus.image_rows("many", 7 * i, 7, captions=1) for i in range(4)]
    small_corpus.publish(store, "images/many", IMAGE_SCHEMA, *parts)
    config = small_corpus.tokens(store, images=("many",), texts=(), held_out=(), batch_size=4)
    (wanted,) = run(config)
    assert len(wanted.files) == 4
    store.delete("tokens")
    (made,) = run(replace(config, actors=actors, cpus_per_actor=cpus))
    assert files(made) == files(wanted)
    assert (made.fingerprint, made.stats) == (wanted.fingerprint, wanted.stats)


def test_words_are_lists_of_one_size(corpus: Store) -> None:
    for name in ("pairs", "captioning/val"):
        dataset = corpus.dataset(f"tokens/{name}")
        view = dataset.read_table().schema.field("views").type.value_type
        assert view.field("words").type == pa.list_(pa.uint16(), 9)
        assert dataset.read_table().schema.equals(image_tokens(9))
        assert [field.name for field in view.fields] == ["box", "flip", "words"]
        assert "fixed_size_list<" in dataset.commit().schema


def test_few_pixels_are_held_at_once(corpus: Store, copied: Callable[..., Store]) -> None:
    """However many pictures a part has."""
    store = copied("tokenizers")
    rows = small_corpus.image_rows("many", 0, 60, captions=0)
    commit = small_corpus.publish(store, "images/many", IMAGE_SCHEMA, rows)
    config = small_corpus.tokens(store, images=("many",), texts=(), held_out=(), batch_size=4)
    worker = ImagePart(replace(config, actors=1, cpus_per_actor=3), "images/many")
    held, most = [0], [0]
    decode_one, encode = worker._decode, worker._encode

    def decoding(*arguments: Any) -> Any:
        picture = decode_one(*arguments)
        held[0] += len(picture.pixels)
        return picture

    def encoding(pixels: list[np.ndarray]) -> np.ndarray:
        time.sleep(0.02)  # so that decoding runs ahead as far as it may
        most[0] = max(most[0], held[0])
        held[0] -= len(pixels)
        return encode(pixels)

    worker._decode, worker._encode = decoding, encoding  # type: ignore[method-assign]
    output = worker({"name": "00000", "path": commit.files[0].path})
    assert output.table.num_rows == 60 and held[0] == 0
    batches = 1 + tokenize_corpus.AHEAD  # and one picture that waits at the border
    assert 4 < most[0] <= 4 * batches + 2 * 2


@pytest.mark.slow
def test_the_batch_may_be_left_to_the_machine(corpus: Store, copied: Callable[..., Store]) -> None:
    store = copied(*SOURCES)
    (made,) = run(
        small_corpus.tokens(store, images=("pairs",), texts=(), held_out=(), batch_size=0)
    )
    assert made.fingerprint == commits(corpus)["pairs"].fingerprint
    tokenizer, _ = load_image_tokenizer(corpus, "vqkd")
    assert batch_that_fits(tokenizer) == 1024
    with torch.device("meta"):
        base = VQKD(VQKDConfig())
    base.codebook.vectors = torch.zeros(1)
    assert 8 <= batch_that_fits(base) <= 32


def test_a_codebook_that_uint16_can_t_name_is_refused(
    copied: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied(*SOURCES)
    monkeypatch.setattr(tokenize_corpus.cluster, "start", None)  # not called
    name = f"tokenizers/image/vqkd/{SHAPE_FILE}"
    store.write_json(name, store.read_json(name) | {"codebook_size": 65537})
    with pytest.raises(ValueError, match="codebook_size 65537 is over 65536"):
        run(small_corpus.tokens(store))


def test_what_holds_no_captions_is_refused(copied: Callable[..., Store]) -> None:
    store = copied(*SOURCES)
    questions = small_corpus.task_rows(3)
    small_corpus.publish(store, "tasks/vqa/val", TASK_SCHEMA, questions, task="vqa")
    with pytest.raises(StoreError, match=r"held_out: .*vqa/val holds no captions"):
        run(small_corpus.tokens(store, images=(), texts=(), held_out=("vqa/val",)))
    assert not store.list("tokens/vqa")


def test_what_is_there_is_skipped_and_other_options_are_refused(
    corpus: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    before = commits(corpus)
    again = run(small_corpus.tokens(corpus, actors=3, batch_size=99))
    assert {c.dataset: c for c in again} == {c.dataset: c for c in before.values()}
    assert capsys.readouterr().out.count("skipped") == len(NAMES)
    jitter = {"view": replace(small_corpus.VIEW, jitter=0.4)}
    for change in ({"views": 3}, {"seed": 1}, {"max_caption_length": 9}, jitter):
        with pytest.raises(StoreError, match="other inputs or options"):
            run(small_corpus.tokens(corpus, texts=(), held_out=(), **change))


def test_a_job_that_was_cut_short_makes_only_what_is_missing(
    corpus: Store, copied: Callable[..., Store]
) -> None:
    store = copied(*SOURCES, "tokens")
    wanted = commits(corpus)["pairs"]
    folder = f"tokens/pairs/data-{wanted.fingerprint[:8]}"
    store.delete("tokens/pairs/_commits/00000000.json")
    store.delete(f"{folder}/_part-00001.json")
    store.write(f"{folder}/part-00001.parquet", b"half of a file")
    whole = Path(store.path(f"{folder}/part-00000.parquet"))
    # A part that were made again would differ: its picture has gone from the source meanwhile.
    (source, *_) = store.dataset("images/pairs").commit().files
    store.delete(f"images/pairs/{source.path}")
    stamp = whole.stat().st_mtime_ns
    (made,) = run(small_corpus.tokens(store, images=("pairs",), texts=(), held_out=()))
    assert files(made) == files(wanted) and made.stats == wanted.stats
    assert whole.stat().st_mtime_ns == stamp


def test_another_seed_draws_other_views(corpus: Store, copied: Callable[..., Store]) -> None:
    store = copied(*SOURCES)
    config = small_corpus.tokens(store, images=("alone",), texts=(), held_out=(), seed=1)
    run(config)
    one, other = (s.dataset("tokens/alone").read_table() for s in (corpus, store))
    assert one["id"] == other["id"] and one["views"] != other["views"]


@pytest.mark.slow
def test_a_killed_job_ends_as_if_it_never_had_been(
    corpus: Store, copied: Callable[..., Store]
) -> None:
    store = copied(*SOURCES)
    command = [
        sys.executable, tokenize_corpus.__file__, "--store", store.root, "--images", "pairs",
        "--views", "2", "--max-caption-length", "16", "--max-text-length", "24",
        "--view.scale", "0.4", "1.0", "--batch-size", "1",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, start_new_session=True, env=environment)
    deadline = time.monotonic() + 120
    parts = Path(store.root) / "tokens" / "pairs"
    try:
        while not list(parts.glob("data-*/_part-*.json")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = {p: p.stat().st_mtime_ns for p in parts.glob("data-*/_part-*.json")}
    store.delete("tokens/pairs/_commits")  # where the kill came late
    subprocess.run(command, check=True, env=environment, timeout=240)
    assert files(store.dataset("tokens/pairs").commit()) == files(commits(corpus)["pairs"])
    assert done == {p: p.stat().st_mtime_ns for p in done}


# -- what can't be done ----------------------------------------------------------------------------


def test_what_is_missing_is_named(corpus: Store) -> None:
    config = small_corpus.tokens(corpus, images=("pairs",), texts=(), held_out=())
    with pytest.raises(StoreError, match="images/nothing does not exist"):
        run(replace(config, images=("nothing",)))
    with pytest.raises(StoreError, match="tokenizers/text/nothing: missing"):
        run(replace(config, text_tokenizer="nothing"))
    with pytest.raises(StoreError, match="tokenizers/image/nothing: missing"):
        run(replace(config, image_tokenizer="nothing"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "name at least one dataset"),
        ({"images": ("a",), "views": 0}, "views: expected at least 1"),
        ({"images": ("a",), "max_text_length": 2}, "max_text_length"),
        ({"images": ("a",), "max_caption_length": 2}, "max_caption_length"),
        ({"images": ("a",), "gpus_per_actor": 1.0}, "need actors"),
        ({"images": ("a",), "cpus_per_actor": 2}, "need actors"),
        ({"images": ("a",), "actors": 1, "cpus_per_actor": 0}, "cpus_per_actor: expected more"),
        ({"images": ("a",), "batch_size": -1}, "batch_size: expected 0 or more"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenizeConfig(**options)
