"""What several tests start from: a tokenizer of a few words, a model that has learned nothing."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch

from beit3 import weights
from beit3.config import ModelConfig
from beit3.objectives import MaskedDataModelling
from beit3.text import TextTokenizer
from pipelines import bundles, models
from pipelines.storage import Store


def small_tokenizer(sentences: Iterable[str], vocab_size: int) -> TextTokenizer:
    """Of at most so many pieces, with the special ids that the released one has."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=out,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return TextTokenizer(out.getvalue())


def save_random_model(store: Store, shape: ModelConfig, tokenizer: TextTokenizer) -> None:
    """`models/pretrained`, as pretraining leaves it, but that it has learned nothing."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder), MaskedDataModelling(shape), shape, kind="pretrained")
        models.add_tokenizer(Path(folder), tokenizer)
        bundles.save(store, "models/pretrained", Path(folder), {"kind": "pretrained"})
