"""The workers of ingestion: a shard of records, an archive or a text file -> rows of the dataset.

Rows have the order of the records, whatever order images arrive in. A worker holds one part in
memory; if an archive or a text has more, it writes further parts itself (`_Spill`).
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipelines import leaks, published_images, sources
from pipelines.dataset import ROW_GROUP_ROWS, Dataset, PartRecord
from pipelines.fetch import fetch_images
from pipelines.images import CleanImage, Rejected, clean_image
from pipelines.ingest_config import IngestConfig
from pipelines.ingest_units import chosen
from pipelines.parts import PartOutput
from pipelines.records import Refused, refuse_language, sift
from pipelines.sources import HeldOut, ImageItem, ImageRecord, Malformed, TextItem
from pipelines.storage import Store

IMAGE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),  # as Hugging Face
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("captions", pa.list_(pa.string())),
        ("url", pa.string()),
        ("sha256", pa.string()),  # of the stored bytes
        ("source", pa.string()),
    ]
)
TEXT_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("sha256", pa.string()),  # of the text, in UTF-8
        ("source", pa.string()),
    ]
)
CAPTION_STAGE = "caption"
"""The stage of set-aside rows that stand for a single caption of a kept record."""

MOST_ASIDE = 50_000
"""Set-aside rows after which archives and texts continue in another part: they are in memory."""

_READ_AHEAD = 8 << 20  # buckets answer a few large requests faster than many small ones
_FEW = 50


class Part:
    """Collects one part: rows are packed into record batches as they come, to save memory."""

    def __init__(self, schema: pa.Schema) -> None:
        self.schema = schema
        self.rows: list[dict[str, Any]] = []
        self.batches: list[pa.RecordBatch] = []
        self.aside: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.captions_aside: Counter[str] = Counter()

    @property
    def empty(self) -> bool:
        return not self.counts["rows"] and not self.aside

    def add(self, row: dict[str, Any], **counts: int) -> None:
        self.counts.update(rows=1, **counts)
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP_ROWS:
            self._flush()

    def set_aside(self, id: str, url: str | None, reason: str, detail: str, stage: str) -> None:
        row = {"id": id, "url": url or "", "reason": reason, "detail": detail, "stage": stage}
        # Details quote what servers and files said, which may not even be text.
        self.aside.append({k: v.encode(errors="replace").decode() for k, v in row.items()})

    def set_captions_aside(self, record: ImageRecord, refused: Iterable[Refused]) -> None:
        """Note the captions that a record loses; only the record's own row counts as read."""
        for caption in refused:
            detail = f"{caption.detail}: {caption.text}"
            self.set_aside(record.id, record.url, caption.reason, detail, CAPTION_STAGE)
            self.captions_aside[caption.reason] += 1

    def output(self) -> PartOutput:
        self._flush()
        records = [row for row in self.aside if row["stage"] != CAPTION_STAGE]
        stats: dict[str, Any] = dict.fromkeys(("rows", "images", "captions", "bytes"), 0)
        stats |= self.counts
        stats["read"] = len(records) + self.counts["rows"]
        stats["set_aside"] = dict(sorted(Counter(r["reason"] for r in records).items()))
        stats["stages"] = dict(sorted(Counter(r["stage"] for r in records).items()))
        if self.captions_aside:
            stats["captions_set_aside"] = dict(sorted(self.captions_aside.items()))
        return PartOutput(pa.Table.from_batches(self.batches, self.schema), self.aside, stats)

    def _flush(self) -> None:
        if self.rows:
            self.batches.append(pa.RecordBatch.from_pylist(self.rows, self.schema))
            self.rows = []

    def add_image(
        self,
        record: ImageRecord,
        refused: Iterable[Refused],
        image: CleanImage,
        source: str,
        pictures: leaks.HeldOutPictures,
    ) -> None:
        """Add a row and note its refused captions, or set it aside if its picture is held out."""
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
        self.set_captions_aside(record, refused)
        self.add(row, images=1, captions=len(record.captions), bytes=len(image.data))

    def add_text(self, id: str, text: str, source: str) -> None:
        data = text.encode()
        digest = hashlib.sha256(data).hexdigest()
        self.add({"id": id, "text": text, "sha256": digest, "source": source}, bytes=len(data))


def sifted(
    part: Part, record: ImageRecord, config: IngestConfig
) -> tuple[ImageRecord, list[Refused]] | None:
    """The record with the captions that are kept, and the refused ones; None if it had some and all
    are refused."""
    kept, refused = sift(record.captions, config.texts)
    if not refused:
        return record, []
    if not kept:
        first = refused[0]
        detail = f"{first.detail}: {first.text}"
        if len(refused) > 1:
            detail += f" (and {len(refused) - 1} more captions)"
        part.set_aside(record.id, record.url, first.reason, detail, "filter")
        return None
    return ImageRecord(record.id, record.url, kept, record.data, record.files), refused


@dataclass(frozen=True)
class PairWorker:
    """A shard of records -> their images, in the shard's order, whatever order they arrive in."""

    config: IngestConfig
    store: Store
    held_out: tuple[leaks.Source, ...] = ()

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        rows = self.store.read_table(unit["urls"]).to_pylist()
        part = Part(IMAGE_SCHEMA)
        # Captions first: records refused by their captions need not be fetched.
        wanted: list[tuple[ImageRecord, list[Refused]]] = []
        for row in rows:
            if row["reason"] is not None:
                part.set_aside(row["id"], row["url"], row["reason"], row["detail"], "annotations")
                continue
            files = tuple(row["files"] or ())
            record = ImageRecord(row["id"], row["url"], row["captions"], files=files)
            kept = sifted(part, record, self.config)
            if kept:
                wanted.append(kept)
        pictures = leaks.load(self.store.uri, self.held_out)
        records = [record for record, _ in wanted]
        images = self._from_files(records) if self.config.images else self._fetched(records)
        for (record, refused), image in zip(wanted, images, strict=True):
            if isinstance(image, Rejected):
                part.set_aside(record.id, record.url, image.reason, image.detail, image.stage)
            else:
                part.add_image(record, refused, image, source_name(self.config), pictures)
        return part.output()

    def _fetched(self, records: list[ImageRecord]) -> Iterator[CleanImage | Rejected]:
        urls = [record.url or "" for record in records]
        uses = Counter(urls)
        outcomes = fetch_images(uses, self.config.fetch, self.config.policy)
        for url in urls:
            uses[url] -= 1  # drop images from memory once the part has them
            yield outcomes[url] if uses[url] else outcomes.pop(url)

    def _from_files(self, records: list[ImageRecord]) -> Iterator[CleanImage | Rejected]:
        files = published_images.load(self.config.images)
        missing = 0
        for record in records:
            data = files.read(record.files, self.config.max_megabytes << 20)
            if isinstance(data, Rejected):
                missing += data.reason == published_images.MISSING
                yield data
            else:
                yield clean_image(data, self.config.policy)
        if missing == len(records) >= _FEW:
            raise FileNotFoundError(
                f"{self.config.images}: not one of {missing} images is there, such as "
                f"{records[0].files[0]}: is it the right folder?"
            )


@dataclass(frozen=True)
class FileWorker:
    """An archive or folder of images, or a text file -> its records, in its order."""

    config: IngestConfig
    dataset: Dataset
    mark: str
    held_out: tuple[leaks.Source, ...] = ()

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        spill = _Spill(self, unit["name"])
        pictures = leaks.load(self.dataset.store.uri, self.held_out)
        for item in chosen(_read(unit, self.config), self.config):
            part = spill.part()
            if isinstance(item, Malformed):
                part.set_aside(item.where, item.url, item.reason, item.detail, "annotations")
            elif isinstance(item, ImageRecord):
                self._image(part, item, pictures)
            elif isinstance(item, HeldOut):
                part.set_aside(item.record.id, item.record.url, item.reason, "", "annotations")
            else:
                self._text(part, item.id, item.text)
        return spill.finish()

    def _image(self, part: Part, item: ImageRecord, pictures: leaks.HeldOutPictures) -> None:
        kept = sifted(part, item, self.config)
        if kept is None:
            return
        record, refused = kept
        image = clean_image(record.data or b"", self.config.policy)
        if isinstance(image, Rejected):
            part.set_aside(record.id, record.url, image.reason, image.detail, image.stage)
        else:
            part.add_image(record, refused, image, source_name(self.config), pictures)

    def _text(self, part: Part, id: str, text: str) -> None:
        name = self.config.short_name
        refused = refuse_language(text, self.config.language)
        if refused:
            # The full text is not copied: its id says where to find it.
            detail = f"{refused.detail}: {text[:200]}"
            part.set_aside(f"{name}/{id}", "", refused.reason, detail, "filter")
        else:
            part.add_text(f"{name}/{id}", text, name)


class _Spill:
    """The parts of one unit: the first is the unit's own, further ones are written as they fill.

    Their names sort in the order of the records, and `further_parts` finds them. The unit's record
    is written last, so an interrupted unit is made again, into the same parts.
    """

    def __init__(self, worker: FileWorker, name: str) -> None:
        self.worker, self.name = worker, name
        text = worker.dataset.name.startswith("text/")
        self.schema = TEXT_SCHEMA if text else IMAGE_SCHEMA
        self.most = worker.config.part_megabytes << 20
        self.first: PartOutput | None = None
        self.count = 0
        self.current = Part(self.schema)

    def part(self) -> Part:
        """The part that the next row goes into."""
        full = self.current.counts["bytes"] >= self.most
        if full or len(self.current.aside) >= MOST_ASIDE:
            self._close()
        return self.current

    def finish(self) -> PartOutput:
        if self.first is None or not self.current.empty:
            self._close()
        assert self.first is not None
        return self.first

    def _close(self) -> None:
        output, self.current = self.current.output(), Part(self.schema)
        if self.first is None:
            self.first = output
            return
        self.count += 1
        self.worker.dataset.write_part(
            self.worker.mark,
            f"{self.name}-{self.count:05d}",
            output.table,
            set_aside=output.set_aside,
            stats=output.stats,
        )


def further_parts(dataset: Dataset, mark: str, units: Iterable[str]) -> list[PartRecord]:
    """The parts that units wrote beyond their first."""
    names = set(units)
    found = dataset.finished_parts(mark)
    return [r for name, r in found.items() if name not in names and name.partition("-")[0] in names]


def source_name(config: IngestConfig) -> str:
    """The value of the column `source`."""
    own = getattr(sources.load(config.source), "OWN", False)
    return config.short_name if own else config.source


def _read(unit: dict[str, Any], config: IngestConfig) -> Iterator[ImageItem | TextItem]:
    source = sources.load(config.source)
    folder = Store(config.annotations)
    if "folder" in unit:
        yield from source.read_folder(folder, unit["folder"], config.options)
        return
    with folder.fs.open_input_file(folder.path(unit["file"])) as native:
        raw = cast(io.RawIOBase, native)
        if "start" in unit:
            raw = _Window(native, unit["start"], unit["bytes"])
        stream = cast(BinaryIO, io.BufferedReader(raw, _READ_AHEAD))
        yield from source.read_file(stream, unit["file"], config.options)


class _Window(io.RawIOBase):
    """A range of `size` bytes of a file, from `start` on."""

    def __init__(self, stream: Any, start: int, size: int) -> None:
        self.stream, self.left = stream, size
        stream.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = self.stream.read(min(len(buffer), self.left))
        buffer[: len(data)] = data
        self.left -= len(data)
        return len(data)
