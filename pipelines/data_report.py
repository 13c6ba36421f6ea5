"""Reports on a dataset: what was kept, why the rest was not, and its sizes, captions and samples.

    python pipelines/data_report.py --store store --dataset images/cc3m

writes `reports/<dataset>/<version>/report.html` and `stats.json` to the store, where the version is
the commit's identity, with a number after it if earlier commits have the same files and other
set-aside rows, and logs both to MLflow with the main numbers. It reads the committed and
set-aside files once, one file per task; the files' counts are summed, so memory doesn't grow with
the dataset. An existing report is not made again.

The same commit gives the same report, samples included, whichever task reads which file.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import posixpath
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines import cluster, console, job, run_logger, sources, tracking
from pipelines.data_report_page import Shown, render
from pipelines.dataset import Commit, Dataset
from pipelines.parts import each
from pipelines.records import SURE, detect
from pipelines.report_content import Sample
from pipelines.storage import Store, StoreError

TOP_DOMAINS = 20
MOST_DOMAINS = 50_000
"""Domains counted at a time; above it, the rarest are dropped, and the report says how many rows
they had."""

_BATCH = 256
_MOST_WORDS, _MOST_CHARACTERS = 1_000, 10_000  # longer captions are counted at these lengths
_TEXT_CHARS = 600  # shown of a sample
UNSURE = "not sure"
"""For texts whose language is less certain than the filter demands; mostly short ones."""
_NOT_THE_DOMAINS = ("annotations", "filter", "duplicates")  # stages where the domain isn't at fault
_CAPTION = "caption"  # the stage of rows about a single caption of a kept record
_HELD_OUT = re.compile(r"held out: (?:same picture as )?(.*)", re.DOTALL)
_HTTP = re.compile(r"http (\d{3})")


@dataclass(frozen=True)
class DataReportConfig:
    """The dataset to report on, and where the report goes."""

    store: str = "store"
    """URI or path of the store."""
    dataset: str = "images/cc3m"
    """The dataset's full name."""
    samples: int = 24
    """Rows shown, drawn at random: always the same ones for a commit."""
    track: bool = True
    """Log the report to MLflow, too."""

    def __post_init__(self) -> None:
        if self.samples < 0:
            raise ValueError(f"samples: must not be negative, but is {self.samples}")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.dataset):
            raise ValueError(f"dataset: {self.dataset!r} is not a dataset's name")


PRESETS = {"default": DataReportConfig()}


def run(config: DataReportConfig, *, here: bool = False) -> str:
    """Write the report of a dataset's commit unless it exists; returns its folder in the store.

    `here` reads all files in this process, without Ray.

    Raises:
        StoreError: the dataset isn't committed, or the store or MLflow can't be reached.
    """
    store = Store(config.store)
    dataset = store.dataset(config.dataset)
    commit = dataset.commit()
    folder = f"reports/{dataset.name}/{_version(dataset, commit)}"
    if store.exists(f"{folder}/stats.json"):
        console.say(f"{folder}: already there, skipped")
        return folder
    stats, chosen = gather(dataset, commit, samples=config.samples, here=here)
    page = render(stats, shown(dataset, chosen)).encode(errors="replace")
    if config.track:
        to_mlflow(store, folder, stats, page)
    store.write(f"{folder}/report.html", page)
    store.write_json(f"{folder}/stats.json", stats)  # last: it marks the report as complete
    console.say(f"{store.uri}/{folder}/report.html")
    return folder


def _version(dataset: Dataset, commit: Commit) -> str:
    """Tells commits apart whose files are the same: a retry may change nothing but reasons."""
    same = sum(other.identity == commit.identity for other in dataset.commits())
    return f"{commit.identity}-{same - 1}" if same > 1 else commit.identity


# -- gathering ------------------------------------------------------------------------------------


def gather(
    dataset: Dataset, commit: Commit, *, samples: int = 24, here: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A commit's statistics, ready for JSON, and the places of its samples (`path` and `row`)."""
    if not here and len(commit.files) + len(commit.set_aside) > 1:
        cluster.start()
    counts: dict[str, Any] = {}
    domains = _Domains()
    best: list[tuple[str, str, int]] = []
    source = _source(commit)
    units = [{"path": f.path, "kept": True} for f in commit.files if f.rows]
    units += [{"path": f.path, "kept": False} for f in commit.set_aside if f.rows]
    work = partial(_count_file, dataset, commit.identity, source, samples)
    for part in each(f"{dataset.name}: statistics", work, units, here=here):
        domains.add(part.pop("domains"))
        best = heapq.nsmallest(samples, [*best, *map(tuple, part.pop("samples"))])
        add(counts, part)
    if counts.get("rows", 0) != commit.rows:
        raise StoreError(f"{dataset.uri}: {counts.get('rows', 0):,} rows, not the {commit.rows:,} "
                         "of its commit")  # fmt: skip
    return _finish(commit, counts, domains), [{"path": p, "row": r} for _, p, r in best]


def _source(commit: Commit) -> str:
    """What kept rows have as `source`: for texts and a user's own data, the dataset's name."""
    config = commit.lineage.get("config", {})
    source = str(config.get("source") or commit.dataset)
    named = commit.dataset.startswith("text/")
    named = named or (source in sources.names() and getattr(sources.load(source), "OWN", False))
    return str(config.get("name") or source) if named else source


def add(total: dict[str, Any], part: dict[str, Any]) -> None:
    """Add a part's counts to the total, nested ones key by key."""
    for key, value in part.items():
        if isinstance(value, dict):
            add(total.setdefault(key, {}), value)
        else:
            total[key] = total.get(key, 0) + value


class _Domains:
    """Counts by domain, for the most relevant domains, in bounded memory."""

    def __init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}  # by reason; "" is kept
        self.forgotten = 0

    def add(self, part: dict[str, dict[str, int]]) -> None:
        add(self.counts, part)
        if len(self.counts) > MOST_DOMAINS:
            order = sorted(self.counts, key=self._rank)
            for domain in order[MOST_DOMAINS // 2 :]:
                self.forgotten += sum(self.counts.pop(domain).values())

    def top(self) -> list[dict[str, Any]]:
        """The domains that failed most often, in downloading or decoding."""
        rows = []
        for domain in sorted(self.counts, key=self._rank)[:TOP_DOMAINS]:
            reasons = dict(self.counts[domain])
            kept = reasons.pop("", 0)
            ordered = dict(sorted(reasons.items(), key=lambda pair: (-pair[1], pair[0])))
            rows.append({"domain": domain, "kept": kept, "set_aside": sum(reasons.values()),
                         "reasons": ordered})  # fmt: skip
        return rows

    def _rank(self, domain: str) -> tuple[int, int, str]:
        reasons = self.counts[domain]
        total, kept = sum(reasons.values()), reasons.get("", 0)
        return kept - total, -kept, domain


# -- one file -------------------------------------------------------------------------------------


def _count_file(
    dataset: Dataset, identity: str, source: str, samples: int, unit: dict[str, Any]
) -> dict[str, Any]:
    """Counts of one file's kept or set-aside rows, and its candidates for the samples."""
    counts: dict[str, Any] = {"domains": {}}
    best: list[tuple[str, str, int]] = []
    name = posixpath.basename(unit["path"])  # as the commit's identity knows the file
    row = 0
    for batch in dataset.batches(unit["path"], _BATCH):
        add(counts, _kept(batch, source) if unit["kept"] else _set_aside(batch, source))
        if unit["kept"]:
            numbers = range(row, row + batch.num_rows)
            drawn = ((_lot(f"{identity} {name} {n}"), unit["path"], n) for n in numbers)
            best = heapq.nsmallest(samples, [*best, *drawn])
        row += batch.num_rows
    return {**counts, "samples": best}


def _lot(of: str) -> str:
    return hashlib.blake2b(of.encode(), digest_size=12).hexdigest()


def _kept(batch: pa.RecordBatch, source: str) -> dict[str, Any]:
    names = set(batch.schema.names)
    counts: dict[str, Any] = {"rows": batch.num_rows}
    sources = batch["source"].to_pylist() if "source" in names else [source] * batch.num_rows
    counts["sources"] = {str(s or source): {"kept": n} for s, n in Counter(sources).items()}
    if "image" in names:
        sizes = pc.binary_length(pc.struct_field(batch["image"], "bytes"))  # type: ignore[attr-defined]
        counts["bytes"] = _octaves(sizes.to_pylist())
        counts["total_bytes"] = pc.sum(sizes).as_py() or 0  # type: ignore[attr-defined]
    if {"width", "height"} <= names:
        widths, heights = batch["width"].to_pylist(), batch["height"].to_pylist()
        both = [(w, h) for w, h in zip(widths, heights, strict=True) if w and h]
        counts["width"], counts["height"] = _values(w for w, _ in both), _values(h for _, h in both)
        # In tenths of a doubling: from 1:2 to 2:1 in twenty steps.
        counts["aspect"] = _values(round(10 * math.log2(w / h)) for w, h in both)
    if "captions" in names:
        captions = [c or [] for c in batch["captions"].to_pylist()]
        flat = [c for said in captions for c in said if c is not None]
        counts["captions"] = len(flat)
        counts["captions_per_image"] = _values(map(len, captions))
        counts["words"] = _values(min(len(c.split()), _MOST_WORDS) for c in flat)
        counts["characters"] = _values(min(len(c), _MOST_CHARACTERS) for c in flat)
        counts["languages"] = _languages(flat)
    if "text" in names:
        texts = [t or "" for t in batch["text"].to_pylist()]
        counts["text_characters"] = _octaves(map(len, texts))
        counts["total_bytes"] = sum(len(t.encode()) for t in texts)
        counts["languages"] = _languages(texts)
    if "url" in names:
        hosts = Counter(_domain(url) for url in batch["url"].to_pylist() if url)
        counts["domains"] = {host: {"": n} for host, n in hosts.items()}
    return counts


def _set_aside(batch: pa.RecordBatch, source: str) -> dict[str, Any]:
    counts: dict[str, Any] = {"stages": {}, "sources": {}}
    for row in batch.to_pylist():
        reason, stage = str(row.get("reason") or ""), str(row.get("stage") or "")
        if stage == _CAPTION:
            add(counts, {"captions_set_aside": {reason: 1}})
            continue
        add(counts, {"set_aside": 1, "stages": {stage: {reason: 1}}})
        own = str(row.get("source") or source)
        add(counts["sources"], {own: {"set_aside": {reason: 1}}})
        if row.get("url") and stage not in _NOT_THE_DOMAINS:
            add(counts, {"domains": {_domain(row["url"]): {reason: 1}}})
        status, held_out = _HTTP.fullmatch(reason), _HELD_OUT.fullmatch(reason)
        if status:
            add(counts, {"http": {status[1]: 1}})
        if held_out:
            add(counts, {"leaks": {held_out[1]: 1}})
        if reason.startswith("duplicate: "):
            kind = reason.removeprefix("duplicate: ")
            of = str(row.get("detail") or "").partition(": ")[0]
            add(counts, {"duplicates": {of: {kind: 1}}})
    return counts


def _values(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in Counter(values).items()}


def _octaves(values: Iterable[int | None]) -> dict[str, int]:
    """Counts by quarters of a doubling: bin k begins at 2 ** (k / 4); bin -1 is for size 0."""
    return _values(
        math.floor(4 * math.log2(value)) if value else -1 for value in values if value is not None
    )


def _languages(texts: Iterable[str]) -> dict[str, int]:
    """Counts by language, as `--language` would judge them."""
    found = map(detect, texts)
    return dict(Counter(name if sure >= SURE else UNSURE for name, sure in found))


def _domain(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower() or "(none)"
    except ValueError:
        return "(none)"


# -- the statistics as they are kept --------------------------------------------------------------


def _finish(commit: Commit, counts: dict[str, Any], domains: _Domains) -> dict[str, Any]:
    """All counts in a fixed order, with derived values."""
    ordered = _ordered(counts)
    sources = {
        name: {"kept": of.get("kept", 0), "set_aside": of.get("set_aside", {})}
        for name, of in ordered.get("sources", {}).items()
    }
    for of in sources.values():
        of["read"] = of["kept"] + sum(of["set_aside"].values())
    histograms = {k: ordered[k] for k in (
        "width", "height", "aspect", "bytes", "captions_per_image", "words", "characters",
        "text_characters",
    ) if ordered.get(k)}  # fmt: skip
    rows, aside = ordered.get("rows", 0), ordered.get("set_aside", 0)
    return {
        "dataset": commit.dataset,
        "version": commit.identity,
        "created": commit.created,
        "job": commit.job,
        "fingerprint": commit.fingerprint,
        "files": len(commit.files),
        "file_bytes": sum(f.bytes for f in commit.files),
        "read": rows + aside,
        "kept": rows,
        "set_aside": aside,
        "bytes": ordered.get("total_bytes", 0),
        "captions": ordered.get("captions", 0),
        "captions_set_aside": ordered.get("captions_set_aside", {}),
        "sources": sources,
        "stages": ordered.get("stages", {}),
        "http": ordered.get("http", {}),
        "domains": domains.top(),
        "rows_of_rare_domains": domains.forgotten,
        "histograms": histograms,
        "languages": ordered.get("languages", {}),
        "duplicates": ordered.get("duplicates", {}),
        "leaks": ordered.get("leaks", {}),
        "lineage": commit.lineage,
    }


def _ordered(value: Any) -> Any:
    """Nested counts with their keys in order: numbers by size, then words."""
    if not isinstance(value, dict):
        return value
    return {k: _ordered(value[k]) for k in sorted(value, key=_key)}


def _key(key: str) -> tuple[int, int, str]:
    return (0, int(key), "") if re.fullmatch(r"-?\d+", key, re.ASCII) else (1, 0, key)


# -- samples --------------------------------------------------------------------------------------


def shown(dataset: Dataset, chosen: Sequence[dict[str, Any]]) -> list[Shown]:
    """The samples' pictures with captions, or texts; reads one row group at a time."""
    rows: dict[tuple[str, int], Shown] = {}
    for path in sorted({c["path"] for c in chosen}):
        wanted = sorted(c["row"] for c in chosen if c["path"] == path)
        full = dataset.store.path(dataset.name, path)
        with pq.ParquetFile(full, filesystem=dataset.store.fs) as file:
            wished = ("id", "image", "captions", "text")
            columns = [c for c in wished if c in file.schema_arrow.names]
            start = 0
            for group in range(file.num_row_groups):
                end = start + file.metadata.row_group(group).num_rows
                mine = [row for row in wanted if start <= row < end]
                if mine:
                    table = file.read_row_group(group, columns=columns)
                    for row in mine:
                        rows[path, row] = _shown(table.slice(row - start, 1).to_pylist()[0])
                start = end
    return [rows[c["path"], c["row"]] for c in chosen]


def _shown(row: dict[str, Any]) -> Shown:
    picture = (row.get("image") or {}).get("bytes") or b""
    sample = Sample(picture, list(row.get("captions") or ())) if "image" in row else None
    text = row.get("text") or ""
    if len(text) > _TEXT_CHARS:
        text = text[:_TEXT_CHARS].rsplit(" ", 1)[0] + " …"
    return Shown(str(row.get("id") or ""), sample, text)


# -- MLflow ---------------------------------------------------------------------------------------


def to_mlflow(store: Store, folder: str, stats: dict[str, Any], page: bytes) -> None:
    """Log the page, the statistics and the main numbers in an MLflow run for this commit."""
    parameters = {k: stats[k] for k in ("dataset", "version", "created", "job", "fingerprint")}
    handle = tracking.start_run(store, f"data {stats['dataset']}", parameters, key=folder)
    here = Path(tempfile.mkdtemp(prefix="beit3-data-report-"))
    try:
        (here / "report.html").write_bytes(page)
        with run_logger.Logger(handle) as logger:
            logger.metrics(0, metrics(stats))
            logger.file(here / "report.html", "data")
            logger.json("data/stats.json", stats)
    finally:
        shutil.rmtree(here, ignore_errors=True)
    tracking.finish_run(handle)


def metrics(stats: dict[str, Any]) -> dict[str, float]:
    """The main numbers, under names that MLflow accepts."""
    values: dict[str, float] = {
        f"data/{k}": stats[k] for k in ("read", "kept", "set_aside", "captions", "bytes")
    }
    values["data/yield"] = stats["kept"] / stats["read"] if stats["read"] else 0.0
    values["data/captions_set_aside"] = sum(stats["captions_set_aside"].values())
    for stage, reasons in stats["stages"].items():
        values[f"data/stage/{_metric(stage)}"] = sum(reasons.values())
    values |= {f"data/http/{status}": n for status, n in stats["http"].items()}
    values |= {f"data/leaks/{_metric(of)}": n for of, n in stats["leaks"].items()}
    values["data/duplicates"] = sum(sum(of.values()) for of in stats["duplicates"].values())
    return values


def _metric(name: str) -> str:
    return re.sub(r"[^\w./ -]", "-", name, flags=re.ASCII)[:200].strip("/ .") or "none"


def main() -> None:
    job.main(PRESETS, __doc__, run, billed=False)


if __name__ == "__main__":
    main()
