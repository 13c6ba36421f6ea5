"""Ingestion: published URL lists, image archives and text files -> `images/<name>`, `text/<name>`.

    python pipelines/ingest.py --source cc3m --annotations /data/cc3m --store s3://bucket/beit3

Pairs: the records are dealt, in published order, into shards of URLs; each shard is one task, on
any node of the cluster. It downloads with img2dataset into a temporary folder of that node, cleans
the images (`pipelines.images`), and writes one part to the store. A URL that fails is a row set
aside with a reason; it fails nothing else. Archives and text files: one task per file, so a corpus
in one huge file uses one core.

The dataset `images/<name>` has the columns of `IMAGE_SCHEMA`, `text/<name>` those of `TEXT_SCHEMA`;
rows set aside have `id`, `url`, `reason`, `detail`, and the `stage` that refused them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import ipaddress
import os
import re
import socket
import ssl
import string
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import cluster, console, sources
from pipelines.config import cli, stop, to_dict
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
    if source.KIND == "pairs":
        with _local(config.annotations) as root:
            inputs = [_describe_local(f, root) for f in source.files(root, config.options)]
            mark = _fingerprint(config, inputs)
            items = partial(_items, source, root, config)
            units = partial(_url_shards, dataset, mark, items, config.shard_size)
            commit = _make(config, dataset, mark, inputs, units, _PairWorker(config, store))
    else:
        files, inputs = _unit_files(config, source)
        mark = _fingerprint(config, inputs)
        listed = [{"name": f"{i:05d}", "file": file} for i, file in enumerate(files)]
        worker = _FileWorker(config, config.name or config.source)
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
        cluster.start()
        return listed

    return make_dataset(
        dataset,
        job="ingest",
        fingerprint=mark,
        config=to_dict(config),
        inputs=inputs,
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


def _fingerprint(config: IngestConfig, inputs: Iterable[dict[str, Any]]) -> str:
    decides = {name: getattr(config, name) for name in _DECIDES_OUTPUT}
    if sources.load(config.source).KIND == "text":
        decides["name"] = config.name or config.source  # it is in the ids
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

    def add_image(self, record: ImageRecord, image: CleanImage, source: str) -> None:
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

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        rows = pq.read_table(io.BytesIO(self.store.read(unit["urls"]))).to_pylist()
        uses = Counter(r["url"] for r in rows if r["reason"] is None)
        outcomes = fetch_images(uses, self.config)
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
                part.add_image(record, image, self.config.source)
        return part.output()


@dataclass(frozen=True)
class _FileWorker:
    """An archive of images, or a file of text, -> its records in its order."""

    config: IngestConfig
    name: str

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        config = self.config
        source = sources.load(config.source)
        folder = Store(config.annotations)
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
                        part.add_image(item, image, config.source)
                else:
                    row = {"id": f"{self.name}/{item.id}", "text": item.text, "source": self.name}
                    part.add(row, bytes=len(item.text.encode()))
        return part.output()


# -- the web --------------------------------------------------------------------------------------

_UNREACHED = ("connection failed", "host not found", "timed out")
_MANY = 50
_ROBOTS = ["noai", "noimageai", "noindex", "noimageindex"]
_REASONS = (  # the first that matches what the downloader said
    (r"X-Robots-Tag", "robots: disallowed"),
    (r"redirect: (private address|unsupported scheme|bad url)", "{}"),
    (r"Redirection to url .* is not allowed", "unsupported scheme"),
    (r"too large: ", "too large"),
    (r"redirect error", "redirect loop"),
    (r"HTTP Error (\d{3})", "http {}"),
    (r"timed out|too slow: ", "timed out"),
    (r"getaddrinfo|Name or service|No address associated|name resolution", "host not found"),
    (r"SSL|certificate", "tls failed"),
    (r"IncompleteRead", "incomplete download"),
    (r"Connection|unreachable|closed connection|No route|Errno|BadStatusLine", "connection failed"),
    (r"URL|url|port|codec|label", "bad url"),
)


def fetch_images(urls: Iterable[str], config: IngestConfig) -> dict[str, CleanImage | Rejected]:
    """Download and clean images; every URL, each fetched once, gets an image or a reason.

    Raises:
        ConnectionError: of many URLs not one host answered, so that it must be our network.
    """
    outcomes: dict[str, CleanImage | Rejected] = {}
    wanted: list[str] = []
    for url in dict.fromkeys(urls):
        refused = refuse(url, allow_loopback=config.allow_loopback)
        if refused:
            outcomes[url] = refused
        else:
            wanted.append(url)
    lost = Rejected("download failed", "the downloader lost it", "download")
    fetched: dict[str, CleanImage | Rejected] = dict.fromkeys(wanted, lost)
    for index, data, error in _download([_wire_url(url) for url in wanted], config):
        if data is None:
            fetched[wanted[index]] = Rejected(failure_reason(error), error[:200], "download")
        else:
            fetched[wanted[index]] = clean_image(data, config.policy)
    if len(fetched) >= _MANY and all(
        isinstance(r, Rejected) and r.reason in _UNREACHED for r in fetched.values()
    ):
        raise ConnectionError(
            f"not one of {len(fetched)} URLs could be reached: is the network up?"
        )
    return outcomes | fetched


def refuse(url: str, *, allow_loopback: bool = False) -> Rejected | None:
    """Why a URL must not be fetched: its scheme, or a host on this machine or a private network.

    Looks at the URL only: a public name may still resolve to a private address.
    """
    try:
        parts = urlsplit(_wire_url(url))
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:  # UnicodeError, of a host name, is one
        return Rejected("bad url", str(error)[:200], "annotations")
    if parts.scheme not in ("http", "https"):
        return Rejected("unsupported scheme", parts.scheme, "annotations")
    if not host:
        return Rejected("bad url", "no host", "annotations")
    address = _literal(host)
    if host == "localhost" or host.endswith(".localhost") or (address and address.is_loopback):
        return None if allow_loopback else Rejected("private address", host, "annotations")
    if address and not address.is_global:
        return Rejected("private address", host, "annotations")
    return None


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:  # the old spellings that resolvers take too: 127.1, 2130706433, 0x7f000001
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def _wire_url(url: str) -> str:
    """The URL as HTTP wants it: international names and letters encoded, the rest untouched."""
    if url.isascii() and url.isprintable() and " " not in url:
        return url
    scheme, slashes, rest = url.partition("://")
    netloc, slash, path = rest.partition("/")
    if not netloc.isascii():
        netloc = netloc.encode("idna").decode()
    return f"{scheme}{slashes}{netloc}{slash}{quote(path, safe=string.punctuation)}"


def failure_reason(error: str) -> str:
    """One of few stable reasons for what the downloader said."""
    for pattern, reason in _REASONS:
        found = re.search(pattern, error)
        if found:
            return reason.format(*found.groups())
    return "download failed"


def _download(urls: Sequence[str], config: IngestConfig) -> Iterator[tuple[int, bytes | None, str]]:
    """Download with img2dataset; yields, in any order, index, bytes or None, what went wrong."""
    if not urls:
        return
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Here, because these imports take seconds: once in each worker process.
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    with tempfile.TemporaryDirectory(prefix="beit3-ingest-") as folder:
        shard = Path(folder, "urls.arrow")
        table = pa.table({"url": pa.array(urls, pa.string())})
        with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        downloader = Downloader(
            sample_writer_class=ParquetSampleWriter,
            resizer=Resizer(
                image_size=config.short_side,
                resize_mode="no",
                resize_only_if_bigger=False,
                disable_all_reencoding=True,  # the bytes as they came: clean_image decides
            ),
            thread_count=min(config.threads, len(urls)),
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=config.timeout,
            number_sample_per_shard=len(urls),
            oom_shard_count=1,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=config.retries,
            user_agent_token=config.user_agent_token,
            disallowed_header_directives=_ROBOTS if config.respect_robots else None,
        )
        urllib.request.install_opener(_opener(config))
        try:
            downloader.download_shard((0, str(shard)))
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]  # the default again
        with pq.ParquetFile(Path(folder, "0.parquet")) as file:
            columns = ["key", "status", "error_message", "jpg"]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    good = row["status"] == "success"
                    yield int(row["key"]), row["jpg"] if good else None, row["error_message"] or ""


def _opener(config: IngestConfig) -> urllib.request.OpenerDirector:
    """What img2dataset opens URLs with: redirects are checked as URLs are, and bodies bounded."""
    # One TLS context for all: making one reads the whole list of authorities.
    secure = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    bounded = _Bounded(config.max_megabytes << 20, config.max_seconds)
    return urllib.request.build_opener(secure, _Redirects(config.allow_loopback), bounded)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_loopback: bool) -> None:
        self.allow_loopback = allow_loopback

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        refused = refuse(newurl, allow_loopback=self.allow_loopback)
        if refused:
            raise urllib.error.URLError(f"redirect: {refused.reason}: {refused.detail}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Bounded(urllib.request.BaseHandler):
    """Ends a body that is too large, or too slow as a whole: a timeout only ends silence."""

    def __init__(self, most_bytes: int, most_seconds: float) -> None:
        self.most_bytes, self.most_seconds = most_bytes, most_seconds

    def http_response(self, request: Any, response: Any) -> Any:
        deadline = time.monotonic() + self.most_seconds

        def read() -> bytes:
            body = bytearray()
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > self.most_bytes:
                    raise urllib.error.URLError(f"too large: over {self.most_bytes} bytes")
                if time.monotonic() > deadline:
                    raise urllib.error.URLError(f"too slow: over {self.most_seconds} s")
            if response.length:  # what Content-Length promised and did not come
                raise urllib.error.URLError(f"IncompleteRead: {response.length} bytes are missing")
            return bytes(body)

        response.read = read
        return response

    https_response = http_response


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
