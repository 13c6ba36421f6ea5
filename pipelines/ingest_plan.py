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

    Captions are counted before they are filtered. The formulas are `IngestConfig.dry_run`'s.

    Raises:
        FileNotFoundError: an annotation file is missing.
    """
    source = sources.load(config.source)
    if source.KIND != "pairs":
        units, inputs = unit_files(config, source)
        size = sum(i["bytes"] for i in inputs)
        hours = size / 1e6 / config.assume.megabytes_per_second / config.assume.nodes / 3600
        return {"files": len(units), "bytes": size, **_time(config, hours)}
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


def _estimates(config: IngestConfig, images: int) -> dict[str, Any]:
    assume = config.assume
    alive = images if config.images else images * assume.success
    stored = alive * assume.kilobytes_stored * 1e3 * (config.short_side / 288) ** 2
    fetched = 0 if config.images else alive * assume.kilobytes_fetched * 1e3
    hours = images / assume.images_per_second / assume.nodes / 3600
    return {
        "bytes_to_fetch": round(fetched),
        "bytes_to_store": round(stored),
        **_time(config, hours),
        "cost_of_storage_a_month": stored / 1e9 * assume.storage_price,
    }


def _time(config: IngestConfig, hours: float) -> dict[str, float]:
    assume = config.assume
    return {"hours": hours, "cost_of_machines": hours * assume.nodes * assume.node_price}
