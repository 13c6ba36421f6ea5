"""Downstream data: a task's published files and images -> `tasks/<name>/<split>`.

    python pipelines/prepare_task.py --task vqa --annotations /data/vqa --images /data/coco

A row is one record: its image or images, as they are stored (upright RGB JPEG, not larger than
needed), and every example about them. Records keep the published order. A record whose image is
missing or broken is set aside with its reason; nothing else fails for it. The commit's statistics
count records, examples and what was set aside, and of the training split hold the answer
vocabulary (`labels`) of tasks that have one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from beit3 import tasks
from beit3.tasks import Example
from pipelines import cluster, console
from pipelines.config import cli, stop, to_dict
from pipelines.images import ImagePolicy, Rejected, clean_image
from pipelines.parts import PartOutput, Worker, make_dataset, sum_stats
from pipelines.storage import (
    Commit,
    Dataset,
    PartRecord,
    Store,
    StoreError,
    fingerprint,
    local_folder,
)

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        (
            "examples",
            pa.list_(
                pa.struct(
                    [("id", pa.string()), ("text", pa.string()), ("target", pa.string())]  # JSON
                )
            ),
        ),
    ]
)
_READS_AT_ONCE = 8


@dataclass(frozen=True)
class PrepareConfig:
    """Which task's data to prepare, from where."""

    task: str = "vqa"
    """A module of beit3/tasks: captioning, imagenet, nlvr2, retrieval, vqa."""
    annotations: str = "annotations"
    """Folder of the task's published files (for retrieval also one dataset_*.json): path or URI."""
    images: str = "images"
    """Folder of the images, with train2014, val2014, ... below it for COCO: path or URI."""
    store: str = "store"
    """URI or path of the store."""
    name: str = ""
    """The datasets become tasks/<name>/<split>; by default the task's name."""
    splits: tuple[str, ...] = ("train", "val")
    limit: int | None = None
    """Take only the first so many records of each split."""
    min_answer_count: int = 9
    """Answers given less often in the training split are no class of the head."""
    short_side: int = 512
    """Larger images are shrunk so that their shorter side has so many pixels."""
    part_records: int = 1000
    """Records in one part: one task's work, and one Parquet file."""
    in_process: bool = False
    """Work in the job's own process instead of on Ray: for small data."""

    def __post_init__(self) -> None:
        tasks.load(self.task)
        if not self.splits:
            raise ValueError("splits: name at least one")
        for field in ("min_answer_count", "short_side", "part_records"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: must be at least 1, not {self.limit}")
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise ValueError(f"name: {self.name!r} is not a name of letters, digits, '_', '-', '.'")

    def dataset(self, split: str) -> str:
        return f"tasks/{self.name or self.task}/{split}"


_two, _three = ("train", "val"), ("train", "val", "test")
PRESETS: dict[str, PrepareConfig] = {
    "vqa": PrepareConfig(task="vqa", splits=_two),
    "captioning": PrepareConfig(task="captioning", splits=_three),
    "retrieval": PrepareConfig(task="retrieval", splits=_three),
    "nlvr2": PrepareConfig(task="nlvr2", splits=_three),
    "imagenet": PrepareConfig(task="imagenet", splits=_two),
}


def run(config: PrepareConfig) -> dict[str, Commit]:
    """Make the datasets, or find them made already; the commits by split.

    Raises:
        FileNotFoundError: a published file is missing.
        StoreError: the store can't be written, or a name is taken by another dataset.
        ValueError: a split is unknown, or a file is not what it should be.
    """
    store = Store(config.store)
    store.check_writable()
    with local_folder(config.annotations) as root:
        return {split: _prepare(config, store, root, split) for split in config.splits}


def read_examples(row: dict[str, Any]) -> tuple[Example, ...]:
    """The examples of a dataset's row."""
    return tuple(Example(e["id"], e["text"], json.loads(e["target"])) for e in row["examples"])


def labels(store: Store, name: str) -> tuple[str, ...]:
    """The answer vocabulary of `tasks/<name>/train`; empty where the task has none.

    Raises:
        StoreError: the training split is not there.
    """
    return tuple(store.dataset(f"tasks/{name}/train").commit().stats.get("labels", ()))


def make_here(
    dataset: Dataset,
    *,
    job: str,
    fingerprint: str,
    config: Any,
    inputs: Sequence[dict[str, Any]],
    units: Callable[[], Sequence[dict[str, Any]]],
    make_worker: Callable[[], Worker],
    schema: pa.Schema,
    extra_stats: dict[str, Any] | None = None,
) -> Commit:
    """`parts.make_dataset` in this process, without Ray; what one left half done the other ends."""
    found = dataset.finished(fingerprint)
    if found is not None:
        console.say(f"{dataset.name}: already there ({found.rows:,} rows), skipped")
        return found
    done = dataset.finished_parts(fingerprint)
    records: list[PartRecord] = []
    worker: Worker | None = None
    for unit in units():
        record = done.get(unit["name"])
        if record is None:
            worker = worker or make_worker()
            output = worker(unit)
            record = dataset.write_part(
                fingerprint,
                unit["name"],
                output.table,
                set_aside=output.set_aside,
                stats=output.stats,
            )
        records.append(record)
    return dataset.publish(
        fingerprint,
        records,
        job=job,
        schema=schema,
        stats={**sum_stats(r.stats for r in records), **(extra_stats or {})},
        config=config,
        inputs=inputs,
    )


def _prepare(config: PrepareConfig, store: Store, root: Path, split: str) -> Commit:
    task = tasks.load(config.task)
    items = [asdict(item) for item in islice(task.read(root, split), config.limit)]
    digest = hashlib.sha256(json.dumps(items, sort_keys=True).encode()).hexdigest()
    extra: dict[str, Any] = {}
    if split == "train":
        found = task.read_labels(root, config.min_answer_count)
        extra = {"labels": found} if found else {}
    decides = [config.task, split, config.short_side, config.part_records, extra]
    arguments: dict[str, Any] = {
        "job": "prepare_task",
        "fingerprint": fingerprint("prepare_task", decides, [digest]),
        "config": to_dict(config),
        "inputs": [{"file": config.annotations, "split": split, "sha256_of_records": digest}],
        "units": partial(_units, items, config),
        "make_worker": partial(_ImageWorker, config.images, config.short_side),
        "schema": SCHEMA,
        "extra_stats": extra,
    }
    dataset = store.dataset(config.dataset(split))
    commit = (make_here if config.in_process else make_dataset)(dataset, **arguments)
    _report(commit)
    return commit


def _units(items: list[dict[str, Any]], config: PrepareConfig) -> list[dict[str, Any]]:
    if not config.in_process:
        cluster.start()
    size = config.part_records
    return [
        {"name": f"{i:05d}", "items": items[start : start + size]}
        for i, start in enumerate(range(0, len(items), size))
    ]


def _report(commit: Commit) -> None:
    stats = commit.stats
    aside = "; ".join(f"{reason}: {n:,}" for reason, n in stats.get("set_aside", {}).items())
    classes = f", {len(stats['labels']):,} labels" if stats.get("labels") else ""
    console.say(
        f"{commit.dataset}: {commit.rows:,} records, {stats.get('examples', 0):,} examples{classes}"
        + (f"; set aside: {aside}" if aside else "")
    )


class _ImageWorker:
    """Records with paths -> records with images."""

    def __init__(self, images: str, short_side: int) -> None:
        self.folder = Store(images)
        # A benchmark's images are all wanted, however small or narrow.
        self.policy = ImagePolicy(short_side, 1, 1e9, downscale="lanczos")

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        rows: list[dict[str, Any]] = []
        aside: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for row, problem in pool.map(self._row, unit["items"]):
                if row is not None:
                    rows.append(row)
                if problem is not None:
                    aside.append(problem)
        stats = {
            "records": len(rows),
            "examples": sum(len(row["examples"]) for row in rows),
            "set_aside": dict(sorted(Counter(p["reason"] for p in aside).items())),
        }
        return PartOutput(pa.Table.from_pylist(rows, SCHEMA), aside, stats)

    def _row(self, item: dict[str, Any]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        if "reason" in item:
            return None, {"id": item["where"], "reason": item["reason"], "detail": item["detail"]}
        images = []
        for path in item["images"]:
            image = self._image(path)
            if isinstance(image, Rejected):
                detail = f"{path}: {image.detail}"
                return None, {"id": item["id"], "reason": image.reason, "detail": detail}
            images.append({"bytes": image, "path": path})
        examples = [{**e, "target": json.dumps(e["target"])} for e in item["examples"]]
        return {"id": item["id"], "images": images, "examples": examples}, None

    def _image(self, path: str) -> bytes | Rejected:
        try:
            data = self.folder.read(path)
        except FileNotFoundError:
            return Rejected("missing image")
        except OSError as error:
            return Rejected("unreadable image", str(error)[:200])
        image = clean_image(data, self.policy)
        return image if isinstance(image, Rejected) else image.data


def main() -> None:
    chosen = cli(PRESETS, description=__doc__ or "")
    try:
        run(chosen)
    except (FileNotFoundError, StoreError, ValueError) as error:
        stop(str(error))


if __name__ == "__main__":
    main()
