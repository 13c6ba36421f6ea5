"""What pretraining refuses before its first step: data, models and options that don't fit."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import small_corpus

from beit3 import vqkd
from beit3.objectives import ObjectiveWeights
from beit3.text import TOKENIZER_FILE
from pipelines import (
    bundles,
    cluster,
    pretrain,
    token_checks,
    train_text_tokenizer,
)
from pipelines.pretrain import run
from pipelines.pretrain_config import PRESETS, PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain, "fit", None)
    monkeypatch.setattr(cluster, "start", None)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize("kind", ["text", "image"])
def test_tokens_of_two_tokenizers_don_t_mix(kind: str, copied: Callable[..., Store]) -> None:
    store = copied("tokens", "tokenizers")
    small_corpus.republished(
        store, "odd", lambda used: used[kind].update(name="other", identity="0" * 16)
    )
    config = small_corpus.pretraining(store, pairs=("pairs", "odd"))
    said = rf"different {kind} tokenizers \(tokens/alone with .*, tokens/odd with other\): tokenize"
    with pytest.raises(StoreError, match=said):
        run(config)


@pytest.mark.usefixtures("nothing_starts")
def test_an_image_tokenizer_that_was_replaced_is_noticed(copied: Callable[..., Store]) -> None:
    store = copied("tokens", "tokenizers")
    name = "tokenizers/image/vqkd"
    with tempfile.TemporaryDirectory() as folder:
        info = bundles.load(store, name, Path(folder))
        model = vqkd.load(Path(folder))
        model.codebook.vectors.neg_()
        vqkd.save(Path(folder), model)
        bundles.save(store, name, Path(folder), info)
    with pytest.raises(StoreError, match="image/vqkd is not the one that made these tokens"):
        run(small_corpus.pretraining(store))


@pytest.mark.usefixtures("nothing_starts")
def test_a_text_tokenizer_that_was_replaced_is_noticed(copied: Callable[..., Store]) -> None:
    store = copied("tokens", "tokenizers")
    store.delete("tokenizers/text/sentencepiece")
    sentences = [s.upper() for s in small_corpus.CAPTIONS]
    model = train_text_tokenizer.train(sentences, small_corpus.text_tokenizer(store, vocab_size=34))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(model)
        bundles.save(store, "tokenizers/text/sentencepiece", Path(folder), {"fingerprint": ""})
    with pytest.raises(StoreError, match="is not the one that made these tokens: tokenize again"):
        run(small_corpus.pretraining(store))


def check_pictures(store: Store, config: PretrainConfig) -> None:
    token_checks.check_pictures(token_checks.check_data(store, config)[0])


@pytest.mark.usefixtures("nothing_starts")
def test_pictures_that_took_the_place_of_those_tokenized_are_refused(
    copied: Callable[..., Store],
) -> None:
    """Under the same name, in parts of the same names and sizes."""
    store = copied("images", "tasks", "tokens", "tokenizers")
    config = small_corpus.pretraining(store)
    check_pictures(store, config)

    def made_anew(name: str, schema: pa.Schema, *parts: list[dict[str, Any]]) -> None:
        store.delete(name)
        with pytest.raises(StoreError, match=rf"was made of .*{name}, whose pictures training"):
            run(config)
        small_corpus.publish(store, name, schema, *parts)

    rows = small_corpus.image_rows("pairs", 0, 35, captions=2)
    made_anew("images/pairs", small_corpus.IMAGE_SCHEMA, rows[:20], rows[20:34])
    check_pictures(store, config)  # the same pictures again
    made_anew("images/pairs", small_corpus.IMAGE_SCHEMA, rows[1:21], rows[21:])
    said = r"tokens/pairs was made of other pictures than .*images/pairs has now: delete tokens/pai"
    with pytest.raises(StoreError, match=said):
        run(config)
    config = replace(config, pairs=(), pair_batch=0)
    check_pictures(store, config)
    made_anew("tasks/captioning/val", small_corpus.TASK_SCHEMA, small_corpus.task_rows(10)[1:])
    said = r"tokens/captioning/val was made of other pictures than .*tasks/captioning/val has now"
    with pytest.raises(StoreError, match=said):
        run(config)


def test_pictures_that_were_added_since_do_no_harm(copied: Callable[..., Store]) -> None:
    """As `ingest.py --retry-failed` adds them."""
    store = copied("images", "tasks", "tokens", "tokenizers")
    config = small_corpus.pretraining(store)
    dataset = store.dataset("images/pairs")
    first = dataset.commit()
    schema, late = small_corpus.IMAGE_SCHEMA, small_corpus.image_rows("pairs", 50, 4, captions=2)
    more = dataset.write_part(first.fingerprint, "00002", pa.Table.from_pylist(late, schema))
    amended = {"set_aside": [], "stats": {}, "note": {"job": "by hand"}}
    dataset.amend(files=[*first.files, more.file], **amended)
    check_pictures(store, config)
    dataset.amend(files=[*first.files[1:], more.file], **amended)  # some were taken away
    with pytest.raises(StoreError, match="tokens/pairs was made of other pictures than"):
        check_pictures(store, config)


def test_how_a_step_goes_through_a_gpu_makes_no_other_run(corpus: Store) -> None:
    config = small_corpus.pretraining(corpus)
    datasets = pretrain.prepare(config)[1]
    mark = pretrain.run_mark(config, datasets)
    halves = {"image_batch": 2, "text_batch": 2, "pair_batch": 4}
    twice = replace(config.train, accumulate=2)
    blocks = replace(config.model, checkpoint_activations="blocks")
    assert pretrain.run_mark(replace(config, **halves, train=twice, model=blocks), datasets) == mark
    assert pretrain.run_mark(replace(config, **halves), datasets) != mark
    assert pretrain.run_mark(replace(config, train=twice), datasets) != mark


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image_size": 32}, r"visual words are 3x3 at 24 pixels, the model's patches 4x4 at 32"),
        ({"patch_size": 4}, r"the model's patches 6x6 at 24"),
        ({"codebook_size": 99}, "model.codebook_size 99 is not the tokenizer's 24"),
        ({"vocab_size": 20}, "model.vocab_size 20 is smaller than the tokenizer's 38"),
    ],
)
def test_a_model_that_does_not_fit_the_tokens_is_refused(
    change: dict[str, Any], said: str, corpus: Store
) -> None:
    config = small_corpus.pretraining(corpus, model=replace(small_corpus.SHAPE, **change))
    with pytest.raises((StoreError, ValueError), match=said):
        run(config)


@pytest.mark.usefixtures("nothing_starts")
def test_a_model_that_the_machine_has_no_memory_for_is_refused(
    corpus: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    model = replace(small_corpus.SHAPE, hidden=1 << 15, mlp=1 << 17, layers=8)
    with pytest.raises(ValueError, match=r"train.workers 2: .* GiB in all, .* a smaller model"):
        run(small_corpus.pretraining(corpus, model=model, train={"workers": 2}))


@pytest.mark.usefixtures("nothing_starts")
def test_missing_and_empty_datasets_are_named(copied: Callable[..., Store]) -> None:
    store = copied("tokens", "tokenizers")
    with pytest.raises(StoreError, match="tokens/nothing does not exist"):
        run(small_corpus.pretraining(store, images=("nothing",)))
    with pytest.raises(StoreError, match="tokens/nothing does not exist"):
        run(small_corpus.pretraining(store, held_out="nothing"))
    small_corpus.republished(
        store, "empty", lambda used: None, rows=lambda table: table.slice(0, 0)
    )
    with pytest.raises(StoreError, match=r"pairs: .*tokens/empty has no rows: leave 'empty' out"):
        run(small_corpus.pretraining(store, pairs=("empty",)))


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"pairs": ("alone",)}, r"pairs: no picture of .*tokens/alone has a caption: name 'alone'"),
        ({"pairs": ("pairs", "alone"), "pair_weights": (1, 1)}, r"pairs: no picture of .*alone"),
        (
            {"held_out": "alone", "images": ("pairs",)},
            r"held_out: no picture of .*tokens/alone has a caption",
        ),
        ({"images": ("words",)}, r"images: .*tokens/words holds texts, no pictures: name 'words'"),
        ({"texts": ("words", "pairs")}, r"texts: .*tokens/pairs holds pictures, no texts"),
    ],
)
def test_datasets_of_another_kind_are_named(
    options: dict[str, Any], said: str, corpus: Store
) -> None:
    with pytest.raises(StoreError, match=said):
        run(small_corpus.pretraining(corpus, **options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"image_weights": (1.0, 2.0)}, "image_weights: 2 weights for the 1 datasets of images"),
        ({"pair_weights": (1.0,) * 4}, "pair_weights: 4 weights for the 5 datasets of pairs"),
        ({"text_weights": (0.0,)}, r"text_weights: expected numbers above 0, got 0.0; leave out"),
        ({"text_weights": (float("nan"),)}, "text_weights: expected numbers above 0, got nan"),
        ({"inspect_step": 0}, r"inspect_step 0 is not within 1\.\.train\.steps 1000"),
        (
            {"objectives": ObjectiveWeights(0, 0, 0, 0)},
            "or the objectives of what is not are: nothing to train on",
        ),
        ({"held_out": "coco"}, "held_out 'coco' is one of pairs, which are trained on"),
        ({"held_out": "imagenet21k"}, "held_out 'imagenet21k' is one of images"),
        ({"held_out_ranked": 8}, "held_out_ranked 8: without held_out there is nothing to rank"),
        (
            {"images": (), "image_batch": 0, "pairs": (), "pair_batch": 0}
            | {"train": TrainConfig(evaluate_every=10)},
            "train.evaluate_every 10: without held_out nothing is measured, and no hidden patches",
        ),
        ({"images": ()}, "images names 0 datasets, but image_batch is"),
        ({"pair_batch": 0}, "pairs names 5 datasets, but pair_batch is 0"),
        ({"text_batch": 9, "train": TrainConfig(workers=2)}, "text_batch 9 is not divis"),
        (
            dict.fromkeys(("image_batch", "text_batch", "pair_batch"), 96)
            | {"train": TrainConfig(workers=3)},
            r"train.workers 3: the 64 streams .* can't be shared out equally, .*: set a divisor or",
        ),
        (
            {"images": (), "texts": (), "pairs": ()}
            | {"image_batch": 0, "text_batch": 0, "pair_batch": 0},
            "nothing to train on",
        ),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PretrainConfig(**options)


def test_presets_fit_their_model() -> None:
    for name, cfg in PRESETS.items():
        for batch in (cfg.image_batch, cfg.text_batch, cfg.pair_batch):
            assert batch % cfg.train.workers == 0, name
    base = PRESETS["base"]
    assert (base.model.layers, base.model.hidden, base.train.steps) == (12, 768, 1_000_000)
