"""The pages that show what a step of pretraining reads."""

from __future__ import annotations

import html.parser
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import small_corpus
import torch

from beit3.objectives import MaskedBatch
from beit3.text import UNK
from pipelines import inspect_step, models
from pipelines.inspect_step import Share, greyed, samples, write
from pipelines.pretrain import PretrainRecipe, run
from pipelines.pretrain_config import PretrainConfig
from pipelines.storage import Store
from pipelines.tokenizers import load_text_tokenizer

STEP = 3


@pytest.fixture(scope="module")
def config(corpus: Store) -> PretrainConfig:
    """Two workers, each with two batches a step; a mix by weight."""
    return small_corpus.pretraining(
        corpus,
        name="inspected",
        images=("alone", "pairs"),
        image_weights=(1.0, 2.0),
        inspect_step=STEP,
        train={"workers": 2, "accumulate": 2},
    )


@pytest.fixture(scope="module")
def result(config: PretrainConfig) -> dict[str, Any]:
    return run(config)


def folder(number: int = STEP) -> str:
    return f"runs/inspected/inspect/step-{number:08d}"


def tokens_of(corpus: Store, name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in corpus.dataset(f"tokens/{name}").read_table().to_pylist()}


def test_it_shows_the_batches_that_are_trained_on(
    corpus: Store, config: PretrainConfig, result: dict[str, Any]
) -> None:
    recipe = PretrainRecipe(config, load_text_tokenizer(corpus, "sentencepiece"))
    for rank in range(2):
        found = corpus.read_json(f"{folder()}/worker-{rank:04d}.json")
        assert found["step"] == STEP
        batches = [recipe.batches(rank, 2)(number) for number in (4, 5)]
        wanted = [
            (name, source, number, rank)
            for number, batch in zip((4, 5), batches, strict=True)
            for name, source in zip(batch.ids, batch.sources, strict=True)
        ]
        shown = [(s["id"], s["dataset"], s["batch"], s["worker"]) for s in found["samples"]]
        assert shown == wanted
        hidden = [s["hidden_patches"] for s in found["samples"] if "hidden_patches" in s]
        assert hidden == [
            mask.nonzero().flatten().tolist() for batch in batches for mask in batch.hidden_patches
        ]
    assert sum(result["sources"].values()) == 2 * recipe.samples_per_batch()
    assert result["sources"]["pair/pairs"] == 16 and result["sources"]["text/words"] == 8
    assert {"image/alone", "image/pairs"} <= set(result["sources"])


def test_texts_are_shown_whole_with_what_is_masked(
    corpus: Store, config: PretrainConfig, result: dict[str, Any]
) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    words, pairs = tokens_of(corpus, "words"), tokens_of(corpus, "pairs")
    seen, masked = 0, 0
    for rank in range(2):
        for one in corpus.read_json(f"{folder()}/worker-{rank:04d}.json")["samples"]:
            if "tokens" not in one:
                assert one["kind"] == "image"
                continue
            seen += 1
            masked += len(one["masked"])
            known = (
                [words[one["id"]]["ids"]] if one["kind"] == "text" else pairs[one["id"]]["captions"]
            )
            assert one["tokens"] in known and tokenizer.mask_id not in one["tokens"]
            assert all(one["tokens"][place] >= UNK for place in one["masked"])
            assert one["text"] == tokenizer.decode([i for i in one["tokens"] if i > UNK]).strip()
    assert seen == 24 and masked > 12


def test_pages_are_whole_and_marked(corpus: Store, result: dict[str, Any]) -> None:
    index = corpus.read(f"{folder()}/index.html").decode()
    assert result["folder"] == f"{corpus.uri}/{folder()}"
    for link in re.findall('href="(worker[^"]*)"', index):
        assert corpus.exists(f"{folder()}/{link}")
    for rank in range(2):
        page = corpus.read(f"{folder()}/worker-{rank:04d}.html").decode()
        html.parser.HTMLParser().feed(page)
        found = corpus.read_json(f"{folder()}/worker-{rank:04d}.json")["samples"]
        assert page.count("<mark") == sum(len(one.get("masked", ())) for one in found)
        assert page.count("<img") == sum("hidden_patches" in one for one in found)
        assert all(one["id"] in page for one in found)


def test_it_trains_nothing_and_tells_of_other_options(
    corpus: Store, config: PretrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not corpus.exists("models/inspected") and not corpus.exists("runs/inspected/run.json")
    run(replace(config, name="longer-inspected", inspect_step=1))
    assert "begun with other" not in capsys.readouterr().out
    corpus.write_json("runs/longer-inspected/run.json", {"fingerprint": "another"})
    run(replace(config, name="longer-inspected", inspect_step=1))
    assert "longer-inspected was begun with other inputs or options" in capsys.readouterr().out


def test_the_number_of_the_step_decides_nothing_else(config: PretrainConfig) -> None:
    plain = models.decisive(replace(config, inspect_step=None))
    assert models.decisive(config) == plain


def test_hidden_patches_are_grey() -> None:
    images = torch.full((1, 3, 4, 6), 200, dtype=torch.uint8)
    hidden = torch.tensor([[False, False, True, True, False, False]])
    whole = greyed(images, hidden, 2)
    assert whole.dtype == np.uint8 and whole.shape == (1, 3, 4, 6)
    assert (whole[0, :, :2, 4:] == 128).all() and (whole[0, :, 2:, :2] == 128).all()
    assert (whole == 128).sum() == 2 * 3 * 4 and (whole == 200).sum() == 4 * 3 * 4
    assert (greyed(images, hidden, 2, 0.5)[0, :, :2, 4:] == 164).all()


@pytest.mark.parametrize("kind", ["images", "texts"])
def test_batches_of_one_kind(kind: str, corpus: Store) -> None:
    none: dict[str, Any] = {
        option: value
        for other in ("images", "texts", "pairs")
        if other != kind
        for option, value in ((other, ()), (f"{other[:-1]}_batch", 0))
    }
    recipe = PretrainRecipe(
        small_corpus.pretraining(corpus, held_out="", **none),
        load_text_tokenizer(corpus, "sentencepiece"),
    )
    found = list(samples(recipe.batches(0, 1)(0)))
    assert [one.kind for one in found] == [kind[:-1]] * 4
    assert all((one.picture is None) == (kind == "texts") for one in found)


def test_names_and_texts_from_the_data_are_harmless(corpus: Store) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    batch = MaskedBatch.collate(
        torch.zeros(1, 3, 24, 24, dtype=torch.uint8),
        torch.zeros(1, 9, dtype=torch.bool),
        torch.zeros(1, 9, dtype=torch.long),
        [],
        [],
        tokenizer.mask_id,
        pairs=0,
        ids=["<script>alert(1)</script>"],
        sources=["a<b"],
    )
    write(corpus, "harmless", 1, [(Share(0, 0), batch)], tokenizer, 8)
    page = corpus.read("harmless/worker-0000.html").decode()
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert json.loads(corpus.read("harmless/worker-0000.json"))["samples"][0]["dataset"] == "a<b"
    assert inspect_step.write(corpus, "none", 1, [], tokenizer, 8)["sources"] == {}
