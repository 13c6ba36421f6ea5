"""Pretraining's batches, and what it refuses before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import small_corpus
import torch

from beit3 import released, weights
from beit3.masking import Masking
from beit3.objectives import MaskedDataModelling, ObjectiveWeights
from beit3.text import BOS, EOS, UNK, TextTokenizer
from beit3.transforms import View, apply_view, decode
from pipelines import (
    config,
    contrast,
    inspect_step,
    models,
    pretrain,
    token_checks,
    tokenize_corpus,
    tracking,
)
from pipelines.masked_batches import held_out_batches
from pipelines.pretrain import PretrainRecipe, run
from pipelines.pretrain_config import PRESETS, PretrainConfig
from pipelines.storage import Store
from pipelines.tokenize_corpus import stored_view
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer

ALONE, PAIRS, TEXTS = 4, 8, 4  # of a batch


def _tokenizer(store: Store) -> TextTokenizer:
    return load_text_tokenizer(store, "sentencepiece")


@pytest.fixture(scope="module")
def recipe(corpus: Store) -> PretrainRecipe:
    return PretrainRecipe(small_corpus.pretraining(corpus), _tokenizer(corpus))


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_has_images_texts_and_pairs(recipe: PretrainRecipe) -> None:
    batch = recipe.batches(0, 1)(0)
    kinds = [name.split("/")[0] for name in batch.ids]
    assert kinds == ["alone"] * ALONE + ["pairs"] * PAIRS + ["words"] * TEXTS
    assert batch.images.shape == (ALONE + PAIRS, 3, small_corpus.SIZE, small_corpus.SIZE)
    assert batch.images.dtype == torch.uint8
    assert recipe.samples_per_batch() == len(batch.ids)


def test_a_batch_is_a_function_of_its_number(recipe: PretrainRecipe) -> None:
    batches = recipe.batches(0, 1)
    early = [batches(step) for step in range(12)]
    later = recipe.batches(0, 1)
    for step in (11, 2, 7):  # as a run resumed there would ask
        again = later(step)
        assert again.ids == early[step].ids
        assert torch.equal(again.images, early[step].images)
        assert torch.equal(again.text, early[step].text)
    assert len({tuple(batch.ids) for batch in early}) == 12
    other = replace(recipe, cfg=replace(recipe.cfg, train=replace(recipe.cfg.train, seed=1)))
    assert other.batches(0, 1)(0).ids != early[0].ids


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_same_batch(world: int, recipe: PretrainRecipe) -> None:
    whole = recipe.batches(0, 1)
    workers = [recipe.batches(rank, world) for rank in range(world)]
    for step in (0, 3, 9):
        batch, shares = whole(step), [worker(step) for worker in workers]
        assert sorted(i for share in shares for i in share.ids) == sorted(batch.ids)
        for share in shares:
            kinds = Counter(name.split("/")[0] for name in share.ids)
            assert kinds == {"alone": ALONE / world, "pairs": PAIRS / world, "words": TEXTS / world}
        # Pixels, and tokens with what is hidden of them, are those of the whole.
        pixels = {t.numpy().tobytes() for share in shares for t in share.images}
        assert pixels == {t.numpy().tobytes() for t in batch.images}
        tokens = torch.cat([share.text for share in shares])
        assert torch.equal(tokens.sort().values, batch.text.sort().values)


def test_an_epoch_has_every_sample_once(recipe: PretrainRecipe) -> None:
    """34 pairs, 14 sound pictures alone, and the pieces of 25 texts."""
    batches = recipe.batches(0, 1)
    seen: dict[str, list[str]] = {"alone": [], "pairs": [], "words": []}
    for step in range(17):
        for name in batches(step).ids:
            seen[name.split("/")[0]].append(name)
    for kind, rows in (("alone", 14), ("pairs", 34)):
        for start in range(0, len(seen[kind]) - rows, rows):
            assert len(set(seen[kind][start : start + rows])) == rows, kind
    assert small_corpus.BROKEN not in seen["alone"]


def test_pictures_are_the_views_that_were_tokenized(recipe: PretrainRecipe, corpus: Store) -> None:
    """By the row in the source that the tokens name; views alternate from epoch to epoch."""
    sources = {
        row["id"]: row["image"]["bytes"]
        for name in ("pairs", "alone")
        for row in corpus.dataset(f"images/{name}").read_table().to_pylist()
    }
    tokens = {
        row["id"]: row["views"]
        for name in ("pairs", "alone")
        for row in corpus.dataset(f"tokens/{name}").read_table().to_pylist()
    }
    batches, drawn = recipe.batches(0, 1), Counter[str]()
    for step in range(10):
        batch = batches(step)
        for name, pixels in zip(batch.ids, batch.images, strict=False):
            view = tokens[name][drawn[name] % 2]
            drawn[name] += 1
            picture = decode(sources[name])
            wanted = apply_view(picture, View(tuple(view["box"]), view["flip"]), small_corpus.SIZE)
            assert np.array_equal(pixels.numpy(), wanted), (step, name)
    assert set(drawn.values()) == {2, 3}  # 80 draws of 34 pairs, 40 of 14 pictures


def test_pictures_have_the_colours_that_were_tokenized(
    recipe: PretrainRecipe, copied: Callable[..., Store]
) -> None:
    """Of tokens with colour jitter and, beside them, without."""
    store, sources, tokens = copied("images", "tokenizers"), {}, {}
    for name, jitter in (("pairs", 0.4), ("alone", 0.0)):
        cfg = small_corpus.tokens(store, images=(name,), texts=(), held_out=())
        tokenize_corpus.run(replace(cfg, view=replace(cfg.view, jitter=jitter)))
        for row in store.dataset(f"images/{name}").read_table().to_pylist():
            sources[row["id"]] = row["image"]["bytes"]
        for row in store.dataset(f"tokens/{name}").read_table().to_pylist():
            tokens[row["id"]] = {stored_view(view): view["words"] for view in row["views"]}
            assert all((view.jitter is None) == (jitter == 0) for view in tokens[row["id"]])
    cfg = small_corpus.pretraining(store, texts=(), text_batch=0, held_out="")
    batches = replace(recipe, cfg=cfg).batches(0, 1)
    tokenizer, _ = load_image_tokenizer(store, "vqkd")
    for step in range(4):
        batch = batches(step)
        assert torch.equal(tokenizer.encode(batch.images), batch.visual_words)
        for name, pixels, words in zip(batch.ids, batch.images, batch.visual_words, strict=True):
            picture = decode(sources[name])
            seen = [
                stored
                for view, stored in tokens[name].items()
                if np.array_equal(apply_view(picture, view, small_corpus.SIZE), pixels.numpy())
            ]
            assert seen == [words.tolist()], name


def test_pictures_of_a_task_are_the_first_of_their_rows(corpus: Store) -> None:
    cfg = small_corpus.pretraining(corpus)
    sources = corpus.dataset("tasks/captioning/val").read_table().to_pylist()
    tokens = {r["id"]: r for r in corpus.dataset("tokens/captioning/val").read_table().to_pylist()}
    batch, drawn = held_out_batches(cfg, _tokenizer(corpus))(0), Counter[str]()
    assert set(batch.ids) == set(tokens)
    for name, pixels in zip(batch.ids, batch.images, strict=True):
        views = tokens[name]["views"]
        view = views[drawn[name] % len(views)]
        drawn[name] += 1
        picture = decode(sources[tokens[name]["image_row"]]["images"][0]["bytes"])
        wanted = apply_view(picture, View(tuple(view["box"]), view["flip"]), small_corpus.SIZE)
        assert np.array_equal(pixels.numpy(), wanted), name


def test_some_tokens_of_a_batch_are_hidden(recipe: PretrainRecipe, corpus: Store) -> None:
    mask = recipe.tokenizer.mask_id
    batch = recipe.batches(0, 1)(0)
    known = {
        row["id"]: row["ids"] for row in corpus.dataset("tokens/words").read_table().to_pylist()
    }
    hidden = int((batch.text == mask).sum())
    assert TEXTS <= hidden < len(batch.text) / 2
    # The last texts of a packed batch are the texts alone, in the order of their ids.
    tail = [known[name] for name in batch.ids[-TEXTS:]]
    length = sum(map(len, tail))
    own, true = batch.text[-length:], torch.tensor([i for ids in tail for i in ids])
    assert torch.equal(own[own != mask], true[own != mask])
    assert bool((true[own == mask] > UNK - 1).all())  # never <s> or </s>


def test_sources_are_drawn_by_weight(corpus: Store) -> None:
    """`alone`, 14 pictures, and `pairs` without captions; the views go by a source's own epochs."""
    config = small_corpus.pretraining(corpus, images=("alone", "pairs"), image_batch=8)
    weighted = replace(config, image_weights=(3.0, 1.0))
    batches = PretrainRecipe(weighted, _tokenizer(corpus)).batches(0, 1)
    drawn = [batches(step) for step in range(128)]
    sources = Counter(name for batch in drawn for name in batch.sources[:8])
    assert abs(sources["alone"] - 768) <= 4 and sources.total() == 1024
    assert all(
        name.split("/")[0] == source
        for batch in drawn
        for name, source in zip(batch.ids, batch.sources, strict=True)
    )
    times = Counter(name for batch in drawn for name in batch.ids[:8])
    by_source = {"alone": set[int](), "pairs": set[int]()}
    for name, count in times.items():
        by_source[name.split("/")[0]].add(count)
    # Each source is gone through evenly: 768 draws of 14 pictures, 256 of 34.
    assert by_source["alone"] <= set(range(50, 61)) and by_source["pairs"] <= set(range(4, 12))
    plain = PretrainRecipe(config, _tokenizer(corpus)).batches(0, 1)
    assert plain(0).ids != drawn[0].ids


def test_a_pair_without_captions_is_an_image_alone(copied: Callable[..., Store]) -> None:
    store = copied("tokens", "tokenizers", "images")

    def without_some(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for row in rows[::2]:
            row["captions"] = []
        return pa.Table.from_pylist(rows, table.schema)

    small_corpus.republished(store, "some", lambda used: None, rows=without_some)
    config = small_corpus.pretraining(store, pairs=("some",), held_out="")
    token_checks.check_kinds({"pairs": [store.dataset("tokens/some")]})
    batches = PretrainRecipe(config, _tokenizer(store)).batches(0, 1)
    for step in range(10):
        batch = batches(step)
        lost = [name for name in batch.ids[:-TEXTS] if name.startswith("pairs")]
        assert len(lost) == PAIRS
        odd = sum(int(name.split("/")[1]) % 2 for name in lost)
        assert batch.pairs == odd and len(batch.images) == ALONE + PAIRS
        assert bool(batch.hidden_patches[: ALONE + PAIRS - odd].any(1).all())


def test_of_pairs_alone_every_worker_has_text(copied: Callable[..., Store]) -> None:
    """An empty one, if it must be: workers call the same modules."""
    store = copied("tokens", "tokenizers", "images")

    def but_one(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        for row in rows[1:]:
            row["captions"] = []
        return pa.Table.from_pylist(rows, table.schema)

    small_corpus.republished(store, "one", lambda used: None, rows=but_one)
    config = small_corpus.pretraining(
        store, images=(), image_batch=0, texts=(), text_batch=0, pairs=("one",), held_out=""
    )
    recipe = PretrainRecipe(config, _tokenizer(store))
    found = set()
    for rank in range(4):
        batches = recipe.batches(rank, 4)
        for batch in map(batches, range(8)):
            assert (batch.pairs, len(batch.images)) == (1, PAIRS // 4)
            empty = batch.text.tolist() == [BOS, EOS]
            assert empty or batch.lengths[0] > 2
            found.add(empty)
    assert found == {True, False}


# -- ablations -------------------------------------------------------------------------------------

ALL = {"image", "text", "pair_image", "pair_text"}
# Options of each row of the paper's table 6 that has options, and the objectives that it leaves on.
ABLATIONS: dict[str, tuple[str, set[str]]] = {
    "multiway": ("", ALL),
    "standard": ("--model.no-multiway --model.vl-layers 0 --model.attention shared", ALL),
    "separate": ("--masking.pairs separate", ALL),
    "joint": ("--masking.pairs joint", ALL),
    "mono": ("--objectives.pair-image 0 --objectives.pair-text 0", {"image", "text"}),
    "multi": ("--objectives.image 0 --objectives.text 0", {"pair_image", "pair_text"}),
    "pixels": ("--objectives.image-target pixels", ALL),
    "no-text": ("--objectives.text 0 --objectives.pair-text 0", {"image", "pair_image"}),
    "mono-text": ("--objectives.pair-text 0", ALL - {"pair_text"}),
    "multi-text": ("--objectives.text 0", ALL - {"text"}),
    "no-image": ("--objectives.image 0 --objectives.pair-image 0", {"text", "pair_text"}),
    "mono-image": ("--objectives.pair-image 0", ALL - {"pair_image"}),
    "multi-image": ("--objectives.image 0", ALL - {"image"}),
}


def ablation(name: str, store: Store) -> PretrainConfig:
    """A row's options, as they are written, on the small corpus."""
    chosen = config.cli(
        PRESETS, description="", args=["--preset", "tiny", *ABLATIONS[name][0].split()]
    )
    model = replace(
        small_corpus.SHAPE,
        multiway=chosen.model.multiway,
        vl_layers=chosen.model.vl_layers,
        attention=chosen.model.attention,
    )
    masking = replace(chosen.masking, min_block=1, pair_text_share=0.5)
    return small_corpus.pretraining(
        store, name=f"ablation-{name}", model=model, masking=masking, objectives=chosen.objectives
    )


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_ablation_trains_what_is_on_and_nothing_else(name: str, corpus: Store) -> None:
    cfg, on = ablation(name, corpus), ABLATIONS[name][1]
    recipe = PretrainRecipe(cfg, _tokenizer(corpus))
    batch = recipe.batches(0, 1)(0)
    torch.manual_seed(0)
    module = recipe.build()
    assert isinstance(module, MaskedDataModelling)
    results = module(batch)
    # What is off is not in the batch: nothing is hidden for it, and no kind is read for nothing.
    assert set(batch.masked) == on
    assert {key.removeprefix("loss/") for key in results if key.startswith("loss/")} == on
    weighted = (getattr(cfg.objectives, kind) * results[f"loss/{kind}"] for kind in on)
    torch.testing.assert_close(results["loss"], sum(weighted))
    assert recipe.samples_per_batch() == len(batch.ids)
    kinds = {name.split("/")[0] for name in batch.ids}
    wanted = {"alone": {"image"}, "words": {"text"}, "pairs": {"pair_image", "pair_text"}}
    assert kinds == {kind for kind, objectives in wanted.items() if objectives & on}

    results["loss"].backward()
    for head, objectives in (
        (module.head_of_images, {"image", "pair_image"}),
        (module.text_head, {"text", "pair_text"}),
    ):
        for parameter in head.parameters():
            assert parameter.grad is not None
            assert bool(parameter.grad.any()) == bool(objectives & on)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.grad is not None:  # a kind's own expert, without that kind
                parameter -= 0.05 * parameter.grad
        assert float(module(batch)["loss"]) < results["loss"].item()


def test_masking_of_pairs_is_joint_or_separate(corpus: Store) -> None:
    for name, both, halves in (("joint", 1.0, None), ("separate", 0.0, (0.3, 0.7))):
        batches = PretrainRecipe(ablation(name, corpus), _tokenizer(corpus)).batches(0, 1)
        seen = [
            (bool(one.hidden), bool(one.masked))
            for step in range(12)
            for one in inspect_step.samples(batches(step))
            if one.kind == "pair"
        ]
        assert np.mean([image and text for image, text in seen]) == both
        assert all(image or text for image, text in seen)
        if halves:
            assert halves[0] < np.mean([image for image, _ in seen]) < halves[1]


def test_a_standard_transformer_has_one_network_for_every_token(corpus: Store) -> None:
    recipes = [
        PretrainRecipe(ablation(name, corpus), _tokenizer(corpus))
        for name in ("standard", "multiway")
    ]
    standard, multiway = ({n for n, _ in recipe.build().named_parameters()} for recipe in recipes)
    assert not any(
        "language" in name or "fusion" in name for name in standard if ".blocks." in name
    )
    assert any("language" in name for name in multiway if ".blocks." in name)


def test_pixels_train_a_model_that_finetuning_takes(corpus: Store) -> None:
    result = run(replace(ablation("pixels", corpus), held_out="captioning/val"))
    assert {key for key in result["metrics"] if key.startswith("accuracy/")} == {
        "accuracy/pair_text"
    }
    assert {"loss/pair_image", "loss/pair_text"} <= set(result["metrics"])
    assert np.isfinite(list(result["metrics"].values())).all()
    tracker = tracking.client(tracking.tracking_uri(corpus))
    assert [f.path for f in tracker.list_artifacts(result["mlflow_run"], "masked")]
    with models.opened(corpus, "models/ablation-pixels") as folder:
        shape, notes = weights.load_config(folder)
        assert (shape, notes["image_target"]) == (small_corpus.SHAPE, "pixels")
        tensors = weights.load_tensors(folder)
        module = MaskedDataModelling(shape, ObjectiveWeights(image_target="pixels"))
        weights.load_into(module, tensors)
        other = MaskedDataModelling(shape)
        models.load_backbone(other, folder, "text_head")
        assert torch.equal(other.text_head.weight, tensors["text_head.weight"])
        with pytest.raises(ValueError, match=r"no released model has the heads .*pixel_head"):
            released.load_folder(folder)


@pytest.mark.parametrize(("name", "share"), [("mono", 0.5), ("separate", 0.0), ("separate", 1.0)])
def test_what_is_not_trained_is_measured_all_the_same(
    name: str, share: float, corpus: Store
) -> None:
    cfg = replace(ablation(name, corpus), held_out="captioning/val", held_out_batches=1)
    cfg = replace(cfg, masking=replace(cfg.masking, pair_text_share=share))
    batch = held_out_batches(cfg, _tokenizer(corpus))(0)
    assert set(batch.masked) == {"pair_image", "pair_text"}
    results = PretrainRecipe(cfg, _tokenizer(corpus)).build()(batch)
    assert {"accuracy/pair_image", "accuracy/pair_text"} <= set(results)
    assert bool(results["loss"]) == (name != "mono")


def test_held_out_pictures_of_which_nothing_is_hidden_make_no_sheet(corpus: Store) -> None:
    cfg = small_corpus.pretraining(
        corpus,
        name="whole",
        train={"steps": 1, "warmup": 0},
        masking=Masking(image=0.0, min_block=1),
    )
    result = run(replace(cfg, held_out="captioning/val", held_out_batches=1))
    tracker = tracking.client(tracking.tracking_uri(corpus))
    assert not tracker.list_artifacts(result["mlflow_run"], "masked")
    assert "accuracy/pair_text" in result["metrics"]


class Drawn:
    """Takes a recipe's pictures in a tracker's place."""

    def __init__(self) -> None:
        self.pictures: dict[str, Any] = {}

    def picture(self, path: str, image: Any) -> None:
        self.pictures[path] = image


@pytest.mark.parametrize("name", ["multiway", "joint", "mono", "pixels", "multi-image"])
def test_without_held_out_pairs_training_data_are_shown(name: str, corpus: Store) -> None:
    cfg = replace(ablation(name, corpus), held_out="", held_out_ranked=0)
    cfg = replace(cfg, train=replace(cfg.train, evaluate_every=2))
    own = PretrainRecipe(cfg, _tokenizer(corpus))
    first, shown = own.batches(0, 1)(0), pretrain.training_pictures(cfg, own.tokenizer)
    kind = "alone" if name == "mono" else "pairs"
    ids = tuple(one for one in first.ids if one.startswith(kind))
    # Those of the first batch, as the run sees them, and of each something is hidden.
    assert shown.ids[: len(ids)] == ids and len(shown.ids) == pretrain.SHOWN
    places = [i for i, one in enumerate(first.ids) if one.startswith(kind)]
    assert torch.equal(shown.images[: len(ids)], first.images[places])
    assert shown.hidden_patches.any(1).all()
    logged = [Drawn(), Drawn()]
    module = own.build()
    for drawn in logged:
        assert own.evaluate(module, 2, cast(Any, drawn)) == {}
    (one,), (two,) = (drawn.pictures.values() for drawn in logged)
    assert list(logged[0].pictures) == ["masked/step-0000002.png"]
    assert one.tobytes() == two.tobytes()


def test_texts_alone_have_no_pictures(corpus: Store) -> None:
    none = dict[str, Any](images=(), image_batch=0, pairs=(), pair_batch=0)
    cfg = small_corpus.pretraining(corpus, held_out="", **none)
    own, drawn = PretrainRecipe(cfg, _tokenizer(corpus)), Drawn()
    assert own.evaluate(own.build(), 6, cast(Any, drawn)) == {}
    assert not drawn.pictures


# -- other mixtures, in this process ---------------------------------------------------------------


@pytest.mark.parametrize(
    "without",
    [
        ("images",),
        ("texts",),
        ("pairs",),
        ("images", "texts"),
        ("texts", "pairs"),
        ("images", "pairs"),
    ],
    ids="+".join,
)
def test_any_mixture_of_kinds_trains(without: tuple[str, ...], corpus: Store) -> None:
    none: dict[str, Any] = dict.fromkeys(without, ())
    none |= {f"{name[:-1]}_batch": 0 for name in without}
    name = "without-" + "-".join(without)
    config = small_corpus.pretraining(corpus, name=name, train={"steps": 3}, held_out="", **none)
    result = run(config)
    assert result["metrics"] == {}
    run_id = result["mlflow_run"]
    tracker = tracking.client(tracking.tracking_uri(corpus))
    found = tracker.get_run(run_id).data.metrics
    objectives = {k.removeprefix("train/loss/") for k in found if k.startswith("train/loss/")}
    wanted = {"images": {"image"}, "texts": {"text"}, "pairs": {"pair_image", "pair_text"}}
    assert objectives == set().union(*(v for k, v in wanted.items() if k not in without))


def test_pretraining_lowers_the_loss(corpus: Store) -> None:
    config = small_corpus.pretraining(
        corpus, name="longer", held_out="", train={"steps": 60, "warmup": 5, "learning_rate": 5e-3}
    )
    run_id = run(config)["mlflow_run"]
    tracker = tracking.client(tracking.tracking_uri(corpus))
    for name in ("image", "text", "pair_image", "pair_text"):
        history = sorted(
            tracker.get_metric_history(run_id, f"train/loss/{name}"), key=lambda m: m.step
        )
        values = [m.value for m in history]
        assert np.mean(values[-10:]) < 0.9 * np.mean(values[:5]), name


def test_a_step_in_batches_is_the_same_step(corpus: Store) -> None:
    """The same samples and masks, and each masked place counts alike: curves agree to rounding."""
    halves = {"image_batch": 2, "text_batch": 2, "pair_batch": 4}
    runs = [
        small_corpus.pretraining(corpus, name="in-one", held_out="", train={"steps": 4}),
        small_corpus.pretraining(
            corpus, name="in-two", held_out="", train={"steps": 4, "accumulate": 2}, **halves
        ),
    ]
    tracker = tracking.client(tracking.tracking_uri(corpus))

    def curves(run_id: str) -> list[float]:
        return [
            m.value
            for kind in ("image", "text", "pair_image", "pair_text")
            for of in ("loss", "accuracy")
            for m in sorted(
                tracker.get_metric_history(run_id, f"train/{of}/{kind}"), key=lambda m: m.step
            )
        ]

    one, two = (curves(run(config)["mlflow_run"]) for config in runs)
    assert len(one) == 4 * 8 and two == pytest.approx(one, rel=1e-4)


# -- what comes after ------------------------------------------------------------------------------


def test_the_contrastive_stage_starts_from_a_pretrained_model(
    corpus: Store, pretrained: dict[str, Any]
) -> None:
    config = small_corpus.teacher(corpus, name="intermediate", init="models/pretrained")
    config = replace(config, train=replace(config.train, steps=2, learning_rate=1e-6))
    result = contrast.run(config)
    assert result["kind"] == "dual_encoder"
    assert result["text_tokenizer"] == pretrained["text_tokenizer"]
    with models.opened(corpus, "models/pretrained") as folder:
        start = weights.load_tensors(folder)
    with models.opened(corpus, "models/intermediate") as folder:
        shape, _ = weights.load_config(folder)
        end = weights.load_tensors(folder)
    assert shape == small_corpus.SHAPE
    backbone = [key for key in start if key.startswith("backbone.")]
    assert backbone and all(key in end for key in backbone)
    for key in backbone:  # two tiny steps away from where it started
        torch.testing.assert_close(end[key], start[key], rtol=0, atol=1e-5)
    assert any(not torch.equal(end[key], start[key]) for key in backbone)
