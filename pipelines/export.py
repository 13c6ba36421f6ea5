"""Take a trained model out of the store, into a folder to keep or to publish.

    python pipelines/export.py --model models/base --to base
    python pipelines/export.py --model models/base --checkpoint 20000 --to base-20000
    python pipelines/export.py --model models/base --format released --to base

Leaves `model.safetensors`, `config.json`, the tokenizer, and a card, `README.md`, with code that
loads it. `--format released` leaves the authors' layout as well, `released.pth`, of models that it
can hold. `--checkpoint` takes a step of a pretraining run, which may be under way.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import dacite
from safetensors.torch import load_file

from beit3 import released, weights
from pipelines import bundles, checkpoints, config, console, model_card, pretrain
from pipelines.pretrain_config import PretrainConfig
from pipelines.storage import Store, StoreError


@dataclass(frozen=True)
class ExportConfig:
    """Export a trained model."""

    model: str = "models/pretrained"
    """The bundle, `models/<name>`."""
    to: str = "exported"
    """A local folder that doesn't exist yet, or is empty."""
    store: str = "store"
    """Where models live: a folder or an s3:// URI."""
    checkpoint: int = 0
    """A step of the run of the same name whose checkpoint is exported; 0: the finished model."""
    format: Literal["folder", "released"] = "folder"
    """released: with the weights in the authors' layout, too (`released.pth`)."""

    def __post_init__(self) -> None:
        if self.checkpoint < 0:
            raise ValueError(f"checkpoint: expected a step, got {self.checkpoint}")


PRESETS = {"default": ExportConfig()}


def run(cfg: ExportConfig) -> Path:
    """Export; returns the folder.

    Raises:
        StoreError: there is no such model or checkpoint, or it is damaged.
        ValueError: the folder is not empty, or the released layout can't hold the model.
    """
    target, store = Path(cfg.to), Store(cfg.store)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"to: {target} is there and not an empty folder: choose another")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if cfg.checkpoint:
            info = _checkpoint(store, cfg.model, cfg.checkpoint, folder)
        else:
            info = bundles.load(store, cfg.model, folder)
        if not (folder / weights.WEIGHTS).exists():
            raise StoreError(f"{store.uri}/{cfg.model} holds no model")
        model, notes = weights.load_config(folder)
        if cfg.format == "released":
            released.save_released(folder / "released.pth", released.load_folder(folder))
        card = model_card.write(Path(cfg.model).name, str(notes["kind"]), model, info)
        (folder / "README.md").write_text(card)
        shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def _checkpoint(store: Store, model: str, step: int, to: Path) -> dict[str, Any]:
    """Make a model's files of a pretraining run's checkpoint; returns what a bundle would say.

    Of a run that averages its weights these are the averages, as they are in its bundle.
    """
    run_folder = f"runs/{model.removeprefix('models/')}"
    name = checkpoints.folder(run_folder, step)
    if not bundles.exists(store, name):
        kept = ", ".join(store.list(f"{run_folder}/checkpoints")) or "none"
        raise StoreError(f"{store.uri}/{name}: missing. There are: {kept}")
    recipe, _ = pretrain.prepare(_config(store, run_folder))
    module = replace(recipe, words_in_step=None).build()  # no part of a model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundles.load(store, name, folder)
        tensors = load_file(folder / "model.safetensors")
        average = folder / "average.safetensors"
        weights.load_into(module, tensors | (load_file(average) if average.exists() else {}))
    return {"steps": step, "run": run_folder, "metrics": {}, **recipe.export(module, to)}


def _config(store: Store, run_folder: str) -> PretrainConfig:
    """What a pretraining run was begun with, with this store's place."""
    note = f"{run_folder}/run.json"
    found = store.read_json(note).get("parameters", {}) if store.exists(note) else {}
    chosen = config.unflatten(found) | {"store": store.uri}
    try:
        return config.from_dict(PretrainConfig, chosen)
    except (ValueError, dacite.DaciteError) as error:
        raise StoreError(
            f"{store.uri}/{note}: not of a pretraining run of this version ({error}); only of such "
            "a run can a checkpoint be exported"
        ) from error


def main() -> None:
    chosen = config.cli(PRESETS, description=__doc__ or "")
    try:
        folder = run(chosen)
    except (StoreError, ValueError) as error:
        config.stop(str(error))
    console.say(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")


if __name__ == "__main__":
    main()
