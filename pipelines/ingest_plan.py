"""Estimates what an ingestion would read, fetch and store, its time and cost, fetching nothing."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipelines import console, sources
from pipelines.addresses import refuse
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import records, unit_files
from pipelines.sources import ImageRecord
from pipelines.storage import local_folder


def plan(config: IngestConfig) -> dict[str, Any]:
    """Counts of records, images and captions, and estimates by `config.assume`.

    Captions are counted before they are filtered. The formulas are `IngestConfig.dry_run`'s. The
    records of archives and texts aren't counted: they are taken to store as many bytes as now.

    Raises:
        FileNotFoundError: an annotation file is missing.
    """
    source = sources.load(config.source)
    if source.KIND != "pairs":
        units, inputs = unit_files(config, source)
        size = sum(i["bytes"] for i in inputs)
        estimates = _of_files(config, size, len(units), images=source.KIND == "images")
        return {"files": len(units), "bytes": size, **estimates}
    images = captions = 0
    aside: Counter[str] = Counter()
    with local_folder(config.annotations, sources.BESIDE) as root:
        for item in records(source, root, config):
            if not isinstance(item, ImageRecord):
                aside[item.reason] += 1
                continue
            refused = None
            if not config.images:
                refused = refuse(item.url or "", allow_loopback=config.allow_loopback)
            if refused is None:
                images, captions = images + 1, captions + len(item.captions)
            else:
                aside[refused.reason] += 1
    return {
        "images": images,
        "captions": captions,
        "set_aside": dict(aside),
        "shards": -(-(images + aside.total()) // config.shard_size),
        **_estimates(config, images),
    }


def show(found: dict[str, Any]) -> None:
    """Print a plan, a line for each number."""
    for key, value in found.items():
        shown = f"{value:,.2f}" if isinstance(value, float) else value
        console.say(f"{key}: {shown:,}" if isinstance(value, int) else f"{key}: {shown}")


def _of_files(config: IngestConfig, size: int, files: int, *, images: bool) -> dict[str, Any]:
    """What files of `size` bytes take together. A sample is drawn from what is read, so it shortens
    nothing; a limit is heeded for images, whose sizes are assumed, but texts may have any."""
    assume = config.assume
    hours = size / 1e6 / assume.megabytes_per_second / assume.nodes / 3600
    stored = size * config.sample
    if config.limit is not None and images:
        taken = config.limit * files
        hours = min(hours, _hours(config, taken / config.sample))
        stored = min(stored, _stored(config, taken))
    return _costs(config, hours, stored)


def _estimates(config: IngestConfig, images: int) -> dict[str, Any]:
    alive = images if config.images else images * config.assume.success
    fetched = 0 if config.images else alive * config.assume.kilobytes_fetched * 1e3
    costs = _costs(config, _hours(config, images), _stored(config, alive))
    return {"bytes_to_fetch": round(fetched), **costs}


def _hours(config: IngestConfig, images: float) -> float:
    return images / config.assume.images_per_second / config.assume.nodes / 3600


def _stored(config: IngestConfig, images: float) -> float:
    return images * config.assume.kilobytes_stored * 1e3 * (config.short_side / 288) ** 2


def _costs(config: IngestConfig, hours: float, stored: float) -> dict[str, Any]:
    assume = config.assume
    return {
        "bytes_to_store": round(stored),
        "hours": hours,
        "cost_of_machines": hours * assume.nodes * assume.node_price,
        "cost_of_storage_a_month": stored / 1e9 * assume.storage_price,
    }
