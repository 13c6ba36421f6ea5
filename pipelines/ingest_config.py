"""The configuration of ingestion: what to ingest, from where, and what to keep."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from pipelines import sources
from pipelines.config import decisive, indifferent
from pipelines.fetch import FetchPolicy
from pipelines.images import FILTERS, RESIZE_MODES, REVISION, ImagePolicy
from pipelines.records import TextPolicy


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of `--dry-run`. None of them is measured here: put in what you know."""

    nodes: int = 1
    """Machines that ingest at once."""
    images_per_second: float = 250.0
    """Images that one machine downloads and cleans; 16 cores reached 485 on CC12M."""
    megabytes_per_second: float = 50.0
    """Megabytes of archives or texts that one machine reads; a quarter of that for packed texts."""
    kilobytes_fetched: float = 150.0
    """Size of an image on the web."""
    kilobytes_stored: float = 25.0
    """Size of an image shrunk to a shorter side of 288; it grows with that side's square."""
    success: float = 0.8
    """Share of the URLs that are still alive."""
    node_price: float = 0.68
    """Hourly price of one machine (16 cores, on demand, in US dollars)."""
    storage_price: float = 0.023
    """Monthly price of a gigabyte (10**9 bytes) in the store."""


@dataclass(frozen=True)
class IngestConfig:
    """What to ingest, from where, and what to keep."""

    source: str = "cc3m"
    """A module of pipelines/sources:
    pairs: cc3m, cc12m, sbu, coco, vg, and your own: table, webdataset;
    images: imagenet21k, imagenet1k;
    texts: wikipedia, bookcorpus, openwebtext, cc_news, stories, text_files."""
    annotations: str = indifferent("annotations")
    """Folder of the source's published files: a local path or a URI."""
    store: str = indifferent("store")
    """URI or path of the store."""
    name: str | None = indifferent(None)
    """The dataset's name, below images/ or text/; by default the source's."""
    limit: int | None = None
    """Take only this many records, the first ones (of each file, for archives and texts)."""
    images: str = indifferent("")
    """Folder or URI of coco's or vg's published images or zips; without it they are downloaded."""
    sample: float = 1.0
    """Take this random share of the records: always the same ones, and a subset of any larger
    share."""
    dry_run: bool = indifferent(False)
    """Read the annotations, fetch nothing, and print what a run would take, according to `assume`:
    hours = images / images_per_second / nodes / 3600; for archives and texts
    hours = megabytes / megabytes_per_second / nodes / 3600, and stored = megabytes * sample, both
    at most what the images of `limit` take;
    stored = images * success * kilobytes_stored * (short_side / 288)**2;
    cost = hours * nodes * node_price, and each month stored gigabytes * storage_price."""
    assume: Assumptions = indifferent(Assumptions())
    """Assumptions of a dry run."""
    splits: tuple[str, ...] = ("train",)
    """Splits of imagenet1k; val is a benchmark."""
    url_column: str = ""
    """Column of a table's URLs (url, URL, ...); a number, from 0, if the table has no header."""
    caption_column: str = ""
    """Column of a table's captions (caption, text, TEXT, ...), or its number."""

    processes: int = indifferent(0)
    """Shards at once, over the whole cluster; 0: one for each CPU."""
    threads: int = indifferent(64)
    """Downloads at once in each process."""
    timeout: float = indifferent(10.0)
    """Seconds without data after which a download fails."""
    max_seconds: float = indifferent(60.0)
    """Seconds after which a download fails even if data still trickles in."""
    max_megabytes: int = indifferent(64)
    """Megabytes (2**20 bytes) above which a download fails."""
    retries: int = indifferent(1)
    """Further tries for a URL that failed."""
    user_agent_token: str = indifferent("beit3-ray")
    """Names this crawler in the User-Agent header and in the sites' X-Robots-Tag."""
    respect_robots: bool = True
    """Leave out images whose X-Robots-Tag says noai, noimageai, noindex or noimageindex."""
    allow_loopback: bool = False
    """Fetch from this machine too (for trials); private networks are never fetched from."""

    shard_size: int = 10_000
    """Records in one part: one task's work, and one Parquet file."""
    short_side: int = 288
    """Larger images are shrunk so that their shorter side has this many pixels."""
    resize_mode: str = "keep_ratio"
    """Which side short_side applies to: keep_ratio, the shorter; keep_ratio_largest, the longer;
    center_crop or border (white), both; no: images keep their size. As in img2dataset."""
    downscale: str = "hamming"
    """The filter that shrinks images: area, hamming, bicubic or lanczos, from fast to sharp."""
    encode_quality: int = 92
    """JPEG quality of images that are shrunk, or weren't RGB JPEGs."""
    reencode: bool = False
    """Re-encode even JPEGs that need no change; by default they keep their bytes."""
    min_side: int = 32
    """Images whose shorter side has fewer pixels are set aside."""
    max_aspect: float = 10.0
    """Images whose longer side is more than this many times the shorter are set aside."""
    max_pixels: int = 100_000_000
    """Images with more pixels, by their header, are never decoded."""
    max_captions: int = 50
    """Maximum captions kept per image, the first ones."""
    coco_split: Path | None = indifferent(None)
    """Karpathy's dataset_coco.json; by default in the annotations' folder or in ../coco."""
    held_out: tuple[str, ...] = indifferent(())
    """Datasets of the store, such as tasks/vqa/test, whose pictures must never be kept."""
    document_chars: int = 4_000
    """Plain text files are cut at paragraphs into documents of about this many characters."""
    part_megabytes: int = 256
    """Megabytes (2**20 bytes) after which archives and texts continue in another Parquet file."""

    unique: bool = indifferent(False)
    """Set aside rows that repeat an earlier row of the dataset: the same bytes, or the same picture
    at another size or quality; for texts, the same text."""
    against: tuple[str, ...] = indifferent(())
    """With unique: datasets of the store, such as images/cc3m, whose rows also count as earlier."""
    retry_failed: bool = indifferent(False)
    """Retry the dataset's failed downloads, and commit it again with those that succeed."""
    report: bool = indifferent(True)
    """Write reports/<dataset>/<commit>/report.html, and log it to MLflow."""

    language: str = ""
    """Keep texts, and captions, of this language only: an ISO 639 code such as en."""
    min_caption_words: int = 0
    """Captions of fewer words are set aside."""
    max_caption_words: int = 0
    """Captions of more words are set aside; 0: no limit."""
    min_caption_chars: int = 0
    """Captions of fewer characters are set aside."""
    max_caption_chars: int = 0
    """Captions of more characters are set aside; 0: no limit."""
    max_repetition: float = 1.0
    """Captions that repeat a larger share of their words or characters are set aside."""

    def __post_init__(self) -> None:
        if self.source not in sources.names():
            raise ValueError(f"source: {self.source!r} is none of {', '.join(sources.names())}")
        self._check_numbers()
        self._check_source()

    def _check_numbers(self) -> None:
        at_least_one = ("threads", "max_megabytes", "shard_size", "short_side", "max_pixels")
        at_least_one += ("max_captions", "document_chars", "part_megabytes")
        for field in at_least_one:
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: must be at least 1, not {getattr(self, field)}")
        not_negative = ("processes", "retries", "min_side", "min_caption_words")
        not_negative += ("max_caption_words", "min_caption_chars", "max_caption_chars")
        for field in not_negative:
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: must not be negative, but is {getattr(self, field)}")
        if self.timeout <= 0 or self.max_seconds <= 0 or self.max_aspect < 1:
            raise ValueError("timeout and max_seconds must be above 0, max_aspect at least 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit: must be at least 1, not {self.limit}")
        for field in ("sample", "max_repetition"):
            if not 0 < getattr(self, field) <= 1:
                raise ValueError(f"{field}: must be above 0 and at most 1")
        a = self.assume
        if min(a.nodes, a.images_per_second, a.megabytes_per_second) <= 0:
            raise ValueError("assume: nodes and what they do a second must be above 0")
        if not 1 <= self.encode_quality <= 95:
            raise ValueError(f"encode_quality: must be 1 to 95, not {self.encode_quality}")
        for field, known in (("resize_mode", RESIZE_MODES), ("downscale", tuple(FILTERS))):
            if getattr(self, field) not in known:
                said = ", ".join(known)
                raise ValueError(f"{field}: {getattr(self, field)!r} is none of {said}")
        if self.name is not None and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", self.name):
            raise ValueError(f"name: {self.name!r} is not a name of letters, digits, '_', '-', '.'")

    def _check_source(self) -> None:
        source = sources.load(self.source)
        if self.against and not self.unique:
            raise ValueError("against: needs unique, which drops duplicates")
        if self.retry_failed and (source.KIND != "pairs" or self.images):
            raise ValueError(f"retry_failed: {self.source} is not downloaded")
        if self.images and not getattr(source, "HAS_FILES", False):
            raise ValueError(f"images: {self.source} has no published images; coco and vg have")
        unknown = set(self.splits) - set(getattr(source, "SPLITS", self.splits))
        if unknown or not self.splits:
            raise ValueError(f"splits: {', '.join(self.splits)} is none of {self.source}")
        if not re.fullmatch(r"([a-z]{2,3})?", self.language):
            raise ValueError(f"language: {self.language!r} is no ISO 639 code such as en")

    @property
    def short_name(self) -> str:
        return self.name or self.source

    @property
    def dataset(self) -> str:
        """The dataset's full name."""
        folder = "text" if sources.load(self.source).KIND == "text" else "images"
        return f"{folder}/{self.short_name}"

    @property
    def policy(self) -> ImagePolicy:
        return ImagePolicy(**{f.name: getattr(self, f.name) for f in fields(ImagePolicy)})

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
    def texts(self) -> TextPolicy:
        return TextPolicy(
            min_words=self.min_caption_words,
            max_words=self.max_caption_words,
            min_chars=self.min_caption_chars,
            max_chars=self.max_caption_chars,
            max_repetition=self.max_repetition,
            language=self.language,
        )

    @property
    def options(self) -> sources.Options:
        return sources.Options(
            max_captions=self.max_captions,
            coco_split=self.coco_split,
            document_chars=self.document_chars,
            name=self.short_name,
            url_column=self.url_column,
            caption_column=self.caption_column,
            splits=self.splits,
            from_files=bool(self.images),
        )

    def decides_output(self) -> dict[str, object]:
        """The options that decide what the dataset holds; the others may change between runs."""
        decides: dict[str, object] = decisive(self)
        source = sources.load(self.source)
        if source.KIND != "text":
            decides["revision"] = REVISION
        if source.KIND == "text" or getattr(source, "OWN", False):
            decides["name"] = self.short_name  # it is in the ids
        if self.images:
            decides["images"] = "files"
        return decides


PRESETS: dict[str, IngestConfig] = {
    "web": IngestConfig(),
    "gentle": IngestConfig(threads=16, retries=0),
    "trial": IngestConfig(threads=16, retries=0, timeout=3.0, limit=1_000, shard_size=250),
}
