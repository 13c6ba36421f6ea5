"""The text tokenizer: SentencePiece with the released BEiT-3's ids.

    <s> 0   <pad> 1   </s> 2   <unk> 3   piece p of the SentencePiece model p + 1   <mask> last

as transformers' XLMRobertaTokenizer numbers them, so the released `beit3.spm` (64000 pieces) gives
`<mask>` = 64001.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

BOS, PAD, EOS, UNK = 0, 1, 2, 3
_BOS, _EOS = (np.array([i - 1], np.int32) for i in (BOS, EOS))  # as pieces: one less

TOKENIZER_FILE = "tokenizer.spm"  # in a bundle


class TextTokenizer:
    """Text to ids and back.

    Raises:
        ValueError: the bytes are not a SentencePiece model, or its special pieces are not first.
    """

    def __init__(self, model: bytes) -> None:
        self.model = model
        self.pieces = sentencepiece.SentencePieceProcessor()
        try:
            self.pieces.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model: {error}") from error
        if [self.pieces.unk_id(), self.pieces.bos_id(), self.pieces.eos_id()] != [0, 1, 2]:
            raise ValueError("SentencePiece model: expected unk, bos, eos as pieces 0, 1, 2")

    @classmethod
    def from_file(cls, path: str | Path) -> TextTokenizer:
        return cls(Path(path).read_bytes())

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[bytes]]:
        return TextTokenizer, (self.model,)

    @property
    def mask_id(self) -> int:
        return self.pieces.GetPieceSize() + 1

    @property
    def vocab_size(self) -> int:
        """Number of ids, `<mask>` included."""
        return self.mask_id + 1

    @property
    def identity(self) -> str:
        """Content hash; names the tokenizer in everything made with it."""
        return hashlib.sha256(self.model).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without `<s>` and `</s>`."""
        return [p + 1 if p else UNK for p in self.pieces.EncodeAsIds(text)]

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` for each. One thread by default: SentencePiece would take every CPU, in every
        process that calls it."""
        found = self.pieces.EncodeAsIds(list(texts), num_threads=threads)
        return [[p + 1 if p else UNK for p in ids] for ids in found]

    def encode_cut(
        self, texts: Iterable[str], max_length: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Texts cut into pieces of at most `max_length` tokens, `<s>` and `</s>` around each.

        Returns the ids, one piece after another, int32 `[tokens]`; the length of each piece
        `[pieces]`; and each text's number of pieces `[texts]`, 0 if it is empty.
        """
        inner, parts, lengths, counts = max_length - 2, [_BOS], [], []
        # As arrays: a Python integer for every token would cost a sixth of SentencePiece's time.
        for ids in self.pieces.Encode(list(texts), return_type="numpy", num_threads=1):
            for start in range(0, len(ids), inner):
                piece = ids[start : start + inner]
                parts += (_BOS, piece, _EOS)
                lengths.append(len(piece) + 2)
            counts.append(-(-len(ids) // inner))
        packed = np.concatenate(parts)[1:] + np.int32(1)
        packed[packed == 1] = UNK
        return packed, np.array(lengths, np.int64), np.array(counts, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are left out."""
        size = self.pieces.GetPieceSize()
        return self.pieces.DecodeIds([i - 1 for i in ids if i > UNK and i - 1 < size])

    def wrap(self, ids: Sequence[int], max_length: int) -> list[int]:
        """`<s> ids </s>`, the ids cut so that the whole has at most `max_length` tokens.

        Raises:
            ValueError: `max_length` has no room for `<s>` and `</s>`.
        """
        if max_length < 2:
            raise ValueError(f"max_length: expected at least 2, <s> and </s>, got {max_length}")
        return [BOS, *ids[: max_length - 2], EOS]

    def encode_packed(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, list[int]]:
        """Texts as `wrap` returns them, one after another, int64 `[tokens]`, and their lengths."""
        wrapped = [self.wrap(ids, max_length) for ids in self.encode_batch(texts)]
        lengths = [len(ids) for ids in wrapped]
        return np.fromiter(chain.from_iterable(wrapped), np.int64, sum(lengths)), lengths
