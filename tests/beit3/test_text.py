"""The text tokenizer's ids are the released BEiT-3's."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from beit3.text import BOS, EOS, PAD, UNK, TextTokenizer

SENTENCES = [
    "a red circle above a blue square",
    "two green triangles beside the yellow star",
    "the large purple square is left of a small circle",
    "one small star below three orange triangles",
    "there is a blue star between two red squares",
]


def learn(vocab_size: int = 44, **options: Any) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=vocab_size,
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "minloglevel": 2, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return learn()


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> TextTokenizer:
    return TextTokenizer(model)


def reference_vocabulary(model: bytes) -> dict[str, int]:
    """Piece to id as transformers' XLMRobertaTokenizer numbers them.

    Its four fairseq ids come first, SentencePiece's piece p is p + 1, `<mask>` comes last.
    """
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    for p in range(3, pieces.GetPieceSize()):
        vocabulary[pieces.IdToPiece(p)] = p + 1
    vocabulary["<mask>"] = len(vocabulary)
    return vocabulary


@pytest.mark.parametrize("longest", [3, 5, 512])
def test_cut_ids_are_those_of_each_text(tokenizer: TextTokenizer, longest: int) -> None:
    texts = [SENTENCES[0], "", "漢 a red 漢", *SENTENCES[1:]]
    wanted = [tokenizer.encode(text) for text in texts]
    inner = longest - 2
    cut = [[ids[i : i + inner] for i in range(0, len(ids), inner)] for ids in wanted]
    pieces = [[BOS, *piece, EOS] for of in cut for piece in of]
    ids, lengths, counts = tokenizer.encode_cut(texts, longest)
    assert ids.dtype == "int32" and UNK in ids
    assert ids.tolist() == [i for piece in pieces for i in piece]
    assert lengths.tolist() == [len(piece) for piece in pieces]
    assert counts.tolist() == [len(of) for of in cut]
    assert [part.tolist() for part in tokenizer.encode_cut([], longest)] == [[], [], []]


def test_batches_are_encoded_as_each_text_is(tokenizer: TextTokenizer) -> None:
    wanted = [tokenizer.encode(text) for text in SENTENCES]
    assert tokenizer.encode_batch(SENTENCES) == wanted
    assert tokenizer.encode_batch(SENTENCES, threads=2) == wanted


def test_ids_follow_the_released_numbering(model: bytes, tokenizer: TextTokenizer) -> None:
    vocabulary = reference_vocabulary(model)
    assert [vocabulary[s] for s in ("<s>", "<pad>", "</s>", "<unk>")] == [BOS, PAD, EOS, UNK]
    assert sorted(vocabulary.values()) == list(range(tokenizer.vocab_size))
    assert tokenizer.mask_id == vocabulary["<mask>"] == tokenizer.vocab_size - 1
    assert tokenizer.vocab_size == 44 + 2
    pieces = sentencepiece.SentencePieceProcessor()
    pieces.LoadFromSerializedProto(model)
    seen = set()
    for text in [*SENTENCES, "a Zebra ☂ blue", "☂☂"]:
        expected = [vocabulary.get(piece, UNK) for piece in pieces.EncodeAsPieces(text)]
        assert tokenizer.encode(text) == expected
        seen |= set(expected)
    assert UNK in seen
    assert len(seen) > 20


def test_a_vocabulary_of_64000_pieces_masks_with_64001(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pieces:
        @staticmethod
        def GetPieceSize() -> int:
            return 64000

    monkeypatch.setattr(tokenizer, "pieces", Pieces)
    assert tokenizer.mask_id == 64001
    assert tokenizer.vocab_size == 64002


def test_round_trip(tokenizer: TextTokenizer) -> None:
    for sentence in SENTENCES:
        ids = tokenizer.encode(sentence)
        assert tokenizer.decode(ids) == sentence
        assert tokenizer.decode([BOS, *ids, tokenizer.mask_id, EOS, PAD, PAD]) == sentence
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""


def test_decode_leaves_out_ids_beyond_the_vocabulary(tokenizer: TextTokenizer) -> None:
    """The released embedding has rows that no piece belongs to."""
    ids = tokenizer.encode(SENTENCES[0])
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 64009]) == SENTENCES[0]


def test_byte_fallback_spells_what_is_unknown() -> None:
    tokenizer = TextTokenizer(learn(vocab_size=310, byte_fallback=True, hard_vocab_limit=False))
    ids = tokenizer.encode("blue ☂ star")
    assert UNK not in ids
    assert tokenizer.decode(ids) == "blue ☂ star"


def test_batches_equal_single_texts(tokenizer: TextTokenizer) -> None:
    texts = [*SENTENCES, "", "☂"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_wrap_adds_the_ends_and_cuts(tokenizer: TextTokenizer) -> None:
    assert tokenizer.wrap([7, 8, 9], 5) == [BOS, 7, 8, 9, EOS]
    assert tokenizer.wrap([7, 8, 9], 50) == [BOS, 7, 8, 9, EOS]
    assert tokenizer.wrap([7, 8, 9], 4) == [BOS, 7, 8, EOS]
    assert tokenizer.wrap([7, 8, 9], 2) == [BOS, EOS]
    assert tokenizer.wrap([], 2) == [BOS, EOS]


def test_packed_texts_are_the_wrapped_ones_in_a_row(tokenizer: TextTokenizer) -> None:
    texts = [*SENTENCES, "", "☂"]
    packed, lengths = tokenizer.encode_packed(texts, 6)
    wrapped = [tokenizer.wrap(tokenizer.encode(text), 6) for text in texts]
    assert packed.dtype == np.int64 and packed.tolist() == [i for ids in wrapped for i in ids]
    assert lengths == [len(ids) for ids in wrapped] and max(lengths) == 6
    nothing, none = tokenizer.encode_packed([], 6)
    assert not len(nothing) and none == []


def test_wrap_needs_room_for_the_ends(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ValueError, match="max_length: expected at least 2"):
        tokenizer.wrap([7, 8, 9], 1)


def test_pickling_keeps_the_tokenizer(tokenizer: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.identity == tokenizer.identity
    assert copy.encode(SENTENCES[1]) == tokenizer.encode(SENTENCES[1])


def test_identity_is_that_of_the_content(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "any.spm").write_bytes(tokenizer.model)
    assert TextTokenizer.from_file(tmp_path / "any.spm").identity == tokenizer.identity
    assert TextTokenizer(learn(vocab_size=45)).identity != tokenizer.identity


@pytest.mark.parametrize("data", [b"not a model", b"\x00" * 64])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        TextTokenizer(data)


def test_other_special_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="expected unk, bos, eos as pieces 0, 1, 2"):
        TextTokenizer(learn(bos_id=2, eos_id=1))
