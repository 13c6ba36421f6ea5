"""The small drawn world: deterministic, true to its captions, badly served."""

from __future__ import annotations

import collections
import hashlib
import http.client
import io
import json
import math
import re
import tarfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from pipelines.sample_world import (
    FAILURES,
    Scene,
    Server,
    Thing,
    World,
    WorldSize,
    generate,
    load,
    picture,
    serve,
    synset,
    synset_kind,
)
from pipelines.sample_world.draw import FORMATS
from pipelines.sample_world.language import (
    caption,
    human_answers,
    questions,
    region_phrases,
    statement,
)
from pipelines.sample_world.scenes import BACKGROUNDS, COLOURS, SHAPES, derive

SEED = 3


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Server]]:
    """A tiny world and the server that stood there before it was generated."""
    root = tmp_path_factory.mktemp("world")
    with serve(root) as server:
        yield generate(root, seed=SEED, size=WorldSize.tiny(), base_url=server.url), server


@pytest.fixture(scope="module")
def world(served: tuple[World, Server]) -> World:
    return served[0]


@pytest.fixture(scope="module")
def behaviour(world: World) -> dict[str, str]:
    return json.loads((world.web / "behaviour.json").read_text())


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def read(world: World, source: str, name: str):
    return json.loads((world.annotations(source) / name).read_text())


# An independent reader of the captions: a small grammar, judged against the things' geometry.

NOUN = re.compile(
    r"\b(?P<count>an?|one|two|three) (?P<size>small |large )?(?P<texture>plain |striped |dotted )?"
    rf"(?P<colour>(?:{'|'.join(COLOURS)}) )?(?P<shape>{'|'.join(SHAPES)}|object)(?:es|s)?\b"
)
PLACES = ("sand", "grass", "night sky", "snow", "brick wall", "water")
COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}


def fits(thing: Thing, noun: re.Match[str]) -> bool:
    kind = thing.kind
    return all(
        noun[part] is None or noun[part].strip() == getattr(kind, part)
        for part in ("size", "texture", "colour")
    ) and noun["shape"] in (kind.shape, "object")


def stands(a: Thing, b: Thing, how: str) -> bool:
    """Judge by centres and boxes, with a margin of its own."""
    dx, dy = b.x - a.x, b.y - a.y
    away = {"left": dx, "right": -dx, "above": dy, "below": -dy, "under": -dy}[how]
    across = dy if how in ("left", "right") else dx
    return away > 1.5 * abs(across) and away > (a.diameter + b.diameter) * 0.35


def check_caption(text: str, scene: Scene) -> None:
    """Fail unless every noun, number, place and relation of the caption is right."""
    text = text.lower().rstrip(".")
    named = [place for place in PLACES if re.search(rf"\b{place}\b", text)]
    assert named in ([], [scene.background]), text
    if scene.grey:
        assert not any(re.search(rf"\b{colour}\b", text) for colour in COLOURS), text
    nouns = list(NOUN.finditer(text))
    assert nouns, text
    for noun in nouns:
        fitting = [thing for thing in scene.things if fits(thing, noun)]
        if noun["count"] in ("a", "an"):
            assert fitting, f"{text}: no {noun[0]}"
            following = noun[0].split()[1]
            assert noun["count"] == ("an" if following[0] in "aeiou" else "a"), text
        else:
            assert len(fitting) == COUNTS[noun["count"]], text
        assert noun[0].endswith("s") == (COUNTS[noun["count"]] > 1 or noun["shape"] == "cross")
    middle = text[nouns[0].end() : nouns[1].start()] if len(nouns) == 2 else ""
    how = re.search(r"\b(left|right|above|below|under)\b", text)
    if how:
        assert len(nouns) == 2 and len(scene.groups()) == len(scene.things), text
        subject, anchor = nouns[::-1] if " with " in middle else nouns
        # A vague phrase may fit several things; then some pair of them must stand so.
        pairs = [
            (a, b)
            for a in scene.things
            for b in scene.things
            if a is not b and fits(a, subject) and fits(b, anchor)
        ]
        assert any(stands(a, b, how[1]) for a, b in pairs), text
    leftover = NOUN.sub("", text)
    for words in (
        *("to the left of", "left of", "to the right of", "right of", "above", "below", "under"),
        *("to its left", "to its right", "a picture of", "a drawing of", "this is", "here are"),
        *("here is", "in front of a brick wall", "on a brick wall", "in the night sky"),
        *("in a night sky", "in the snow", "on snow", "on sand", "on grass", "on water"),
        *("with", "and", "it", ","),
    ):
        leftover = leftover.replace(words, "")
    assert not leftover.strip(), f"unread words {leftover!r} in {text!r}"


def scenes(count: int, source: str = "cc3m") -> Iterator[tuple[int, Scene]]:
    for i in range(count):
        yield i, picture(SEED, f"{source}/{i}").scene


def test_scenes_are_well_formed() -> None:
    copies = 0
    for _, scene in scenes(600):
        short = min(scene.width, scene.height)
        kinds = [kind for kind, _ in scene.groups()]
        assert 64 <= short <= 160 and 1 <= len(scene.things) <= 3
        assert len({kind.shape for kind in kinds}) == len({kind.colour for kind in kinds})
        assert len({kind.shape for kind in kinds}) == len(kinds)
        copies += scene.has_copies()
        for thing in scene.things:
            left, top, right, bottom = thing.box()
            assert left >= 0 and top >= 0 and right <= scene.width and bottom <= scene.height
            share = thing.diameter / short
            least, most = (0.28, 0.33) if thing.kind.size == "small" else (0.42, 0.5)
            assert least - 1e-9 <= share <= most + 1e-9
        boxes = [thing.box() for thing in scene.things]
        for i, a in enumerate(boxes):
            for b in boxes[:i]:
                assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    assert 0.18 < copies / 600 < 0.32


def test_captions_and_region_phrases_are_true() -> None:
    relations: collections.Counter[str] = collections.Counter()
    for i, scene in scenes(800):
        rng = derive(SEED, f"check/{i}")
        for _ in range(3):
            text = caption(scene, rng)
            check_caption(text, scene)
            relations.update(re.findall(r"left|right|above|below|under", text))
        for phrase, (x, y, width, height) in region_phrases(scene, rng):
            check_caption(phrase, scene)
            assert x >= 0 and y >= 0 and x + width <= scene.width and y + height <= scene.height
    assert all(relations[how] > 40 for how in ("left", "right", "above", "below", "under"))


def answer(text: str, scene: Scene) -> str:
    """Answer a question about a scene, independently of how it was asked."""
    words = text.lower().rstrip("?").split()
    singular = {form: shape for shape in SHAPES for form in (shape, shape + "s", shape + "es")}
    if text == "what is in the background?":
        return scene.background
    if words[:2] == ["how", "many"]:
        shape = singular.get(words[2])
        return str(sum(shape in (None, thing.kind.shape) for thing in scene.things))
    if words[:2] == ["is", "there"]:
        looks = [{thing.kind.shape, thing.kind.colour} for thing in scene.things]
        return "yes" if any(set(words[3:]) <= look for look in looks) else "no"
    if words[:2] == ["what", "is"]:
        anchor = next(thing for thing in scene.things if thing.kind.shape == words[-1])
        how = next(word for word in words if word in ("left", "right", "above", "below"))
        there = {t.kind.shape for t in scene.things if t is not anchor and stands(t, anchor, how)}
        assert len(there) == 1
        return there.pop()
    named = {"color": "colour"}.get(words[1], words[1])
    if named == "shape":
        found = {t.kind.shape for t in scene.things if t.kind.colour == words[4]}
    else:
        shape = singular[words[-1]]
        found = {getattr(t.kind, named) for t in scene.things if t.kind.shape == shape}
    assert len(found) == 1
    return found.pop()


def test_questions_have_true_answers_and_people_mostly_agree() -> None:
    yes_no: collections.Counter[str] = collections.Counter()
    kinds: collections.Counter[str] = collections.Counter()
    for i, scene in scenes(700, "coco"):
        rng = derive(SEED, f"ask/{i}")
        for question in questions(scene, rng, 4):
            assert answer(question.text, scene) == question.answer, question.text
            assert question.text.startswith(question.question_type + " ")
            assert not (scene.grey and ("color" in question.text or question.answer in COLOURS))
            people = [said for said, _ in human_answers(question, rng)]
            assert len(people) == 10 and people.count(question.answer) >= 8
            kinds[question.answer_type] += 1
            if question.answer_type == "yes/no":
                yes_no[question.answer] += 1
    assert set(kinds) == {"yes/no", "number", "other"}
    assert 0.42 < yes_no["yes"] / yes_no.total() < 0.58


def judge(text: str, left: Scene, right: Scene) -> bool:
    """Judge a statement about two images, independently of how it was made."""
    numbers = ("no", "one", "two", "three", "four", "five", "six")
    a, b = len(left.things), len(right.things)
    if found := re.fullmatch(r"there are (\w+) objects in total", text):
        return a + b == numbers.index(found[1])
    if found := re.fullmatch(r"the (left|right) image contains more objects than .*", text):
        return a > b if found[1] == "left" else b > a
    if found := re.fullmatch(r"the background of the (left|right) image is (?:a |the )?(.*)", text):
        assert found[2] in BACKGROUNDS
        return (left if found[1] == "left" else right).background == found[2]
    noun = NOUN.search(text)
    assert noun, text
    holding = [any(fits(thing, noun) for thing in scene.things) for scene in (left, right)]
    if found := re.fullmatch(r"there is .* in the (left|right) image", text):
        return holding[found[1] == "right"]
    return sum(holding) == {"both": 2, "exactly": 1}[text.split()[0]]


def test_statements_are_as_true_as_labelled() -> None:
    for i in range(400):
        left, right = (picture(SEED, f"nlvr2/{i}/{side}").scene for side in ("left", "right"))
        for truth in (True, False):
            text = statement(left, right, truth, derive(SEED, f"say/{i}/{truth}"))
            assert judge(text, left, right) == truth, text


def test_words_alone_hardly_tell_whether_a_statement_is_true() -> None:
    seen: dict[str, list[bool]] = collections.defaultdict(list)
    right: list[bool] = []
    for i in range(4000):
        left, other = (picture(SEED, f"nlvr2/{i}/{side}").scene for side in ("left", "right"))
        for truth in (True, False):
            text = statement(left, other, truth, derive(SEED, f"say/{i}/{truth}"))
            if i < 3000:
                seen[text].append(truth)
            else:
                right.append((sum(seen[text]) > len(seen[text]) / 2) == truth)
    assert 0.45 < sum(right) / len(right) < 0.53


def test_classes_are_shape_and_colour() -> None:
    ids = [f"n{i:08d}" for i in range(1, 36)]
    assert [synset(synset_kind(wnid)) for wnid in ids] == ids
    scene = picture(SEED, "imagenet/n00000004/5").scene
    assert [synset(thing.kind) for thing in scene.things] == ["n00000004"]
    with pytest.raises(ValueError, match="n00000036"):
        synset_kind("n00000036")


@pytest.mark.parametrize("form", FORMATS)
def test_every_format_shows_the_scene_upright(form: str) -> None:
    names = (f"{source}/{i}" for i in range(400) for source in ("cc3m", "coco", "nlvr2"))
    item = next(
        item
        for item in (picture(SEED, name) for name in names)
        if item.form == form and item.scene.width != item.scene.height
    )
    with Image.open(io.BytesIO(item.file())) as stored:
        expected = {"grey": ("JPEG", "L"), "cmyk": ("JPEG", "CMYK"), "palette": ("PNG", "P")}
        expected |= {"alpha": ("PNG", "RGBA"), "png": ("PNG", "RGB")}
        assert (stored.format, stored.mode) == expected.get(form, ("JPEG", "RGB"))
        assert (stored.getexif().get(0x0112, 1) != 1) == (form == "exif")
        upright = ImageOps.exif_transpose(stored).convert("RGB")
    assert upright.size == (item.scene.width, item.scene.height)
    for thing in item.scene.things:
        if thing.kind.texture != "plain" or form == "grey":
            continue
        pixel = upright.getpixel((int(thing.x), int(thing.y)))
        assert isinstance(pixel, tuple)
        distances = {name: math.dist(pixel, colour) for name, colour in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == thing.kind.colour


def test_equal_arguments_give_equal_bytes(world: World, tmp_path: Path) -> None:
    generate(tmp_path, seed=SEED, size=WorldSize.tiny(), base_url=world.base_url)
    assert digests(tmp_path) == digests(world.root)


def test_a_second_call_changes_nothing_and_others_are_refused(world: World) -> None:
    stamp = (world.root / "world.json").stat().st_mtime_ns
    again = generate(world.root, seed=SEED, size=WorldSize.tiny(), base_url=world.base_url + "/")
    assert again == load(world.root) == world
    assert (world.root / "world.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match=r"seed is 3 there, 4 was asked for.*another folder"):
        generate(world.root, seed=4, size=WorldSize.tiny(), base_url=world.base_url)
    with pytest.raises(ValueError, match=r"size\.cc3m is 24 there, 500"):
        generate(world.root, seed=SEED, base_url=world.base_url)


def test_an_interrupted_generation_goes_on(world: World, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == total // 2:
            raise Interrupted

    arguments = {"size": WorldSize.tiny(), "base_url": world.base_url}
    with pytest.raises(Interrupted):
        generate(tmp_path, seed=SEED, progress=stop, **arguments)
    with pytest.raises(FileNotFoundError):
        load(tmp_path)
    with pytest.raises(ValueError, match="seed is 3 there"):
        generate(tmp_path, seed=SEED + 1, **arguments)
    steps: list[tuple[int, int]] = []
    generate(tmp_path, seed=SEED, progress=lambda *step: steps.append(step), **arguments)
    assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1))
    assert digests(tmp_path) == digests(world.root)


def test_image_is_the_same_whatever_else_is_generated(world: World, tmp_path: Path) -> None:
    size = WorldSize(3, 7, 1, 2, 1, 2, 1, 1, 1, 1, 1, 1, 1, bad_share=0.0)
    other = generate(tmp_path, seed=SEED, size=size, base_url="http://example.org")
    assert not other.expected_failures and other.port == 80
    ours = digests(world.web)
    shared = digests(other.web).items()
    shared = {name: digest for name, digest in shared if name in ours and name.endswith("g")}
    assert len(shared) > 8
    assert shared == {name: ours[name] for name in shared}


def test_pair_lists(world: World, behaviour: dict[str, str]) -> None:
    for source, name in (("cc3m", "Train_GCC-training.tsv"), ("cc12m", "cc12m.tsv")):
        lines = (world.annotations(source) / name).read_text().split("\n")[:-1]
        broken = world.expected_malformed[source]
        assert len(lines) == world.counts[source] + sum(broken.values())
        good = 0
        for line in lines:
            fields = line.split("\t")
            if len(fields) != 2 or not all(fields) or "\0" in line:
                continue
            url, text = fields if source == "cc12m" else fields[::-1]
            path = url.removeprefix(world.base_url)
            index = int(Path(path).stem)
            good += 1
            if behaviour.get(path, "truncated") == "truncated" and index not in (5, 6):
                check_caption(text, picture(SEED, f"{source}/{index}").scene)
                assert (world.web / path[1:]).read_bytes() == picture(
                    SEED, f"{source}/{index}"
                ).file()
        assert good == world.counts[source]
    sbu = read(world, "sbu", "sbu-captions-all.json")
    assert set(sbu) == {"image_urls", "user_ids", "captions"}
    assert len({len(column) for column in sbu.values()}) == 1
    assert sbu["captions"].count("") == 1 == world.expected_malformed["sbu"]["empty_caption"]


def test_failures_are_counted_as_they_are_served(world: World, behaviour: dict[str, str]) -> None:
    counted: dict[str, dict[str, int]] = {}
    for path, kind in behaviour.items():
        kinds = counted.setdefault(path.split("/")[1], {})
        kinds[kind] = kinds.get(kind, 0) + 1
    expected = {source: dict(kinds) for source, kinds in world.expected_failures.items()}
    for source, count in world.redirects.items():
        expected.setdefault(source, {})["redirect"] = count
    assert counted == expected
    assert set(FAILURES) == set(world.expected_failures["cc3m"]) and world.redirects["cc3m"]


def test_bad_share_is_kept(tmp_path: Path) -> None:
    size = WorldSize(400, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, bad_share=0.3)
    world = generate(tmp_path, size=size, base_url="http://127.0.0.1:1")
    bad = sum(world.expected_failures["cc3m"].values()) + world.redirects["cc3m"]
    assert 0.25 < bad / 400 < 0.36


def test_coco(world: World, behaviour: dict[str, str]) -> None:
    karpathy = {row["cocoid"]: row for row in read(world, "coco", "dataset_coco.json")["images"]}
    splits = collections.Counter(row["split"] for row in karpathy.values())
    assert splits == {"train": 14, "restval": 2, "val": 6, "test": 6}
    seen: set[int] = set()
    for release in ("train2017", "val2017"):
        captions = read(world, "coco", f"captions_{release}.json")
        instances = read(world, "coco", f"instances_{release}.json")
        images = {row["id"]: row for row in captions["images"]}
        assert not seen & images.keys()
        seen |= images.keys()
        per_image = collections.Counter(row["image_id"] for row in captions["annotations"])
        missing = per_image.keys() - images.keys()
        assert len(missing) == (release == "train2017")
        assert {per_image[image] for image in images} == {5}
        names = {row["id"]: row["name"] for row in instances["categories"]}
        assert sorted(names.values()) == sorted(SHAPES)
        for row in instances["annotations"]:
            x, y, width, height = row["bbox"]
            image = images[row["image_id"]]
            assert x + width <= image["width"] and y + height <= image["height"]
            assert 0 < row["area"] <= width * height and len(row["segmentation"][0]) >= 6
        for row in images.values():
            split = karpathy[row["id"]]["split"]
            # As in COCO, some of Karpathy's val and test are in train2017: a leak to shut.
            assert release == "train2017" or split in ("val", "test")
            assert row["coco_url"] == f"{world.base_url}/coco/{release}/{row['file_name']}"
            if split in ("val", "test"):
                assert row["coco_url"].removeprefix(world.base_url) not in behaviour
    assert seen == karpathy.keys()
    for image, row in karpathy.items():
        folder = "train2014" if row["split"] == "train" else "val2014"
        assert (row["filepath"], row["filename"]) == (folder, f"COCO_{folder}_{image:012d}.jpg")
        with Image.open(world.images("coco") / folder / row["filename"]) as stored:
            ImageOps.exif_transpose(stored).load()
        assert [s["sentid"] for s in row["sentences"]] == row["sentids"]
        assert all(s["tokens"] == re.findall(r"\w+", s["raw"].lower()) for s in row["sentences"])


def test_coco_captions_are_true(world: World) -> None:
    rows = read(world, "coco", "dataset_coco.json")["images"]
    for split, part in (("val", "val"), ("test", "test")):
        for i, row in enumerate(row for row in rows if row["split"] == split):
            scene = picture(SEED, f"coco/{part}/{i}").scene
            for sentence in row["sentences"]:
                check_caption(sentence["raw"], scene)


def test_leaks_are_as_counted(world: World) -> None:
    karpathy = {row["cocoid"]: row for row in read(world, "coco", "dataset_coco.json")["images"]}
    tested = {image for image, row in karpathy.items() if row["split"] in ("val", "test")}
    train2017 = {row["id"] for row in read(world, "coco", "captions_train2017.json")["images"]}
    assert len(train2017 & tested) == world.expected_leaks["coco"]["id"] > 0
    genome = read(world, "vg", "image_data.json")
    known = [row["coco_id"] for row in genome if row["coco_id"] is not None]
    assert len(known) == len(set(known)) == len(genome) // 2 and set(known) <= karpathy.keys()
    assert len(tested.intersection(known)) == world.expected_leaks["vg"]["id"] > 0
    files = [
        world.images("coco") / row["filepath"] / row["filename"]
        for row in karpathy.values()
        if row["split"] == "test"
    ]
    contents = {hashlib.sha256(file.read_bytes()).digest() for file in files}
    crawl = [hashlib.sha256(p.read_bytes()).digest() for p in (world.web / "cc12m").iterdir()]
    assert len(contents.intersection(crawl)) == world.expected_leaks["cc12m"]["copy"] == 1
    assert world.expected_leaks["cc12m"]["reencoded"] == 1


def test_visual_genome(world: World) -> None:
    images = {row["image_id"]: row for row in read(world, "vg", "image_data.json")}
    regions = read(world, "vg", "region_descriptions.json")
    assert images.keys() == {row["id"] for row in regions}
    empty = 0
    for row in regions:
        image = images[row["id"]]
        for region in row["regions"]:
            assert region["image_id"] == row["id"]
            assert 0 <= region["x"] <= region["x"] + region["width"] <= image["width"]
            assert 0 <= region["y"] <= region["y"] + region["height"] <= image["height"]
            empty += not region["phrase"]
    assert empty == world.expected_malformed["vg"]["empty_phrase"]


def test_vqa_trains_on_no_tested_image(world: World) -> None:
    karpathy = {
        row["cocoid"]: row["split"] for row in read(world, "coco", "dataset_coco.json")["images"]
    }
    images: dict[str, set[int]] = {}
    for subtype, splits in (("train2014", {"train"}), ("val2014", {"val", "test"})):
        asked = read(world, "vqa", f"v2_OpenEnded_mscoco_{subtype}_questions.json")
        answered = read(world, "vqa", f"v2_mscoco_{subtype}_annotations.json")
        assert set(asked) == {
            *("info", "task_type", "data_type", "data_subtype", "license", "questions")
        }
        by_id = {row["question_id"]: row for row in asked["questions"]}
        assert len(by_id) == len(asked["questions"]) == world.counts[f"vqa_{subtype}"]
        for row in answered["annotations"]:
            assert by_id[row["question_id"]]["image_id"] == row["image_id"]
            assert len(row["answers"]) == 10
            given = collections.Counter(a["answer"] for a in row["answers"])
            assert given.most_common(1)[0][0] == row["multiple_choice_answer"]
        images[subtype] = {row["image_id"] for row in asked["questions"]}
        for image in images[subtype]:
            assert karpathy[image] in splits
            name = f"COCO_{subtype}_{image:012d}.jpg"
            assert (world.images("coco") / subtype / name).is_file()
    assert not images["train2014"] & images["val2014"]


def test_nlvr2_is_balanced_and_its_images_are_there(world: World) -> None:
    rows = {
        split: [json.loads(s) for s in (world.annotations("nlvr2") / f"{split}.json").open()]
        for split in ("train", "dev", "test1")
    }
    assert sum(map(len, rows.values())) == world.counts["nlvr2"]
    for split, statements in rows.items():
        labels = collections.Counter(row["label"] for row in statements)
        assert labels["True"] == labels["False"] > 0
        for row in statements:
            pair = row["identifier"].rsplit("-", 1)[0]
            for side in (0, 1):
                folder = world.images("nlvr2") / split / str(row.get("directory", ""))
                path = folder / f"{pair}-img{side}.png"
                with Image.open(path) as stored:
                    assert stored.format == "PNG"


def test_other_sources(world: World) -> None:
    flickr = read(world, "flickr30k", "dataset_flickr30k.json")
    assert {row["split"] for row in flickr["images"]} == {"train", "val", "test"}
    for row in flickr["images"]:
        assert len(row["sentences"]) == 5
        assert (world.images("flickr30k") / row["filename"]).is_file()
    classes = read(world, "imagenet", "classes.json")
    held = 0
    for wnid in classes:
        with tarfile.open(world.annotations("imagenet") / f"{wnid}.tar") as tar:
            for member in tar.getmembers():
                content = tar.extractfile(member)
                assert content and member.name.startswith(wnid) and member.name.endswith(".JPEG")
                with Image.open(content) as stored:
                    stored.load()
                held += 1
    assert held == world.counts["imagenet"]
    labelled = world.annotations("imagenet1k")
    for split in ("train", "val"):
        assert {p.parent.name for p in labelled.glob(f"{split}/*/*.JPEG")} == set(classes)
    assert len(list(labelled.rglob("*.JPEG"))) == world.counts["imagenet1k"]
    documents = [
        json.loads(line)["text"]
        for path in world.annotations("text").glob("*.jsonl")
        for line in path.open()
    ]
    assert len(documents) == world.counts["text"] and all(documents)
    assert len(list((world.annotations("text") / "books").glob("*.txt"))) == world.counts["books"]
    with pytest.raises(KeyError, match="laion"):
        world.annotations("laion")


def one(behaviour: dict[str, str], kind: str) -> str:
    return next(path for path, found in behaviour.items() if found == kind)


def test_the_server_misbehaves_as_told(
    served: tuple[World, Server], behaviour: dict[str, str]
) -> None:
    world, server = served
    before = server.requests

    def get(path: str, timeout: float = 5.0) -> tuple[bytes, str, str]:
        with urllib.request.urlopen(server.url + path, timeout=timeout) as answer:
            return answer.read(), answer.headers["Content-Type"], answer.url

    body, kind, _ = get("/cc3m/00000" + next(world.web.glob("cc3m/00000.*")).suffix)
    Image.open(io.BytesIO(body)).load()
    assert kind in ("image/jpeg", "image/png")
    for status in (403, 404):
        with pytest.raises(urllib.error.HTTPError) as error:
            get(one(behaviour, str(status)))
        assert error.value.code == status
        error.value.close()
    body, _, url = get(one(behaviour, "redirect"))
    Image.open(io.BytesIO(body)).load()
    assert url == f"{server.url}/moved{one(behaviour, 'redirect')}"
    body, kind, _ = get(one(behaviour, "html"))
    assert body.startswith(b"<!doctype html>") and kind.startswith("text/html")
    assert get(one(behaviour, "zero"))[0] == b""
    for path in (path for path, kind in behaviour.items() if kind == "truncated"):
        stored = Image.open(io.BytesIO(get(path)[0]))
        with pytest.raises(OSError, match=r"truncated|broken"):
            stored.load()
    with pytest.raises(TimeoutError):
        get(one(behaviour, "timeout"), timeout=0.3)
    assert server.requests >= before + 8


def test_the_server_serves_only_images_of_its_web(served: tuple[World, Server]) -> None:
    world, server = served
    assert (world.annotations("imagenet1k")).is_dir()
    outside = next(iter(world.images("flickr30k").iterdir())).relative_to(world.root)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    for path in (
        f"/../{outside}",
        f"/cc3m/../../{outside}",
        f"/%2e%2e/{outside}",
        f"/..%2f{outside}",
        f"/{world.root / outside}",
        f"//{world.root / outside}",
        "/behaviour.json",
        "/cc3m",
        "/",
        "/%00.jpg",
    ):
        connection.request("GET", path)  # one connection throughout: it is kept alive
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 404, path
    connection.close()


def test_close_does_not_wait_for_held_requests(world: World, behaviour: dict[str, str]) -> None:
    server = serve(world.root)
    ended = threading.Event()

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        try:
            connection.request("GET", one(behaviour, "timeout"))
            connection.getresponse()
        except (OSError, http.client.HTTPException):
            ended.set()

    idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    idle.request("GET", "/nothing.jpg")
    idle.getresponse().read()
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    while server.requests < 2:
        time.sleep(0.01)
    start = time.monotonic()
    server.close()
    server.close()
    assert time.monotonic() - start < 2
    assert ended.wait(5)
    assert idle.sock.recv(1) == b"", "a kept-alive connection outlived the server"
    idle.close()
    with pytest.raises(OSError):
        urllib.request.urlopen(server.url + "/cc3m/00000.jpg", timeout=2)


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="cc3m must be at least 1"):
        WorldSize(cc3m=0)
    with pytest.raises(ValueError, match="synsets=36"):
        WorldSize(synsets=36)
    with pytest.raises(ValueError, match="bad_share"):
        WorldSize(bad_share=1.5)
