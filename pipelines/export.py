"""Exports a trained model from the store to a folder to keep or publish.

    python pipelines/export.py --model models/base --to base
    python pipelines/export.py --model models/base --checkpoint 20000 --to base-20000
    python pipelines/export.py --model models/base --format released --to base

Writes `model.safetensors`, `config.json`, the tokenizer, and a model card, `README.md`, with code
that loads it. `--format released` also writes the authors' layout, `released.pth`, for models that
fit it. `--checkpoint` exports a step of a pretraining run, which may still be running.
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
from pipelines import (
    bundles,
    checkpoints,
    config,
    console,
    job,
    model_card,
    pretrain,
    report,
    stops,
    tracking,
)
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
    """released: also write the weights in the authors' layout (`released.pth`)."""

    def __post_init__(self) -> None:
        if self.checkpoint < 0:
            raise ValueError(f"checkpoint: expected a step, got {self.checkpoint}")


PRESETS = {"default": ExportConfig()}
PREFIX = "eval/"  # of an evaluation's metrics


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
    """Make a model's files from a pretraining run's checkpoint; returns what would be bundle info.

    If the run averages its weights, the averages are exported, as in its bundle.
    """
    run_folder = f"runs/{model.removeprefix('models/')}"
    name = checkpoints.folder(run_folder, step)
    if not bundles.exists(store, name):
        kept = ", ".join(store.list(f"{run_folder}/checkpoints")) or "none"
        raise StoreError(f"{store.uri}/{name}: missing. There are: {kept}")
    note = f"{run_folder}/{stops.NOTE}"
    # This note fills in what older checkpoints don't note about their run.
    made = (store.read_json(note) if store.exists(note) else {}) | bundles.info(store, name)
    if "fingerprint" not in made:
        raise StoreError(f"{store.uri}/{note}: missing, and without it {name} is of no known run")
    cfg = _config(store, note, made["parameters"])
    recipe, datasets = pretrain.prepare(cfg)
    mark = pretrain.run_mark(cfg, datasets)
    if mark != made["fingerprint"]:
        raise StoreError(
            f"{store.uri}/{name} is of a run of the fingerprint {made['fingerprint']}, and its "
            f"options with the data that are there now have {mark}: the datasets were made anew "
            "since, or this version reads options otherwise. Export with the version of the code "
            "that wrote it, and bring back its data"
        )
    module = replace(recipe, words_in_step=None).build()  # no part of a model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundles.load(store, name, folder)
        tensors = load_file(folder / "model.safetensors")
        average = folder / "average.safetensors"
        weights.load_into(module, tensors | (load_file(average) if average.exists() else {}))
    return {
        **recipe.export(module, to),
        "steps": step,
        "run": run_folder,
        "code": made.get("code", {}),
        **(_measured(store, run_folder, step) if cfg.held_out else {"metrics": {}}),
    }


def _config(store: Store, note: str, parameters: dict[str, Any]) -> PretrainConfig:
    """A pretraining run's configuration, with this store's location."""
    chosen = config.unflatten(parameters) | {"store": store.uri}
    try:
        return config.from_dict(PretrainConfig, chosen)
    except (ValueError, dacite.DaciteError) as error:
        raise StoreError(
            f"{store.uri}/{note}: not of a pretraining run of this version ({error}); only of such "
            "a run can a checkpoint be exported"
        ) from error


def _measured(store: Store, run_folder: str, step: int) -> dict[str, Any]:
    """Scores and step of a run's last evaluation up to `step`, from the tracker.

    `metrics` is None if the tracker doesn't answer or has no scores.
    """
    unknown = {"metrics": None}
    run = tracking.handle_of(store, run_folder)
    if run is None:
        return unknown
    file = Path(run.uri.removeprefix("sqlite:///"))
    if run.uri.startswith("sqlite:") and not file.exists():  # MLflow would create it
        return unknown
    try:
        names = tracking.client(run.uri).get_run(run.run_id).data.metrics
        wanted = {name: name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)}
        curves = report.gather_curves(run, run.run_id, wanted)
    except Exception as error:
        console.say(f"tracking {run.uri}: {error}; the card has no scores")
        return unknown
    points = [(at, curve.label, value) for curve in curves for at, value in curve.points]
    last = max((at for at, _, _ in points if at <= step), default=None)
    if last is None:
        return unknown
    return {
        "metrics": {label: value for at, label, value in points if at == last},
        "evaluated": last,
    }


def main() -> None:
    def shown(chosen: ExportConfig) -> None:
        folder = run(chosen)
        console.say(f"{folder}: {', '.join(sorted(p.name for p in folder.iterdir()))}")

    job.main(PRESETS, __doc__, shown, billed=False)


if __name__ == "__main__":
    main()
