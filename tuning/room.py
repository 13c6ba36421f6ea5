"""Computes how many trials a cluster has room for at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.recipe import TrainConfig

_EXACT = 1e-6  # tolerance: fractions of a GPU are summed


@dataclass
class _Node:
    cpus: float
    gpus: list[float]
    """The free share of each GPU."""

    def take(self, bundle: Mapping[str, float]) -> bool:
        """Take a process's resources from this node, if all are there."""
        cpus, gpus = bundle["CPU"], bundle["GPU"]
        if cpus > self.cpus + _EXACT:
            return False
        if gpus > 1 - _EXACT:  # whole ones
            free = [i for i, left in enumerate(self.gpus) if left > 1 - _EXACT]
            if len(free) < round(gpus):
                return False
            for i in free[: round(gpus)]:
                self.gpus[i] = 0.0
        elif gpus:
            share = next((i for i, left in enumerate(self.gpus) if left > gpus - _EXACT), None)
            if share is None:
                return False
            self.gpus[share] -= gpus
        self.cpus -= cpus
        return True


def demand(train: TrainConfig, own_cpus: float) -> list[dict[str, float]]:
    """Resources of one trial's processes: its own, its Ray Train workers, its loaders."""
    worker = {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}
    loaders = max(1, train.workers) * train.loader_workers
    return [
        {"CPU": own_cpus, "GPU": 0.0},
        *(worker for _ in range(train.workers)),
        *({"CPU": 1.0, "GPU": 0.0} for _ in range(loaders)),
    ]


def fitting(
    bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]], most: int
) -> int:
    """How many trials, each with these `bundles`, fit on these nodes, counted up to `most`."""
    free = [_Node(n.get("CPU", 0.0), [1.0] * int(n.get("GPU", 0))) for n in nodes]
    largest_first = sorted(bundles, key=lambda b: (b["GPU"], b["CPU"]), reverse=True)
    for count in range(most):
        if not all(any(node.take(bundle) for node in free) for bundle in largest_first):
            return count
    return most


def at_once(
    train: TrainConfig, own_cpus: float, *, wanted: int, samples: int, autoscaling: bool
) -> int:
    """How many trials run at once on this cluster.

    Args:
        own_cpus: CPUs of a trial's own process.
        wanted: Trials to run, if there is room; 0: as many as there is room for.
        samples: Trials of the whole sweep.
        autoscaling: The cluster adds machines for the `wanted` trials.

    Raises:
        ValueError: there is no room for them, and there never will be.
    """
    if autoscaling:
        return min(wanted, samples)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = fitting(demand(train, own_cpus), nodes, max(wanted, samples))
    if room >= max(1, min(wanted, samples)):
        return min(wanted or room, samples)
    has = f"{_said(_sum(nodes))} on {len(nodes)} node{'s' if len(nodes) > 1 else ''}"
    takes = f"{_said({'CPU': own_cpus})} for itself" + "".join(
        f", {count} x {_said(each)} for its {name}"
        for name, count, each in (
            ("workers", train.workers,
             {"CPU": train.cpus_per_worker, "GPU": train.gpus_per_worker}),
            ("loader workers", max(1, train.workers) * train.loader_workers, {"CPU": 1}),
        )
        if count
    )  # fmt: skip
    grows = "; if the cluster brings machines by itself, add --autoscaling --concurrent N"
    if room:
        raise ValueError(
            f"concurrent {wanted}: the cluster has room for {room} trials at once (a trial takes "
            f"{takes}; there are {has}): set concurrent to {room} or less{grows}"
        )
    raise ValueError(
        f"a trial takes {takes}, and the cluster has {has}: set finetune.train.workers, "
        "finetune.train.gpus_per_worker, finetune.train.cpus_per_worker, "
        f"finetune.train.loader_workers or cpus_per_trial lower{grows}"
    )


def _sum(nodes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}


def _said(resources: Mapping[str, float]) -> str:
    return (
        " and ".join(
            f"{count:g} {kind}{'' if count == 1 else 's'}"
            for kind in ("CPU", "GPU")
            if (count := resources.get(kind))
        )
        or "nothing"
    )
