"""Pretrain BEiT-3: masked data modelling on images, texts and pairs in every step.

    python pipelines/pretrain.py --preset base --store s3://bucket/beit3 \
        --images imagenet21k --texts wiki --pairs cc3m cc12m sbu coco vg
    ray job submit --working-dir . -- python pipelines/pretrain.py --preset base ...

Reads what `pipelines/tokenize_corpus.py` wrote, and leaves the bundle `models/<name>`. Killed
anywhere and run again, it goes on from the newest checkpoint.

`--dry-run` trains nothing, and needs neither GPUs nor data: it says what the run would take.
`--inspect-step N` trains nothing: it makes the batch of step N again and leaves its pictures, texts
and masks as pages in `runs/<name>/inspect/`.
"""

from __future__ import annotations

import math
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from beit3 import weights
from beit3.config import PRESETS as MODELS
from beit3.config import ModelConfig
from beit3.device import to_device
from beit3.flops import StepShape, masked_step
from beit3.masking import Masking, token_mask
from beit3.objectives import MaskedBatch, MaskedDataModelling, ObjectiveWeights
from beit3.text import TextTokenizer
from beit3.transforms import View, apply_view
from pipelines import (
    bundles,
    cluster,
    config,
    inspect_step,
    models,
    pictures,
    pretrain_plan,
    train_image_tokenizer,
    train_text_tokenizer,
)
from pipelines.budget import Assumptions
from pipelines.loader import ParquetRows
from pipelines.recipe import TrainConfig
from pipelines.samples import Pictures, Sample, Samples
from pipelines.storage import ROW_GROUP_ROWS, Dataset, Store, StoreError, fingerprint
from pipelines.tracking import Logger
from pipelines.trainer import fit
from pipelines.zero_shot import picture_recall

HELD_OUT_PAIRS = 64  # in a batch that is measured on
# What can be learnt from samples of each kind.
OBJECTIVES = {"images": ("image",), "texts": ("text",), "pairs": ("pair_image", "pair_text")}


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a BEiT-3."""

    store: str = "store"
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "pretrained"
    """The model becomes `models/<name>`, the run `runs/<name>`."""
    images: tuple[str, ...] = ("imagenet21k",)
    """Tokenized image datasets to use without captions (`tokens/<name>`)."""
    texts: tuple[str, ...] = ("wiki",)
    """Tokenized text datasets."""
    pairs: tuple[str, ...] = ("cc3m", "cc12m", "sbu", "coco", "vg")
    """Tokenized image datasets to use with their captions."""
    image_weights: tuple[float, ...] = ()
    """How often each of `images` is drawn, in relation to the others; empty: by its size."""
    text_weights: tuple[float, ...] = ()
    """The same of `texts`."""
    pair_weights: tuple[float, ...] = ()
    """The same of `pairs`."""
    image_batch: int = 2048
    """Images alone of a step, over all workers."""
    text_batch: int = 2048
    """Texts alone of a step."""
    pair_batch: int = 2048
    """Pairs of a step."""
    held_out: str = ""
    """Tokenized pairs, such as captioning/val, whose masked accuracies are measured at the end;
    empty: nothing is measured."""
    held_out_batches: int = 4
    held_out_ranked: int = 0
    """Held-out pairs, up to 64, among which each caption looks for its picture; 0: none does. The
    model reads the square of so many pairs (`pipelines/zero_shot.py`)."""
    inspect_step: int | None = None
    """Train nothing, but show what this step reads; the first is 1, as in MLflow."""
    dry_run: bool = False
    """Train nothing, but say what the run would take in memory, hours and money, as `assume` has
    it, and whether tokens and model fit together."""
    assume: Assumptions = field(default_factory=Assumptions)
    """What a dry run reckons with."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: Masking = field(default_factory=Masking)
    objectives: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for kind in OBJECTIVES:
            named, batch = getattr(self, kind), getattr(self, f"{kind[:-1]}_batch")
            if bool(named) != (batch > 0):
                raise ValueError(
                    f"{kind} names {len(named)} datasets, but {kind[:-1]}_batch is {batch}: "
                    "set both or neither"
                )
            if self.train.workers and batch % self.train.workers:
                raise ValueError(
                    f"{kind[:-1]}_batch {batch} is not divisible by train.workers "
                    f"{self.train.workers}"
                )
            weights = self.weights(kind)
            if weights and len(weights) != len(named):
                raise ValueError(
                    f"{kind[:-1]}_weights: {len(weights)} weights for the {len(named)} datasets of "
                    f"{kind}: set one for each, or none"
                )
            if not all(0 < weight < math.inf for weight in weights):
                raise ValueError(
                    f"{kind[:-1]}_weights: expected numbers above 0, got "
                    f"{' '.join(map(str, weights))}; leave out of {kind} what is not to be drawn"
                )
        if not any(map(self.drawn, OBJECTIVES)):
            raise ValueError(
                "image_batch, text_batch, pair_batch: all are 0, or the objectives of what is not "
                "are: nothing to train on"
            )
        if not 0 <= self.held_out_ranked <= HELD_OUT_PAIRS:
            raise ValueError(
                f"held_out_ranked: expected 0 to {HELD_OUT_PAIRS}, got {self.held_out_ranked}"
            )
        if self.inspect_step is not None and not 1 <= self.inspect_step <= self.train.steps:
            raise ValueError(
                f"inspect_step {self.inspect_step} is not within 1..train.steps {self.train.steps}"
            )

    def weights(self, kind: str) -> tuple[float, ...]:
        return getattr(self, f"{kind[:-1]}_weights")

    def drawn(self, kind: str) -> int:
        """Samples of a kind in a step: none where all that could be learnt from them is off."""
        on = any(getattr(self.objectives, name) for name in OBJECTIVES[kind])
        return getattr(self, f"{kind[:-1]}_batch") if on else 0

    def used(self, kind: str) -> tuple[str, ...]:
        """The datasets that samples of a kind are drawn from."""
        return getattr(self, kind) if self.drawn(kind) else ()

    @property
    def hidden(self) -> Masking:
        """`masking`, with nothing hidden of a pair that an objective of weight 0 would predict."""
        image, text = self.objectives.pair_image, self.objectives.pair_text
        if bool(image) == bool(text):
            return self.masking
        return replace(self.masking, pairs="separate", pair_text_share=float(bool(text)))


def _paper(name: str, **train: Any) -> PretrainConfig:
    """Table 11 of the paper: 1M steps of 2048 images, texts and pairs; AdamW; DropPath 0.1."""
    shape = {f: getattr(MODELS[name], f) for f in MODELS[name].__dataclass_fields__}
    shape |= {"drop_path": 0.1, "checkpoint_activations": "blocks"}
    defaults: dict[str, Any] = {
        "steps": 1_000_000,
        "warmup": 10_000,
        "learning_rate": 1e-3,
        "precision": "bf16",
        "workers": 64,
        "gpus_per_worker": 1,
        "checkpoint_every": 1000,
    }
    return PretrainConfig(model=ModelConfig(**shape), train=TrainConfig(**(defaults | train)))


PRESETS = {
    "tiny": PretrainConfig(
        image_batch=8,
        text_batch=16,
        pair_batch=64,
        model=MODELS["tiny"],
        masking=Masking(min_block=4, pair_text_share=0.75),
        train=TrainConfig(
            steps=500, warmup=30, learning_rate=2e-3, workers=2, checkpoint_every=100
        ),
    ),
    "base": _paper("base", workers=16),
    "large": _paper("large", workers=32),
    "giant": _paper("giant"),
}


@dataclass(frozen=True)
class PretrainRecipe:
    cfg: PretrainConfig
    tokenizer: TextTokenizer

    def build(self) -> nn.Module:
        return MaskedDataModelling(self.cfg.model, self.cfg.objectives)

    def layers(self) -> int:
        return self.cfg.model.layers

    def samples_per_batch(self) -> int:
        return sum(map(self.cfg.drawn, OBJECTIVES))

    def flops(self, batch: MaskedBatch) -> float:
        pixels = self.cfg.objectives.image_target == "pixels"
        return masked_step(self.cfg.model, StepShape.of(batch), pixels=pixels)

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        return MaskedBatches(self.cfg, self.tokenizer, rank, world)

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """Masked accuracies and zero-shot retrieval on held-out pairs; a picture of masked inputs
        and predictions."""
        assert isinstance(module, MaskedDataModelling)
        cfg = self.cfg
        if not cfg.held_out:
            return {}
        batches = held_out_batches(cfg, self.tokenizer)
        device = module.text_head.weight.device
        totals: dict[str, list[float]] = {}
        for number in range(cfg.held_out_batches):
            on_cpu = batches(number)
            batch = to_device(on_cpu, device)
            if number == 0 and cfg.held_out_ranked:
                found = picture_recall(
                    module, on_cpu, self.tokenizer.mask_id, device, count=cfg.held_out_ranked
                )
                totals |= {f"zero_shot/{key}": [value] for key, value in found.items()}
            for key, value in module(batch).items():
                totals.setdefault(key, []).append(float(value))
            if number == 0 and len(batch.images):
                sheet = masked_sheet(module, batch, cfg.model.patch_size)
                logger.picture(f"masked/step-{step:07d}.png", sheet)
        return {key: sum(values) / len(values) for key, values in totals.items()}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        target = self.cfg.objectives.image_target
        weights.save(folder, module, self.cfg.model, kind="pretrained", image_target=target)
        models.add_tokenizer(folder, self.tokenizer)
        data = [f"tokens/{name}" for kind in OBJECTIVES for name in self.cfg.used(kind)]
        return {
            "kind": "pretrained",
            "text_tokenizer": self.tokenizer.identity,
            **models.provenance(Store(self.cfg.store), self.cfg, data),
        }


def masked_sheet(module: MaskedDataModelling, batch: MaskedBatch, patch: int) -> Any:
    """Pictures, what the model saw, the true visual words, and those it predicted; with pixels as
    the target, pictures, what the model saw, and the picture that it predicted."""
    shown = batch.hidden_patches.any(1).nonzero().flatten()[:10].cpu()
    if module.pixels:
        whole, hidden = batch.images.cpu()[shown], batch.hidden_patches.cpu()[shown]
        restored = module.restore_pixels(batch).cpu()[shown]
        rows = (whole, inspect_step.greyed(whole, hidden, patch), restored)
        return pictures.sheet([[pictures.to_image(one) for one in row] for row in rows])
    predicted, _ = module.restore(batch)
    return pictures.masked_predictions(
        batch.images.cpu()[shown],
        batch.hidden_patches.cpu()[shown],
        batch.visual_words.cpu()[shown],
        predicted.cpu()[shown],
        patch,
    )


@dataclass(frozen=True)
class _Corrupted:
    """A sample on its way into a batch, without its pixels: of a picture, a text, or both."""

    id: str
    source: str
    words: np.ndarray | None = None
    hidden: np.ndarray | None = None
    text: Sequence[int] = ()
    masked: np.ndarray | None = None


class MaskedBatches:
    """Corrupted batches of a worker, as a function of the step."""

    def __init__(
        self, cfg: PretrainConfig, tokenizer: TextTokenizer, rank: int, world: int
    ) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.masking = cfg.hidden
        store = Store(cfg.store)
        self.samples = {
            kind: Samples(
                [store.dataset(f"tokens/{name}") for name in cfg.used(kind)],
                columns=None,
                seed=cfg.train.seed * 3 + number,
                batch=cfg.drawn(kind),
                rank=rank,
                world=world,
                weights=cfg.weights(kind),
                arrow=() if kind == "texts" else ("views",),  # one of several is wanted
            )
            for number, kind in enumerate(OBJECTIVES)
            if cfg.drawn(kind)
        }
        self.pictures = {kind: PictureSource(store, cfg.used(kind)) for kind in ("images", "pairs")}

    def __call__(self, step: int) -> MaskedBatch:
        drawn = {kind: samples(step) for kind, samples in self.samples.items()}
        pairs = [one for one in drawn.get("pairs", ()) if one.row["captions"]]
        # A picture that has lost its captions still is a picture.
        lost = [one for one in drawn.get("pairs", ()) if not one.row["captions"]]
        alone = [("images", one) for one in drawn.get("images", ())]
        alone += [("pairs", one) for one in lost]
        side = self.cfg.model.image_size
        # Each picture goes to its place at once: memory that is held anew for each costs time.
        pixels = np.empty((len(alone) + len(pairs), 3, side, side), np.uint8)
        return self._collate(
            pixels,
            [self._alone(*one, into) for one, into in zip(alone, pixels, strict=False)],
            [self._pair(*one) for one in zip(pairs, pixels[len(alone) :], strict=True)],
            [self._text(one) for one in drawn.get("texts", ())],
        )

    def _alone(self, kind: str, sample: Sample, into: np.ndarray) -> _Corrupted:
        hidden = self.masking.of_image(self.cfg.model.grid, sample.rng)
        return self._picture(kind, sample, hidden, into)

    def _pair(self, sample: Sample, into: np.ndarray) -> _Corrupted:
        captions = sample.row["captions"]
        caption = captions[int(sample.rng.integers(len(captions)))]
        hidden, masked = self.masking.of_pair(self.cfg.model.grid, len(caption), sample.rng)
        picture = self._picture("pairs", sample, hidden, into)
        return replace(picture, text=caption, masked=masked)

    def _text(self, sample: Sample) -> _Corrupted:
        text = sample.row["ids"]
        masked = token_mask(len(text), self.masking.text, sample.rng)
        source = self.cfg.texts[sample.group.dataset]
        return _Corrupted(sample.row["id"], source, text=text, masked=masked)

    def _picture(
        self, kind: str, sample: Sample, hidden: np.ndarray, into: np.ndarray
    ) -> _Corrupted:
        views = sample.row["views"]
        stored = views[sample.epoch % len(views)]
        view = View(tuple(stored["box"].as_py()), stored["flip"].as_py())
        into[:] = self.pictures[kind].pixels(sample, view, self.cfg.model.image_size)
        return _Corrupted(
            sample.row["id"],
            self.cfg.used(kind)[sample.group.dataset],
            words=stored["words"].values.to_numpy().astype(np.int64),
            hidden=hidden,
        )

    def _collate(
        self,
        pixels: np.ndarray,
        alone: list[_Corrupted],
        pairs: list[_Corrupted],
        texts: list[_Corrupted],
    ) -> MaskedBatch:
        shown, said, everything = [*alone, *pairs], [*pairs, *texts], [*alone, *pairs, *texts]
        patches = self.cfg.model.patches
        hidden = np.array([one.hidden for one in shown], bool)
        words = np.array([one.words for one in shown], np.int64)
        return MaskedBatch.collate(
            torch.from_numpy(pixels),
            torch.from_numpy(hidden.reshape(-1, patches)),
            torch.from_numpy(words.reshape(-1, patches)),
            [one.text for one in said],
            [one.masked for one in said if one.masked is not None],
            self.tokenizer.mask_id,
            pairs=len(pairs),
            ids=[one.id for one in everything],
            sources=[one.source for one in everything],
        )


class PictureSource:
    """The pictures that belong to tokenized datasets, found by part and row."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        commits = [store.dataset(f"tokens/{name}").commit() for name in names]
        self.datasets = [store.dataset(c.lineage["inputs"][0]["dataset"]) for c in commits]
        self.rows = ParquetRows(self.datasets, ["image", "images"]) if names else None
        # A part of tokens/x holds the tokens of the part of the same number of its source.
        self.paths = [
            {posixpath.basename(f.path): f.path for f in dataset.commit().files}
            for dataset in self.datasets
        ]
        self.decoded = Pictures()

    def pixels(self, sample: Sample, view: View, size: int) -> np.ndarray:
        """The view that was tokenized, uint8 `[3, size, size]`."""
        assert self.rows is not None
        number = sample.group.dataset
        path = self.paths[number][posixpath.basename(sample.group.path)]
        group, index = divmod(sample.row["image_row"], ROW_GROUP_ROWS)
        table = self.rows.table(number, path, group)
        cell = table.column(0)[index].as_py()  # `image`, or of a task's row the first of `images`
        data = (cell[0] if isinstance(cell, list) else cell)["bytes"]
        picture = self.decoded(f"{number}/{sample.row['id']}", data)
        return apply_view(picture, view, size)


def held_out_batches(cfg: PretrainConfig, tokenizer: TextTokenizer) -> MaskedBatches:
    """Batches of held-out pairs, on one worker."""
    alone = replace(
        cfg,
        images=(),
        texts=(),
        pairs=(cfg.held_out,),
        image_weights=(),
        text_weights=(),
        pair_weights=(),
        image_batch=0,
        text_batch=0,
        pair_batch=HELD_OUT_PAIRS,
        held_out="",
        held_out_ranked=0,
        # What is not trained is measured all the same.
        objectives=ObjectiveWeights(image_target=cfg.objectives.image_target),
        train=replace(cfg.train, workers=0, gpus_per_worker=0.0),
    )
    return MaskedBatches(alone, tokenizer, 0, 1)


def run(cfg: PretrainConfig) -> dict[str, Any]:
    """Pretrain, or skip what is trained; returns the bundle's info.

    With `inspect_step`, show that step instead; returns what `inspect_step.write` does.

    Raises:
        StoreError: a dataset is missing or empty, is of another kind, was made with another
            tokenizer, or its views don't match the model's patches.
        ValueError: the tokenizers don't fit the model; or `dry_run` is set.
    """
    if cfg.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    store = Store(cfg.store)
    everything, tokenizer = check_data(store, cfg)
    mark = fingerprint("pretrain", models.decisive(cfg), [d.commit().identity for d in everything])
    recipe = PretrainRecipe(cfg, tokenizer)
    if cfg.inspect_step is not None:
        inspect_step.check(store, f"runs/{cfg.name}", mark)
        return inspect_step.write(
            store,
            f"runs/{cfg.name}/inspect/step-{cfg.inspect_step:08d}",
            cfg.inspect_step,
            batches_of_step(recipe, cfg.inspect_step),
            tokenizer,
            cfg.model.patch_size,
        )
    if cfg.train.workers:
        cluster.start()
    return fit(
        store,
        name=cfg.name,
        output=f"models/{cfg.name}",
        fingerprint=mark,
        recipe=recipe,
        config=cfg.train,
        parameters=config.flatten(cfg),
    )


def plan(cfg: PretrainConfig) -> dict[str, Any]:
    """What a run would take; see `pretrain_plan.plan`.

    Raises:
        StoreError, ValueError: the data are there and can't be used, as `run` has it.
    """
    store = Store(cfg.store)
    datasets = tokens(store, cfg)
    if all(dataset.find_commit() for of_kind in datasets.values() for dataset in of_kind):
        check_data(store, cfg)
    return pretrain_plan.plan(cfg, datasets)


def tokens(store: Store, cfg: PretrainConfig) -> dict[str, list[Dataset]]:
    """The datasets that a run trains on, by kind."""
    return {
        kind: [store.dataset(f"tokens/{name}") for name in cfg.used(kind)] for kind in OBJECTIVES
    }


def check_data(store: Store, cfg: PretrainConfig) -> tuple[list[Dataset], TextTokenizer]:
    """All datasets of a run, the held-out one last, and the text tokenizer; they can be used.

    Raises:
        StoreError, ValueError: as `run`.
    """
    datasets = tokens(store, cfg)
    held_out = [store.dataset(f"tokens/{cfg.held_out}")] if cfg.held_out else []
    check_kinds({**datasets, "held_out": held_out})
    everything = [*(d for of_kind in datasets.values() for d in of_kind), *held_out]
    tokenizer = check_tokens(store, cfg, everything)
    models.check_vocabulary(tokenizer, cfg.model)
    return everything, tokenizer


def batches_of_step(
    recipe: PretrainRecipe, step: int
) -> Iterator[tuple[inspect_step.Share, MaskedBatch]]:
    """What all workers together read for an optimizer step, the first being 1."""
    train = recipe.cfg.train
    world = max(1, train.workers)
    for rank in range(world):
        batches = recipe.batches(rank, world)
        for number in range((step - 1) * train.accumulate, step * train.accumulate):
            yield inspect_step.Share(rank, number), batches(number)


def check_kinds(datasets: dict[str, list[Dataset]]) -> None:
    """Datasets are named under what they hold: pictures, texts, pictures with captions.

    Raises:
        StoreError: one is not, or is missing or empty.
    """
    for kind, of_kind in datasets.items():
        for dataset in of_kind:
            commit = dataset.commit()
            name = dataset.name.removeprefix("tokens/")
            if not commit.rows:
                raise StoreError(
                    f"{dataset.uri} has no rows: leave {name!r} out, or ingest it again"
                )
            is_text = commit.lineage["inputs"][0]["dataset"].startswith("text/")
            if is_text != (kind == "texts"):
                holds = "texts, no pictures" if is_text else "pictures, no texts"
                raise StoreError(f"{kind}: {dataset.uri} holds {holds}: name {name!r} elsewhere")
            if kind in ("pairs", "held_out") and not _has_captions(dataset):
                raise StoreError(
                    f"{kind}: no picture of {dataset.uri} has a caption: name {name!r} in images"
                )


def _has_captions(dataset: Dataset) -> bool:
    """Whether any row has, by what the files' footers count."""
    for path in dataset.paths():
        footer = pq.read_metadata(path, filesystem=dataset.store.fs)
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            captions = next(c for c in columns if c.path_in_schema.startswith("captions."))
            counted = captions.statistics
            # Without a caption there is a null in the place of its first token.
            if counted is None or captions.num_values > (counted.null_count or 0):
                return True
    return False


def check_tokens(store: Store, cfg: PretrainConfig, datasets: Sequence[Dataset]) -> TextTokenizer:
    """Every dataset comes from one pair of tokenizers that fits the model."""
    used: dict[str, dict[str, str]] = {"text": {}, "image": {}}
    for dataset in datasets:
        commit = dataset.commit()
        for key in ("max_text_length", "max_caption_length"):
            longest = commit.lineage["config"][key]
            if longest > cfg.model.max_text_length:
                raise StoreError(
                    f"{dataset.uri} was tokenized with {key} {longest}, above the model's "
                    f"model.max_text_length {cfg.model.max_text_length}: raise that, or tokenize "
                    "again into shorter pieces"
                )
        for kind, made_with in commit.lineage["inputs"][0]["tokenizers"].items():
            used[kind][made_with["identity"]] = made_with["name"]
    for kind, found in used.items():
        if len(found) > 1:
            raise StoreError(
                f"the datasets were tokenized with different {kind} tokenizers "
                f"({', '.join(sorted(found.values()))}): tokenize them all with one"
            )
    if used["image"]:
        (identity, name) = next(iter(used["image"].items()))
        shape = train_image_tokenizer.shape(store, name)
        if bundles.identity(store, f"tokenizers/image/{name}") != identity:
            raise StoreError(
                f"tokenizers/image/{name} is not the one that made these tokens: tokenize again"
            )
        grid = shape.image_size // shape.patch_size
        if grid != cfg.model.grid or shape.image_size != cfg.model.image_size:
            raise StoreError(
                f"visual words are {grid}x{grid} at {shape.image_size} pixels, the model's "
                f"patches {cfg.model.grid}x{cfg.model.grid} at {cfg.model.image_size}: tokenize "
                "with another tokenizer, or set model.image_size and model.patch_size"
            )
        codes = cfg.objectives.image_target == "codes"
        if codes and shape.codebook_size != cfg.model.codebook_size:
            raise StoreError(
                f"model.codebook_size {cfg.model.codebook_size} is not the tokenizer's "
                f"{shape.codebook_size}: set it to that"
            )
    (identity, name) = next(iter(used["text"].items()))
    tokenizer = train_text_tokenizer.load(store, name)
    if tokenizer.identity != identity:
        raise StoreError(
            f"tokenizers/text/{name} is not the one that made these tokens: tokenize again"
        )
    return tokenizer


def main() -> None:
    chosen = config.cli(PRESETS, description=__doc__ or "")
    if not chosen.dry_run:
        run(chosen)
        return
    try:
        found = plan(chosen)
    except (StoreError, ValueError) as error:
        config.stop(str(error))
    pretrain_plan.show(found)
    if found["problem"]:
        config.stop(found["problem"])


if __name__ == "__main__":
    main()
