"""Writes annotations in the published formats, as text that looks like each source's own files.

Each function takes records of the small world and returns the content of one file (or of several,
by name). Nothing here draws, downloads or decides what is in the world.
"""

from __future__ import annotations

import io
import json
import random
import re
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .language import human_answers, pixel_box, questions, region_phrases
from .pictures import Picture
from .scenes import SHAPES, derive

_DATE = "2017-09-02 12:00:00"
_INFO = {
    "description": "A small drawn world in COCO's format",
    "url": "",
    "version": "1.0",
    "year": 2017,
    "contributor": "beit3-ray",
    "date_created": "2017/09/01",
}
_LICENSES = [{"id": 1, "name": "No known copyright restrictions", "url": ""}]


@dataclass(frozen=True)
class Photo:
    """An image with captions, as in COCO and Flickr30k.

    `split` is Karpathy's: train, restval, val or test. `release` is the part of COCO 2017 that
    contains the image: train2017 or val2017 ("" for Flickr30k).
    """

    id: int
    picture: Picture
    captions: tuple[str, ...]
    split: str
    release: str = ""

    @property
    def folder(self) -> str:
        """COCO's folder of 2014: restval, val and test are all in val2014."""
        return "train2014" if self.split == "train" else "val2014"

    @property
    def file_name(self) -> str:
        """COCO's file name of 2014, such as COCO_val2014_000000000042.jpg."""
        return f"COCO_{self.folder}_{self.id:012d}.jpg"


@dataclass(frozen=True)
class Place:
    """An image of Visual Genome, with its COCO id if it is also in COCO."""

    id: int
    picture: Picture
    url: str
    coco_id: int | None


def conceptual_tsv(
    rows: Sequence[tuple[str, str]], *, url_first: bool
) -> tuple[str, dict[str, int]]:
    """Return a TSV of (url, caption) rows and its number of malformed lines by kind.

    CC3M has the caption first, CC12M the URL. The malformed lines are in addition to the rows: one
    without a tab, an empty one, one without a caption, one with a NUL in the caption.
    """

    def line(url: str, caption: str) -> str:
        return f"{url}\t{caption}" if url_first else f"{caption}\t{url}"

    lines = [line(url, caption) for url, caption in rows]
    broken = {
        "no_tab": f"a line without a tab {rows[0][0]}",
        "blank_line": "",
        "empty_caption": line(rows[0][0], ""),
        "nul": line(rows[0][0], "a circle\x00 on sand"),
    }
    for i, text in enumerate(broken.values(), start=1):
        lines.insert(i * len(lines) // (len(broken) + 1), text)
    return "\n".join(lines) + "\n", dict.fromkeys(broken, 1)


def sbu_json(rows: Sequence[tuple[str, str]]) -> tuple[str, dict[str, int]]:
    """Return SBU's parallel lists of (url, caption) rows, plus one entry with an empty caption."""
    entries = list(rows)
    entries.insert(len(entries) // 2, (rows[0][0], ""))
    data = {
        "image_urls": [url for url, _ in entries],
        "user_ids": [f"user{i % 37:02d}" for i in range(len(entries))],
        "captions": [caption for _, caption in entries],
    }
    return json.dumps(data), {"empty_caption": 1}


def coco_files(photos: Sequence[Photo], base_url: str) -> tuple[dict[str, str], dict[str, int]]:
    """Return captions_*2017.json and instances_*2017.json by name, and malformed counts.

    The training captions include one annotation that names a missing image.
    """
    files: dict[str, str] = {}
    for release in ("train2017", "val2017"):
        here = [photo for photo in photos if photo.release == release]
        head = {
            "info": _INFO,
            "licenses": _LICENSES,
            "images": [_coco_image(photo, base_url) for photo in here],
        }
        captions: list[dict[str, object]] = [
            {"id": photo.id * 10 + k, "image_id": photo.id, "caption": caption}
            for photo in here
            for k, caption in enumerate(photo.captions)
        ]
        if release == "train2017":
            captions.append({"id": 9, "image_id": 999_999_999, "caption": "A circle on sand."})
        instances = {
            "annotations": [instance for photo in here for instance in _coco_instances(photo)],
            "categories": [
                {"id": i, "name": shape, "supercategory": "shape"}
                for i, shape in enumerate(SHAPES, start=1)
            ],
        }
        files[f"captions_{release}.json"] = json.dumps({**head, "annotations": captions})
        files[f"instances_{release}.json"] = json.dumps({**head, **instances})
    return files, {"missing_image": 1}


def karpathy_json(photos: Sequence[Photo], dataset: str) -> str:
    """Return Karpathy's file of a data set ("coco" or "flickr30k") with its splits."""
    images: list[dict[str, object]] = []
    sentence_id = 0
    for index, photo in enumerate(photos):
        sentences = []
        for caption in photo.captions:
            tokens = re.findall(r"[a-z0-9]+", caption.lower())
            sentences.append(
                {"tokens": tokens, "raw": caption, "imgid": index, "sentid": sentence_id}
            )
            sentence_id += 1
        image: dict[str, object] = {
            "sentids": [sentence["sentid"] for sentence in sentences],
            "imgid": index,
            "sentences": sentences,
            "split": photo.split,
            "filename": photo.file_name if dataset == "coco" else f"{photo.id}.jpg",
        }
        if dataset == "coco":
            image |= {"filepath": photo.folder, "cocoid": photo.id}
        images.append(image)
    return json.dumps({"images": images, "dataset": dataset})


def genome_files(places: Sequence[Place]) -> tuple[dict[str, str], dict[str, int]]:
    """Return image_data.json and region_descriptions.json by name, and malformed counts.

    The first image has one extra region, whose phrase is empty.
    """
    images, regions = [], []
    for place in places:
        scene = place.picture.scene
        images.append(
            {
                "image_id": place.id,
                "url": place.url,
                "width": scene.width,
                "height": scene.height,
                "coco_id": place.coco_id,
                "flickr_id": None if place.coco_id is None else place.coco_id + 5_000_000,
            }
        )
        phrases = region_phrases(scene, derive(place.picture.seed, f"vg/{place.id}/regions"))
        if place is places[0]:
            phrases.append(("", (0, 0, scene.width, scene.height)))
        regions.append(
            {
                "id": place.id,
                "regions": [
                    {
                        "region_id": place.id * 100 + k,
                        "image_id": place.id,
                        "phrase": phrase,
                        "x": x,
                        "y": y,
                        "width": width,
                        "height": height,
                    }
                    for k, (phrase, (x, y, width, height)) in enumerate(phrases)
                ],
            }
        )
    files = {
        "image_data.json": json.dumps(images),
        "region_descriptions.json": json.dumps(regions),
    }
    return files, {"empty_phrase": 1}


def vqa_files(photos: Sequence[Photo], subtype: str) -> dict[str, str]:
    """Return VQAv2's questions and annotations about the photos, of "train2014" or "val2014"."""
    head = {
        "info": {
            **_INFO,
            "description": "Questions on a small drawn world, in VQA v2's format",
            "version": "2.0",
        },
        "data_type": "mscoco",
        "data_subtype": subtype,
        "license": _LICENSES[0],
    }
    asked: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for photo in photos:
        rng = derive(photo.picture.seed, f"{photo.picture.name}/questions")
        for k, question in enumerate(questions(photo.picture.scene, rng, rng.randint(3, 4))):
            key = {"image_id": photo.id, "question_id": photo.id * 1000 + k}
            answers = human_answers(question, rng)
            asked.append({**key, "question": question.text[0].upper() + question.text[1:]})
            annotations.append(
                {
                    **key,
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer": answer, "answer_confidence": sure, "answer_id": i}
                        for i, (answer, sure) in enumerate(answers, start=1)
                    ],
                }
            )
    open_ended = {**head, "task_type": "Open-Ended", "questions": asked}
    return {
        f"v2_OpenEnded_mscoco_{subtype}_questions.json": json.dumps(open_ended),
        f"v2_mscoco_{subtype}_annotations.json": json.dumps({**head, "annotations": annotations}),
    }


def json_lines(rows: Iterable[object]) -> str:
    """Return the rows as JSON, one per line."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def tar_bytes(members: Sequence[tuple[str, bytes]]) -> bytes:
    """Return a tar of (name, content) members; equal members give equal bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def sentence_case(caption: str, rng: random.Random) -> str:
    """Return a caption in COCO's style: with a capital letter, mostly with a full stop."""
    return caption[0].upper() + caption[1:] + ("." if rng.random() < 0.8 else "")


def _coco_image(photo: Photo, base_url: str) -> dict[str, object]:
    name = f"{photo.id:012d}.jpg"
    return {
        "license": 1,
        "file_name": name,
        "coco_url": f"{base_url}/coco/{photo.release}/{name}",
        # The photographers' own pages are gone, as many are in reality.
        "flickr_url": f"{base_url}/flickr/{photo.id}_z.jpg",
        "height": photo.picture.scene.height,
        "width": photo.picture.scene.width,
        "date_captured": _DATE,
        "id": photo.id,
    }


def _coco_instances(photo: Photo) -> list[dict[str, object]]:
    scene = photo.picture.scene
    return [
        {
            "id": photo.id * 10 + k,
            "image_id": photo.id,
            "category_id": SHAPES.index(thing.kind.shape) + 1,
            "iscrowd": 0,
            "area": round(thing.area(), 2),
            "bbox": list(pixel_box(scene, thing.box())),
            "segmentation": [[round(v, 2) for point in thing.outline() for v in point]],
        }
        for k, thing in enumerate(scene.things)
    ]
