"""A sweep's page, and what it says of hyperparameters."""

from __future__ import annotations

import copy
import math
import random
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from ray import tune

from tuning import spaces, sweep_page
from tuning.importance import LEAST, importance
from tuning.sweep_charts import BEST

SPACE = {
    "train.learning_rate": tune.loguniform(3e-4, 6e-3),
    "train.layer_decay": tune.choice([0.7, 0.85, 1.0]),
    "drop_path": tune.choice([0.0, 0.1]),
}


def row(place: int, score: float | None, **changes: Any) -> dict[str, Any]:
    values = {
        "train.learning_rate": 5e-4 * (place + 1),
        "train.layer_decay": (0.7, 0.85, 1.0)[place % 3],
        "drop_path": (0.0, 0.1)[place % 2],
    }
    name = f"sweep/{place:08x}"
    return {
        "name": name,
        "parameters": values,
        "score": score,
        "steps": 40,
        "status": "finished",
        "error": None,
        "runs": [{"run": name, "step": 0, "values": values}],
        "curve": [] if score is None else [[20, score / 2], [40, score]],
        **changes,
    }


def outcome(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "sweep",
        "task": "retrieval",
        "search": "random",
        "scheduler": "asha",
        "metric": "mean_recall",
        "best": copy.deepcopy(rows[0]),  # as it is after reading the table
        "trials": list(rows),
        "importance": {"train.learning_rate": 0.75, "train.layer_decay": 0.2, "drop_path": 0.05},
        "workers": 2,
        "seconds": {"busy": 90.0, "waiting": 6.0, "tail": 4.0},
        "busy": 0.9,
        "model": "models/sweep/best",
        "mlflow_run": "f00d",
        **changes,
    }


ROWS = (
    row(0, 0.5),
    row(1, 0.3),
    row(2, 0.6, status="stopped early", steps=20),
    row(3, None, status="failed", steps=0, error="ValueError: <b>no room</b>"),
)


class Seen(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.lines: list[dict[str, str | None]] = []
        self.text: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if found.get("class") == "trial":
            self.lines.append(found)
        if tag == "section" and found.get("id"):
            self.ids.append(str(found["id"]))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def render(**changes: Any) -> str:
    return sweep_page.render(outcome(*ROWS, **changes), spaces.read(SPACE))


def test_every_trial_is_a_line_and_a_row() -> None:
    page = render()
    seen = Seen(page)
    scored = [r for r in ROWS if r["score"] is not None]
    assert len(seen.lines) == 2 * len(scored)  # over the axes, and by step
    for one in ROWS:
        assert seen.text.count(one["name"]) == 1
    for one in scored:
        assert len([t for t in seen.text if t.startswith(f"{one['name']}: ")]) == 2
    assert {"learning rate", "layer decay", "drop path"} <= set(seen.text)
    assert seen.ids == ["hyperparameters", "curves", "importance", "trials", "best"]
    assert "90.0 %" in seen.text and "75.0 %" in seen.text
    assert "ValueError: <b>no room</b>" in seen.text and "<b>no room</b>" not in page


def test_the_best_is_marked_even_where_a_stopped_one_had_scored_more() -> None:
    seen = Seen(render())
    marked = [line for line in seen.lines if line["stroke"] == BEST]
    assert len(marked) == 2
    page = render()
    best = re.findall(r'<tr class="best"><td>([^<]*)', page)
    assert best == ["sweep/00000000"]


def test_lines_cross_the_axes_where_their_values_are() -> None:
    """The learning rate's axis is logarithmic, and the best score is at the top."""
    seen = Seen(render())
    paths = [str(line["d"]) for line in seen.lines if "d" in line]
    rates = sorted(float(path.split(",")[1].split("C")[0]) for path in paths)
    low, high = 3e-4, 6e-3
    shares = [math.log(5e-4 * n / low) / math.log(high / low) for n in (3, 2, 1)]
    tops = [50 + (1 - share) * (380 - 24 - 50) for share in shares]
    assert rates == pytest.approx(tops, abs=0.1)
    ends = {str(line["stroke"]): float(str(line["d"]).rsplit(",", 1)[1])
            for line in seen.lines if "d" in line}  # fmt: skip
    worst, stopped, best = ends["#d3dce2"], ends["#17607d"], ends[BEST]
    assert stopped < best < worst  # 0.6, 0.5 and 0.3, from the top


def test_the_page_asks_for_nothing_and_runs_nothing() -> None:
    page = render()
    assert "<script" not in page and "http://" not in page and "https://" not in page
    assert "default-src 'none'" in page.replace("&#x27;", "'")


def test_a_schedule_is_shown_where_values_changed() -> None:
    first = ROWS[1]["runs"][0]
    own = {"run": "sweep/00000000", "step": 20, "values": ROWS[0]["parameters"]}
    rows = (row(0, 0.5, runs=[first, own]), *ROWS[1:])
    page = sweep_page.render(outcome(*rows, scheduler="pbt"), spaces.read(SPACE))
    assert "schedule" in Seen(page).ids and "population based training" in page


@pytest.mark.parametrize("scores", [(0.5,), (0.5, 0.5), (0.0, 0.0, 0.0)])
def test_few_or_equal_scores_are_drawn_too(scores: tuple[float, ...]) -> None:
    rows = [row(i, score) for i, score in enumerate(scores)]
    page = sweep_page.render(outcome(*rows, importance={}), spaces.read(SPACE))
    assert "nan" not in page and "Nothing can be said" in page
    assert len(Seen(page).lines) == 2 * len(rows)


# -- importance -----------------------------------------------------------------------------------


def drawn(count: int, seed: int = 0) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            "train.learning_rate": 3e-4 * 20 ** rng.random(),
            "train.layer_decay": rng.choice([0.7, 0.85, 1.0]),
            "drop_path": rng.choice([0.0, 0.1]),
        }
        for _ in range(count)
    ]


def test_what_decides_the_score_is_the_most_important() -> None:
    trials = [(values, values["train.layer_decay"] + values["drop_path"]) for values in drawn(40)]
    shares = importance(SPACE, trials, seed=0)
    assert list(shares) == ["train.layer_decay", "drop_path", "train.learning_rate"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["train.layer_decay"] > 0.6 and shares["train.learning_rate"] < 0.1
    assert importance(SPACE, trials, seed=0) == shares


def test_nothing_is_said_without_differences() -> None:
    values = drawn(8)
    assert importance(SPACE, [(v, 0.5) for v in values], seed=0) == {}
    assert importance(SPACE, [(v, i / 9) for i, v in enumerate(values[: LEAST - 1])], seed=0) == {}
    assert importance(SPACE, [(v, i / 9) for i, v in enumerate(values[:LEAST])], seed=0)
    assert importance(SPACE, [], seed=0) == {}
