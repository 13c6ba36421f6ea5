"""Exported models: a folder that explains itself, and whose card's code loads it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import torch
from safetensors.torch import load_file

from beit3 import released, weights
from beit3.config import PRESETS as MODELS
from beit3.model import BEiT3
from pipelines import bundles, checkpoints, export, models
from pipelines.export import ExportConfig
from pipelines.storage import Store, StoreError

ROOT = Path(__file__).resolve().parents[2]


def execute_card(folder: Path, then: str) -> str:
    """Run the card's code in its folder, and more code after it."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}\n{then}\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )
    assert not done.returncode, done.stderr
    return done.stdout


def test_a_pretrained_model_and_its_card(
    corpus: Store, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    folder = export.run(ExportConfig("models/pretrained", str(tmp_path / "out"), corpus.uri))
    card = (folder / "README.md").read_text()
    for dataset in ("tokens/pairs", "images/pairs", "tokens/words", "text/words"):
        assert corpus.dataset(dataset).commit().identity in card
    scores = ("accuracy/pair_text", "zero_shot/picture_recall_1")
    for said in (pretrained["text_tokenizer"], "| steps | 6 |", "| hidden | 32 |", *scores):
        assert said in card
    assert bundles.identity(corpus, "tokenizers/image/vqkd") in card
    assert execute_card(folder, "print(list(features.shape))") == "[1, 32]\n"
    with pytest.raises(ValueError, match="is there and not an empty folder"):
        export.run(ExportConfig("models/pretrained", str(folder), corpus.uri))


def test_a_checkpoint_of_a_run(corpus: Store, pretrained: dict[str, Any], tmp_path: Path) -> None:
    cfg = ExportConfig("models/pretrained", str(tmp_path / "out"), corpus.uri, checkpoint=4)
    folder = export.run(cfg)
    name = checkpoints.folder("runs/pretrained", 4)
    kept = load_file(corpus.path(name, "model.safetensors"))
    found = weights.load_tensors(folder)
    assert kept.keys() == found.keys()
    assert all(torch.equal(kept[key], found[key]) for key in kept)
    assert "| steps | 4 |" in (folder / "README.md").read_text()
    assert models.tokenizer_of(folder).identity == pretrained["text_tokenizer"]
    missing = ExportConfig("models/pretrained", str(tmp_path / "no"), corpus.uri, checkpoint=3)
    with pytest.raises(StoreError, match=r"step-00000003: missing. There are: step-00000002, "):
        export.run(missing)


def test_a_dual_encoder(corpus: Store, tmp_path: Path) -> None:
    folder = export.run(ExportConfig("models/teacher", str(tmp_path / "out"), corpus.uri))
    assert execute_card(folder, "print(list(similarity.shape))") == "[1, 1]\n"


def test_the_released_layout(tmp_path: Path) -> None:
    store, config = Store(tmp_path / "store"), MODELS["tiny"]
    config = type(config)(layers=2, hidden=64, mlp=96, heads=1, image_size=32, vocab_size=40)
    made = tmp_path / "made"
    tensors = {f"backbone.{k}": v for k, v in BEiT3(config).state_dict().items()}
    weights.save_tensors(made, tensors, config, kind="backbone")
    bundles.save(store, "models/bare", made, {"steps": 1})
    cfg = ExportConfig("models/bare", str(tmp_path / "out"), store.uri, format="released")
    back = released.load_released(export.run(cfg) / "released.pth")
    assert all(torch.equal(back.tensors[key], tensors[key]) for key in tensors)
    with pytest.raises(StoreError, match="missing or half written"):
        export.run(ExportConfig("models/none", str(tmp_path / "none"), store.uri))


def test_a_model_of_the_paper_has_no_released_layout(
    corpus: Store, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    assert small_corpus.SHAPE.attention == "shared"
    cfg = ExportConfig("models/pretrained", str(tmp_path / "out"), corpus.uri, format="released")
    with pytest.raises(ValueError, match="the released layout has attention='per_modality'"):
        export.run(cfg)
    assert not (tmp_path / "out").exists()
