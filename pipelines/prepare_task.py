"""Downstream data: a task's published files and images -> `tasks/<name>/<split>`.

    python pipelines/prepare_task.py --task vqa --annotations /data/vqa --images /data/coco
    python pipelines/prepare_task.py --preset flickr30k --annotations /data --images /data/flickr30k

A row is one record: its image or images, as stored (upright RGB JPEG, no larger than needed), and
every example about them. Records keep the published order. A record whose image is missing or
broken is set aside with its reason and its examples, which an evaluation counts as wrong; no other
record is affected. The commit's statistics count records, examples and set-aside records, and for
the training split hold the answer vocabulary (`labels`) of tasks that have one.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from beit3 import tasks
from beit3.tasks import Problem, Record
from pipelines import cluster, console, job
from pipelines.config import to_dict
from pipelines.dataset import Commit
from pipelines.images import ImagePolicy, Rejected, clean_image
from pipelines.lineage import fingerprint
from pipelines.parts import PartOutput, make_dataset
from pipelines.storage import Store, local_folder
from pipelines.task_data import SCHEMA

_READS_AT_ONCE = 8
_LOOKED_FOR = 20  # images, before any is read


@dataclass(frozen=True)
class PrepareConfig:
    """Prepare a task's data."""

    task: str = "vqa"
    """A module of beit3/tasks, such as vqa."""
    annotations: str = "annotations"
    """Folder of the task's published files (for captioning and retrieval also one dataset_*.json):
    path or URI."""
    images: str = "images"
    """Folder of the images, with train2014, val2014, ... below it for COCO: path or URI."""
    store: str = "store"
    """URI or path of the store."""
    name: str = ""
    """The datasets become tasks/<name>/<split>; by default the task's name."""
    splits: tuple[str, ...] = ()
    """Which of the published splits to prepare; empty: all that have answers."""
    dataset: str = ""
    """Captioning and retrieval: which of Karpathy's files to read, coco or flickr30k; empty: the
    only one there is."""
    limit: int | None = None
    """Take only this many records of each split, the first ones."""
    min_answer_count: int = 9
    """Answers given less often in the training split are not classes of the head."""
    short_side: int = 512
    """Larger images are shrunk so that their shorter side has this many pixels."""
    part_records: int = 1000
    """Records in one part: one task's work, and one Parquet file."""
    in_process: bool = False
    """Work in the job's own process instead of on Ray: for small data."""

    def __post_init__(self) -> None:
        for field in ("min_answer_count", "short_side", "part_records"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        there = tasks.load(self.task).about.collections
        if self.dataset and self.dataset not in there:
            known = f"expected one of {', '.join(there)}" if there else f"{self.task} has only one"
            raise ValueError(f"dataset: {known}, not {self.dataset!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: must be at least 1, not {self.limit}")
        if not re.fullmatch(r"[\w.-]*", self.name):
            raise ValueError(f"name: {self.name!r} is not a name of letters, digits, '_', '-', '.'")

    @property
    def chosen(self) -> tuple[str, ...]:
        return self.splits or tasks.load(self.task).about.splits

    def output(self, split: str) -> str:
        return f"tasks/{self.name or self.task}/{split}"

    def source(self, root: Path) -> Path:
        """The path that the task reads within the folder of annotations."""
        return root / tasks.load(self.task).about.collections.get(self.dataset, "")


_DEFAULT = PrepareConfig()
PRESETS: dict[str, PrepareConfig] = {
    _DEFAULT.task: _DEFAULT,
    **{name: PrepareConfig(task=name) for name in tasks.names()},
    "flickr30k": PrepareConfig(task="retrieval", dataset="flickr30k", name="flickr30k"),
}


def run(config: PrepareConfig) -> dict[str, Commit]:
    """Make the datasets, unless they exist already; returns the commits by split.

    Raises:
        FileNotFoundError: a published file or every image is missing.
        StoreError: the store can't be written, or a name is taken by another dataset.
        ValueError: a split is unknown, or a file is malformed.
    """
    store = Store(config.store)
    store.check_writable()
    with local_folder(config.annotations) as root:
        return {split: _prepare(config, store, root, split) for split in config.chosen}


def _prepare(config: PrepareConfig, store: Store, root: Path, split: str) -> Commit:
    task, source = tasks.load(config.task), config.source(root)
    try:
        packed, digest = pack(islice(task.read(source, split), config.limit), config.part_records)
    except ValueError as error:
        raise ValueError(f"{config.task}, {split}: {error}") from error
    extra: dict[str, Any] = {}
    if split == "train":
        found = task.read_labels(source, config.min_answer_count)
        extra = {"labels": found} if found else {}
    decides = [config.task, split, config.short_side, config.part_records, extra]
    commit = make_dataset(
        store.dataset(config.output(split)),
        job="prepare_task",
        fingerprint=fingerprint("prepare_task", decides, [digest]),
        config=to_dict(config),
        inputs=[{"file": config.annotations, "split": split, "sha256_of_records": digest}],
        units=partial(_units, packed, config),
        make_worker=partial(_ImageWorker, config.images, config.short_side),
        schema=SCHEMA,
        here=config.in_process,
        extra_stats=extra,
    )
    _report(commit)
    return commit


def pack(items: Iterable[Record | Problem], size: int) -> tuple[list[str], str]:
    """Records and problems, compressed `size` at a time, and the SHA-256 of all of them.

    This way a million take only megabytes, in this process and on their way to the workers.

    Raises:
        ValueError: there is no record among the items.
    """
    remaining = iter(items)
    parts: list[str] = []
    digest = hashlib.sha256(b"[")
    records, first = 0, None
    while chunk := list(islice(remaining, size)):
        text = ", ".join(json.dumps(asdict(item), sort_keys=True) for item in chunk)
        digest.update((", " if parts else "").encode() + text.encode())
        parts.append(base64.b64encode(zlib.compress(f"[{text}]".encode())).decode())
        problems = [item for item in chunk if isinstance(item, Problem)]
        records += len(chunk) - len(problems)
        first = first or next(iter(problems), None)
    digest.update(b"]")
    if not records:
        why = f"; the first: {first.reason}, {first.detail} ({first.where})" if first else ""
        raise ValueError(f"not a single good record in the published files{why}")
    return parts, digest.hexdigest()


def unpack(part: str) -> list[dict[str, Any]]:
    """The items that `pack` compressed into a part, as dicts."""
    return json.loads(zlib.decompress(base64.b64decode(part)))


def _units(packed: list[str], config: PrepareConfig) -> list[dict[str, Any]]:
    _check_images(config, unpack(packed[0]))
    if not config.in_process:
        cluster.start()
    return [{"name": f"{i:05d}", "items": part} for i, part in enumerate(packed)]


def _check_images(config: PrepareConfig, items: list[dict[str, Any]]) -> None:
    """Check that one of the first images exists: in a wrong folder, all would count as missing."""
    folder = Store(config.images)
    paths = [item["images"][0] for item in items if "images" in item][:_LOOKED_FOR]
    if paths and not any(folder.exists(path) for path in paths):
        raise FileNotFoundError(
            f"images: none of the first {len(paths)} is in {config.images}, such as {paths[0]}"
        )


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
        # All of a benchmark's images are needed, however small or narrow.
        self.policy = ImagePolicy(short_side, 1, 1e9, downscale="lanczos")

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        rows: list[dict[str, Any]] = []
        aside: list[dict[str, Any]] = []
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            for row, problem in pool.map(self._row, unpack(unit["items"])):
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
            problem = {"id": item["where"], "reason": item["reason"], "detail": item["detail"]}
            return None, {**problem, "examples": None}
        images = []
        for path in item["images"]:
            image = self._image(path)
            if isinstance(image, Rejected):
                detail, lost = f"{path}: {image.detail}", json.dumps(item["examples"])
                problem = {"id": item["id"], "reason": image.reason, "detail": detail}
                return None, {**problem, "examples": lost}
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
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
