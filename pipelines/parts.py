"""Resumable jobs on Ray Data: each unit of input becomes one part (one Parquet file) of a dataset.

Ray Data streams the units through tasks or an actor pool on whatever nodes there are. A part's
record is written after its file, so a job killed at any point finds its finished parts again and
makes only the rest; part names and contents depend on the unit alone, never on timing.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import pyarrow as pa

from pipelines import console
from pipelines.dataset import Commit, Dataset, PartRecord


@dataclass
class PartOutput:
    """A worker's output for one unit: good rows, set-aside rows (each with `reason`), counts."""

    table: pa.Table
    set_aside: list[dict[str, Any]] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)


class Worker(Protocol):
    """Turns a unit (a JSON-able dict with a unique `name`) into a part."""

    def __call__(self, unit: dict[str, Any]) -> PartOutput: ...


@dataclass(frozen=True)
class Resources:
    """A job's workers: `actors` of them (0: plain tasks), each with `cpus` CPUs and `gpus` GPUs."""

    actors: int = 0
    cpus: float = 1.0
    gpus: float = 0.0


def run_parts(
    dataset: Dataset,
    fingerprint: str,
    units: Sequence[dict[str, Any]],
    make_worker: Callable[[], Worker],
    *,
    resources: Resources = Resources(),  # noqa: B008 (frozen)
    here: bool = False,
) -> list[PartRecord]:
    """Make the missing parts; return the records of all parts, in the units' order.

    Args:
        make_worker: Called once per actor, or once per task, and must be picklable.
        here: Make them all in this process, one after another, without Ray.
    """
    names = [unit["name"] for unit in units]
    if len(set(names)) != len(names):
        raise ValueError(f"{dataset.name}: unit names are not unique")
    records = {k: v for k, v in dataset.finished_parts(fingerprint).items() if k in set(names)}
    todo = [unit for unit in units if unit["name"] not in records]
    with console.bar(dataset.name, total=len(units), done=len(records)) as bar:
        if todo and here:
            worker = make_worker()
            made = (_make(dataset, fingerprint, worker, unit) for unit in todo)
        else:
            made = _by_ray(dataset, fingerprint, todo, make_worker, resources)
        for record in made:
            records[record.name] = record
            bar.update(1)
    return [records[name] for name in names]


def _by_ray(
    dataset: Dataset,
    fingerprint: str,
    units: Sequence[dict[str, Any]],
    make_worker: Callable[[], Worker],
    resources: Resources,
) -> Iterator[PartRecord]:
    """The parts' records, as the parts are finished."""
    if not units:
        return
    import ray.data

    rows = [{"unit": json.dumps(unit)} for unit in units]
    stream = ray.data.from_items(rows, override_num_blocks=len(rows))
    options: dict[str, Any] = {"batch_size": 1, "num_cpus": resources.cpus}
    if resources.gpus:
        options["num_gpus"] = resources.gpus
    if resources.actors:
        options["compute"] = ray.data.ActorPoolStrategy(size=min(resources.actors, len(units)))
        options["fn_constructor_args"] = (dataset, fingerprint, make_worker)
        stream = stream.map_batches(_PartActor, **options)
    else:
        options["fn_args"] = (dataset, fingerprint, make_worker)
        stream = stream.map_batches(cast(Any, _part_task), **options)
    for row in stream.iter_rows():
        yield PartRecord.from_json(row["record"])


def each(
    label: str,
    work: Callable[[dict[str, Any]], Any],
    units: Sequence[dict[str, Any]],
    *,
    here: bool = False,
) -> Iterator[Any]:
    """The results of `work` for each unit, in the units' order, by Ray tasks where there is room.

    Args:
        label: The progress bar's label.
        work: A picklable function; takes and returns JSON values.
        units: JSON values.
        here: Do everything in this process, as for a single unit, which isn't worth starting Ray.
    """
    with console.bar(label, total=len(units)) as bar:
        if here or len(units) < 2:
            for unit in units:
                yield json.loads(json.dumps(work(unit)))
                bar.update(1)
            return
        import ray.data

        from pipelines import cluster

        cluster.start()
        rows = [{"place": i, "unit": json.dumps(unit)} for i, unit in enumerate(units)]
        stream = ray.data.from_items(rows, override_num_blocks=len(rows))
        stream = stream.map_batches(
            cast(Any, _each_task), batch_size=1, num_cpus=1, fn_args=(work,)
        )
        early: dict[int, str] = {}  # results that came before their turn
        turn = 0
        for row in stream.iter_rows():
            early[row["place"]] = row["result"]
            bar.update(1)
            while turn in early:
                yield json.loads(early.pop(turn))
                turn += 1


def _each_task(
    batch: dict[str, Any], work: Callable[[dict[str, Any]], Any]
) -> dict[str, list[Any]]:
    result = work(json.loads(str(batch["unit"][0])))
    return {"place": [int(batch["place"][0])], "result": [json.dumps(result)]}


def _make(dataset: Dataset, fingerprint: str, worker: Worker, unit: dict[str, Any]) -> PartRecord:
    output = worker(unit)
    return dataset.write_part(
        fingerprint, unit["name"], output.table, set_aside=output.set_aside, stats=output.stats
    )


def _write(
    dataset: Dataset, fingerprint: str, worker: Worker, batch: dict[str, Any]
) -> dict[str, list[str]]:
    unit = json.loads(str(batch["unit"][0]))
    # Ray reruns a task whose process died, even if the part had been recorded by then.
    recorded = f"{dataset.name}/data-{fingerprint[:8]}/_part-{unit['name']}.json"
    if dataset.store.exists(recorded):
        return {"record": [dataset.store.read(recorded).decode()]}
    return {"record": [_make(dataset, fingerprint, worker, unit).to_json()]}


class _PartActor:
    def __init__(
        self, dataset: Dataset, fingerprint: str, make_worker: Callable[[], Worker]
    ) -> None:
        self.dataset, self.fingerprint, self.worker = dataset, fingerprint, make_worker()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        return _write(self.dataset, self.fingerprint, self.worker, batch)


def _part_task(
    batch: dict[str, Any], dataset: Dataset, fingerprint: str, make_worker: Callable[[], Worker]
) -> dict[str, list[str]]:
    return _write(dataset, fingerprint, make_worker(), batch)


def sum_stats(counters: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Add up the parts' counters; nested dicts of counts are added key by key."""
    total: dict[str, Any] = {}
    for stats in counters:
        for key, value in stats.items():
            if isinstance(value, dict):
                total[key] = dict(Counter(total.get(key, {})) + Counter(value))
            else:
                total[key] = total.get(key, 0) + value
    return total


def make_dataset(
    dataset: Dataset,
    *,
    job: str,
    fingerprint: str,
    config: Any,
    inputs: Sequence[dict[str, Any]],
    units: Callable[[], Sequence[dict[str, Any]]],
    make_worker: Callable[[], Worker],
    schema: pa.Schema,
    resources: Resources = Resources(),  # noqa: B008 (frozen)
    here: bool = False,
    extra_stats: dict[str, Any] | None = None,
) -> Commit:
    """Make a dataset: skip it if it is committed, else make its parts and commit them.

    `units` is a function because a finished dataset doesn't need the work of listing them; with
    `here` everything is done in this process, without Ray.
    """
    found = dataset.finished(fingerprint)
    if found is not None:
        console.say(f"{dataset.name}: already there ({found.rows:,} rows), skipped")
        return found
    records = run_parts(dataset, fingerprint, units(), make_worker, resources=resources, here=here)
    return dataset.publish(
        fingerprint,
        records,
        job=job,
        schema=schema,
        stats={**sum_stats(r.stats for r in records), **(extra_stats or {})},
        config=config,
        inputs=inputs,
    )
