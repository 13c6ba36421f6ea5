"""Trains the text tokenizer: SentencePiece on a sample of texts and captions.

    python pipelines/train_text_tokenizer.py --store store --texts wiki --images cc3m cc12m

Reads committed `text/*` and `images/*` datasets with Ray Data and writes the bundle
`tokenizers/text/<name>` with `tokenizer.spm`. Ids are laid out as in the released BEiT-3
(`beit3.text`).
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa

from beit3.text import TOKENIZER_FILE, TextTokenizer
from pipelines import bundles, cluster, config, console, job
from pipelines.config import indifferent
from pipelines.dataset import Dataset
from pipelines.lineage import fingerprint
from pipelines.storage import Store
from pipelines.tokenizers import load_text_tokenizer

_LONGEST = 1 << 24  # bytes of a line; SentencePiece leaves out longer ones, by default above 4,192


@dataclass(frozen=True)
class TextTokenizerConfig:
    """Train a SentencePiece tokenizer."""

    store: str = indifferent("store", noted="")
    """Where datasets and tokenizers live: a folder or an s3:// URI."""
    name: str = "sentencepiece"
    """The tokenizer becomes `tokenizers/text/<name>`."""
    texts: tuple[str, ...] = ()
    """Text datasets to learn from (`text/<name>`)."""
    images: tuple[str, ...] = ()
    """Image datasets whose captions to learn from (`images/<name>`)."""
    vocab_size: int = 64002
    """Number of ids, including the special ones and `<mask>`."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    character_coverage: float = 0.9995
    byte_fallback: bool = False
    """Spell unknown characters as bytes instead of `<unk>`."""
    sample: float = 1.0
    """Share of the texts to learn from, drawn by their hash."""
    max_sentences: int = 10_000_000
    threads: int = indifferent(2, noted=0)

    def __post_init__(self) -> None:
        if not self.texts and not self.images:
            raise ValueError("texts, images: name at least one dataset to learn from")
        if not 0 < self.sample <= 1:
            raise ValueError(f"sample: expected a share above 0 and up to 1, got {self.sample}")


PRESETS = {"released": TextTokenizerConfig(images=("cc3m",))}


def run(cfg: TextTokenizerConfig) -> TextTokenizer:
    """Train a tokenizer, or load it if it is trained already.

    Raises:
        StoreError: a dataset is missing, or the name is taken by another tokenizer.
        ValueError: the corpus is empty, or too small for the vocabulary.
    """
    store = Store(cfg.store)
    output = f"tokenizers/text/{cfg.name}"
    names = [f"text/{n}" for n in cfg.texts] + [f"images/{n}" for n in cfg.images]
    datasets = [store.dataset(name) for name in names]
    inputs = [dataset.commit().identity for dataset in datasets]
    print_of = fingerprint("train_text_tokenizer", config.decisive(cfg), inputs)
    taken = (
        "was trained from other inputs or options: choose another --name, or delete that folder "
        "first"
    )
    if bundles.finished(store, output, print_of, taken) is not None:
        console.say(f"{output}: already trained, skipped")
        return load_text_tokenizer(store, cfg.name)
    cluster.start()
    sentences = sorted(
        set(_sentences(datasets, cfg.sample)),
        key=lambda s: hashlib.sha1(s.encode()).digest(),
    )[: cfg.max_sentences]
    if not sentences:
        raise ValueError(f"no text in {', '.join(names)}: nothing to learn a tokenizer from")
    model = train(sentences, cfg)
    tokenizer = TextTokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(model)
        info = {
            "fingerprint": print_of,
            "identity": tokenizer.identity,
            "vocab_size": tokenizer.vocab_size,
            "sentences": len(sentences),
            "inputs": dict(zip(names, inputs, strict=True)),
        }
        bundles.save(store, output, Path(folder), info)
    console.say(f"{output}: {tokenizer.vocab_size:,} ids from {len(sentences):,} sentences")
    return tokenizer


def train(sentences: list[str], cfg: TextTokenizerConfig) -> bytes:
    """A serialised SentencePiece model.

    Raises:
        ValueError: the corpus is too small for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            vocab_size=cfg.vocab_size - 2,  # <pad> and <mask> are ours, not SentencePiece's
            model_type=cfg.model_type,
            character_coverage=cfg.character_coverage,
            byte_fallback=cfg.byte_fallback,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            num_threads=cfg.threads,
            max_sentence_length=_LONGEST,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_reason(str(error), cfg, len(sentences))) from error
    return model.getvalue()


def _reason(said: str, cfg: TextTokenizerConfig, sentences: int) -> str:
    """What SentencePiece's error means; it doesn't say all that it knows in one way."""
    reason = said.split("] ")[-1].strip() or said
    if "too high" not in said:
        return f"SentencePiece can't learn from {sentences:,} sentences: {reason}"
    return (
        f"vocab_size {cfg.vocab_size}: SentencePiece can't learn so many pieces from {sentences:,} "
        f"sentences ({reason}); lower vocab_size or add text"
    )


def _sentences(datasets: Sequence[Dataset], share: float) -> Iterator[str]:
    """The sentences of all datasets, which share one store, in any order."""
    import ray.data

    paths: dict[str, list[str]] = defaultdict(list)
    for dataset in datasets:
        if dataset.commit().rows:
            column = "text" if dataset.name.startswith("text/") else "captions"
            paths[column] += dataset.paths()
    for column, files in paths.items():  # one Ray Data read per column: each takes seconds to start
        rows = ray.data.read_parquet(files, filesystem=datasets[0].store.fs, columns=[column])
        lines: Any = rows.map_batches(
            cast(Any, _lines), batch_format="pyarrow", fn_args=(column, share)
        )
        for batch in lines.iter_batches(batch_format="pyarrow", batch_size=None):
            yield from batch["line"].to_pylist()


def _lines(table: pa.Table, column: str, share: float) -> pa.Table:
    """Sentences of texts or captions whose hash falls into the sample."""
    values = table[column].to_pylist()
    texts = [t for v in values for t in (v if isinstance(v, list) else v.split("\n"))]
    limit = int(share * 2**32)
    kept = [
        text
        for text in (t.strip() for t in texts)
        if text and int.from_bytes(hashlib.sha1(text.encode()).digest()[:4], "big") < limit
    ]
    return pa.table({"line": pa.array(kept, pa.string())})


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
