"""ImageNet-1K: readers of each published layout, head, loss, augmentation, measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.io import savemat
from small_models import small_tokenizer
from torch import Tensor

from beit3.config import PRESETS
from beit3.tasks import Example, Problem, Record, Sample, _augment, create
from beit3.tasks._augment import OPERATIONS, erase, mix, rand_augment
from beit3.tasks.imagenet import Batch, Model, Task
from beit3.text import TextTokenizer
from pipelines.sample_world import WorldSize, generate

TINY = replace(PRESETS["tiny"], layers=2)
LABELS = ("n00000001", "n00000004", "n00000009")
PLAIN = {"rand_augment": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "label_smoothing": 0.0}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return small_tokenizer(["a red circle on sand"] * 30, 30)


def task(**options: float) -> Task:
    made = create("imagenet", labels=LABELS, options=options)
    assert isinstance(made, Task)
    return made


def sample(label: str | None, seed: int) -> Sample:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    return Sample((pixels,), (Example(str(seed), None, label),))


def samples(count: int) -> list[Sample]:
    return [sample(LABELS[i % 3], i) for i in range(count)]


def rngs(count: int) -> list[np.random.Generator]:
    return [np.random.default_rng((1, i)) for i in range(count)]


def records(root: Path, split: str) -> dict[str, str]:
    """Class of each path; nothing was set aside."""
    found = list(Task.read(root, split))
    assert not [item for item in found if isinstance(item, Problem)]
    return {r.images[0]: r.examples[0].target for r in found if isinstance(r, Record)}


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


# -- readers --------------------------------------------------------------------------------------


def test_folders_of_classes(tmp_path: Path) -> None:
    train = {f"train/{wnid}/{wnid}_{i}.JPEG": wnid for wnid in LABELS for i in range(20)}
    touch(tmp_path, *train, "train/n00000001/notes.txt", "train/classes.json", "train/extra/a.jpg")
    touch(tmp_path, "val/n00000009/ILSVRC2012_val_00000002.JPEG", "val/n00000001/x.jpg")
    assert records(tmp_path, "train") == train
    assert Task.read_labels(tmp_path, 9) == list(LABELS)
    assert records(tmp_path, "val") == {
        "val/n00000009/ILSVRC2012_val_00000002.JPEG": "n00000009",
        "val/n00000001/x.jpg": "n00000001",
    }
    # Classes are mixed, and in the same order each time.
    first = [r.examples[0].target for r in Task.read(tmp_path, "train") if isinstance(r, Record)]
    assert set(first[:12]) == set(LABELS)
    names = [r.id for r in Task.read(tmp_path, "train") if isinstance(r, Record)]
    assert names[:3] == ["n00000004_6", "n00000001_4", "n00000001_19"]


def test_kaggle_s_lists_need_no_folders(tmp_path: Path) -> None:
    (tmp_path / "train_cls.txt").write_text(
        "n00000004/n00000004_10 1\nn00000001/n00000001_7 2\n\nimage_5 3\n"
    )
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n00000004 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n00000009 1 2 3 4 n00000009 5 6 7 8 \n"
        "ILSVRC2012_val_00000003\n"
    )
    assert Task.read_labels(tmp_path, 1) == ["n00000001", "n00000004"]
    for split, good, bad in (
        ("train", {"train/n00000004/n00000004_10.JPEG", "train/n00000001/n00000001_7.JPEG"},
         ("train/image_5.JPEG", "'image_5'")),
        ("val", {"val/ILSVRC2012_val_00000002.JPEG", "val/ILSVRC2012_val_00000001.JPEG"},
         ("val/ILSVRC2012_val_00000003.JPEG", "''")),
    ):  # fmt: skip
        found = list(Task.read(tmp_path, split))
        assert {r.images[0] for r in found if isinstance(r, Record)} == good
        (problem,) = [p for p in found if isinstance(p, Problem)]
        assert (problem.reason, problem.where) == ("malformed record", bad[0])
        assert f"class {bad[1]} is no WordNet id" in problem.detail
    targets = {
        r.id: r.examples[0].target for r in Task.read(tmp_path, "val") if isinstance(r, Record)
    }
    assert targets["ILSVRC2012_val_00000001"] == "n00000009"


def devkit(root: Path, truth: str) -> Path:
    """The devkit's files: classes are numbered in another order than the alphabetical one."""
    folder = root / "ILSVRC2012_devkit_t12/data"
    folder.mkdir(parents=True)
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    numbered = (LABELS[2], LABELS[0], LABELS[1], "n99999999")
    rows = [(i, wnid, f"name of {wnid}", i // 4) for i, wnid in enumerate(numbered, 1)]
    synsets = np.array(rows, dtype=kind).reshape(-1, 1)
    savemat(folder / "meta.mat", {"synsets": synsets})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    return folder


def test_the_devkit_s_ground_truth(tmp_path: Path) -> None:
    devkit(tmp_path, "2\n1\n3\n1\n")
    assert records(tmp_path, "val") == {
        "val/ILSVRC2012_val_00000001.JPEG": "n00000001",
        "val/ILSVRC2012_val_00000002.JPEG": "n00000009",
        "val/ILSVRC2012_val_00000003.JPEG": "n00000004",
        "val/ILSVRC2012_val_00000004.JPEG": "n00000009",
    }


def test_a_number_that_is_no_class_is_set_aside(tmp_path: Path) -> None:
    devkit(tmp_path, "2\n7\n")
    found = list(Task.read(tmp_path, "val"))
    assert sum(isinstance(item, Record) for item in found) == 1
    (problem,) = [p for p in found if isinstance(p, Problem)]
    assert problem.where == "val/ILSVRC2012_val_00000002.JPEG" and "class '7'" in problem.detail


def test_files_that_are_missing_or_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folders like train/n01440764"):
        list(Task.read(tmp_path, "train"))
    with pytest.raises(FileNotFoundError, match=r"no folders like val/n01440764.*ground_truth"):
        list(Task.read(tmp_path, "val"))
    with pytest.raises(ValueError, match="'test' is none of train, val"):
        list(Task.read(tmp_path, "test"))
    meta = devkit(tmp_path, "1\n") / "meta.mat"
    meta.write_bytes(b"something else entirely, and long enough to be looked at" * 10)
    with pytest.raises(ValueError, match=r"meta\.mat: not the devkit's"):
        list(Task.read(tmp_path, "val"))
    meta.unlink()
    with pytest.raises(FileNotFoundError, match=r"meta\.mat is missing"):
        list(Task.read(tmp_path, "val"))


def test_the_small_world_is_read_whole(tmp_path: Path) -> None:
    world = generate(tmp_path, size=WorldSize.tiny(), base_url="http://127.0.0.1:1")
    root = world.annotations("imagenet1k")
    found = {split: records(root, split) for split in ("train", "val")}
    assert sum(map(len, found.values())) == world.counts["imagenet1k"]
    assert set(found["val"].values()) == set(Task.read_labels(root, 1))
    assert all((root / path).is_file() for split in found.values() for path in split)


# -- model ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["shared", "per_modality"])
def test_the_classifier_reads_the_mean_of_the_patches(
    attention: Any, tokenizer: TextTokenizer
) -> None:
    torch.manual_seed(0)
    model = Model(replace(TINY, attention=attention), len(LABELS)).eval()
    torch.nn.init.normal_(model.head.weight)
    torch.nn.init.normal_(model.fc_norm.weight)
    batch = task().collate(samples(2), tokenizer)
    assert not model.backbone.config.final_norm
    pixels = batch.images.float() / 255
    for channel, (mean, deviation) in enumerate(
        zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)
    ):
        pixels[:, channel] = (pixels[:, channel] - mean) / deviation
    own = model.state_dict()
    assert {k for k in own if not k.startswith("backbone.")} == {
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"
    }  # fmt: skip
    with torch.no_grad():
        vision = model.backbone(images=pixels).vision
        assert vision is not None
        x = vision[:, 1:].mean(1)
        x = F.layer_norm(x, x.shape[-1:], own["fc_norm.weight"], own["fc_norm.bias"])
        expected = F.linear(x, own["head.weight"], own["head.bias"])
        torch.testing.assert_close(model.logits(batch.images), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="no labels"):
        Task().build(TINY)


@pytest.mark.parametrize("variant", ["tiny", "per_modality", "one network"])
def test_what_sees_no_image_is_not_trained_and_all_else_is(
    variant: str, tokenizer: TextTokenizer
) -> None:
    config = {
        "tiny": TINY,
        "per_modality": replace(TINY, attention="per_modality", vl_layers=0, sub_ln=True),
        "one network": replace(TINY, multiway=False, vl_layers=0),
    }[variant]
    model = Model(config, len(LABELS))
    torch.nn.init.normal_(model.head.weight)
    model(task().collate(samples(3), tokenizer))["loss"].backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


def test_published_sizes() -> None:
    for size, millions in (("base", 86.66), ("large", 304.6)):  # published: 87M and 305M
        with torch.device("meta"):
            model = Model(PRESETS[size], 1000)
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_loss_of_soft_targets_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(TINY, 3)
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])
    monkeypatch.setattr(model, "logits", lambda images: logits)
    targets = torch.tensor([[0.7, 0.1, 0.2], [0.0, 0.0, 1.0]])
    out = model(Batch(torch.zeros(2), torch.tensor([0, 1]), targets))
    probabilities = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    by_hand = -(targets.numpy() * np.log(probabilities)).sum(1).mean()
    assert float(out["loss"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(out["accuracy"]) == 0.5


def test_a_few_steps_lower_the_loss(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    plain = task(**PLAIN)
    batch = plain.collate(samples(6), tokenizer, rngs(6), training=True)
    model = plain.build(TINY).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses: list[float] = []
    for _ in range(30):
        out: dict[str, Tensor] = model(batch)
        losses.append(float(out["loss"].detach()))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[0] == pytest.approx(np.log(3), abs=0.02)
    assert losses[-1] < 0.5 * losses[0]
    predictions = plain.predict(model.eval(), batch, tokenizer)
    assert [p[0] for p in predictions] == [LABELS[i % 3] for i in range(6)]
    assert all(sorted(p) == list(LABELS) for p in predictions)  # three classes, not five


# -- augmentation ---------------------------------------------------------------------------------


def test_targets_are_smoothed_and_images_left_alone_where_all_is_off(
    tokenizer: TextTokenizer,
) -> None:
    given = [*samples(2), sample("n00000777", 5)]
    plain = task(**{**PLAIN, "label_smoothing": 0.3})
    batch = plain.collate(given[:2], tokenizer, rngs(2), training=True)
    assert batch.targets[0].tolist() == pytest.approx([0.8, 0.1, 0.1])
    assert np.array_equal(batch.images[1], given[1].images[0])
    seen = plain.collate(given, tokenizer)
    assert seen.targets.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert plain.trainable(given[0].examples[0]) and not plain.trainable(given[2].examples[0])


def test_a_sample_s_augmentation_follows_from_its_own_generator(tokenizer: TextTokenizer) -> None:
    own = task(mixup=0.0, cutmix=0.0, erase=0.5)
    whole = own.collate(samples(8), tokenizer, rngs(8), training=True)
    alone = own.collate(samples(8)[5:6], tokenizer, rngs(8)[5:6], training=True)
    assert torch.equal(alone.images[0], whole.images[5])
    changed = [
        not np.array_equal(a, s.images[0]) for a, s in zip(whole.images, samples(8), strict=True)
    ]
    assert any(changed)


@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_keeps_the_shape_and_grows_with_its_strength(name: str) -> None:
    from PIL import Image

    y, x = np.mgrid[:40, :60]
    pixels = np.stack([4 * x, 6 * y, 100 + x + 20 * (x % 3)], -1).astype(np.uint8)
    picture = Image.fromarray(pixels)

    def change(strength: float) -> float:
        result = OPERATIONS[name](picture, strength, 1)
        assert result.size == picture.size and result.mode == "RGB"
        return float(np.abs(np.asarray(result).astype(float) - pixels).mean())

    if name in ("auto contrast", "equalize", "invert"):  # these have no strength
        assert change(0.2) == change(0.9) > 0
    else:
        assert change(0.9) > change(0.2)
        # As published, posterize at its weakest still drops four bits.
        assert name == "posterize" or change(0.0) == 0


def test_rand_augment_does_two_operations_in_half_of_the_cases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[float] = []

    def spy(picture: Any, strength: float, sign: int) -> Any:
        calls.append(sign * strength)
        return picture

    monkeypatch.setattr(_augment, "OPERATIONS", dict.fromkeys(OPERATIONS, spy))
    rng = np.random.default_rng(0)
    pixels = np.random.default_rng(1).integers(0, 256, (3, 8, 12), dtype=np.uint8)
    for _ in range(1000):
        assert np.array_equal(rand_augment(pixels, rng, 9.0), pixels)
    assert len(calls) == pytest.approx(1000, abs=100)
    strengths = np.abs(calls)
    assert strengths.max() <= 1.0 and strengths.mean() == pytest.approx(0.9, abs=0.02)
    assert np.mean(np.sign(calls)) == pytest.approx(0.0, abs=0.1)


def test_erasing_puts_noise_into_one_rectangle() -> None:
    pixels = np.full((3, 64, 64), 7, np.uint8)
    shares = []
    for seed in range(50):
        result = erase(pixels, np.random.default_rng(seed))
        rows, columns = (result != 7).any(0).any(1), (result != 7).any(0).any(0)
        box = np.ix_(np.flatnonzero(rows), np.flatnonzero(columns))
        assert (result != 7).any(0)[box].mean() > 0.95  # one rectangle, full of noise
        shares.append(rows.sum() * columns.sum() / 64**2)
    assert min(shares) > 0.01 and max(shares) < 0.37
    assert (pixels == 7).all()  # what was given is left alone


def test_mixup_by_hand() -> None:
    images = np.stack([np.full((3, 4, 4), value, np.uint8) for value in (0, 100, 200)])
    targets = np.eye(3, dtype=np.float32)
    share = np.random.default_rng(3).beta(0.8, 0.8)
    mixed, soft = mix(images, targets, np.random.default_rng(3), mixup=0.8, cutmix=0.0)
    assert mixed.dtype == np.uint8 and soft.dtype == np.float32
    assert np.unique(mixed[0]).tolist() == [round((1 - share) * 200)]
    assert np.unique(mixed[1]).tolist() == [100]  # the middle one is mixed with itself
    assert soft[0].tolist() == pytest.approx([share, 0, 1 - share])
    assert soft[1].tolist() == pytest.approx([0, 1, 0])


def test_cutmix_weighs_targets_by_the_area() -> None:
    images = np.stack([np.full((3, 10, 20), value, np.uint8) for value in (0, 200)])
    areas = []
    for seed in range(40):
        mixed, soft = mix(
            images, np.eye(2, dtype=np.float32), np.random.default_rng(seed), mixup=0.0, cutmix=1.0
        )
        other = (mixed[0] == 200).mean()
        assert np.isin(mixed, (0, 200)).all()
        assert soft[0].tolist() == pytest.approx([1 - other, other])
        areas.append(other)
    assert min(areas) < 0.1 and max(areas) > 0.5


def test_a_coin_decides_between_mixup_and_cutmix() -> None:
    images = np.stack([np.full((3, 16, 16), value, np.uint8) for value in (0, 201)])
    kinds = []
    for seed in range(200):
        mixed, _ = mix(images, np.eye(2), np.random.default_rng(seed), mixup=0.8, cutmix=1.0)
        kinds.append(bool(np.isin(mixed, (0, 201)).all()))
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.15)
    off, targets = mix(images, np.eye(2), np.random.default_rng(0), mixup=0.0, cutmix=0.0)
    assert np.array_equal(off, images) and np.array_equal(targets, np.eye(2))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rand_augment", 11.0), ("erase", 1.5), ("label_smoothing", -0.1), ("mixup", -1.0)],
)
def test_impossible_options_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"options.{name}"):
        create("imagenet", options={name: value})


# -- measures -------------------------------------------------------------------------------------


def test_top_1_and_top_5_by_hand() -> None:
    found = [Example(str(i), None, target) for i, target in enumerate("abcd")]
    predictions = [list("axyzw"), list("xybzw"), list("xyzwv"), None]
    assert Task().score(predictions, found) == {"top_1": 0.25, "top_5": 0.5}
    assert Task().score([["a"]], [Example("1", None, None)]) == {}
    assert Task().submission(predictions, found) is None
