"""Ingestion: published lists, archives and texts -> `images/<name>`, `text/<name>`.

    python pipelines/ingest.py --source cc3m --annotations /data/cc3m --store s3://bucket/beit3

Pairs: the records are split, in published order, into shards; each shard is one task, on any node
of the cluster. It downloads with img2dataset into a temporary folder of that node, or reads the
published zips (`--images`), cleans the images (`pipelines.images`), and writes one part to the
store. A failed record becomes a set-aside row with a reason and affects no other record. Archives
and texts: one task per file, which writes a part for every `--part-megabytes`; so a corpus in one
huge file uses one core.

The dataset `images/<name>` has the columns of `IMAGE_SCHEMA`, `text/<name>` of `TEXT_SCHEMA`; rows
set aside have `id`, `url`, `reason`, `detail`, and the `stage` that refused them. Pictures that
also occur in a dataset of `held_out`, at any size and quality, are set aside (`pipelines.leaks`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

from pipelines import (
    cluster,
    console,
    data_report,
    drop_duplicates,
    duplicates,
    job,
    leaks,
    published_images,
    retry,
    sources,
)
from pipelines.config import to_dict
from pipelines.dataset import Commit, Dataset
from pipelines.ingest_config import PRESETS, IngestConfig
from pipelines.ingest_plan import plan, show
from pipelines.ingest_units import describe_local, records, unit_files, url_shards
from pipelines.ingest_workers import (
    IMAGE_SCHEMA,
    TEXT_SCHEMA,
    FileWorker,
    PairWorker,
    further_parts,
)
from pipelines.lineage import fingerprint
from pipelines.parts import PartRecord, Resources, run_parts, sum_stats
from pipelines.storage import Store, StoreError, local_folder

__all__ = ["IMAGE_SCHEMA", "PRESETS", "TEXT_SCHEMA", "IngestConfig", "plan", "run"]

T = TypeVar("T")


def run(config: IngestConfig) -> Commit:
    """Make the dataset, unless it exists already; returns its commit.

    Raises:
        FileNotFoundError: an annotation file is missing.
        StoreError: the store can't be written, or the name is taken by another dataset.
        ValueError: an annotation file is malformed; or `dry_run` is set.
    """
    if config.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    source = sources.load(config.source)
    store = Store(config.store)
    store.check_writable()
    dataset = store.dataset(config.dataset)
    held_out = () if source.KIND == "text" else tuple(leaks.sources(store, config.held_out))
    if source.KIND == "pairs":
        with local_folder(config.annotations, sources.BESIDE) as root:
            inputs = [describe_local(f, root) for f in source.files(root, config.options)]
            inputs += published_images.load(config.images).described if config.images else []
            mark = _fingerprint(config, inputs, held_out)
            items = partial(records, source, root, config)
            units = partial(url_shards, dataset, mark, items, config.shard_size)
            commit = _make(config, mark, inputs, units, PairWorker(config, store, held_out))
    else:
        listed, inputs = unit_files(config, source)
        mark = _fingerprint(config, inputs, held_out)
        worker = FileWorker(config, dataset, mark, held_out)
        commit = _make(config, mark, inputs, lambda: listed, worker)
    _report(commit)
    if config.report:
        data_report.run(data_report.DataReportConfig(config.store, config.dataset))
    return commit


def _make(
    config: IngestConfig,
    mark: str,
    inputs: list[dict[str, Any]],
    units: Callable[[], Sequence[dict[str, Any]]],
    worker: PairWorker | FileWorker,
) -> Commit:
    """Like `parts.make_dataset`, except that a unit may write several parts, and that duplicates
    are dropped from the parts before they are committed."""
    dataset = Store(config.store).dataset(config.dataset)
    against = _against(config, dataset)
    whole = fingerprint("ingest", {"parts": mark, "against": against}) if config.unique else mark
    found = dataset.finished(whole)
    if found is not None and not config.retry_failed:
        console.say(f"{dataset.name}: already there ({found.rows:,} rows), skipped")
        return found
    if found is None and config.retry_failed:
        raise StoreError(f"{dataset.uri}: not there yet; ingest it without --retry-failed first")

    def parts_of(listed: Sequence[dict[str, Any]]) -> list[PartRecord]:
        leaks.prepare(dataset.store, worker.held_out)
        cluster.start()
        resources = Resources(actors=config.processes)
        parts = run_parts(dataset, mark, listed, partial(_same, worker), resources=resources)
        if isinstance(worker, FileWorker):
            parts += further_parts(dataset, mark, [unit["name"] for unit in listed])
        if not config.unique:
            return parts
        before = (*config.against, dataset.name) if found else config.against
        same = duplicates.find(dataset, duplicates.in_order(parts), against=before)
        return drop_duplicates.remove(dataset, whole, parts, same)

    if found is not None:
        failed = retry.failed_shards(dataset, found, mark, config.shard_size)
        if not failed.units:
            console.say(f"{dataset.name}: no download failed that may work now")
            return found
        return retry.amend(dataset, found, failed, parts_of(failed.units))
    parts = parts_of(units())  # bad annotations are reported before a cluster starts
    held_out = [{"dataset": s.dataset, "commit": s.commit} for s in worker.held_out]
    return dataset.publish(
        whole,
        parts,
        job="ingest",
        schema=TEXT_SCHEMA if dataset.name.startswith("text/") else IMAGE_SCHEMA,
        stats=sum_stats(part.stats for part in parts),
        config=to_dict(config),
        inputs=[*inputs, *held_out, *({"dataset": n, "commit": i} for n, i in against)],
    )


def _against(config: IngestConfig, dataset: Dataset) -> list[tuple[str, str]]:
    """The datasets of `against` and their identities: those that the commit records, if there is
    one, because they may have been amended since."""
    found = dataset.find_commit()
    if found is not None and config.against:
        inputs = found.lineage["inputs"][-len(config.against) :]
        recorded = [(i.get("dataset", ""), i.get("commit", "")) for i in inputs]
        if [name for name, _ in recorded] == list(config.against):
            return recorded
    return [(name, dataset.store.dataset(name).commit().identity) for name in config.against]


def _same(worker: T) -> T:
    return worker


def _report(commit: Commit) -> None:
    stats = commit.stats
    line = f"{commit.dataset}: {commit.rows:,} of {stats.get('read', 0):,} records"
    for key, label in (("set_aside", "set aside"), ("captions_set_aside", "captions set aside")):
        counts = sorted(stats.get(key, {}).items(), key=lambda pair: (-pair[1], pair[0]))
        reasons = "; ".join(f"{reason}: {count:,}" for reason, count in counts)
        line += f"; {label}: {reasons}" if reasons else ""
    console.say(line)


def _fingerprint(
    config: IngestConfig, inputs: Iterable[dict[str, Any]], held_out: Sequence[leaks.Source]
) -> str:
    decides = config.decides_output()
    if held_out:
        decides["held_out"] = sorted([s.dataset, s.commit] for s in held_out)
    return fingerprint(
        "ingest", decides, [f"{i['file']}:{i.get('sha256', i['bytes'])}" for i in inputs]
    )


def main() -> None:
    def run_or_plan(chosen: IngestConfig) -> None:
        if chosen.dry_run:
            show(plan(chosen))
        else:
            run(chosen)

    job.main(PRESETS, __doc__, run_or_plan)


if __name__ == "__main__":
    main()
