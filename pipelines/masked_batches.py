"""Batches of pretraining: pictures as they were tokenized, texts, and the masks of both."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from beit3.masking import token_mask
from beit3.objectives import MaskedBatch, ObjectiveWeights
from beit3.text import BOS, EOS, TextTokenizer
from beit3.transforms import View, apply_view
from pipelines.dataset import ROW_GROUP_ROWS
from pipelines.loader import ParquetRows, rows_at_hand
from pipelines.pretrain_config import HELD_OUT_PAIRS, OBJECTIVES, PretrainConfig
from pipelines.samples import Pictures, Sample, Samples
from pipelines.storage import Store


@dataclass(frozen=True)
class _Corrupted:
    """A sample to be put into a batch, without pixels: a picture, a text, or both."""

    id: str
    source: str
    words: np.ndarray | None = None
    hidden: np.ndarray | None = None
    text: Sequence[int] = ()
    masked: np.ndarray | None = None


class MaskedBatches:
    """A worker's masked batches, as a function of the step."""

    def __init__(
        self, cfg: PretrainConfig, tokenizer: TextTokenizer, rank: int, world: int
    ) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.masking = cfg.hidden
        store = Store(cfg.store)
        self.samples = {
            kind: Samples(
                [store.dataset(f"tokens/{name}") for name in cfg.used(kind)],
                columns=None,
                seed=cfg.train.seed * 3 + number,
                batch=cfg.drawn(kind),
                rank=rank,
                world=world,
                weights=cfg.weights(kind),
                readers={} if kind == "texts" else {"views": _Views},
            )
            for number, kind in enumerate(OBJECTIVES)
            if cfg.drawn(kind)
        }
        self.pictures = {
            kind: PictureSource(
                store, cfg.used(kind), rows_at_hand(world, len(cfg.weights(kind)) or 1)
            )
            for kind in ("images", "pairs")
        }

    def __call__(self, step: int) -> MaskedBatch:
        drawn = {kind: samples(step) for kind, samples in self.samples.items()}
        pairs = [one for one in drawn.get("pairs", ()) if one.row["captions"]]
        # A picture without captions is still usable as a picture.
        lost = [one for one in drawn.get("pairs", ()) if not one.row["captions"]]
        if lost and not pairs and "texts" not in drawn:
            # No worker may lack text while others have some: all must call the same modules.
            pairs, lost = lost[:1], lost[1:]
        alone = [("images", one) for one in drawn.get("images", ())]
        alone += [("pairs", one) for one in lost]
        return self._collate(
            self._pixels([*alone, *(("pairs", one) for one in pairs)]),
            [self._alone(kind, one) for kind, one in alone],
            [self._pair(one) for one in pairs],
            [self._text(one) for one in drawn.get("texts", ())],
        )

    def _pixels(self, shown: Sequence[tuple[str, Sample]]) -> np.ndarray:
        """Views of pictures of each kind, uint8 `[pictures, 3, image_size, image_size]`.

        They are made one after another, apart from masks and words, which is kinder to the
        processor's caches. Each is written straight to its place: allocating memory costs time.
        """
        side = self.cfg.model.image_size
        pixels = np.empty((len(shown), 3, side, side), np.uint8)
        for (kind, sample), into in zip(shown, pixels, strict=True):
            box, flip, jitter, _ = _stored_view(sample)
            self.pictures[kind].draw(sample, View(tuple(box.tolist()), flip, jitter), into)
        return pixels

    def _alone(self, kind: str, sample: Sample) -> _Corrupted:
        hidden = self.masking.of_image(self.cfg.model.grid, sample.rng)
        return self._picture(kind, sample, hidden)

    def _pair(self, sample: Sample) -> _Corrupted:
        captions = sample.row["captions"] or [[BOS, EOS]]
        caption = captions[int(sample.rng.integers(len(captions)))]
        hidden, masked = self.masking.of_pair(self.cfg.model.grid, len(caption), sample.rng)
        picture = self._picture("pairs", sample, hidden)
        return replace(picture, text=caption, masked=masked)

    def _text(self, sample: Sample) -> _Corrupted:
        text = sample.row["ids"]
        masked = token_mask(len(text), self.masking.text, sample.rng)
        source = self.cfg.texts[sample.group.dataset]
        return _Corrupted(sample.row["id"], source, text=text, masked=masked)

    def _picture(self, kind: str, sample: Sample, hidden: np.ndarray) -> _Corrupted:
        *_, words = _stored_view(sample)
        source = self.cfg.used(kind)[sample.group.dataset]
        return _Corrupted(sample.row["id"], source, words=words, hidden=hidden)

    def _collate(
        self,
        pixels: np.ndarray,
        alone: list[_Corrupted],
        pairs: list[_Corrupted],
        texts: list[_Corrupted],
    ) -> MaskedBatch:
        shown, said, everything = [*alone, *pairs], [*pairs, *texts], [*alone, *pairs, *texts]
        patches = self.cfg.model.patches
        hidden = np.array([one.hidden for one in shown], bool)
        unknown = np.zeros(patches, np.int64)  # the training step computes them
        words = np.array([unknown if one.words is None else one.words for one in shown], np.int64)
        return MaskedBatch.collate(
            torch.from_numpy(pixels),
            torch.from_numpy(hidden.reshape(-1, patches)),
            torch.from_numpy(words.reshape(-1, patches)),
            [one.text for one in said],
            [one.masked for one in said if one.masked is not None],
            self.tokenizer.mask_id,
            pairs=len(pairs),
            ids=[one.id for one in everything],
            sources=[one.source for one in everything],
        )


class _Views:
    """The views of a row group: for each row, boxes, flips, and jitters and words if stored.

    Only one of a row's views is needed, and Arrow's nested scalars are slow to make.
    """

    def __init__(self, column: pa.ListArray) -> None:
        offsets = column.offsets.to_numpy()
        self.starts = (offsets - offsets[0]).tolist()
        views = column.flatten()
        parts = dict(zip((field.name for field in views.type), views.flatten(), strict=True))
        self.flips = parts["flip"].to_pylist()
        self.boxes = _matrix(parts["box"])
        none = [None] * len(views)
        self.jitters: Sequence[Any] = (
            [tuple(factors) for factors in _matrix(parts["jitter"]).tolist()]
            if "jitter" in parts
            else none
        )
        self.words: Sequence[Any] | np.ndarray = (
            _matrix(parts["words"]) if "words" in parts else none
        )

    def __getitem__(
        self, row: int
    ) -> tuple[np.ndarray, list[bool], Sequence[Any], Sequence[Any] | np.ndarray]:
        own = slice(self.starts[row], self.starts[row + 1])
        return self.boxes[own], self.flips[own], self.jitters[own], self.words[own]


def _matrix(lists: pa.FixedSizeListArray) -> np.ndarray:
    """Fixed-size lists as a matrix, `[lists, size]`."""
    return lists.flatten().to_numpy().reshape(len(lists), lists.type.list_size)


def _stored_view(
    sample: Sample,
) -> tuple[np.ndarray, bool, tuple[float, float, float] | None, np.ndarray | None]:
    """Box, flip, jitter and words (None if not stored) of this epoch's view."""
    boxes, flips, jitters, words = sample.row["views"]
    number = sample.epoch % len(flips)
    return boxes[number], flips[number], jitters[number], words[number]


class _Encoded:
    """The encoded pictures of a row group; the first one if a row has several."""

    def __init__(self, column: pa.Array) -> None:
        several = isinstance(column, pa.ListArray)
        self.starts = column.offsets.to_pylist() if several else range(len(column))
        pictures = column.values if several else column
        self.bytes = pictures.flatten()[pictures.type.get_field_index("bytes")]

    def __getitem__(self, row: int) -> bytes:
        return self.bytes[self.starts[row]].as_py()


class PictureSource:
    """The pictures that belong to tokenized datasets, found by part and row."""

    def __init__(self, store: Store, names: Sequence[str], kept: int) -> None:
        """`kept`: as for `ParquetRows`; the same as for the tokens, which have the same order."""
        commits = [store.dataset(f"tokens/{name}").commit() for name in names]
        self.datasets = [store.dataset(c.lineage["inputs"][0]["dataset"]) for c in commits]
        readers = {"image": _Encoded, "images": _Encoded}
        self.rows = (
            ParquetRows(self.datasets, list(readers), readers=readers, kept=kept) if names else None
        )
        # A part of tokens/x holds the tokens of its source's part of the same number.
        self.paths = [
            {posixpath.basename(f.path): f.path for f in dataset.commit().files}
            for dataset in self.datasets
        ]
        self.decoded = Pictures()

    def draw(self, sample: Sample, view: View, out: np.ndarray) -> None:
        """Write the view that was tokenized to `out`, uint8 `[3, size, size]`."""
        assert self.rows is not None
        number = sample.group.dataset
        path = self.paths[number][posixpath.basename(sample.group.path)]
        group, index = divmod(sample.row["image_row"], ROW_GROUP_ROWS)
        columns = self.rows.values(number, path, group)
        data = columns["image" if "image" in columns else "images"][index]
        picture = self.decoded(f"{number}/{sample.row['id']}", data)
        apply_view(picture, view, out.shape[-1], out)


def held_out_batches(cfg: PretrainConfig, tokenizer: TextTokenizer) -> MaskedBatches:
    """Batches of held-out pairs, on one worker."""
    share = cfg.masking.pair_text_share
    alone = replace(
        cfg,
        images=(),
        texts=(),
        pairs=(cfg.held_out,),
        image_weights=(),
        text_weights=(),
        pair_weights=(),
        image_batch=0,
        text_batch=0,
        pair_batch=HELD_OUT_PAIRS,
        held_out="",
        held_out_ranked=0,
        # Objectives that are not trained are measured all the same.
        objectives=ObjectiveWeights(image_target=cfg.objectives.image_target),
        masking=replace(cfg.masking, pair_text_share=share if 0 < share < 1 else 0.5),
        train=replace(cfg.train, workers=0, gpus_per_worker=0.0),
    )
    return MaskedBatches(alone, tokenizer, 0, 1)
