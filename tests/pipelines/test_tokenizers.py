"""Training the text tokenizer, the teacher and the image tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_corpus
import torch
from PIL import Image
from small_corpus import CODES, SIZE, VOCABULARY

from beit3 import weights
from beit3.objectives import DualEncoder
from beit3.text import BOS, EOS, PAD, UNK, TextTokenizer
from beit3.transforms import WHOLE, apply_view, decode
from beit3.vqkd import SHAPE_FILE
from pipelines import (
    bundles,
    check_tokenizer,
    cluster,
    contrast,
    models,
    tracking,
    train_image_tokenizer,
    train_text_tokenizer,
    trainer,
)
from pipelines.check_tokenizer import CheckConfig
from pipelines.contrast import ContrastConfig, ContrastRecipe
from pipelines.samples import Pictures
from pipelines.storage import Store, StoreError
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer
from pipelines.train_image_tokenizer import ImageTokenizerConfig, ImageTokenizerRecipe
from pipelines.train_text_tokenizer import TextTokenizerConfig, run

SOURCES = ("images", "text")


@pytest.fixture(scope="module")
def text(corpus: Store) -> TextTokenizer:
    return load_text_tokenizer(corpus, "sentencepiece")


def history(store: Store, run_id: str, key: str) -> list[float]:
    found = tracking.client(tracking.tracking_uri(store)).get_metric_history(run_id, key)
    return [m.value for m in sorted(found, key=lambda m: m.step)]


# -- text -----------------------------------------------------------------------------------------


def test_special_ids_are_the_released_ones(text: TextTokenizer) -> None:
    assert (BOS, PAD, EOS, UNK) == (0, 1, 2, 3)
    assert text.vocab_size == VOCABULARY and text.mask_id == VOCABULARY - 1
    ids = text.encode("a small red circle")
    assert min(ids) > UNK and max(ids) < text.mask_id
    assert UNK in text.encode("a 漢 circle")
    assert {text.encode(word)[0] for word in ("a", "e", "c")}.isdisjoint({BOS, PAD, EOS})


def test_what_was_learned_from_comes_back(text: TextTokenizer) -> None:
    for caption in small_corpus.CAPTIONS[::97]:
        assert UNK not in text.encode(caption)
        assert text.decode(text.encode(caption)) == caption


def test_it_learns_from_texts_and_captions(corpus: Store) -> None:
    info = bundles.info(corpus, "tokenizers/text/sentencepiece")
    rows = corpus.dataset("images/pairs").read_table(["captions"]).to_pylist()
    texts = corpus.dataset("text/words").read_table(["text"])["text"].to_pylist()
    sentences = {c for row in rows for c in row["captions"]} | set(texts)
    assert info["sentences"] == len(sentences) and info["vocab_size"] == VOCABULARY
    assert info["inputs"] == {
        name: corpus.dataset(name).commit().identity for name in ("text/words", "images/pairs")
    }


def test_the_same_corpus_gives_the_same_tokenizer(
    corpus: Store, text: TextTokenizer, copied: Callable[..., Store]
) -> None:
    store = copied(*SOURCES)
    assert run(small_corpus.text_tokenizer(store)).identity == text.identity
    bpe = run(small_corpus.text_tokenizer(store, name="bpe", model_type="bpe"))
    assert bpe.identity != text.identity and bpe.vocab_size == VOCABULARY


@pytest.mark.slow
def test_a_share_or_a_number_of_sentences_will_do(copied: Callable[..., Store]) -> None:
    store = copied(*SOURCES)
    config = small_corpus.text_tokenizer(store, name="half", sample=0.5, vocab_size=30)
    run(config)
    info = bundles.info(store, "tokenizers/text/half")
    assert 0.3 * 92 < info["sentences"] < 0.7 * 92
    few = replace(config, name="few", sample=1.0, max_sentences=20)
    run(few)
    assert bundles.info(store, "tokenizers/text/few")["sentences"] == 20


def test_bytes_stand_in_for_unknown_characters(copied: Callable[..., Store]) -> None:
    config = small_corpus.text_tokenizer(copied(*SOURCES), byte_fallback=True, vocab_size=290)
    tokenizer = run(config)
    assert UNK not in tokenizer.encode("a 漢 circle")
    assert tokenizer.decode(tokenizer.encode("a 漢 circle")) == "a 漢 circle"


def test_a_vocabulary_that_is_too_large_is_an_error(corpus: Store) -> None:
    config = small_corpus.text_tokenizer(corpus, name="large", vocab_size=5000)
    with pytest.raises(ValueError, match=r"vocab_size 5000: .* 92 sentences .*lower vocab_size"):
        run(config)
    assert not bundles.exists(corpus, "tokenizers/text/large")


def test_a_text_tokenizer_is_trained_once(
    corpus: Store,
    text: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "start", None)  # not called
    monkeypatch.setattr(train_text_tokenizer, "train", None)
    assert run(small_corpus.text_tokenizer(corpus, threads=7)).identity == text.identity
    assert "tokenizers/text/sentencepiece: already trained, skipped" in capsys.readouterr().out
    with pytest.raises(StoreError, match="was trained from other inputs or options"):
        run(small_corpus.text_tokenizer(corpus, vocab_size=30))
    with pytest.raises(StoreError, match="text/nothing does not exist"):
        run(small_corpus.text_tokenizer(corpus, texts=("nothing",)))


def test_a_corpus_without_text_is_an_error(corpus: Store) -> None:
    config = small_corpus.text_tokenizer(corpus, name="none", texts=(), images=("alone",))
    with pytest.raises(ValueError, match="no text in images/alone: nothing to learn"):
        run(config)


def test_impossible_options_are_named() -> None:
    with pytest.raises(ValueError, match="name at least one dataset to learn from"):
        TextTokenizerConfig()
    with pytest.raises(ValueError, match="sample: expected a share"):
        TextTokenizerConfig(texts=("a",), sample=0.0)
    with pytest.raises(ValueError, match="images: name at least one"):
        ImageTokenizerConfig(images=())
    with pytest.raises(ValueError, match="baseline_images: expected at least 1"):
        ImageTokenizerConfig(baseline_images=0)
    with pytest.raises(ValueError, match="images: name at least one"):
        ContrastConfig(images=())


# -- the teacher ----------------------------------------------------------------------------------


def test_the_teacher_is_a_dual_encoder_with_its_tokenizer(
    corpus: Store, text: TextTokenizer
) -> None:
    info = bundles.info(corpus, "models/teacher")
    assert (info["kind"], info["steps"]) == ("dual_encoder", 4)
    assert info["text_tokenizer"] == text.identity
    with models.opened(corpus, "models/teacher") as folder:
        shape, _ = weights.load_config(folder)
        weights.load_into(DualEncoder(shape), weights.load_tensors(folder))
        assert models.tokenizer_of(folder).identity == text.identity
    assert len(history(corpus, info["mlflow_run"], "train/loss")) == 4


def test_the_teacher_learns_which_caption_belongs_to_which_picture(corpus: Store) -> None:
    train = small_corpus.train_config(steps=60, warmup=5, learning_rate=3e-3)
    config = small_corpus.teacher(corpus, name="longer-teacher", train=train)
    losses = history(corpus, contrast.run(config)["mlflow_run"], "train/loss")
    assert np.mean(losses[-10:]) < np.mean(losses[:5]) - 0.1


def test_the_teachers_batch_is_shared_by_its_workers(corpus: Store, text: TextTokenizer) -> None:
    recipe = ContrastRecipe(small_corpus.teacher(corpus), small_corpus.SHAPE, text)
    for step in (0, 5):
        whole = recipe.batches(0, 1)(step)
        shares = [recipe.batches(rank, 2)(step) for rank in range(2)]
        both = [shares[rank].images[i] for i in range(4) for rank in range(2)]
        assert torch.equal(whole.images, torch.stack(both))
        texts = [torch.split(share.text, share.lengths) for share in shares]
        merged = [texts[rank][i] for i in range(4) for rank in range(2)]
        assert torch.equal(whole.text, torch.cat(merged))
    lengths = [n for step in range(4) for n in recipe.batches(0, 1)(step).lengths]
    assert max(lengths) == 24  # captions are cut


def test_the_tokenizer_must_fit_the_model(corpus: Store) -> None:
    small = replace(small_corpus.SHAPE, vocab_size=20)
    with pytest.raises(ValueError, match=r"model\.vocab_size 20 is smaller"):
        contrast.run(small_corpus.teacher(corpus, name="small", model=small))


# -- images ---------------------------------------------------------------------------------------


def test_the_image_tokenizer_leaves_a_bundle_and_its_health(corpus: Store) -> None:
    info = bundles.info(corpus, "tokenizers/image/vqkd")
    assert (info["codebook_size"], info["steps"]) == (CODES, 4)
    health = info["metrics"]
    assert {"used", "perplexity", "dead", "cosine"} <= health.keys()
    assert 0 < health["used"] <= 1 and 1 <= health["perplexity"] <= CODES
    assert health["dead"] == pytest.approx(CODES * (1 - health["used"]))
    assert -1 <= health["cosine"] <= 1
    model, identity = load_image_tokenizer(corpus, "vqkd")
    assert identity == bundles.identity(corpus, "tokenizers/image/vqkd")
    assert not model.training and model.config.teacher_dim == small_corpus.SHAPE.hidden

    assert (info["teacher"], info["images"]) == ("teacher", ["pairs"])

    # Its health is that of the held-out pictures, whole.
    rows = corpus.dataset("tasks/captioning/val").read_table().to_pylist()
    pixels = [apply_view(decode(row["images"][0]["bytes"]), WHOLE, SIZE) for row in rows]
    codes = model.encode(torch.from_numpy(np.stack(pixels)))
    assert codes.shape == (9, 9) and int(codes.max()) < CODES
    assert len(codes.unique()) == round(health["used"] * CODES)


def test_the_tokenizers_health_is_said_in_words(corpus: Store) -> None:
    info = bundles.info(corpus, "tokenizers/image/vqkd")
    health, numbers = info["health"], info["health"]["numbers"]
    assert health["verdict"] in ("usable", "doubtful", "unusable")
    assert health["text"].startswith(f"The tokenizer is {health['verdict']}.\n- Usage: ")
    assert (numbers["pictures"], numbers["words"], numbers["codes"]) == (9, 81, CODES)
    assert (numbers["held_out"], numbers["centres"]) == (True, CODES)
    assert numbers["baseline_features"] == 34 * 9
    assert numbers["floor"] < numbers["kmeans"] <= 1
    for key in ("used", "dead", "perplexity", "cosine"):
        assert info["metrics"][key] == numbers[key]
    assert info["metrics"]["cosine_kmeans"] == numbers["kmeans"]
    assert info["metrics"]["cosine_floor"] == numbers["floor"]


def test_a_tokenizer_is_checked_by_a_command(
    corpus: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    config = CheckConfig(store=corpus.uri, images=("captioning/val",))
    judged = check_tokenizer.run(config)
    assert judged.text == bundles.info(corpus, "tokenizers/image/vqkd")["health"]["text"]
    assert f"tokenizers/image/vqkd: {judged.text}" in capsys.readouterr().out
    own = check_tokenizer.run(replace(config, images=("pairs", "alone")))
    assert "of 48 pictures" in own.text  # one does not decode
    assert "of those that it learned from" in own.text
    with pytest.raises(ValueError, match="192 wide, the tokenizer makes 32"):
        check_tokenizer.run(replace(config, teacher="pixels"))
    with pytest.raises(StoreError, match="tokenizers/image/nothing: missing"):
        check_tokenizer.run(replace(config, name="nothing"))
    with pytest.raises(ValueError, match="images: name at least one"):
        CheckConfig()
    with pytest.raises(ValueError, match="count: expected at least 1"):
        replace(config, count=0)


def test_pixels_may_be_the_teacher(corpus: Store, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_corpus.image_tokenizer(corpus, name="of-pixels", teacher="pixels", held_out="")
    info = train_image_tokenizer.run(config)
    model, _ = load_image_tokenizer(corpus, "of-pixels")
    assert model.config.teacher_dim == 3 * small_corpus.PATCH**2
    assert info["health"]["text"] in capsys.readouterr().out
    assert not info["health"]["numbers"]["held_out"]


def test_the_image_tokenizers_run_has_curves_and_pictures(corpus: Store, tmp_path: Path) -> None:
    run_id = bundles.info(corpus, "tokenizers/image/vqkd")["mlflow_run"]
    curves = [f"{a}/{b}" for a in ("batch", "codebook") for b in ("used", "perplexity", "dead")]
    for key in ("loss", "cosine", "commitment", *curves):
        assert len(history(corpus, run_id, f"train/{key}")) == 4, key
    tracker = tracking.client(tracking.tracking_uri(corpus))
    for folder in ("code_maps", "code_patches"):
        (file,) = tracker.list_artifacts(run_id, folder)
        assert file.path == f"{folder}/step-000004.png"
        with Image.open(tracker.download_artifacts(run_id, file.path, str(tmp_path))) as picture:
            assert picture.width > 100 and len(picture.getcolors(1 << 20) or []) > 10


def test_the_image_tokenizer_learns_from_its_teacher(corpus: Store) -> None:
    train = small_corpus.train_config(steps=40, warmup=4, learning_rate=3e-3)
    config = small_corpus.image_tokenizer(corpus, name="longer-vqkd", train=train)
    result = train_image_tokenizer.run(config)
    cosines = history(corpus, result["mlflow_run"], "train/cosine")
    assert np.mean(cosines[-5:]) > np.mean(cosines[:5]) + 0.05
    assert result["metrics"]["used"] * CODES > 1.5  # not one code for everything


def test_the_teacher_is_left_as_it_is(corpus: Store) -> None:
    """Nor is it part of the tokenizer's weights."""
    recipe = ImageTokenizerRecipe(small_corpus.image_tokenizer(corpus), small_corpus.WORDS)
    module = recipe.build().train()
    assert isinstance(module, train_image_tokenizer.Distillation)
    assert not module.teacher.training and module.tokenizer.training
    batch = recipe.batches(0, 1)(0)
    results = module(batch)
    results["loss"].backward()
    assert all(p.grad is None for p in module.teacher.parameters())
    assert any(p.grad is not None for p in module.tokenizer.parameters())
    again = recipe.batches(0, 1)(0)
    assert torch.equal(batch.images, again.images) and batch.images.dtype == torch.uint8
    files = corpus.read_json("tokenizers/image/vqkd/_bundle.json")["files"]
    assert set(files) == {weights.WEIGHTS, SHAPE_FILE}
    with models.opened(corpus, "tokenizers/image/vqkd") as folder:
        tensors = weights.load_tensors(folder)
        shape = json.loads((folder / SHAPE_FILE).read_text())
    assert (
        not any(key.startswith("teacher.") for key in tensors) and shape["codebook_size"] == CODES
    )


def test_an_image_tokenizer_is_trained_once(
    corpus: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "_launch", None)  # not called
    config = small_corpus.image_tokenizer(corpus)
    found = train_image_tokenizer.run(config)
    assert found == bundles.info(corpus, "tokenizers/image/vqkd")
    assert "tokenizers/image/vqkd: already trained (4 steps), skipped" in capsys.readouterr().out
    with pytest.raises(StoreError, match="other inputs or options"):
        train_image_tokenizer.run(replace(config, batch_size=4))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "nobody"}, "models/nobody: missing"),
        ({"teacher": "tokenizers/image/vqkd"}, "neither a dual encoder nor an imported CLIP"),
        ({"images": ("nothing",)}, "images/nothing does not exist"),
        ({"held_out": "images/nothing"}, "images/nothing does not exist"),
        (
            {"tokenizer": replace(small_corpus.WORDS, patch_size=4)},
            r"its patch grid is 3x3 at 24 pixels, the tokenizer's 6x6 at 24",
        ),
        (
            {"tokenizer": replace(small_corpus.WORDS, image_size=40)},
            r"the tokenizer's 5x5 at 40: too different",
        ),
    ],
)
def test_what_can_t_be_learned_from_is_named(
    changes: dict[str, Any], said: str, corpus: Store
) -> None:
    with pytest.raises(StoreError, match=said):
        train_image_tokenizer.run(small_corpus.image_tokenizer(corpus, name="odd", **changes))


def test_long_lines_are_learned_from_too(tmp_path: Path) -> None:
    config = TextTokenizerConfig(texts=("a",), vocab_size=26, threads=1)
    lines = ["привет книга " * 400, *["a small red circle"] * 30]
    assert len(lines[0].encode()) > 4_192
    tokenizer = TextTokenizer(train_text_tokenizer.train(lines, config))
    assert UNK not in tokenizer.encode("привет книга")


def test_an_error_of_sentencepiece_s_own_keeps_its_words() -> None:
    config = TextTokenizerConfig(texts=("a",), vocab_size=64, character_coverage=2.0, threads=1)
    with pytest.raises(ValueError, match=r"can't learn from 1 sentences: .*character_coverage"):
        train_text_tokenizer.train(["a small red circle"], config)


def test_a_picture_that_can_t_be_decoded_is_named() -> None:
    with pytest.raises(ValueError, match=r"cc3m/7: a picture that can't be decoded"):
        Pictures()("cc3m/7", b"no picture")


def test_the_codebook_s_steps_are_not_cut() -> None:
    base = train_image_tokenizer.PRESETS["tiny"]
    with pytest.raises(
        ValueError, match=r"train\.accumulate 2: the codebook moves with each batch"
    ):
        replace(base, train=replace(base.train, accumulate=2))
