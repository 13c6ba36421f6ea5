"""Random samples for benchmarks: pictures, texts of mixed length, pictures with captions.

Ids, visual words and pixels are uniform noise: no time or memory depends on them. The lengths of
texts, which do matter, are drawn from distributions like those of the data:

- Documents: log-normal, median 200 tokens, sigma 0.9 (mean 300 before it is cut), cut to 16..512.
  Paragraphs and articles of web text, news and Wikipedia are like this;
  `pipelines/tokenize_corpus.py` cuts texts at 512. About one in seven is cut.
- Captions: log-normal, median 15 tokens, sigma 0.35, cut to 8..30: COCO's captions have about 10
  words, web captions up to twice as many; `<s>` and `</s>` are counted.

Even in a small draw, half of all texts are longer than the median and half are shorter: the
distribution is cut into equally likely slices, one per text, and each gives one length, in random
order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

from beit3.config import ModelConfig
from beit3.masking import Masking, token_mask
from beit3.objectives import MaskedBatch
from beit3.text import BOS, EOS, UNK


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of text lengths, cut to `shortest..longest` tokens."""

    median: float
    sigma: float
    shortest: int
    longest: int

    def draw(self, count: int, rng: np.random.Generator) -> list[int]:
        """One length of each of `count` equally likely slices, in random order."""
        shares = (np.arange(count) + rng.uniform(0.001, 0.999, count)) / max(1, count)
        deviations = np.array([NormalDist().inv_cdf(share) for share in shares])
        exact = self.median * np.exp(self.sigma * deviations)
        lengths = np.clip(np.rint(exact), self.shortest, self.longest).astype(int)
        return rng.permutation(lengths).tolist()


DOCUMENTS = Lengths(median=200, sigma=0.9, shortest=16, longest=512)
CAPTIONS = Lengths(median=15, sigma=0.35, shortest=8, longest=30)


@dataclass(frozen=True)
class Samples:
    """Samples before any formulation has laid them out: pictures alone, pairs, texts alone.

    images: uint8 `[images, 3, height, width]`; those of pairs are the last.
    hidden_patches: bool `[images, patches]`.
    visual_words: `[images, patches]`.
    texts: uncorrupted ids; those of pairs are the first.
    token_masks: bool, each as long as its text.
    """

    images: Tensor
    hidden_patches: Tensor
    visual_words: Tensor
    texts: list[list[int]]
    token_masks: list[np.ndarray]
    pairs: int
    mask_id: int

    @property
    def count(self) -> int:
        """Samples; a pair is one."""
        return len(self.images) + len(self.texts) - self.pairs

    @property
    def captions(self) -> list[list[int]]:
        return self.texts[: self.pairs]

    @property
    def documents(self) -> list[list[int]]:
        return self.texts[self.pairs :]

    def packed(self) -> MaskedBatch:
        """The batch that `beit3` takes."""
        return MaskedBatch.collate(
            self.images,
            self.hidden_patches,
            self.visual_words,
            self.texts,
            self.token_masks,
            self.mask_id,
            pairs=self.pairs,
        )


def draw(
    config: ModelConfig,
    *,
    images: int,
    texts: int,
    pairs: int,
    seed: int,
    masking: Masking | None = None,
) -> Samples:
    """Pictures alone, texts alone and pairs, masked as in pretraining."""
    rng = np.random.default_rng(seed)
    masking = masking or Masking()
    captions = CAPTIONS.draw(pairs, rng)
    documents = DOCUMENTS.draw(texts, rng)
    lengths = [min(n, config.max_text_length) for n in (*captions, *documents)]
    patch_masks = [masking.of_image(config.grid, rng) for _ in range(images)]
    token_masks = []
    for number, length in enumerate(lengths[:pairs]):
        # With separate masking every other pair has its caption corrupted, the others the picture.
        turn = Masking.of_pair(_in_turn(masking, number), config.grid, length, rng)
        patch_masks.append(turn[0])
        token_masks.append(turn[1])
    token_masks += [token_mask(length, masking.text, rng) for length in lengths[pairs:]]
    mask_id = config.vocab_size - 1
    shape = (images + pairs, 3, config.image_size, config.image_size)
    words = rng.integers(0, config.codebook_size, (images + pairs, config.patches))
    return Samples(
        images=torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8)),
        hidden_patches=torch.from_numpy(np.array(patch_masks, bool).reshape(-1, config.patches)),
        visual_words=torch.from_numpy(words),
        texts=[_text(length, mask_id, rng) for length in lengths],
        token_masks=token_masks,
        pairs=pairs,
        mask_id=mask_id,
    )


def _in_turn(masking: Masking, number: int) -> Masking:
    if masking.pairs == "joint":
        return masking
    return replace(masking, pair_text_share=float(number % 2 == 0))


def _text(length: int, end: int, rng: np.random.Generator) -> list[int]:
    return [BOS, *rng.integers(UNK + 1, end, length - 2).tolist(), EOS]


def describe(texts: Sequence[Sequence[int]]) -> str:
    """Mean and longest of some texts."""
    if not texts:
        return "none"
    lengths = [len(text) for text in texts]
    mean = sum(lengths) / len(lengths)
    return f"{len(texts)}, mean {mean:.0f} tokens, longest {max(lengths)}"
