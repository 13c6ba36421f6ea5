"""Estimates on paper what ingesting all of BEiT-3's pretraining data would take.

    python -m benchmarks.scale_plan                             # the tables of docs/scale.md
    python -m benchmarks.scale_plan --nodes 8 --resolver 1e5    # eight nodes, own resolvers

Every input is an option and is printed with where it comes from: *measured* (by
`benchmarks.ingestion`; the command stands in docs/scale.md), *public* (published by others),
*list price* (a cloud's, on demand, which changes) or *assumed*. Put in what you know.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any


def given(value: float, what: str, origin: str) -> Any:
    return field(default=value, metadata={"what": what, "origin": origin})


@dataclass(frozen=True)
class Inputs:
    """Everything that the tables are computed from."""

    cpu_ms: float = given(4.3, "CPU ms for an image from the web", "measured")
    archive_ms: float = given(3.5, "CPU ms for an image from a tar", "measured")
    text_mb: float = given(19.5, "MB of text a core reads in a second", "measured")
    text_kept: float = given(0.4, "stored size of text / its size", "assumed")
    stored_kb: float = given(33.9, "stored kB of an image, short side 288", "measured")
    process_mb: float = given(557, "memory of a process, MB, at shards of 1,000", "measured")
    fixed_mb: float = given(969, "memory of a node besides, MB", "measured")
    copies: float = given(3, "times that a part is in memory at once", "assumed")

    nodes: float = given(4, "nodes", "assumed")
    cores: float = given(16, "vCPUs of a node, one process on each", "assumed")
    threads: float = given(64, "downloads at once in each process", "default")
    timeout: float = given(10, "seconds of silence until a download fails", "default")
    retries: float = given(1, "further tries of a URL that failed", "default")
    shard: float = given(10_000, "records in a part", "default")

    latency: float = given(0.5, "seconds that an answer takes", "assumed")
    hanging: float = given(0.2, "share of the dead URLs that hang", "assumed")
    fetched_kb: float = given(130, "kB of an image on the web", "public")
    network_gbit: float = given(5, "Gbit/s of a node, sustained", "assumed")
    looked_up: float = given(0.3, "share of the URLs whose host is looked up", "assumed")
    resolver: float = given(1024, "DNS packets a second of a node", "public")
    packets: float = given(2, "DNS packets of a lookup (A and AAAA)", "assumed")

    imagenet: float = given(14_197_122, "images of ImageNet-21K", "public")
    imagenet_kb: float = given(92, "kB of an image in ImageNet-21K's tars", "assumed")
    text_gb: float = given(160, "GB of text", "public")

    price: float = given(0.68, "US$ of a node for an hour (16 vCPUs, 32 GiB)", "list price")
    address: float = given(0.005, "US$ of a public IPv4 address for an hour", "list price")
    nat: float = given(0.045, "US$ of a GB through a NAT gateway", "list price")
    egress: float = given(0.09, "US$ of a GB that leaves the cloud", "list price")
    storage: float = given(0.023, "US$ of a GB in the bucket for a month", "list price")
    put: float = given(0.005, "US$ of 1,000 PUT or LIST requests", "list price")
    get: float = given(0.0004, "US$ of 1,000 GET requests", "list price")
    upload_mb: float = given(10, "MB in one request of a large upload", "default")


@dataclass(frozen=True)
class Pairs:
    """A list of URLs: how many, and captions of each image."""

    name: str
    urls: int
    captions: float


PAIRS = (
    Pairs("CC3M", 3_318_333, 1),
    Pairs("CC12M", 12_423_374, 1),
    Pairs("SBU", 1_000_000, 1),
    Pairs("COCO, Karpathy's train and restval", 113_287, 5),
    Pairs("Visual Genome", 108_077, 50),
)
"""Published counts; for Visual Genome, as many phrases as ingestion keeps per image."""

MEASURED_SHARD = 1_000
DEAD = (0.1, 0.2, 1 / 3)
PUBLIC_RATES = (
    ("its README, sustained, one machine of 16 cores", 1_350.0),
    ("its CC3M example", 917.0),
    ("its CC12M example", 689.0),
    ("a user, CC12M (thread 242)", 485.0),
    ("a user on 1 Gbit/s (thread 218)", 180.0),
)
TYPES = (
    ("c6i.4xlarge", 16, 32, 0.68),
    ("c6i.8xlarge", 32, 64, 1.36),
    ("m6i.4xlarge", 16, 64, 0.768),
    ("c6in.4xlarge", 16, 32, 0.9072),
)
"""Name, vCPUs, GiB, list price an hour (us-east-1)."""


# -- formulas -------------------------------------------------------------------------------------


def limits(i: Inputs, dead: float) -> dict[str, float]:
    """URLs a second of one node, by possible bottleneck; the lowest one decides."""
    hung = i.timeout * (1 + i.retries)
    thread_seconds = (1 - dead * i.hanging) * i.latency + dead * i.hanging * hung
    return {
        "CPU": i.cores * 1e3 / i.cpu_ms / (1 - dead),
        "threads": i.cores * i.threads / thread_seconds,
        "network": i.network_gbit * 1e6 / 8 / i.fetched_kb / (1 - dead),
        "DNS": i.resolver / i.packets / i.looked_up,
    }


def urls() -> int:
    return sum(p.urls for p in PAIRS)


def pair_hours(i: Inputs, dead: float) -> float:
    return urls() / min(limits(i, dead).values()) / i.nodes / 3600


def archive_hours(i: Inputs) -> float:
    return i.imagenet * i.archive_ms / 1e3 / i.cores / i.nodes / 3600


def text_hours(i: Inputs) -> float:
    return i.text_gb * 1e3 / i.text_mb / i.cores / i.nodes / 3600


def memory_gb(i: Inputs) -> float:
    """Memory that a node needs; shards larger than those measured add the difference."""
    more = max(0.0, i.shard - MEASURED_SHARD) * i.stored_kb / 1e3 * i.copies
    return (i.cores * (i.process_mb + more) + i.fixed_mb) / 1e3


@dataclass(frozen=True)
class Row:
    """The cost of one kind of data."""

    name: str
    hours: float
    read_gb: float
    stored_gb: float
    parts: float


def rows(i: Inputs, dead: float) -> list[Row]:
    alive = urls() * (1 - dead)
    stored = alive * i.stored_kb / 1e6
    images = i.imagenet * i.stored_kb / 1e6
    text = i.text_gb * i.text_kept
    return [
        Row("pairs", pair_hours(i, dead), alive * i.fetched_kb / 1e6, stored, urls() / i.shard),
        Row("ImageNet-21K", archive_hours(i), i.imagenet * i.imagenet_kb / 1e6, images, 21_841),
        Row("text", text_hours(i), i.text_gb, text, i.text_gb * 1e3 / 268),
    ]


def requests(i: Inputs, row: Row) -> tuple[float, float]:
    """PUTs and GETs: a part's list, file, rows set aside, record; and the reads of inputs."""
    pieces = row.stored_gb * 1e3 / i.upload_mb
    puts = 4 * row.parts + pieces
    gets = 3 * row.parts + row.read_gb * 1e3 / 8 * (row.name != "pairs")
    return puts, gets


# -- tables ---------------------------------------------------------------------------------------


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines))


def inputs_table(i: Inputs) -> str:
    lines = [[f.metadata["what"], f"{getattr(i, f.name):,g}", _option(f), f.metadata["origin"]]
             for f in fields(i)]  # fmt: skip
    return table(("input", "value", "option", "origin"), lines)


def sources_table() -> str:
    lines = [[p.name, f"{p.urls:,}", f"{p.urls * p.captions / 1e6:.1f}"] for p in PAIRS]
    total = sum(p.urls * p.captions for p in PAIRS)
    lines.append(["together", f"{urls():,}", f"{total / 1e6:.1f}"])
    return table(("published pairs", "URLs", "million pairs"), lines)


def limits_table(i: Inputs) -> str:
    lines = []
    for dead in DEAD:
        found = limits(i, dead)
        least = min(found, key=lambda name: found[name])
        numbers = [f"{found[name]:,.0f}" for name in ("CPU", "threads", "network", "DNS")]
        lines.append([f"{dead:.0%}", *numbers, least, f"{pair_hours(i, dead):.1f}"])
    head = ("dead", "CPU", "threads", "network", "DNS", "least", f"hours, {i.nodes:.0f} nodes")
    return table(head, lines)


def public_table(i: Inputs) -> str:
    lines = [[name, f"{rate:,.0f}", f"{urls() / rate / i.nodes / 3600:.1f}"]
             for name, rate in PUBLIC_RATES]  # fmt: skip
    return table(("img2dataset, public", "URLs/s of a machine", f"hours, {i.nodes:.0f} nodes"),
                 lines)  # fmt: skip


def work_table(i: Inputs, dead: float) -> str:
    found = rows(i, dead)
    hours, read, stored = (sum(getattr(r, what) for r in found) for what in
                           ("hours", "read_gb", "stored_gb"))  # fmt: skip
    lines = [_work(i, r.name, r.hours, r.read_gb, r.stored_gb) for r in found]
    lines.append(_work(i, "together", hours, read, stored))
    return table((f"{dead:.0%} dead", "hours", "node hours", "GB read", "GB stored"), lines)


def _work(i: Inputs, name: str, hours: float, read: float, stored: float) -> list[str]:
    return [name, f"{hours:.2f}", f"{hours * i.nodes:.1f}", f"{read:,.0f}", f"{stored:,.0f}"]


def money_table(i: Inputs, dead: float) -> str:
    found = rows(i, dead)
    hours, stored = sum(r.hours for r in found) * i.nodes, sum(r.stored_gb for r in found)
    puts = sum(requests(i, r)[0] for r in found)
    gets = sum(requests(i, r)[1] for r in found)
    web = found[0].read_gb
    lines = [
        ["machines", f"{hours:.0f} node hours", f"{hours * i.price:,.0f}"],
        ["public addresses", f"{hours:.0f} node hours", f"{hours * i.address:,.2f}"],
        ["  or a NAT gateway instead", f"{web:,.0f} GB", f"{web * i.nat:,.0f}"],
        ["the bucket's PUTs", f"{puts:,.0f}", f"{puts / 1e3 * i.put:,.2f}"],
        ["the bucket's GETs", f"{gets:,.0f}", f"{gets / 1e3 * i.get:,.2f}"],
        ["storage, each month", f"{stored:,.0f} GB", f"{stored * i.storage:,.0f}"],
        ["all of it out of the cloud, once", f"{stored:,.0f} GB", f"{stored * i.egress:,.0f}"],
    ]
    return table((f"{dead:.0%} dead", "how much", "US$"), lines)


def types_table(i: Inputs, dead: float) -> str:
    lines = []
    for name, cores, memory, price in TYPES:
        node = replace(i, cores=float(cores), price=price)
        hours = sum(r.hours for r in rows(node, dead))
        need = memory_gb(node)
        lines.append([name, f"{cores}", f"{memory}", f"{need:.0f}", f"{hours:.1f}",
                      f"{hours * i.nodes * price:,.0f}"])  # fmt: skip
    head = ("node", "vCPUs", "GiB", "GB needed", f"hours, {i.nodes:.0f} nodes", "US$")
    return table(head, lines)


def _option(f: Field[Any]) -> str:
    return f"`--{f.name.replace('_', '-')}`"


def tables(i: Inputs) -> list[str]:
    """All tables, in the document's order."""
    third = DEAD[-1]
    return [
        sources_table(), work_table(i, third), money_table(i, third), limits_table(i),
        public_table(i), types_table(i, third), inputs_table(i),
    ]  # fmt: skip


def parse(arguments: Sequence[str] | None) -> Inputs:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for f in fields(Inputs):
        parser.add_argument(
            f"--{f.name.replace('_', '-')}",
            type=float,
            default=f.default,
            help=f"{f.metadata['what']} ({f.metadata['origin']}; {f.default:,g})",
        )
    found = Inputs(**vars(parser.parse_args(arguments)))
    if min(vars(found).values()) < 0 or min(found.nodes, found.cores, found.threads) <= 0:
        parser.error("expected numbers above 0")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    print("\n\n".join(tables(parse(arguments))))


if __name__ == "__main__":
    main()
