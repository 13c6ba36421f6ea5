"""Tokens that were stored without visual words: the training step finds the same ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_corpus
import torch

from beit3 import weights
from beit3.objectives import MaskedDataModelling, ObjectiveWeights
from pipelines import (
    bundles,
    export,
    pretrain,
    pretrain_plan,
    token_checks,
    tokenize_corpus,
)
from pipelines.export import ExportConfig
from pipelines.pretrain import PretrainRecipe
from pipelines.storage import Store, StoreError
from pipelines.tokenize_corpus import TokenizeConfig
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer
from pipelines.words_in_step import WordsInStep

ROWS = ("id", "image_row", "captions")


@pytest.fixture
def wordless(copied: Callable[..., Store]) -> Store:
    """The corpus, tokenized without visual words."""
    store = copied("images", "tasks", "text", "tokenizers")
    tokenize_corpus.run(small_corpus.tokens(store, in_step=True))
    return store


FP32 = token_checks.Words("vqkd", "fp32")


@pytest.fixture
def recipe(corpus: Store) -> PretrainRecipe:
    """One that finds the words, though they are stored."""
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    return PretrainRecipe(small_corpus.pretraining(corpus), tokenizer, FP32)


def _exported(store: Store, name: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as folder:
        bundles.load(store, name, Path(folder))
        return weights.load_tensors(Path(folder))


def test_views_are_stored_as_ever_but_for_their_words(wordless: Store, corpus: Store) -> None:
    for name in ("pairs", "alone", "captioning/val"):
        own, other = (store.dataset(f"tokens/{name}") for store in (wordless, corpus))
        rows, wanted = own.read_table().to_pylist(), other.read_table().to_pylist()
        for row in wanted:
            for view in row["views"]:
                del view["words"]
        assert rows == wanted
        assert own.read_set_aside() == other.read_set_aside()
        stats = other.commit().stats
        assert own.commit().stats == {**stats, "words": {}}


def test_the_step_trains_as_if_words_had_been_stored(wordless: Store, corpus: Store) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    stored = PretrainRecipe(small_corpus.pretraining(corpus), tokenizer)
    found = PretrainRecipe(small_corpus.pretraining(wordless), tokenizer, FP32)
    module = found.build()
    assert isinstance(module, WordsInStep)
    for step in range(3):
        wanted = stored.batches(0, 1)(step)
        batch = found.batches(0, 1)(step)
        assert torch.equal(batch.images, wanted.images) and not batch.visual_words.any()
        batch = module.with_words(batch)
        assert torch.equal(batch.visual_words, wanted.visual_words)
        for kind, masked in wanted.masked.items():
            assert torch.equal(batch.masked[kind].targets, masked.targets)
    for store in (wordless, corpus):
        pretrain.run(small_corpus.pretraining(store, name="in-step"))
    ours, theirs = (bundles.info(store, "models/in-step") for store in (wordless, corpus))
    assert ours["metrics"] == theirs["metrics"]
    ours, theirs = (_exported(store, "models/in-step") for store in (wordless, corpus))
    assert ours.keys() == theirs.keys()  # the tokenizer is no part of the model
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_the_tokenizer_goes_with_the_model_and_learns_nothing(recipe: PretrainRecipe) -> None:
    module, plain = recipe.build(), MaskedDataModelling(small_corpus.SHAPE)
    assert isinstance(module, WordsInStep)
    assert module.state_dict().keys() == plain.state_dict().keys()
    (tokenizer,) = module._tokenizer
    module.train().to("meta")
    assert not tokenizer.training
    assert {p.device.type for p in tokenizer.parameters()} == {"meta"}
    assert not any(p.requires_grad for p in tokenizer.parameters())


def test_words_keep_their_precision_where_the_model_has_less(recipe: PretrainRecipe) -> None:
    module, batch = recipe.build(), recipe.batches(0, 1)(0)
    assert isinstance(module, WordsInStep)
    with torch.autocast("cpu", torch.bfloat16):
        found = module.with_words(batch)
    assert torch.equal(found.visual_words, batch.visual_words)


def test_words_in_bf16_are_the_same_stored_or_in_the_step(
    recipe: PretrainRecipe, copied: Callable[..., Store], corpus: Store
) -> None:
    stored, found = copied("images", "tasks", "text", "tokenizers"), []
    half = small_corpus.tokens(stored, precision="bf16", texts=(), batch_size=3)
    tokenize_corpus.run(half)
    wanted, full = (s.dataset("tokens/pairs").read_table(["views"]) for s in (stored, corpus))
    wanted, full = (
        np.array([view["words"] for views in table["views"].to_pylist() for view in views])
        for table in (wanted, full)
    )
    assert 0.9 < (wanted == full).mean() < 1  # bf16 it is, and few words change
    for store in (stored, corpus):
        cfg = small_corpus.pretraining(store, images=(), texts=(), image_batch=0, text_batch=0)
        words = token_checks.Words("vqkd", "bf16")
        own = PretrainRecipe(cfg, recipe.tokenizer, None if store is stored else words)
        found.append((own.build(), own.batches(0, 1)(0)))
    (_, at_hand), (module, batch) = found
    assert isinstance(module, WordsInStep) and torch.equal(at_hand.images, batch.images)
    same = module.with_words(batch).visual_words == at_hand.visual_words
    assert same.float().mean() > 0.99  # other pictures beside them round otherwise


def test_words_of_two_precisions_are_not_mixed(copied: Callable[..., Store]) -> None:
    store = copied("images", "tasks", "text", "tokenizers")
    for name, precision in (("pairs", "bf16"), ("alone", "fp32")):
        options = {"images": (name,), "texts": (), "held_out": (), "precision": precision}
        tokenize_corpus.run(small_corpus.tokens(store, in_step=True, **options))
    datasets = [store.dataset(f"tokens/{name}") for name in ("pairs", "alone")]
    with pytest.raises(StoreError, match="tokens/pairs in bf16, tokens/alone in fp32"):
        token_checks.words_in_step(small_corpus.pretraining(store), datasets)


def test_a_tokenizer_is_loaded_only_where_words_are_missing_and_wanted(
    wordless: Store, corpus: Store
) -> None:
    config = small_corpus.pretraining(wordless)
    datasets = [wordless.dataset("tokens/words"), corpus.dataset("tokens/pairs")]
    assert token_checks.words_in_step(config, datasets) is None
    mixed = [*datasets, wordless.dataset("tokens/alone")]
    assert token_checks.words_in_step(config, mixed) == FP32
    wordless.delete("tokenizers/image/vqkd/" + weights.WEIGHTS)
    pixels = ObjectiveWeights(image_target="pixels")
    with pytest.raises(StoreError, match="tokenizers/image/vqkd"):
        pretrain.run(config)
    assert pretrain.run(replace(config, name="pixels", objectives=pixels))["steps"] == 6


def test_a_checkpoint_is_exported_without_the_tokenizer(wordless: Store, tmp_path: Path) -> None:
    pretrain.run(small_corpus.pretraining(wordless, name="in-step"))
    wordless.delete("tokenizers/image/vqkd/" + weights.WEIGHTS)
    folder = export.run(ExportConfig("models/in-step", str(tmp_path / "out"), wordless.uri, 4))
    own = weights.load_tensors(folder)
    assert own.keys() == MaskedDataModelling(small_corpus.SHAPE).state_dict().keys()


def test_a_dry_run_counts_the_tokenizer(
    wordless: Store, corpus: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    stored, found = (pretrain.plan(small_corpus.pretraining(store)) for store in (corpus, wordless))
    tokenizer, _ = load_image_tokenizer(wordless, "vqkd")
    size = 4 * sum(p.numel() for p in tokenizer.parameters())
    assert found["memory"] == stored["memory"] | {
        "image_tokenizer": size,
        "in_all": stored["memory"]["in_all"] + size,
    }
    pretrain_plan.show(stored)
    assert "visual words" not in capsys.readouterr().out
    pretrain_plan.show(found)
    assert "finds its visual words is not in these hours" in capsys.readouterr().out


def test_nothing_is_encoded_so_no_gpu_is_taken() -> None:
    with pytest.raises(ValueError, match="gpus_per_actor: with in_step nothing is encoded"):
        TokenizeConfig(images=("cc3m",), in_step=True, actors=1, gpus_per_actor=1.0)
