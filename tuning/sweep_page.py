"""A sweep's page: one HTML file that opens offline, without scripts.

store.write("sweeps/vqa.html", render(outcome, fields).encode())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from beit3 import tasks
from pipelines.report_html import Html, el, facts, join, note, number, page, table
from tuning import importance, watch
from tuning.spaces import Choice, Range
from tuning.sweep_charts import Line, curves, parallel, short, styles

_SEARCHES = {"random": "random search", "optuna": "Optuna (TPE)"}
_SCHEDULERS = {"asha": "ASHA", "pbt": "population based training", "none": "all to the end"}


def render(outcome: Mapping[str, Any], fields: Mapping[str, Range | Choice]) -> str:
    """The page as one string.

    Args:
        outcome: A sweep's table, as `sweeps/<name>.json` holds it.
        fields: The hyperparameters' possible values.
    """
    metric, rows = outcome["metric"], outcome["trials"]
    best = next(row for row in rows if row["name"] == outcome["best"]["name"])
    percent = tasks.load(outcome["task"]).about.selected_share
    lines = [
        Line(
            row["name"], row["parameters"], row["score"], row["curve"], row["name"] == best["name"]
        )
        for row in rows
        if row["score"] is not None and math.isfinite(row["score"])
    ]
    counts = {status: sum(row["status"] == status for row in rows) for status in _STATUSES}
    known = facts(
        [
            ("Best", f"{number(best['score'], percent=percent)} {metric.replace('_', ' ')}"),
            ("Trials", ", ".join(f"{n} {status}" for status, n in counts.items() if n)),
            ("Search", _SEARCHES[outcome["search"]]),
            ("Scheduler", _SCHEDULERS[outcome["scheduler"]]),
            ("Workers", str(outcome["workers"])),
            ("Busy", number(watch.busy_share(outcome["seconds"]), percent=True)),
        ]
    )
    shown = ", ".join(f"{short(k)} {_shown(v)}" for k, v in best["parameters"].items())
    return page(
        f"Sweep {outcome['name']}",
        f"Finetuning for {outcome['task']}: what its hyperparameters do to "
        f"{metric.replace('_', ' ')} on the validation split. Best: {shown}.",
        known,
        [
            ("hyperparameters", "Hyperparameters",
             join(styles(), parallel(fields, metric, lines, percent=percent),
                  note("Each line is a trial. Hover over one to read its values."))),
            ("curves", "Learning curves",
             join(curves(metric, lines, percent=percent), note(_NOTES[outcome["scheduler"]]))),
            ("importance", "Importance", _importance(outcome["importance"], len(lines))),
            ("schedule", "How the best came about", _schedule(best)),
            ("trials", "Trials", _trials(outcome, percent)),
            ("best", "The best", _best(outcome)),
        ],
    )  # fmt: skip


_STATUSES = ("finished", "stopped early", "failed")
_NOTES = {
    "asha": "Trials that fell behind were stopped early.",
    "pbt": "Of each trial, the way of the weights that it ended with: where it went on from "
    "another trial's checkpoint, that one's curve up to there.",
    "none": "",
}


def _importance(shares: Mapping[str, float], trials: int) -> Html | None:
    if not shares:
        return note(
            f"Nothing can be said: it takes {importance.LEAST} scores that differ, and "
            f"{trials} trials gave one."
        )
    bars = []
    for name, share in shares.items():
        bar = el("span", style=f"width:{100 * share:.1f}%;background:#17607d")
        label = f"{name}: {number(share, percent=True)}"
        bars += [
            el("span", short(name), title=name),
            el("div", bar, class_="bar", role="img", aria_label=label),
            el("span", number(share, percent=True)),
        ]
    words = (
        f"The share of the differences between the {trials} trials' last scores that each "
        "hyperparameter explains alone (fANOVA, by Optuna). The fewer the trials, the less it "
        "means."
    )
    return join(el("div", *bars, class_="bars"), note(words))


def _schedule(best: Mapping[str, Any]) -> Html | None:
    """The values that the best trial's weights were trained with, in order."""
    if len(best["runs"]) < 2:
        return None
    names = list(best["parameters"])
    rows = [
        el("tr", el("td", run["run"]), el("td", f"{run['step']:,}"),
           *(el("td", _shown(run["values"].get(name))) for name in names))
        for run in best["runs"]
    ]  # fmt: skip
    return table(["Run", "from step", *map(short, names)], rows)


def _trials(outcome: Mapping[str, Any], percent: bool) -> Html | None:
    names = list(outcome["best"]["parameters"])
    rows = []
    for row in outcome["trials"]:
        won = row["name"] == outcome["best"]["name"]
        score = number(row["score"], percent=percent)
        rows.append(
            el(
                "tr",
                el("td", row["name"], el("span", row["error"], class_="small bad"))
                if row["error"]
                else el("td", row["name"]),
                *(el("td", _shown(row["parameters"].get(name))) for name in names),
                el("td", el("strong", score, class_="best-value") if won else score),
                el("td", f"{row['steps']:,}"),
                el("td", row["status"]),
                class_="best" if won else None,
            )
        )
    metric = outcome["metric"].replace("_", " ")
    return table(["Trial", *map(short, names), metric, "Steps", "Status"], rows)


def _best(outcome: Mapping[str, Any]) -> Html:
    where = [("Model", outcome["model"]), ("MLflow run", outcome["mlflow_run"])]
    rows = [el("tr", el("td", label), el("td", el("code", what))) for label, what in where]
    return table(["", "Where"], rows, class_="words")


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)
