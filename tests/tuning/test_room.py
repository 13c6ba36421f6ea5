"""How many trials there is room for, and what is said if there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import ray.train.torch
from ray.train import ScalingConfig

from pipelines import trainer
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store
from tuning import room
from tuning.room import at_once, demand, fitting


def train(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"workers": 0, **changes})


def nodes(*cpus_gpus: tuple[float, float]) -> list[dict[str, float]]:
    return [{"CPU": cpus, "GPU": gpus} for cpus, gpus in cpus_gpus]


@pytest.mark.parametrize(
    ("options", "own", "there", "count"),
    [
        ({}, 1, nodes((2, 0)), 2),
        ({}, 0.5, nodes((2, 0), (1, 0)), 6),
        # A trial's own process and its worker: they must not take the room of each other's.
        ({"workers": 1}, 1, nodes((4, 0)), 2),
        ({"workers": 1}, 1, nodes((3, 0)), 1),
        ({"workers": 2, "gpus_per_worker": 1}, 1, nodes((16, 4)), 2),
        # Fractions of a GPU: a worker's share is of one device.
        ({"workers": 1, "gpus_per_worker": 0.5}, 1, nodes((16, 2)), 4),
        ({"workers": 1, "gpus_per_worker": 0.6}, 1, nodes((16, 2)), 2),
        ({"workers": 1, "gpus_per_worker": 0.1}, 0, nodes((99, 1)), 10),
        # What one worker takes is on one node.
        ({"workers": 1, "cpus_per_worker": 6}, 1, nodes((4, 0), (4, 0)), 0),
        ({"workers": 1, "cpus_per_worker": 6}, 1, nodes((4, 0), (6, 0)), 1),
        # Workers of one trial may be on two; the process without a GPU is where there is room.
        ({"workers": 2, "gpus_per_worker": 1}, 1, nodes((1, 1), (1, 1)), 0),
        ({"workers": 2, "gpus_per_worker": 1}, 1, nodes((1, 1), (1, 1), (1, 0)), 1),
        # Processes that load want a CPU each.
        ({"loader_workers": 2}, 1, nodes((6, 0)), 2),
        ({"workers": 2, "loader_workers": 2}, 1, nodes((6, 0)), 0),
        ({"workers": 2, "loader_workers": 2}, 1, nodes((7, 0)), 1),
    ],
)
def test_trials_that_fit(
    options: dict[str, Any], own: float, there: list[dict[str, float]], count: int
) -> None:
    assert fitting(demand(train(**options), own), there, most=99) == count


@pytest.mark.parametrize(("workers", "gpus"), [(1, 0.5), (1, 1.0), (4, 1.0)])
def test_a_trials_workers_get_what_was_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, gpus: float
) -> None:
    """A share of a GPU, or one each: Ray Train asks the cluster for the same."""
    asked: list[ScalingConfig] = []

    class Trainer:
        def __init__(self, worker: Any, scaling_config: ScalingConfig, **_: Any) -> None:
            asked.append(scaling_config)

    monkeypatch.setattr(ray.train.torch, "TorchTrainer", Trainer)
    options = train(workers=workers, gpus_per_worker=gpus, cpus_per_worker=3.0)
    recipe: Any = None
    trainer._trainer(Run(Store(tmp_path).uri, "runs/x", "models/x", "", recipe, options))
    [scaling] = asked
    assert scaling.use_gpu and scaling.num_workers == workers
    wanted = [scaling.resources_per_worker] * workers
    assert demand(options, 1.0) == [{"CPU": 1.0, "GPU": 0.0}, *wanted]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of 4 CPUs and a GPU; a third has gone."""
    there = [
        {"Alive": alive, "Resources": {"CPU": 4.0, "GPU": 1.0}} for alive in (True, True, False)
    ]
    monkeypatch.setattr(room.ray, "nodes", lambda: there)


@pytest.mark.parametrize(
    ("wanted", "samples", "count"), [(0, 16, 8), (0, 3, 3), (5, 16, 5), (100, 6, 6)]
)
def test_as_many_as_fit_or_are_wanted(cluster: None, wanted: int, samples: int, count: int) -> None:
    assert at_once(train(), 1.0, wanted=wanted, samples=samples, autoscaling=False) == count


def test_a_trial_that_never_fits_is_said_before_the_first(cluster: None) -> None:
    options = train(workers=4, gpus_per_worker=1.0)
    with pytest.raises(ValueError) as found:
        at_once(options, 1.0, wanted=0, samples=16, autoscaling=False)
    said = str(found.value)
    assert "1 CPU for itself, 4 x 1 CPU and 1 GPU for its workers" in said
    assert "has 8 CPUs and 2 GPUs on 2 nodes" in said
    assert "set finetune.train.workers" in said and "--autoscaling --concurrent N" in said
    # A cluster that grows is asked for them.
    assert at_once(options, 1.0, wanted=3, samples=16, autoscaling=True) == 3


def test_more_at_once_than_fit_is_an_error(cluster: None) -> None:
    options = train(workers=1, gpus_per_worker=0.5)
    assert at_once(options, 1.0, wanted=0, samples=16, autoscaling=False) == 4
    with pytest.raises(ValueError, match=r"concurrent 5: .*room for 4 trials.*set concurrent to 4"):
        at_once(options, 1.0, wanted=5, samples=16, autoscaling=False)
