"""Writes a small world, source by source."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from PIL import Image, ImageOps

from . import formats, texts
from .draw import suffix
from .formats import Photo, Place
from .language import caption, statement
from .pictures import Picture, picture
from .scenes import derive, synset_kind
from .server import FAILURES, REDIRECT
from .world import World, WorldSize, load

_VERSION = 3  # raised when equal arguments no longer give equal files
_BAD_WEIGHTS = {
    "404": 33,
    "403": 12,
    "timeout": 7,
    "html": 12,
    "truncated": 12,
    "zero": 8,
    REDIRECT: 16,
}
_COCO_IDS = {"train": 100_000, "val": 400_000, "test": 600_000}  # the first of each part
_COCO_GAP = 37
_STATEMENTS = 4  # of NLVR2, per pair of images


def generate(
    root: Path | str,
    *,
    seed: int = 0,
    size: WorldSize | None = None,
    base_url: str,
    progress: Callable[[int, int], None] | None = None,
) -> World:
    """Write the world of these arguments under `root`, or return it if it is there already.

    An interrupted generation resumes where it was. `base_url` is where `web/` will be served, such
    as "http://127.0.0.1:8123"; `progress` is called with the numbers of images done and in total.

    Raises:
        ValueError: `root` holds a world, or part of one, made with other arguments.
    """
    root, size, base_url = Path(root), size or WorldSize(), base_url.rstrip("/")
    wanted = {"version": _VERSION, "seed": seed, "base_url": base_url, "size": asdict(size)}
    whole, begun = root / "world.json", root / "world.begun.json"
    for file in (whole, begun):
        if file.exists():
            _check_same(root, json.loads(file.read_text()), wanted)
    if not whole.exists():
        _write(begun, json.dumps(wanted))
        world = _Writer(World(root, seed, size, base_url), progress).run()
        _write(whole, json.dumps({**wanted, **world.found()}, indent=1))
    begun.unlink(missing_ok=True)
    return load(root)


def coco_picture(seed: int, image_id: int) -> Picture:
    """Return the picture with this COCO id in the world `seed`.

    Raises:
        ValueError: the id is below all ids of a world.
    """
    begun = [part for part, first in _COCO_IDS.items() if first <= image_id]
    if not begun:
        raise ValueError(f"image_id: {image_id} is none of a sample world's")
    part = begun[-1]
    return picture(seed, f"coco/{part}/{(image_id - _COCO_IDS[part]) // _COCO_GAP}")


def _check_same(root: Path, there: dict, wanted: dict) -> None:
    def flat(record: dict) -> dict[str, object]:
        sizes = {f"size.{name}": value for name, value in record["size"].items()}
        return {name: record[name] for name in ("version", "seed", "base_url")} | sizes

    old, new = flat(there), flat(wanted)
    names = sorted(old.keys() | new.keys())
    differing = [
        f"{name} is {old.get(name)!r} there, {new.get(name)!r} was asked for"
        for name in names
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise ValueError(
            f"{root} holds a world of other arguments: {'; '.join(differing)}. "
            "Ask for the same, or choose another folder, or delete this one first."
        )


def _write(path: Path, content: str | bytes) -> None:
    """Write a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    passing = path.with_name(f"{path.name}.{os.getpid()}.part")
    passing.write_bytes(data)
    passing.replace(path)


def _link(source: Path, path: Path) -> None:
    """Hard-link a file, or copy it if the file system has no hard links."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, path)
    except OSError:
        _write(path, source.read_bytes())


class _Writer:
    """Writes one world, source by source."""

    def __init__(self, world: World, progress: Callable[[int, int], None] | None) -> None:
        self.world, self.size, self.seed = world, world.size, world.seed
        self.progress = progress or (lambda done, total: None)
        self.behaviour: dict[str, str] = {}
        self.done = 0
        s = self.size
        self.total = s.cc3m + s.cc12m + s.sbu + s.coco_train + s.coco_val + s.coco_test
        self.total += (
            s.vg + s.flickr30k + s.imagenet + s.imagenet1k + 2 * math.ceil(s.nlvr2 / _STATEMENTS)
        )

    def run(self) -> World:
        photos = self.coco()
        self.conceptual("cc3m", self.size.cc3m)
        self.conceptual("cc12m", self.size.cc12m)
        self.sbu()
        self.genome(photos)
        self.flickr30k()
        self.imagenet()
        self.imagenet1k()
        self.nlvr2()
        self.vqa(photos)
        self.text()
        _write(self.world.web / "behaviour.json", json.dumps(self.behaviour, indent=0))
        return self.world

    # Files

    def annotate(self, source: str, files: Mapping[str, str | bytes]) -> None:
        for name, content in files.items():
            _write(self.world.root / "annotations" / source / name, content)

    def image(self, path: Path, make: Callable[[], bytes]) -> Path:
        """Write an image, unless an interrupted run already did."""
        if not path.exists():
            _write(path, make())
        self.step()
        return path

    def step(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)

    def publish(self, source: str, path: str, kind: str, made: Callable[[], bytes] | Path) -> str:
        """Put an image on the web under `path`, with the behaviour `kind`; return its URL.

        `made` makes the image, or is a file that holds it.
        """
        if kind:
            self.behaviour[path] = kind
        if kind == REDIRECT:
            self.world.redirects[source] = self.world.redirects.get(source, 0) + 1
        elif kind:
            failures = self.world.expected_failures.setdefault(source, {})
            failures[kind] = failures.get(kind, 0) + 1
        file = self.world.web / (("/moved" if kind == REDIRECT else "") + path).lstrip("/")
        if kind not in ("", REDIRECT, "truncated"):
            self.step()  # the image will never be sent
        elif isinstance(made, Path):
            _link(made, file)
            self.step()
        else:
            self.image(file, made)
        return self.world.base_url + path

    def behave(self, path: str, index: int, *, every_kind: bool = False) -> str:
        """Return the behaviour of a source's image `index`; "" is good.

        The first image is always good. With `every_kind`, the next few show one kind each, so that
        even the smallest world has them all.
        """
        if index == 0 or self.size.bad_share == 0:
            return ""
        if every_kind and index <= len(_BAD_WEIGHTS):
            return (*FAILURES, REDIRECT)[index - 1]
        rng = derive(self.seed, f"behaviour{path}")
        if rng.random() >= self.size.bad_share:
            return ""
        return rng.choices(list(_BAD_WEIGHTS), list(_BAD_WEIGHTS.values()))[0]

    # Pairs from the web

    def pairs(self, source: str, count: int) -> list[tuple[str, str]]:
        rows = []
        for i in range(count):
            shown, leak = self.leaked(i) if source == "cc12m" else (None, "")
            item = shown or picture(self.seed, f"{source}/{i}")
            text = caption(item.scene, derive(self.seed, f"{source}/{i}/caption"))
            path = f"/{source}/{i:05d}{suffix(item.form)}"
            kind = "" if leak else self.behave(path, i, every_kind=source == "cc3m")
            make = (lambda p=item: _reencoded(p)) if leak == "reencoded" else item.file
            rows.append((self.publish(source, path, kind, make), text))
        self.world.counts[source] = count
        return rows

    def leaked(self, index: int) -> tuple[Picture | None, str]:
        """Return the COCO test image leaked at this position of a crawl, and in which form."""
        block, place = divmod(index, 50)
        guise = {5: "copy", 6: "reencoded"}.get(place, "")
        number = 2 * block + (place - 5)
        if not guise or number >= self.size.coco_test:
            return None, ""
        leaks = self.world.expected_leaks.setdefault("cc12m", {})
        leaks[guise] = leaks.get(guise, 0) + 1
        return picture(self.seed, f"coco/test/{number}"), guise

    def conceptual(self, source: str, count: int) -> None:
        rows = self.pairs(source, count)
        text, broken = formats.conceptual_tsv(rows, url_first=source == "cc12m")
        name = "cc12m.tsv" if source == "cc12m" else "Train_GCC-training.tsv"
        self.annotate(source, {name: text})
        self.world.expected_malformed[source] = broken

    def sbu(self) -> None:
        text, broken = formats.sbu_json(self.pairs("sbu", self.size.sbu))
        self.annotate("sbu", {"sbu-captions-all.json": text})
        self.world.expected_malformed["sbu"] = broken

    def coco(self) -> list[Photo]:
        photos = [
            self.coco_photo(part, i)
            for part, count in (
                ("train", self.size.coco_train),
                ("val", self.size.coco_val),
                ("test", self.size.coco_test),
            )
            for i in range(count)
        ]
        for index, photo in enumerate(photos):
            file = self.world.root / "images/coco" / photo.folder / photo.file_name
            if not file.exists():
                _write(file, photo.picture.file())
            path = f"/coco/{photo.release}/{photo.id:012d}.jpg"
            tested = photo.split in ("val", "test")
            self.publish("coco", path, "" if tested else self.behave(path, index), file)
        files, broken = formats.coco_files(photos, self.world.base_url)
        self.annotate("coco", files)
        self.annotate("coco", {"dataset_coco.json": formats.karpathy_json(photos, "coco")})
        self.world.counts["coco"] = len(photos)
        self.world.expected_malformed["coco"] = broken
        tests = [photo for photo in photos if photo.split in ("val", "test")]
        seen = [photo for photo in tests if photo.release == "train2017"]
        self.world.expected_leaks["coco"] = {"id": len(seen)}
        return photos

    def coco_photo(self, part: str, index: int) -> Photo:
        item = picture(self.seed, f"coco/{part}/{index}")
        rng = derive(self.seed, f"{item.name}/captions")
        captions = tuple(formats.sentence_case(caption(item.scene, rng), rng) for _ in range(5))
        # Ids with gaps, like the published ones.
        number = _COCO_IDS[part] + _COCO_GAP * index + rng.randrange(_COCO_GAP)
        split = "restval" if part == "train" and index % 8 == 7 else part
        # As in COCO: Karpathy's val and test images are partly in val2017, partly in train2017.
        release = "train2017" if part == "train" or index % 2 else "val2017"
        return Photo(number, item, captions, split, release)

    def genome(self, photos: list[Photo]) -> None:
        known = iter([p for p in photos if p.split in ("train", "restval")])
        tested = iter([p for p in photos if p.split in ("val", "test")])
        places, leaks = [], 0
        for i in range(self.size.vg):
            photo = next(tested if i % 6 == 5 else known, None) if i % 2 else None
            item = photo.picture if photo else picture(self.seed, f"vg/{i}")
            number = 2_300_000 + i
            path = f"/vg/VG_100K/{number}.jpg"
            if photo and photo.split in ("val", "test"):
                leaks += 1
                kind = ""
            else:
                kind = self.behave(path, i)
            made = item.file
            if photo:
                made = self.world.root / "images/coco" / photo.folder / photo.file_name
            url = self.publish("vg", path, kind, made)
            places.append(Place(number, item, url, photo.id if photo else None))
        files, broken = formats.genome_files(places)
        self.annotate("vg", files)
        self.world.counts["vg"] = len(places)
        self.world.expected_malformed["vg"] = broken
        self.world.expected_leaks["vg"] = {"id": leaks}

    # Data sets on disk

    def flickr30k(self) -> None:
        photos = []
        for i in range(self.size.flickr30k):
            item = picture(self.seed, f"flickr30k/{i}")
            rng = derive(self.seed, f"{item.name}/captions")
            captions = tuple(formats.sentence_case(caption(item.scene, rng), rng) for _ in range(5))
            split = ("train", "train", "val", "train", "test")[i % 5]
            photo = Photo(1_000_000 + 37 * i + rng.randrange(37), item, captions, split)
            self.image(self.world.root / f"images/flickr30k/{photo.id}.jpg", item.file)
            photos.append(photo)
        text = formats.karpathy_json(photos, "flickr30k")
        self.annotate("flickr30k", {"dataset_flickr30k.json": text})
        self.world.counts["flickr30k"] = len(photos)

    def synsets(self) -> list[str]:
        return [f"n{i + 1:08d}" for i in range(self.size.synsets)]

    def class_names(self) -> str:
        kinds = {wnid: synset_kind(wnid) for wnid in self.synsets()}
        return json.dumps({wnid: f"{k.colour} {k.shape}" for wnid, k in kinds.items()}, indent=1)

    def labelled(self, source: str, count: int) -> Iterable[tuple[int, str, int, Picture]]:
        """Yield each image's place in the source, class, number in the class, and picture."""
        wnids = self.synsets()
        for i in range(count):
            wnid, number = wnids[i % len(wnids)], i // len(wnids)
            yield i, wnid, number, picture(self.seed, f"{source}/{wnid}/{number}")

    def imagenet(self) -> None:
        members: dict[str, list[tuple[str, bytes]]] = {wnid: [] for wnid in self.synsets()}
        for _, wnid, number, item in self.labelled("imagenet", self.size.imagenet):
            members[wnid].append((f"{wnid}_{number}.JPEG", item.file()))
            self.step()
        tars = {f"{wnid}.tar": formats.tar_bytes(files) for wnid, files in members.items()}
        self.annotate("imagenet", {**tars, "classes.json": self.class_names()})
        self.world.counts["imagenet"] = self.size.imagenet

    def imagenet1k(self) -> None:
        folder = self.world.root / "annotations/imagenet1k"
        for _, wnid, number, item in self.labelled("imagenet1k", self.size.imagenet1k):
            # Every fifth from the second of a class on: each class has both splits early.
            split = "val" if number % 5 == 1 else "train"
            self.image(folder / split / wnid / f"{wnid}_{number}.JPEG", item.file)
        self.annotate("imagenet1k", {"classes.json": self.class_names()})
        self.world.counts["imagenet1k"] = self.size.imagenet1k

    def nlvr2(self) -> None:
        rows: dict[str, list[dict[str, object]]] = {"train": [], "dev": [], "test1": []}
        for pair in range(math.ceil(self.size.nlvr2 / _STATEMENTS)):
            split = ("train", "train", "dev", "train", "test1")[pair % 5]
            name = f"{split}-{10_000 + pair}-0"
            place = {"directory": pair % 3} if split == "train" else {}
            folder = "/".join(["nlvr2", split, *map(str, place.values())])
            items = [picture(self.seed, f"nlvr2/{pair}/{side}") for side in ("left", "right")]
            urls = []
            for i, item in enumerate(items):
                path = f"{folder}/{name}-img{i}.png"
                self.image(self.world.root / "images" / path, item.file)
                urls.append(f"{self.world.base_url}/{path}")
            rng = derive(self.seed, f"nlvr2/{pair}/statements")
            # Each pair has as many true statements as false ones: images alone tell nothing.
            truths = rng.sample((True, False) * (_STATEMENTS // 2), _STATEMENTS)
            truths = truths[: self.size.nlvr2 - _STATEMENTS * pair]
            for k, truth in enumerate(truths):
                sentence = statement(items[0].scene, items[1].scene, truth, rng)
                rows[split].append(
                    {
                        "sentence": sentence[0].upper() + sentence[1:] + ".",
                        "label": str(truth),
                        "identifier": f"{name}-{k}",
                        "left_url": urls[0],
                        "right_url": urls[1],
                        "writer": "0",
                        "validation": {"0": str(truth)},
                        "synset": "shape",
                        "query": "shapes0",
                        **place,
                    }
                )
        self.annotate("nlvr2", {f"{s}.json": formats.json_lines(r) for s, r in rows.items()})
        self.world.counts["nlvr2"] = self.size.nlvr2

    def vqa(self, photos: list[Photo]) -> None:
        # Restval images are skipped: they are in val2014, whose questions are all for testing here.
        parts = {
            "train2014": [photo for photo in photos if photo.split == "train"],
            "val2014": [photo for photo in photos if photo.split in ("val", "test")],
        }
        for subtype, about in parts.items():
            files = formats.vqa_files(about, subtype)
            self.annotate("vqa", files)
            annotated = json.loads(files[f"v2_mscoco_{subtype}_annotations.json"])["annotations"]
            self.world.counts[f"vqa_{subtype}"] = len(annotated)

    def text(self) -> None:
        count = self.size.text
        makers = {
            "wiki.jsonl": (texts.article, count - count * 2 // 5),
            "news.jsonl": (texts.news, count * 2 // 5),
        }
        for name, (make, number) in makers.items():
            documents = [
                {"text": make(derive(self.seed, f"text/{name}/{i}"))} for i in range(number)
            ]
            self.annotate("text", {name: formats.json_lines(documents)})
        books = 1 + count // 750
        for i in range(books):
            book = texts.book(derive(self.seed, f"text/books/{i}"))
            self.annotate("text", {f"books/book_{i + 1:02d}.txt": book})
        self.world.counts |= {"text": count, "books": books}


def _reencoded(item: Picture) -> bytes:
    """Return the picture as another site would show it: a little smaller, more compressed."""
    with Image.open(io.BytesIO(item.file())) as stored:
        image = ImageOps.exif_transpose(stored).convert("RGB")
    size = (round(image.width * 0.9), round(image.height * 0.9))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=75)
    return out.getvalue()
