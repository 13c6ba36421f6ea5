"""Ingestion: published URL lists, image archives and text files -> `images/<name>`, `text/<name>`.

    python pipelines/ingest.py --source cc3m --annotations /data/cc3m --store s3://bucket/beit3

Pairs: the records are dealt, in published order, into shards of URLs; each shard is one task, on
any node of the cluster. It downloads with img2dataset into a temporary folder of that node, cleans
the images (`pipelines.images`), and writes one part to the store. A URL that fails is a row set
aside with a reason; it fails nothing else. Archives and text files: one task per file, so a corpus
in one huge file uses one core.

The dataset `images/<name>` has the columns of `IMAGE_SCHEMA`, `text/<name>` of `TEXT_SCHEMA`; rows
set aside have `id`, `url`, `reason`, `detail`, and the `stage` that refused them. Pictures that a
dataset of `held_out` has too, at whatever size and quality, are set aside (`pipelines.leaks`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import cluster, console, leaks, sources
from pipelines.config import cli, stop, to_dict
from pipelines.fetch import FetchPolicy, fetch_images, refuse
from pipelines.images import CleanImage, ImagePolicy, Rejected, clean_image
from pipelines.parts import PartOutput, Resources, make_dataset
from pipelines.sources import HeldOut, ImageItem, ImageRecord, Malformed
from pipelines.storage import ROW_GROUP_ROWS, Commit, Dataset, Store, StoreError, fingerprint

T = TypeVar("T")

IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),  # as Hugging Face's
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("url", pa.string()),
        ("sha256", pa.string()),  # of the stored bytes
        ("source", pa.string()),
    ]
)
TEXT_SCHEMA = pa.schema([("id", pa.string()), ("text", pa.string()), ("source", pa.string())])
_URL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("url", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("reason", pa.string()),  # set where the annotation itself is set aside
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True)
class IngestConfig:
    """What to ingest, from where, and what to keep of it."""

    source: str = "cc3m"
    """A module of pipelines/sources: cc3m, cc12m, sbu, coco, vg, imagenet21k, text_files."""
    annotations: str = "annotations"
    """Folder of the source's published files: a local path or a URI."""
    store: str = "store"
    """URI or path of the store."""
    name: str | None = None
    """The dataset's name, below images/ or text/; by default the source's."""
    limit: int | None = None
    """Take only the first so many records (of each file, for archives and texts)."""
    dry_run: bool = False
    """Read the annotations, say what would be fetched, and fetch nothing."""

    processes: int = 0
    """Shards at once, over the whole cluster; 0: one for each CPU."""
    threads: int = 64
    """Downloads at once in each process."""
    timeout: float = 10.0
    """Seconds of silence after which a download fails."""
    max_seconds: float = 60.0
    """Seconds after which a download fails though it still trickles."""
    max_megabytes: int = 64
    """Megabytes (2**20 bytes) above which a download fails."""
    retries: int = 1
    """Further tries for a URL that failed."""
    user_agent_token: str = "beit3-ray"
    """Names this crawler in the User-Agent header and in the sites' X-Robots-Tag."""
    respect_robots: bool = True
    """Leave out images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex."""
    allow_loopback: bool = False
    """Fetch from this machine too (for trials); private networks are never fetched from."""

    shard_size: int = 10_000
    """Records in one part: one task's work, and one Parquet file."""
    short_side: int = 288
    """Larger images are shrunk so that their shorter side has so many pixels."""
    min_side: int = 32
    """Images whose shorter side has fewer pixels are set aside."""
    max_aspect: float = 10.0
    """Images whose longer side is more than so many times the shorter are set aside."""
    max_pixels: int = 100_000_000
    """Images with more pixels, by their header, are never decoded."""
    max_captions: int = 50
    """Captions kept of one image, the first ones."""
    coco_split: Path | None = None
    """Karpathy's dataset_coco.json; by default in the annotations' folder or in ../coco."""
    held_out: tuple[str, ...] = ()
    """Datasets of the store, such as tasks/vqa/test, whose pictures must never be kept."""
    document_chars: int = 4_000
    """Plain text files are cut at paragraphs into documents of about so many characters."""

    def __post_init__(self) -> None:
        if self.source not in sources.names():
            raise ValueError(f"source: {self.source!r} is none of {', '.join(sources.names())}")
        at_least_one = ("threads", "max_megabytes", "shard_size", "short_side", "max_pixels")
        for field in (*at_least_one, "max_captions", "document_chars"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        for field in ("processes", "retries", "min_side"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: must not be negative, but is {getattr(self, field)}")
        if self.timeout <= 0 or self.max_seconds <= 0 or self.max_aspect < 1:
            raise ValueError("timeout and max_seconds must be above 0, max_aspect at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: must be at least 1, not {self.limit}")
        if self.name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.name):
            raise ValueError(f"name: {self.name!r} is not a name of letters, digits, '_', '-', '.'")

    @property
    def dataset(self) -> str:
        """The dataset's full name."""
        folder = "text" if sources.load(self.source).KIND == "text" else "images"
        return f"{folder}/{self.name or self.source}"

    @property
    def policy(self) -> ImagePolicy:
        return ImagePolicy(self.short_side, self.min_side, self.max_aspect, self.max_pixels)

    @property
    def fetch(self) -> FetchPolicy:
        return FetchPolicy(
            threads=self.threads,
            timeout=self.timeout,
            max_seconds=self.max_seconds,
            max_megabytes=self.max_megabytes,
            retries=self.retries,
            user_agent_token=self.user_agent_token,
            respect_robots=self.respect_robots,
            allow_loopback=self.allow_loopback,
        )

    @property
    def options(self) -> sources.Options:
        return sources.Options(self.max_captions, self.coco_split, self.document_chars)


_DECIDES_OUTPUT = ("source", "limit", "respect_robots", "allow_loopback", "shard_size")
_DECIDES_OUTPUT += ("short_side", "min_side", "max_aspect", "max_pixels", "max_captions")
_DECIDES_OUTPUT += ("document_chars",)

PRESETS: dict[str, IngestConfig] = {
    "web": IngestConfig(),
    "gentle": IngestConfig(threads=16, retries=0),
    "trial": IngestConfig(threads=16, retries=0, timeout=3.0, limit=1_000, shard_size=250),
}


def run(config: IngestConfig) -> Commit:
    """Make the dataset, or find it made already.

    Raises:
        FileNotFoundError: an annotation file is missing.
        StoreError: the store can't be written, or the name is taken by another dataset.
        ValueError: an annotation file is not what it should be; or `dry_run` is set.
    """
    if config.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    source = sources.load(config.source)
    store = Store(config.store)
    store.check_writable()
    dataset = store.dataset(config.dataset)
    held_out = () if source.KIND == "text" else tuple(leaks.sources(store, config.held_out))
    if source.KIND == "pairs":
        with _local(config.annotations) as root:
            inputs = [_describe_local(f, root) for f in source.files(root, config.options)]
            mark = _fingerprint(config, inputs, held_out)
            items = partial(_items, source, root, config)
            units = partial(_url_shards, dataset, mark, items, config.shard_size)
            worker = _PairWorker(config, store, held_out)
            commit = _make(config, dataset, mark, inputs, units, worker)
    else:
        files, inputs = _unit_files(config, source)
        mark = _fingerprint(config, inputs, held_out)
        listed = [{"name": f"{i:05d}", "file": file} for i, file in enumerate(files)]
        worker = _FileWorker(config, config.name or config.source, held_out)
        commit = _make(config, dataset, mark, inputs, lambda: listed, worker)
    _report(commit)
    return commit


def plan(config: IngestConfig) -> dict[str, Any]:
    """What a run would read and fetch: counts of records, images, captions; nothing is fetched."""
    source = sources.load(config.source)
    if source.KIND != "pairs":
        files, inputs = _unit_files(config, source)
        return {"files": len(files), "bytes": sum(i["bytes"] for i in inputs)}
    images = captions = 0
    aside: Counter[str] = Counter()
    with _local(config.annotations) as root:
        for item in _items(source, root, config):
            if isinstance(item, ImageRecord):
                refused = refuse(item.url or "", allow_loopback=config.allow_loopback)
                if refused is None:
                    images, captions = images + 1, captions + len(item.captions)
                else:
                    aside[refused.reason] += 1
            else:
                aside[item.reason] += 1
    # About what the alt-text lists yield: 150 kB a file on the web, 25 kB with a side of 288.
    stored = round(images * 25_000 * (config.short_side / 288) ** 2)
    return {
        "images": images,
        "captions": captions,
        "set_aside": dict(aside),
        "shards": -(-(images + aside.total()) // config.shard_size),
        "bytes_to_fetch": images * 150_000,
        "bytes_to_store": stored,
    }


def _make(
    config: IngestConfig,
    dataset: Dataset,
    mark: str,
    inputs: list[dict[str, Any]],
    units: Callable[[], Sequence[dict[str, Any]]],
    worker: _PairWorker | _FileWorker,
) -> Commit:
    text = dataset.name.startswith("text/")

    def start_and_list() -> Sequence[dict[str, Any]]:
        listed = units()  # first: bad annotations should be said before a cluster starts
        leaks.prepare(dataset.store, worker.held_out)
        cluster.start()
        return listed

    return make_dataset(
        dataset,
        job="ingest",
        fingerprint=mark,
        config=to_dict(config),
        inputs=inputs + [{"dataset": s.dataset, "commit": s.commit} for s in worker.held_out],
        units=start_and_list,
        make_worker=partial(_same, worker),
        schema=TEXT_SCHEMA if text else IMAGE_SCHEMA,
        resources=Resources(actors=config.processes),
    )


def _same(worker: T) -> T:
    return worker


def _report(commit: Commit) -> None:
    stats = commit.stats
    aside = sorted(stats.get("set_aside", {}).items(), key=lambda pair: (-pair[1], pair[0]))
    reasons = "; ".join(f"{reason}: {count:,}" for reason, count in aside)
    console.say(
        f"{commit.dataset}: {commit.rows:,} of {stats.get('read', 0):,} records"
        + (f"; set aside: {reasons}" if reasons else "")
    )


def _fingerprint(
    config: IngestConfig, inputs: Iterable[dict[str, Any]], held_out: Sequence[leaks.Source]
) -> str:
    decides = {name: getattr(config, name) for name in _DECIDES_OUTPUT}
    if sources.load(config.source).KIND == "text":
        decides["name"] = config.name or config.source  # it is in the ids
    if held_out:
        decides["held_out"] = sorted([s.dataset, s.commit] for s in held_out)
    return fingerprint(
        "ingest", decides, [f"{i['file']}:{i.get('sha256', i['bytes'])}" for i in inputs]
    )


# -- inputs ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _local(annotations: str) -> Iterator[Path]:
    """The annotations' folder on this machine; one at another URI is copied for the while."""
    if "://" not in annotations:
        yield Path(annotations)
        return
    remote = Store(annotations)
    with tempfile.TemporaryDirectory(prefix="beit3-annotations-") as folder:
        pafs.copy_files(remote.root, folder, source_filesystem=remote.fs)
        yield Path(folder)


def _describe_local(file: Path, root: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    return {"file": name, "sha256": digest, "bytes": file.stat().st_size}


def _unit_files(config: IngestConfig, source: ModuleType) -> tuple[list[str], list[dict[str, Any]]]:
    """The archives or text files below the annotations' folder, and their description.

    Texts are described by checksum; archives, terabytes of them, by name and size.
    """
    folder = Store(config.annotations)
    names = folder.list("", recursive=True)
    names = [n for n in names if any(fnmatch(Path(n).name, pattern) for pattern in source.UNITS)]
    if not names:
        raise FileNotFoundError(
            f"{config.annotations}: no {' or '.join(source.UNITS)} there. "
            f"Get them from {source.ORIGIN}"
        )
    inputs = []
    for name in names:
        info = folder.fs.get_file_info(folder.path(name))
        described: dict[str, Any] = {"file": name, "bytes": info.size}
        if source.KIND == "text":
            digest = hashlib.sha256()
            with folder.fs.open_input_stream(folder.path(name)) as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
            described["sha256"] = digest.hexdigest()
        inputs.append(described)
    return names, inputs


def _items(source: ModuleType, root: Path, config: IngestConfig) -> Iterator[ImageItem]:
    return islice(source.read(root, config.options), config.limit)


def _url_shards(
    dataset: Dataset, mark: str, items: Callable[[], Iterator[ImageItem]], size: int
) -> list[dict[str, Any]]:
    """Write the records, good and bad, to the store as shards of URLs, unless they are there."""
    store, folder = dataset.store, f"{dataset.name}/data-{mark[:8]}"
    index = f"{folder}/_urls.json"
    if not store.exists(index):
        count = 0
        for rows in _chunks((_url_row(item) for item in items()), size):
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows, _URL_SCHEMA), sink, compression="zstd")
            store.write(f"{folder}/_urls-{count:05d}.parquet", sink.getvalue().to_pybytes())
            count += 1
        store.write_json(index, {"shards": count})
    count = store.read_json(index)["shards"]
    return [{"name": f"{i:05d}", "urls": f"{folder}/_urls-{i:05d}.parquet"} for i in range(count)]


def _url_row(item: ImageItem) -> dict[str, Any]:
    if isinstance(item, Malformed):
        return {"id": item.where, "url": item.url, "reason": item.reason, "detail": item.detail}
    record = item.record if isinstance(item, HeldOut) else item
    row = {"id": record.id, "url": record.url, "captions": record.captions}
    return row | {"reason": item.reason, "detail": ""} if isinstance(item, HeldOut) else row


def _chunks(rows: Iterable[T], size: int) -> Iterator[list[T]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


# -- workers --------------------------------------------------------------------------------------


class _Part:
    """Gathers one part: rows go into record batches as they come, so that none grows too large."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows: list[dict[str, Any]] = []
        self.batches: list[pa.RecordBatch] = []
        self.aside: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()

    def add(self, row: dict[str, Any], **counts: int) -> None:
        self.counts.update(rows=1, **counts)
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP_ROWS:
            self._flush()

    def set_aside(self, id: str, url: str | None, reason: str, detail: str, stage: str) -> None:
        row = {"id": id, "url": url or "", "reason": reason, "detail": detail, "stage": stage}
        # Details quote what servers and files said, which may not even be text.
        self.aside.append({k: v.encode(errors="replace").decode() for k, v in row.items()})

    def output(self) -> PartOutput:
        self._flush()
        stats: dict[str, Any] = dict.fromkeys(("rows", "images", "captions", "bytes"), 0)
        stats |= self.counts
        stats["read"] = len(self.aside) + self.counts["rows"]
        stats["set_aside"] = dict(sorted(Counter(r["reason"] for r in self.aside).items()))
        stats["stages"] = dict(sorted(Counter(r["stage"] for r in self.aside).items()))
        return PartOutput(pa.Table.from_batches(self.batches, self.schema), self.aside, stats)

    def _flush(self) -> None:
        if self.rows:
            self.batches.append(pa.RecordBatch.from_pylist(self.rows, self.schema))
            self.rows = []

    def add_image(
        self, record: ImageRecord, image: CleanImage, source: str, pictures: leaks.HeldOutPictures
    ) -> None:
        """Add a row, or set it aside if its picture is a held-out one."""
        same = pictures.find(image.data)
        if same:
            reason = f"held out: same picture as {same.dataset}"
            detail = f"{same.id}: {same.bits} bits and {same.colour} levels of colour differ"
            self.set_aside(record.id, record.url, reason, detail, "filter")
            return
        row = {
            "id": record.id,
            "image": {"bytes": image.data, "path": f"{record.id.replace('/', '-')}.jpg"},
            "width": image.width,
            "height": image.height,
            "captions": record.captions,
            "url": record.url,
            "sha256": image.sha256,
            "source": source,
        }
        self.add(row, images=1, captions=len(record.captions), bytes=len(image.data))


@dataclass(frozen=True)
class _PairWorker:
    """A shard of URLs -> its images, in the shard's order whatever order they arrived in."""

    config: IngestConfig
    store: Store
    held_out: tuple[leaks.Source, ...] = ()

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        rows = pq.read_table(io.BytesIO(self.store.read(unit["urls"]))).to_pylist()
        uses = Counter(r["url"] for r in rows if r["reason"] is None)
        outcomes = fetch_images(uses, self.config.fetch, self.config.policy)
        pictures = leaks.load(self.store.uri, self.held_out)
        part = _Part(IMAGE_SCHEMA)
        for row in rows:
            if row["reason"] is not None:
                part.set_aside(row["id"], row["url"], row["reason"], row["detail"], "annotations")
                continue
            uses[row["url"]] -= 1  # images leave memory as the part takes them in
            image = outcomes[row["url"]] if uses[row["url"]] else outcomes.pop(row["url"])
            if isinstance(image, Rejected):
                part.set_aside(row["id"], row["url"], image.reason, image.detail, image.stage)
            else:
                record = ImageRecord(row["id"], row["url"], row["captions"])
                part.add_image(record, image, self.config.source, pictures)
        return part.output()


@dataclass(frozen=True)
class _FileWorker:
    """An archive of images, or a file of text, -> its records in its order."""

    config: IngestConfig
    name: str
    held_out: tuple[leaks.Source, ...] = ()

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        config = self.config
        source = sources.load(config.source)
        folder = Store(config.annotations)
        pictures = leaks.load(Store(config.store).uri, self.held_out)
        part = _Part(TEXT_SCHEMA if source.KIND == "text" else IMAGE_SCHEMA)
        with folder.fs.open_input_file(folder.path(unit["file"])) as native:
            stream = io.BufferedReader(cast(io.RawIOBase, native), 1 << 20)
            for item in islice(
                source.read_file(stream, unit["file"], config.options), config.limit
            ):
                if isinstance(item, Malformed):
                    part.set_aside(item.where, "", item.reason, item.detail, "annotations")
                elif isinstance(item, ImageRecord):
                    image = clean_image(item.data or b"", config.policy)
                    if isinstance(image, Rejected):
                        part.set_aside(item.id, "", image.reason, image.detail, image.stage)
                    else:
                        part.add_image(item, image, config.source, pictures)
                else:
                    row = {"id": f"{self.name}/{item.id}", "text": item.text, "source": self.name}
                    part.add(row, bytes=len(item.text.encode()))
        return part.output()


def main() -> None:
    config = cli(PRESETS, description="Ingest a published dataset into the store.")
    try:
        if config.dry_run:
            for key, value in plan(config).items():
                console.say(f"{key}: {value:,}" if isinstance(value, int) else f"{key}: {value}")
        else:
            run(config)
    except (FileNotFoundError, StoreError, ValueError) as error:
        stop(str(error))


if __name__ == "__main__":
    main()
