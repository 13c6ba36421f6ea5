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

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beit3 import weights
from beit3.device import to_device
from beit3.flops import StepShape, masked_step
from beit3.memory import hollow
from beit3.objectives import MaskedBatch, MaskedDataModelling
from beit3.text import TextTokenizer
from pipelines import (
    bill,
    budget,
    cluster,
    config,
    inspect_step,
    models,
    pictures,
    pretrain_plan,
    token_checks,
    train_image_tokenizer,
)
from pipelines.masked_batches import MaskedBatches, held_out_batches
from pipelines.pretrain_config import OBJECTIVES, PRESETS, PretrainConfig
from pipelines.storage import Dataset, Store, StoreError, fingerprint
from pipelines.tracking import Logger
from pipelines.trainer import fit
from pipelines.words_in_step import WordsInStep
from pipelines.zero_shot import picture_recall


@dataclass(frozen=True)
class PretrainRecipe:
    cfg: PretrainConfig
    tokenizer: TextTokenizer
    words_in_step: token_checks.Words | None = None
    """How visual words are found in the step; None: they are stored."""

    def build(self) -> nn.Module:
        found = self.words_in_step
        if found is None:
            return MaskedDataModelling(self.cfg.model, self.cfg.objectives)
        with torch.random.fork_rng(devices=[]):  # the model begins as without it
            images, _ = train_image_tokenizer.load(Store(self.cfg.store), found.tokenizer)
        return WordsInStep(self.cfg.model, self.cfg.objectives, images, found.precision)

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
            if number == 0 and batch.hidden_patches.any():
                if isinstance(module, WordsInStep):
                    batch = module.with_words(batch)
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


def run(cfg: PretrainConfig, *, parent: str | None = None) -> dict[str, Any]:
    """Pretrain, or skip what is trained; returns the bundle's info.

    With `inspect_step`, show that step instead; returns what `inspect_step.write` does. `parent` is
    the MLflow run to nest under.

    Raises:
        StoreError: a dataset is missing or empty, is of another kind, was made with another
            tokenizer, or its views don't match the model's patches.
        ValueError: the tokenizers don't fit the model, or the model's state this machine's memory;
            or `dry_run` is set.
    """
    if cfg.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    store = Store(cfg.store)
    recipe, everything = prepare(cfg)
    mark = fingerprint("pretrain", models.decisive(cfg), [d.commit().identity for d in everything])
    if cfg.inspect_step is not None:
        inspect_step.check(store, f"runs/{cfg.name}", mark)
        return inspect_step.write(
            store,
            f"runs/{cfg.name}/inspect/step-{cfg.inspect_step:08d}",
            cfg.inspect_step,
            batches_of_step(recipe, cfg.inspect_step),
            recipe.tokenizer,
            cfg.model.patch_size,
        )
    pixels = cfg.objectives.image_target == "pixels"
    budget.check_machine(hollow(cfg.model, pixels=pixels), cfg.train)
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
        parent=parent,
    )


def prepare(cfg: PretrainConfig) -> tuple[PretrainRecipe, list[Dataset]]:
    """The recipe of a run, and its datasets, which it can be trained on.

    Raises:
        StoreError, ValueError: as `run`.
    """
    datasets, tokenizer = token_checks.check_data(Store(cfg.store), cfg)
    return PretrainRecipe(cfg, tokenizer, token_checks.words_in_step(cfg, datasets)), datasets


def plan(cfg: PretrainConfig) -> dict[str, Any]:
    """What a run would take; see `pretrain_plan.plan`.

    Raises:
        StoreError, ValueError: the data are there and can't be used, as `run` has it.
    """
    store = Store(cfg.store)
    datasets, tokenizer = token_checks.tokens(store, cfg), None
    if all(dataset.find_commit() for of_kind in datasets.values() for dataset in of_kind):
        recipe, _ = prepare(cfg)
        if recipe.words_in_step:
            tokenizer = train_image_tokenizer.shape(store, recipe.words_in_step.tokenizer)
    return pretrain_plan.plan(cfg, datasets, tokenizer)


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


def main() -> None:
    chosen = config.cli(PRESETS, description=__doc__ or "")
    if not chosen.dry_run:
        with bill.printed():
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
