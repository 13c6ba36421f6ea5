"""What others trained, brought into the store, serves as what was trained here."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import small_corpus
import torch

from beit3 import teachers, vqkd
from beit3.teachers import ClipConfig, ClipTower
from beit3.text import UNK
from beit3.vqkd import VQKD
from pipelines import bundles, check_tokenizer, tokenize_corpus, train_image_tokenizer
from pipelines.import_weights import ImportConfig, run
from pipelines.storage import Store, StoreError
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer


def spm(pieces: int, path: Path, **options: Any) -> Path:
    """A SentencePiece model of the layout of beit3.spm: <unk>, <s>, </s>, then what was learned."""
    model = io.BytesIO()
    layout: dict[str, Any] = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, **options}
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(small_corpus.CAPTIONS),
        model_writer=model,
        vocab_size=pieces,
        minloglevel=2,
        **layout,
    )
    path.write_bytes(model.getvalue())
    return path


def test_a_sentencepiece_model_keeps_the_released_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, path = Store(tmp_path / "store"), spm(36, tmp_path / "beit3.spm")
    config = ImportConfig("text-tokenizer", str(path), "released", store.uri)
    info = run(config)
    assert "36 pieces, 38 ids, <mask> is 37 (the authors' beit3.spm has 64,000" in (
        capsys.readouterr().out
    )
    tokenizer = load_text_tokenizer(store, "released")
    assert (info["identity"], info["vocab_size"]) == (tokenizer.identity, 38)
    assert tokenizer.mask_id == 37  # 64001 of 64000 pieces
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path))
    pieces = plain.EncodeAsIds("a small red circle 漢")
    assert 0 in pieces
    ids = tokenizer.encode("a small red circle 漢")
    assert ids == [p + 1 if p else UNK for p in pieces] and min(ids) >= UNK

    assert run(config) == info and "already there, skipped" in capsys.readouterr().out
    spm(34, path)
    with pytest.raises(StoreError, match="exists and comes from elsewhere"):
        run(config)
    spm(36, path, unk_id=3, bos_id=0, eos_id=1)
    with pytest.raises(ValueError, match="expected unk, bos, eos as pieces 0, 1, 2"):
        run(replace(config, name="other"))
    path.write_bytes(b"no model")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        run(replace(config, name="other"))
    assert not bundles.exists(store, "tokenizers/text/other")


def test_a_tokenizer_folder_serves_as_a_trained_one(tmp_path: Path, corpus: Store) -> None:
    torch.manual_seed(0)
    model = VQKD(small_corpus.WORDS).eval()
    vqkd.save(tmp_path / "folder", model)
    config = ImportConfig("image-tokenizer", str(tmp_path / "folder"), "imported", corpus.uri)
    info = run(config)
    assert (info["codebook_size"], info["teacher"]) == (small_corpus.CODES, "")
    judged = check_tokenizer.run(
        check_tokenizer.CheckConfig(store=corpus.uri, name="imported", images=("captioning/val",))
    )
    assert "not measured, since there is no teacher" in judged.text
    changes = {"images": ("alone",), "texts": (), "held_out": (), "image_tokenizer": "imported"}
    store = Store(tmp_path / "copy")
    for folder in ("images/alone", "tokenizers"):
        for name in corpus.list(folder, recursive=True):
            if Path(corpus.path(folder, name)).is_file():
                store.write(f"{folder}/{name}", corpus.read(f"{folder}/{name}"))
    tokenize_corpus.run(small_corpus.tokens(store, **changes))
    rows = store.dataset("tokens/alone").read_table().to_pylist()
    words = {int(w) for row in rows for view in row["views"] for w in view["words"]}
    assert len(rows) == 14 and len(words) > 1


def clip(folder: Path, size: int = small_corpus.SIZE) -> ClipTower:
    shape = ClipConfig(
        layers=1, hidden=24, mlp=32, heads=2, patch_size=8, image_size=size, dim=20,
        activation="gelu",
    )  # fmt: skip
    torch.manual_seed(0)
    tower = ClipTower(shape)
    torch.nn.init.normal_(tower.class_embedding)
    torch.nn.init.normal_(tower.positions)
    teachers.save_clip(folder, shape, tower.state_dict())
    return tower


def test_an_imported_clip_teaches(tmp_path: Path, corpus: Store) -> None:
    tower = clip(tmp_path / "clip")
    theirs = {
        "conv.weight": "conv1.weight", "positions": "positional_embedding",
        "class_embedding": "class_embedding", "projection.weight": "proj",
        ".qkv.": ".attn.in_proj_", ".out.": ".attn.out_proj.", ".fc1.": ".mlp.c_fc.",
        ".fc2.": ".mlp.c_proj.", "blocks.": "transformer.resblocks.",
    }  # fmt: skip
    tensors = {}
    for key, value in tower.state_dict().items():
        name = key
        for ours, other in theirs.items():
            name = name.replace(ours, other)
        tensors[f"visual.{name}"] = value.T if name == "proj" else value
    torch.save(tensors, tmp_path / "open_clip.pt")
    config = ImportConfig(
        "teacher", str(tmp_path / "open_clip.pt"), "clip", corpus.uri, heads=2, activation="gelu"
    )
    assert run(config)["dim"] == 20
    training = small_corpus.image_tokenizer(
        corpus, name="of-clip", teacher="teachers/clip", train=small_corpus.train_config(steps=2)
    )
    info = train_image_tokenizer.run(training)
    model, _ = load_image_tokenizer(corpus, "of-clip")
    assert model.config.teacher_dim == 20 and info["teacher"] == "teachers/clip"
    assert np.isfinite(info["metrics"]["cosine"])
    other = replace(training.tokenizer, image_size=48)
    with pytest.raises(StoreError, match=r"teachers/clip: its patch grid is 3x3 at 24 pixels"):
        train_image_tokenizer.run(replace(training, name="odd", tokenizer=other))


def test_what_can_t_be_imported_is_named(tmp_path: Path) -> None:
    store = (tmp_path / "store").as_uri()
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        run(ImportConfig("image-tokenizer", str(tmp_path / "nothing.pth"), "a", store))
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth: no released VQ-KD:"):
        run(ImportConfig("image-tokenizer", str(tmp_path / "odd.pth"), "a", store))
    with pytest.raises(ValueError, match="doesn't tell its activation"):
        run(ImportConfig("teacher", str(tmp_path / "odd.pth"), "a", store))
    with pytest.raises(ValueError, match="no vision tower of a CLIP"):
        run(ImportConfig("teacher", str(tmp_path / "odd.pth"), "a", store, activation="gelu"))
    with pytest.raises(ValueError, match="name: say what"):
        ImportConfig("teacher", "a", "")
