"""Pretrains BEiT-3: masked data modelling on images, texts and pairs in every step.

    python pipelines/pretrain.py --preset base --store s3://bucket/beit3 \
        --images imagenet21k --texts wiki --pairs cc3m cc12m sbu coco vg
    ray job submit --working-dir . -- python pipelines/pretrain.py --preset base ...

Reads the output of `pipelines/tokenize_corpus.py`, and writes the bundle `models/<name>`. If killed
and run again, it resumes from the newest checkpoint.

`--dry-run` trains nothing, and needs neither GPUs nor data: it prints what the run would take.
`--inspect-step N` trains nothing: it makes the batch of step N again and writes its pictures, texts
and masks as pages to `runs/<name>/inspect/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beit3 import weights
from beit3.device import to_device
from beit3.flops import StepShape, masked_step
from beit3.memory import hollow
from beit3.objectives import (
    MaskedBatch,
    MaskedDataModelling,
    ObjectiveWeights,
    of_one_step,
)
from beit3.text import TextTokenizer
from beit3.vqkd import VQKDConfig
from pipelines import (
    budget,
    bundles,
    cluster,
    config,
    inspect_step,
    job,
    models,
    pictures,
    pretrain_plan,
    token_checks,
)
from pipelines.dataset import Dataset
from pipelines.lineage import fingerprint
from pipelines.masked_batches import MaskedBatches, held_out_batches
from pipelines.pretrain_config import OBJECTIVES, PRESETS, PretrainConfig
from pipelines.recipe import Recipe
from pipelines.run_logger import Logger
from pipelines.storage import Store
from pipelines.tokenizers import image_tokenizer_shape, load_image_tokenizer
from pipelines.trainer import fit
from pipelines.words_in_step import WordsInStep
from pipelines.zero_shot import picture_recall

SHOWN = 10  # pictures on a sheet


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    cfg: PretrainConfig
    tokenizer: TextTokenizer
    words_in_step: token_checks.Words | None = None
    """How each step computes its visual words; None: they are stored."""

    def build(self) -> nn.Module:
        found = self.words_in_step
        if found is None:
            return MaskedDataModelling(self.cfg.model, self.cfg.objectives)
        with torch.random.fork_rng(devices=[]):  # so the model is initialized as without it
            images, _ = load_image_tokenizer(Store(self.cfg.store), found.tokenizer)
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

    def of_one_step(self, batches: Sequence[MaskedBatch]) -> Sequence[MaskedBatch]:
        return of_one_step(batches)

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """Masked accuracies and zero-shot retrieval on held-out pairs; and a picture of masked
        inputs and predictions, from the first training samples if there are no held-out pairs."""
        assert isinstance(module, MaskedDataModelling)
        cfg = self.cfg
        device = module.text_head.weight.device
        if not cfg.held_out:
            if cfg.predicted:
                batch = training_pictures(cfg, self.tokenizer)
                self._draw(module, to_device(batch, device), step, logger)
            return {}
        batches = held_out_batches(cfg, self.tokenizer)
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
            if number == 0:
                self._draw(module, batch, step, logger)
        return {key: sum(values) / len(values) for key, values in totals.items()}

    def _draw(
        self, module: MaskedDataModelling, batch: MaskedBatch, step: int, logger: Logger
    ) -> None:
        """Log a picture of some samples of a batch, if any patches are hidden."""
        if not batch.hidden_patches.any():
            return
        if isinstance(module, WordsInStep):
            batch = module.with_words(batch)
        sheet = masked_sheet(module, batch, self.cfg.model.patch_size)
        logger.picture(f"masked/step-{step:07d}.png", sheet)

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


def training_pictures(cfg: PretrainConfig, tokenizer: TextTokenizer) -> MaskedBatch:
    """The first training pictures of the kind whose hidden patches a run predicts."""
    alone: dict[str, Any] = {}
    for kind in OBJECTIVES:
        mine = kind == cfg.predicted
        alone[kind] = getattr(cfg, kind) if mine else ()
        alone[f"{kind[:-1]}_weights"] = cfg.weights(kind) if mine else ()
        alone[f"{kind[:-1]}_batch"] = SHOWN if mine else 0
    few = replace(
        cfg,
        **alone,
        # In every pair the picture is masked, and the caption is not.
        objectives=ObjectiveWeights(pair_text=0.0, image_target=cfg.objectives.image_target),
        train=replace(cfg.train, workers=0, gpus_per_worker=0.0),
    )
    return MaskedBatches(few, tokenizer, 0, 1)(0)


def masked_sheet(module: MaskedDataModelling, batch: MaskedBatch, patch: int) -> Any:
    """A sheet of pictures, what the model saw, the true and the predicted visual words; with pixels
    as the target, of pictures, what the model saw, and the predicted pictures."""
    shown = batch.hidden_patches.any(1).nonzero().flatten()[:SHOWN].cpu()
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
    """Pretrain, unless the model is trained already; returns the bundle's info.

    With `inspect_step`, show that step instead and return the result of `inspect_step.write`.
    `parent` is the MLflow run to nest under.

    Raises:
        StoreError: a dataset is missing or empty, is of another kind, was made with another
            tokenizer or from other pictures, or its views don't match the model's patches.
        ValueError: the tokenizers don't fit the model, or the model's state doesn't fit into this
            machine's memory; or `dry_run` is set.
    """
    if cfg.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    store = Store(cfg.store)
    recipe, everything = prepare(cfg)
    if not bundles.exists(store, f"models/{cfg.name}"):
        token_checks.check_pictures(everything)
    mark = run_mark(cfg, everything)
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
        step_memory=_step_memory(store, recipe) if cfg.train.gpus_per_worker else None,
        parent=parent,
    )


def prepare(cfg: PretrainConfig) -> tuple[PretrainRecipe, list[Dataset]]:
    """The recipe of a run, and its datasets, checked to be usable for it.

    Raises:
        StoreError, ValueError: as for `run`.
    """
    datasets, tokenizer = token_checks.check_data(Store(cfg.store), cfg)
    return PretrainRecipe(cfg, tokenizer, token_checks.words_in_step(cfg, datasets)), datasets


def run_mark(cfg: PretrainConfig, datasets: Sequence[Dataset]) -> str:
    """The fingerprint of a run on all of its datasets, as `prepare` returns them.

    It depends on a step's samples, not on the number of batches they are split into or on
    activation checkpointing: a run may resume on fewer or smaller GPUs.
    """
    samples = {
        f"{kind[:-1]}_batch": getattr(cfg, f"{kind[:-1]}_batch") * cfg.train.accumulate
        for kind in OBJECTIVES
    }
    model = replace(cfg.model, checkpoint_activations="none")
    whole = replace(cfg, **samples, model=model, train=replace(cfg.train, accumulate=1))
    return fingerprint("pretrain", models.decisive(whole), [d.commit().identity for d in datasets])


def plan(cfg: PretrainConfig) -> dict[str, Any]:
    """Estimates of what a run would take; see `pretrain_plan.plan`.

    Raises:
        StoreError, ValueError: the data exist but can't be used; see `run`.
    """
    store = Store(cfg.store)
    datasets, tokenizer = token_checks.tokens(store, cfg), None
    if all(dataset.find_commit() for of_kind in datasets.values() for dataset in of_kind):
        recipe, everything = prepare(cfg)
        token_checks.check_pictures(everything)
        tokenizer = _tokenizer_in_step(store, recipe)
    return pretrain_plan.plan(cfg, datasets, tokenizer)


def _step_memory(store: Store, recipe: PretrainRecipe) -> budget.StepMemory:
    shape = pretrain_plan.shape_of(recipe.cfg, token_checks.tokens(store, recipe.cfg))
    return pretrain_plan.step_memory(recipe.cfg, shape, _tokenizer_in_step(store, recipe))


def _tokenizer_in_step(store: Store, recipe: PretrainRecipe) -> VQKDConfig | None:
    """The image tokenizer that computes visual words in each step, if there is one."""
    found = recipe.words_in_step
    return image_tokenizer_shape(store, found.tokenizer) if found else None


def batches_of_step(
    recipe: PretrainRecipe, step: int
) -> Iterator[tuple[inspect_step.Share, MaskedBatch]]:
    """The batches of all workers for an optimizer step; the first step is 1."""
    train = recipe.cfg.train
    world = max(1, train.workers)
    for rank in range(world):
        batches = recipe.batches(rank, world)
        for number in range((step - 1) * train.accumulate, step * train.accumulate):
            yield inspect_step.Share(rank, number), batches(number)


def main() -> None:
    def run_or_plan(chosen: PretrainConfig) -> None:
        if not chosen.dry_run:
            run(chosen)
            return
        found = plan(chosen)
        pretrain_plan.show(found)
        if found["problem"]:
            raise ValueError(found["problem"])

    job.main(PRESETS, __doc__, run_or_plan)


if __name__ == "__main__":
    main()
