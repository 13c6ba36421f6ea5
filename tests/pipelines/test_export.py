"""Exported models: a folder that explains itself, and whose card's code loads it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import torch
from safetensors.torch import load_file

from beit3 import released, weights
from beit3.config import PRESETS as MODELS
from beit3.model import BEiT3
from pipelines import bundles, checkpoints, export, models, pretrain, tracking
from pipelines.export import ExportConfig
from pipelines.lineage import fingerprint
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


def noted(store: Store, run: str, step: int, **notes: Any) -> None:
    """Change what a checkpoint's manifest says; None takes it out."""
    name = f"{checkpoints.folder(run, step)}/{bundles.MANIFEST}"
    manifest = store.read_json(name)
    info = manifest["info"] | notes
    manifest["info"] = {key: value for key, value in info.items() if value is not None}
    store.write_json(name, manifest)


@pytest.fixture(scope="module")
def measured(corpus: Store) -> str:
    """The name of a run that was evaluated at every other step."""
    train = {"steps": 6, "checkpoint_every": 1, "keep_checkpoints": 6, "evaluate_every": 2}
    pretrain.run(small_corpus.pretraining(corpus, name="scored", train=train))
    return "scored"


def card_of(store: Store, name: str, step: int, to: Path) -> str:
    cfg = ExportConfig(f"models/{name}", str(to), store.uri, checkpoint=step)
    return (export.run(cfg) / "README.md").read_text()


@pytest.mark.parametrize(("step", "evaluated"), [(4, 4), (5, 4), (3, 2)])
def test_a_checkpoint_has_the_scores_of_the_evaluation_before_it(
    step: int, evaluated: int, corpus: Store, measured: str, tmp_path: Path
) -> None:
    noted(corpus, f"runs/{measured}", step, code={"beit3-ray": "0.0.7", "git": "abc"})
    card = card_of(corpus, measured, step, tmp_path / "out")
    assert "| code | beit3-ray 0.0.7 git abc |" in card
    assert f"After step {evaluated}, on captioning/val:" in card
    handle = tracking.RunHandle(**corpus.read_json(f"runs/{measured}/mlflow.json"))
    history = tracking.client(handle.uri).get_metric_history(
        handle.run_id, "eval/accuracy/pair_text"
    )
    (value,) = (m.value for m in history if m.step == evaluated)
    assert f"| accuracy/pair_text | {value:.4f} |" in card


def test_what_nobody_can_say_of_a_checkpoint_is_not_known(
    corpus: Store, measured: str, tmp_path: Path
) -> None:
    unknown = "It is not known what was measured on held-out data."
    assert unknown in card_of(corpus, measured, 1, tmp_path / "early")  # before the first
    note = f"runs/{measured}/mlflow.json"
    kept = corpus.read_json(note)
    noted(corpus, f"runs/{measured}", 4, code=None, fingerprint=None, parameters=None)
    try:
        corpus.write_json(note, kept | {"uri": f"sqlite:///{tmp_path}/gone.db"})
        card = card_of(corpus, measured, 4, tmp_path / "gone")
        assert unknown in card and "| code |" not in card
        assert not (tmp_path / "gone.db").exists()
        corpus.write_json(note, kept | {"run_id": "0" * 32})
        assert unknown in card_of(corpus, measured, 4, tmp_path / "other")
        corpus.delete(note)
        assert unknown in card_of(corpus, measured, 4, tmp_path / "untracked")
    finally:
        corpus.write_json(note, kept)


def test_a_checkpoint_of_a_run_without_held_out_data(corpus: Store, tmp_path: Path) -> None:
    pretrain.run(small_corpus.pretraining(corpus, name="unmeasured", held_out=""))
    card = card_of(corpus, "unmeasured", 4, tmp_path / "out")
    assert "Nothing was measured on held-out data." in card


def test_a_checkpoint_of_other_data_or_options_is_refused(
    copied: Callable[..., Store], pretrained: dict[str, Any], tmp_path: Path
) -> None:
    store = copied("images", "tasks", "tokens", "tokenizers", "runs/pretrained")
    out = tmp_path / "out"
    mark = pretrained["fingerprint"]
    noted(store, "runs/pretrained", 4, fingerprint="of another run")
    with pytest.raises(StoreError, match=f"of the fingerprint of another run, .* have {mark}: "):
        card_of(store, "pretrained", 4, out)
    noted(store, "runs/pretrained", 4, fingerprint=mark)
    assert "| steps | 4 |" in card_of(store, "pretrained", 4, tmp_path / "good")

    # The tokens, made anew: other rows under the same name.
    words = store.dataset("tokens/words")
    old = words.commit()
    rows = words.read_table().slice(1)
    store.delete("tokens/words")
    again = fingerprint("republished", "words")
    record = words.write_part(again, "00000", rows)
    made = {key: old.lineage[key] for key in ("inputs", "config")}
    words.publish(again, [record], job="by hand", schema=rows.schema, stats={}, **made)
    for notes in ({}, {"fingerprint": None}):  # then the run's own note says it
        noted(store, "runs/pretrained", 4, **notes)
        with pytest.raises(StoreError, match=rf"step-00000004 is of a run of .* {mark}, and its"):
            card_of(store, "pretrained", 4, out)
    assert not out.exists()
    store.delete("runs/pretrained/run.json")
    with pytest.raises(StoreError, match=r"run.json: missing, and without it"):
        card_of(store, "pretrained", 4, out)


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
