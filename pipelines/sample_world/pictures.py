"""Pictures by name: scene and file are a function of a seed and a name, and of nothing else.

Names begin with their source: "cc3m/12", "coco/test/3", "imagenet/n00000004/7". So a seed and a
name suffice to tell what is in a picture, without its file.
"""

from __future__ import annotations

from dataclasses import dataclass

from .draw import encode, paint
from .scenes import Scene, derive, sample_scene, synset_kind

_WEB = {"jpeg": 68, "png": 9, "grey": 6, "cmyk": 4, "palette": 4, "alpha": 4, "exif": 5}
_PHOTO = {"jpeg": 84, "grey": 6, "cmyk": 4, "exif": 6}
_LABELLED = {"jpeg": 90, "cmyk": 5, "exif": 5}  # no grey: the class may be a colour
_PAIRED = {"png": 84, "palette": 8, "alpha": 8}
_MIXES: dict[str, dict[str, int]] = {
    "cc3m": _WEB,
    "cc12m": _WEB,
    "sbu": _PHOTO,
    "coco": _PHOTO,
    "vg": _PHOTO,
    "flickr30k": _PHOTO,
    "imagenet": _LABELLED,
    "imagenet1k": _LABELLED,
    "nlvr2": _PAIRED,
}


@dataclass(frozen=True)
class Picture:
    """A scene and the format of its file (one of `draw.FORMATS`)."""

    seed: int
    name: str
    scene: Scene
    form: str

    def file(self) -> bytes:
        """Return the encoded image."""
        rng = derive(self.seed, f"{self.name}/drawing")
        return encode(paint(self.scene, rng), self.form, rng)


def picture(seed: int, name: str) -> Picture:
    """Return the picture `name` of the world `seed`; raises KeyError for an unknown source."""
    source, *rest = name.split("/")
    mix = _MIXES[source]
    rng = derive(seed, name)
    form = rng.choices(list(mix), list(mix.values()))[0]
    wanted = next((part for part in rest if part.startswith("n0")), None)
    kind = synset_kind(wanted) if wanted else None
    return Picture(seed, name, sample_scene(rng, grey=form == "grey", kind=kind), form)
