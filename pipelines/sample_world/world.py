"""The small world on disk: how much of each source there is, and where it is stored."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_FOUND = ("counts", "expected_failures", "redirects", "expected_malformed", "expected_leaks")


@dataclass(frozen=True)
class WorldSize:
    """How much of each source to make; the defaults suit a demo.

    Fields count images, except `text` (documents) and `nlvr2` (statements: four per pair of
    images); about half the images of `vg` are COCO's. `bad_share` is the share of URLs that
    misbehave.
    """

    cc3m: int = 500
    cc12m: int = 600
    sbu: int = 400
    coco_train: int = 700
    coco_val: int = 150
    coco_test: int = 200
    vg: int = 400
    flickr30k: int = 200
    imagenet: int = 300
    synsets: int = 10
    imagenet1k: int = 200
    text: int = 3000
    nlvr2: int = 600
    bad_share: float = 0.12

    def __post_init__(self) -> None:
        for item in fields(self):
            if item.name != "bad_share" and getattr(self, item.name) < 1:
                raise ValueError(f"{item.name} must be at least 1, not {getattr(self, item.name)}")
        if self.synsets > 35:
            raise ValueError(f"there are 35 classes; synsets={self.synsets} asks for more")
        if not 0 <= self.bad_share <= 1:
            raise ValueError(f"bad_share must lie between 0 and 1, not {self.bad_share}")

    @classmethod
    def tiny(cls) -> WorldSize:
        """Return the size for tests: all of the formats and failures, generated within a second."""
        return cls(
            cc3m=24,
            cc12m=16,
            sbu=10,
            coco_train=16,
            coco_val=6,
            coco_test=6,
            vg=12,
            flickr30k=12,
            imagenet=12,
            synsets=4,
            imagenet1k=16,
            text=40,
            nlvr2=40,
        )

    @classmethod
    def of_rows(cls, rows: int) -> WorldSize:
        """Return a size for scaling trials, with `rows` records in the sources of pretraining.

        These are CC3M, CC12M, SBU, COCO, Visual Genome, ImageNet-21K and the documents; books come
        in addition. The sources for finetuning are as small as possible.
        """
        if rows < 500:
            raise ValueError(f"rows must be at least 500, not {rows}")
        size = cls(
            cc3m=rows * 20 // 100,
            cc12m=rows * 24 // 100,
            sbu=rows * 12 // 100,
            coco_train=rows * 11 // 100,
            coco_val=rows // 200,
            coco_test=rows // 200,
            vg=rows * 12 // 100,
            flickr30k=1,
            imagenet=rows * 8 // 100,
            synsets=35,
            imagenet1k=1,
            text=1,
            nlvr2=1,
        )
        coco = size.coco_train + size.coco_val + size.coco_test
        images = size.cc3m + size.cc12m + size.sbu + coco + size.vg + size.imagenet
        return replace(size, text=rows - images)


@dataclass
class World:
    """A generated world.

    Attributes:
        root: the folder it is in.
        seed, size, base_url: the arguments it was generated with.
        counts: images (text: documents, vqa and nlvr2: questions and statements) by source.
        expected_failures: URLs that yield no image, by source and kind (`server.FAILURES`).
        redirects: URLs that yield their image after a redirect, by source.
        expected_malformed: broken records in the annotation files, by source and kind; in addition
            to the counts.
        expected_leaks: images that must not reach pretraining, since a downstream val or test set
            also holds them, by source and the way to find them: "id" (COCO's), "copy" (the same
            bytes) or "reencoded" (the same picture, smaller and at another quality).
    """

    root: Path
    seed: int
    size: WorldSize
    base_url: str
    counts: dict[str, int] = field(default_factory=dict)
    expected_failures: dict[str, dict[str, int]] = field(default_factory=dict)
    redirects: dict[str, int] = field(default_factory=dict)
    expected_malformed: dict[str, dict[str, int]] = field(default_factory=dict)
    expected_leaks: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def web(self) -> Path:
        """The folder that the server serves."""
        return self.root / "web"

    @property
    def port(self) -> int:
        """The port of base_url, for `serve(world.root, port=world.port)`."""
        parts = urlsplit(self.base_url)
        return parts.port or (443 if parts.scheme == "https" else 80)

    def annotations(self, source: str) -> Path:
        """Return the folder of a source's annotation files; raises KeyError if it has none."""
        return self._folder("annotations", source)

    def images(self, source: str) -> Path:
        """Return the folder of a downstream data set's images; raises KeyError if it has none."""
        return self._folder("images", source)

    def _folder(self, kind: str, source: str) -> Path:
        path = self.root / kind / source
        if not path.is_dir():
            there = ", ".join(sorted(p.name for p in (self.root / kind).iterdir()))
            raise KeyError(f"the world has no {kind} of {source!r}, only of {there}")
        return path

    def found(self) -> dict[str, Any]:
        """The counts from when the world was generated."""
        return {name: getattr(self, name) for name in _FOUND}


def load(root: Path | str) -> World:
    """Return the world under `root`; raises FileNotFoundError if it is missing or incomplete."""
    root = Path(root)
    data = json.loads((root / "world.json").read_text())
    found = {name: data[name] for name in _FOUND}
    return World(root, data["seed"], WorldSize(**data["size"]), data["base_url"], **found)
