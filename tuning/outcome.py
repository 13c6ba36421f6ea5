"""A sweep's outcome: its table, its best model, and what the console shows."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beit3 import weights
from pipelines import bundles, console, model_card
from pipelines.storage import Store
from tuning import importance, spaces, trials, watch

if TYPE_CHECKING:
    from tuning.sweep import SweepConfig

FINISHED, STOPPED, FAILED = "finished", "stopped early", "failed"


def gather(cfg: SweepConfig, store: Store, folder: str) -> dict[str, Any]:
    """Gather a sweep's outcome: the table of its trials, and what follows from it.

    Raises:
        RuntimeError: no trial was trained to its end.
    """
    seen = watch.ended(store, folder)
    failed = {trials.run_name(cfg.name, one["values"]) for one in seen["trials"] if one["error"]}
    trials.close(store, cfg.name, failed)
    rows = [_row(cfg, store, one) for one in seen["trials"]]
    # A trial that was stopped early has no model, whatever it scored so far.
    rows.sort(key=_place)
    if not rows or rows[0]["status"] != FINISHED or rows[0]["score"] is None:
        errors = "; ".join(sorted({row["error"] for row in rows if row["error"]})) or "no score"
        raise RuntimeError(
            f"no trial of sweep {cfg.name} was trained to its end: {errors}. Run the same command "
            "to try those that failed again"
        )
    scored = [
        (row["parameters"], row["score"])
        for row in rows
        if row["score"] is not None and math.isfinite(row["score"])
    ]
    return {
        "name": cfg.name,
        "task": cfg.finetune.task,
        "search": cfg.search,
        "scheduler": cfg.scheduler,
        "metric": cfg.metric,
        "best": rows[0],
        "trials": rows,
        "importance": importance.importance(spaces.load(cfg.finetune), scored, seed=cfg.seed),
        "workers": seen["workers"],
        "seconds": seen["seconds"],
        "busy": watch.busy_share(seen["seconds"]),
    }


def _place(row: dict[str, Any]) -> tuple[bool, bool, float, str]:
    score = row["score"]
    comparable = -math.inf if score is None or math.isnan(score) else score
    among_equals = trials.among_equals(row["parameters"])
    return row["status"] != FINISHED, score is None, -comparable, among_equals


def _row(cfg: SweepConfig, store: Store, seen: dict[str, Any]) -> dict[str, Any]:
    name = trials.run_name(cfg.name, seen["values"])
    steps = int(seen["result"].get("step", 0))
    ended = FINISHED if steps == cfg.finetune.train.steps else STOPPED
    runs = trials.lineage(store, name)
    return {
        "name": name,
        "parameters": trials.values(seen["values"]),
        "score": seen["result"].get(cfg.metric),
        "steps": steps,
        "status": FAILED if seen["error"] else ended,
        "error": seen["error"],
        "runs": runs,
        "curve": trials.learning_curve(store, runs, cfg.metric),
    }


def export(store: Store, outcome: dict[str, Any]) -> str:
    """Export the best trial's model as the bundle `<sweep>/best`, with the table in its card."""
    name = f"models/{outcome['name']}/best"
    kept = ("name", "parameters", "score", "steps", "status")
    rows = [{key: row[key] for key in kept} for row in outcome["trials"]]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        info = bundles.load(store, f"models/{outcome['best']['name']}", folder)
        info["sweep"] = {
            "name": outcome["name"],
            "metric": outcome["metric"],
            "trials": rows,
            "runs": outcome["best"]["runs"],
        }
        model, notes = weights.load_config(folder)
        card = model_card.write(name.removeprefix("models/"), str(notes["kind"]), model, info)
        (folder / "README.md").write_text(card)
        bundles.save(store, name, folder, info)
    return name


def show(outcome: dict[str, Any]) -> None:
    """Print the trials, best first, and how busy the workers were."""
    for row in outcome["trials"]:
        chosen = "  ".join(f"{k} {_short(v)}" for k, v in row["parameters"].items())
        score = row["status"] if row["score"] is None else f"{row['score']:.4f}"
        console.say(f"  {outcome['metric']} {score}  after {row['steps']:>4} steps  {chosen}")
    seconds, workers = outcome["seconds"], outcome["workers"]
    idle = ", ".join(f"{seconds[k] / workers:.0f} s {k}" for k in ("waiting", "tail"))
    console.say(f"  {workers} workers were busy {100 * outcome['busy']:.1f} % of the time ({idle})")
    console.say(f"  best: {outcome['model']}; sweeps/{outcome['name']}.html shows all")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
