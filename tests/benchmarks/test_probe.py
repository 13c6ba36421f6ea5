"""Linear probes: they find what is there, and nothing where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from beit3 import vqkd, weights
from beit3.config import PRESETS
from beit3.objectives import DualEncoder
from benchmarks import probe
from pipelines import bundles
from pipelines.storage import Store


def test_what_is_linear_is_found_and_noise_is_not() -> None:
    labels = torch.arange(400) % 5
    features = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    marked = features + 4 * torch.nn.functional.one_hot(labels, 8)
    assert probe.probe(marked[:300], labels[:300], marked[300:], labels[300:]) > 0.95
    assert probe.probe(features[:300], labels[:300], features[300:], labels[300:]) < 0.4


def test_pictures_have_the_looks_that_are_said() -> None:
    images, looks = probe.pictures(30, 24, "a")
    again, _ = probe.pictures(30, 24, "a")
    assert images.shape == (30, 3, 24, 24) and torch.equal(images, again)
    assert set(looks["shape"].tolist()) == set(range(5))
    blue = images[looks["colour"] == list(probe.LOOKS["colour"]).index("blue")].float()
    red = images[looks["colour"] == list(probe.LOOKS["colour"]).index("red")].float()
    assert (blue[:, 2] - blue[:, 0]).mean() > (red[:, 2] - red[:, 0]).mean()


def test_models_and_tokenizers_have_a_line_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    torch.manual_seed(0)
    weights.save(
        tmp_path / "model", DualEncoder(PRESETS["tiny"]), PRESETS["tiny"], kind="dual_encoder"
    )
    bundles.save(store, "models/some", tmp_path / "model", {})
    vqkd.save(tmp_path / "words", vqkd.VQKD(vqkd.PRESETS["tiny"]))
    bundles.save(store, "tokenizers/image/some", tmp_path / "words", {})
    probe.main(
        ["--store", store.uri, "--models", "some", "--tokenizers", "some", "--pictures", "60"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == [
        "chance", "models/some", "tokenizers/image/some"
    ]  # fmt: skip
    assert all(0 <= float(number) <= 1 for line in lines[2:] for number in line.split()[1:])
