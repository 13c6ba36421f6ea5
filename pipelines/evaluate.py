"""Evaluation: a finetuned model and a prepared split -> predictions, scores, a submission file.

    python pipelines/evaluate.py --model models/vqa-base --data tasks/vqa/val

The split is cut into parts; each is predicted by an actor that keeps the model loaded, and written
to `predictions/<name>`, so an evaluation killed at any point resumes where it was. Then the whole
split is scored: `scores/<name>.json`, and `scores/<name>.submission.json` (or `.csv`) in the format
of the benchmark's server or script where there is one. An example that can't be predicted is
recorded with the reason and counts as wrong; it never ends the evaluation. An example whose image
was missing or broken when the split was prepared counts as wrong, too.

A dual encoder that was not finetuned is evaluated on retrieval as it is: zero-shot.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import torch

from beit3 import tasks
from beit3.config import Precision
from beit3.tasks import Example, Sample, Task
from pipelines import bill, bundles, cluster, console, job, run_logger, tracking
from pipelines.config import decisive, flatten, indifferent, later, to_dict
from pipelines.dataset import Commit
from pipelines.finetuned import Finetuned, load, read_notes, row_sample
from pipelines.lineage import fingerprint
from pipelines.loader import ParquetRows
from pipelines.parts import PartOutput, Resources, make_dataset
from pipelines.storage import Store
from pipelines.task_data import lost_examples

FAILED = "prediction failed"
_ALONE = 8  # this many records that all fail are not to blame for it
AHEAD = 2  # batches whose pictures are decoded while one is predicted
SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # of the record
        ("example", pa.string()),
        ("prediction", pa.string()),  # JSON; null where there is none
        ("target", pa.string()),  # JSON
    ]
)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a model on a prepared split."""

    store: str = indifferent("store")
    """Where models and data live: a folder or an s3:// URI."""
    model: str = indifferent("models/vqa")
    """Bundle of a finetuned model."""
    data: str = indifferent("tasks/vqa/val")
    """A prepared split."""
    name: str = indifferent("")
    """The scores become scores/<name>.json; by default derived from model and data."""
    batch_size: int = indifferent(32)
    """Records predicted at once."""
    options: dict[str, float] = field(default_factory=dict, hash=False)
    """The task's options to change, e.g. `--options beams 5 length_penalty 0.8`."""
    limit: int | None = None
    """Evaluate only this many records, the first ones."""
    missing: Literal["wrong", "left out"] = indifferent("wrong")  # for predictions
    """How to count records whose images were missing or broken when the split was prepared. With
    `limit` they are left out."""
    part_records: int = 256
    """Records per part, at most 256; a part is the most that is redone after a kill."""
    resources: Resources = indifferent(Resources(actors=1))
    """Actors, and the CPUs and GPUs of each; with one GPU each, the model runs there. An actor
    decodes pictures in one thread per CPU."""
    precision: Precision = later("fp32")
    """Precision the model computes in. On GPUs, bf16 uses the tensor cores."""
    threads: int = indifferent(0)
    """Torch threads of an actor on CPU; 0: as torch chooses. Small models want 1."""
    in_process: bool = indifferent(False)
    """Predict in the job's own process instead of on Ray: for small data."""
    track: bool = indifferent(True)
    """Log the scores to MLflow."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size: must be at least 1, not {self.batch_size}")
        if not 1 <= self.part_records <= 256:
            raise ValueError(f"part_records: {self.part_records} is not within 1..256")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: must be at least 1, not {self.limit}")

    @property
    def output(self) -> str:
        """The name of predictions and scores."""
        default = f"{self.model.removeprefix('models/')}-{self.data.removeprefix('tasks/')}"
        return self.name or re.sub(r"[^\w.-]+", "-", default)


PRESETS: dict[str, EvaluateConfig] = {
    "cpu": EvaluateConfig(),
    "gpu": EvaluateConfig(
        batch_size=64, precision="bf16", resources=Resources(actors=1, cpus=4, gpus=1)
    ),
    "tiny": EvaluateConfig(in_process=True, batch_size=64, threads=1),
}


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Evaluate, unless that is done already; returns the contents of `scores/<name>.json`.

    Raises:
        StoreError: model or data are missing, or the name is taken by another evaluation.
        ValueError: the task has no such option.
    """
    store = Store(config.store)
    data = store.dataset(config.data).commit()
    notes = read_notes(store, config.model)
    files = store.read_json(f"{config.model}/{bundles.MANIFEST}")["files"]
    decides = list(decisive(config).values())
    mark = fingerprint("evaluate", decides, [json.dumps(files, sort_keys=True), data.identity])
    aside = [] if config.limit else store.dataset(config.data).read_set_aside()
    whole = fingerprint("scores", [mark, config.missing], [json.dumps(row) for row in aside])
    scores = f"scores/{config.output}.json"
    if store.exists(scores):
        found = store.read_json(scores)
        if found["fingerprint"] == whole:
            console.say(f"{scores}: already there, skipped")
            _show(found)
            return found
    start = time.monotonic()
    with bill.Meter() as meter:
        commit = _predictions(config, store, mark, data)
    seconds = time.monotonic() - start
    result, submission = _score(config, store, commit, notes, aside)
    result |= {"fingerprint": whole, "seconds": round(seconds, 3)}
    result["records_per_second"] = round(result["records"] / max(1e-9, seconds), 2)
    if submission is not None:
        name, text = _submission_file(submission)
        result["submission"] = f"scores/{config.output}.{name}"
        store.write(result["submission"], text.encode())
    if config.track:
        result["mlflow_run"] = _track(config, store, result, submission, meter.hours())
    store.write_json(scores, result)
    _show(result)
    return result


def _predictions(config: EvaluateConfig, store: Store, mark: str, data: Commit) -> Commit:
    return make_dataset(
        store.dataset(f"predictions/{config.output}"),
        job="evaluate",
        fingerprint=mark,
        config=to_dict(config),
        inputs=[{"dataset": config.data, "commit": data.identity}, {"model": config.model}],
        units=partial(_units, config, store),
        make_worker=partial(_worker, config, mark),
        schema=SCHEMA,
        resources=config.resources,
        here=config.in_process,
    )


def _units(config: EvaluateConfig, store: Store) -> list[dict[str, Any]]:
    """Slices of the split's row groups."""
    if not config.in_process:
        cluster.start()
    units: list[dict[str, Any]] = []
    left = config.limit if config.limit is not None else float("inf")
    for group in ParquetRows([store.dataset(config.data)]).groups:
        for start in range(0, group.rows, config.part_records):
            stop = int(min(start + config.part_records, group.rows, start + left))
            if stop > start:
                place = {"path": group.path, "group": group.index, "start": start, "stop": stop}
                units.append({"name": f"{len(units):06d}", **place})
                left -= stop - start
    return units


@lru_cache(maxsize=1)
def _worker(config: EvaluateConfig, mark: str) -> Predictor:
    """Cached, since plain Ray tasks ask for a worker per part: the model loads once per process."""
    device = cluster.device(config.resources.gpus)
    model = load(Store(config.store), config.model, config.options, device)
    return Predictor(config, replace(model, precision=config.precision))


class Predictor:
    """A slice of a split -> a prediction per example."""

    def __init__(self, config: EvaluateConfig, model: Finetuned) -> None:
        self.config, self.model = config, model
        self.rows = ParquetRows([Store(config.store).dataset(config.data)])
        self.pool = ThreadPoolExecutor(max(1, int(config.resources.cpus)))

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        before = torch.get_num_threads()
        torch.set_num_threads(self.config.threads or before)
        try:
            return self._predict(unit)
        finally:
            torch.set_num_threads(before)  # the process may be the job's own

    def rows_of(self, unit: dict[str, Any]) -> list[dict[str, Any]]:
        table = self.rows.table(0, unit["path"], unit["group"])
        return table.slice(unit["start"], unit["stop"] - unit["start"]).to_pylist()

    def _predict(self, unit: dict[str, Any]) -> PartOutput:
        rows = self.rows_of(unit)
        out: list[dict[str, Any]] = []
        aside: list[dict[str, Any]] = []
        for batch, samples in self.batches(rows):
            good, bad = predict_rows(self.model, batch, samples)
            out += good
            aside += bad
        failed = [row for row in aside if row["reason"] == FAILED]
        if len(failed) == len(rows) >= _ALONE:
            raise RuntimeError(
                f"{self.config.model} failed on each of {len(rows)} records, so it is not theirs; "
                f"the first: {failed[0]['detail']}"
            )
        stats = {"records": len(rows), "examples": len(out), "failed": len(aside)}
        return PartOutput(pa.Table.from_pylist(out, SCHEMA), aside, stats)

    def batches(
        self, rows: Sequence[dict[str, Any]]
    ) -> Iterator[tuple[Sequence[dict[str, Any]], list[Sample | Exception]]]:
        """Batches of rows with their samples, which are decoded ahead of prediction."""
        size = self.config.batch_size
        batches = (rows[start : start + size] for start in range(0, len(rows), size))
        begun = ((batch, self.pool.map(partial(_sample, self.model), batch)) for batch in batches)
        waiting = list(islice(begun, AHEAD))
        while waiting:
            batch, samples = waiting.pop(0)
            waiting += islice(begun, 1)
            yield batch, list(samples)


def _sample(model: Finetuned, row: dict[str, Any]) -> Sample | Exception:
    try:
        return row_sample(model.task, row, model.image_size)
    except Exception as error:  # decoders raise nearly anything
        return error


def predict_rows(
    model: Finetuned,
    rows: Sequence[dict[str, Any]],
    samples: Sequence[Sample | Exception] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Predict a batch of rows; if that fails, each row is tried alone and set aside if it fails.

    Args:
        samples: The rows' samples, or the errors in making them, if that is done already.

    Returns rows of `SCHEMA` for every example, and the rows set aside with their reason.
    """
    if samples is None:
        samples = [_sample(model, row) for row in rows]
    aside: list[dict[str, Any]] = []
    sound: list[tuple[int, Sample]] = []
    for place, (row, sample) in enumerate(zip(rows, samples, strict=True)):
        if isinstance(sample, Exception):
            aside.append(_failure(row, "broken record", sample))
        elif sample.examples:
            sound.append((place, sample))
    predictions: dict[int, list[Any]] = {}  # by place: published ids may repeat
    try:
        if sound:
            found = iter(model.predict([sample for _, sample in sound]))
            for place, sample in sound:
                predictions[place] = [next(found) for _ in sample.examples]
    except torch.AcceleratorError:
        raise  # of the machine, not of an example
    except Exception as error:
        if len(rows) == 1:
            aside.append(_failure(rows[0], FAILED, error))
        else:
            alone = zip(rows, samples, strict=True)
            pairs = [predict_rows(model, [row], [sample]) for row, sample in alone]
            return [p for good, _ in pairs for p in good], [p for _, bad in pairs for p in bad]
    out = []
    for place, row in enumerate(rows):
        found = predictions.get(place, [None] * len(row["examples"]))
        for example, prediction in zip(row["examples"], found, strict=True):
            out.append(
                {
                    "id": row["id"],
                    "example": example["id"],
                    "prediction": as_text(prediction),
                    "target": example["target"],
                }
            )
    return out, aside


def as_text(prediction: Any) -> str | None:
    """A prediction in the form that a dataset stores."""
    return None if prediction is None else json.dumps(prediction)


def _failure(row: dict[str, Any], reason: str, error: Exception) -> dict[str, Any]:
    return {
        "id": row["id"],
        "reason": reason,
        "detail": f"{type(error).__name__}: {error}"[:200],
    }


def _score(
    config: EvaluateConfig,
    store: Store,
    commit: Commit,
    notes: dict[str, Any],
    aside: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]] | str | None]:
    table = store.dataset(commit.dataset).read_table()
    task = tasks.create(notes["task"], labels=notes["labels"])
    examples, predictions = [], []
    for row in table.to_pylist():
        examples.append(Example(row["example"], None, json.loads(row["target"])))
        predictions.append(None if row["prediction"] is None else json.loads(row["prediction"]))
    lost = lost_examples(aside)
    # Servers want an answer for every example.
    submission = task.submission(predictions + [None] * len(lost), examples + lost)
    if config.missing == "left out":
        lost = []
    examples += lost
    predictions += [None] * len(lost)
    result = {
        "task": notes["task"],
        "model": config.model,
        "data": config.data,
        "metrics": task.score(predictions, examples, thorough=True),
        "records": commit.stats.get("records", 0),
        "examples": len(examples),
        "failed": commit.stats.get("failed", 0),
        "set_aside": len(aside),
        "lost_examples": len(lost),
        "outside_labels": _outside(task, examples),
        "predictions": commit.dataset,
    }
    return result, submission


def _outside(task: Task, examples: Sequence[Example]) -> int:
    """Number of examples the model can't get right, as it has no class for any of their answers."""
    if not task.labels:
        return 0
    return sum(e.target is not None and not task.trainable(e) for e in examples)


def _submission_file(submission: list[dict[str, Any]] | str) -> tuple[str, str]:
    """Name and text of the file for the benchmark."""
    if isinstance(submission, str):
        return "submission.csv", submission
    return "submission.json", json.dumps(submission, indent=1) + "\n"


def _track(
    config: EvaluateConfig,
    store: Store,
    result: dict[str, Any],
    submission: list[dict[str, Any]] | str | None,
    hours: Mapping[str, float],
) -> str:
    handle = tracking.start_run(store, f"evaluate/{config.output}", flatten(config))
    with tempfile.TemporaryDirectory() as folder, run_logger.Logger(handle) as logger:
        logger.metrics(0, {**result["metrics"], "failed": result["failed"]})
        logger.json("scores.json", result)
        if submission is not None:
            name, text = _submission_file(submission)
            file = Path(folder) / name
            file.write_text(text)
            logger.file(file)
        logger.close()
    bill.track(handle, hours)
    tracking.finish_run(handle)
    return handle.run_id


def _show(result: dict[str, Any]) -> None:
    failed = f", {result['failed']} failed" if result["failed"] else ""
    console.say(
        f"{result['model']} on {result['data']}: {result['records']:,} records, "
        f"{result['examples']:,} examples{failed}"
    )
    if result["set_aside"]:
        console.say(
            f"  set aside when the split was prepared: {result['set_aside']:,} records; "
            f"{result['lost_examples']:,} examples of theirs count as wrong"
        )
    if result["outside_labels"]:
        console.say(f"  of no class that the model has: {result['outside_labels']:,} examples")
    for name, value in result["metrics"].items():
        console.say(f"  {name:<24} {value:8.4f}")


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    from pipelines.evaluate import main  # Ray's workers know the file by this name only

    main()
