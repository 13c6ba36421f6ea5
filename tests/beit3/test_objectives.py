"""The objectives against naive references that go sample by sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.config import ModelConfig
from beit3.objectives import (
    IMAGE_OBJECTIVES,
    TEXT_OBJECTIVES,
    DualEncoder,
    MaskedBatch,
    MaskedDataModelling,
    ObjectiveWeights,
    gather,
    normalise,
    of_one_step,
    patches,
)

PAPER = ModelConfig(
    layers=2,
    hidden=32,
    mlp=48,
    heads=4,
    patch_size=8,
    image_size=24,
    vocab_size=40,
    max_text_length=12,
    codebook_size=20,
    attention="shared",
    vl_layers=1,
    sub_ln=False,
)
RELEASED = replace(PAPER, attention="per_modality", vl_layers=0, sub_ln=True)
KINDS = ("image", "text", "pair_image", "pair_text")
IGNORED = -100


@dataclass
class Piece:
    """One image, text or pair, already corrupted."""

    image: Tensor | None = None
    hidden: Tensor | None = None
    visual_words: Tensor | None = None
    text: Tensor | None = None
    masked: Tensor | None = None
    words: Tensor | None = None


def draw(images: int, texts: int, pairs: int, seed: int = 0) -> list[Piece]:
    """Images, then pairs, then texts, of various lengths and numbers of hidden tokens."""
    random = torch.Generator().manual_seed(seed)
    pieces = []
    for number in range(images + pairs + texts):
        piece = Piece()
        if number < images + pairs:
            piece.image = torch.randint(0, 256, (3, 24, 24), generator=random, dtype=torch.uint8)
            piece.hidden = torch.rand(9, generator=random) < 0.5
            piece.hidden[number % 9] = True
            piece.visual_words = torch.randint(0, 20, (9,), generator=random)
        if number >= images:
            length = 4 + number % 5
            piece.words = torch.randint(4, 39, (length,), generator=random)
            piece.masked = torch.zeros(length, dtype=torch.bool)
            piece.masked[1 : 2 + number % 3] = True
            piece.text = torch.where(piece.masked, 39, piece.words)
        pieces.append(piece)
    return pieces


def pack(pieces: list[Piece]) -> MaskedBatch:
    pictures = [p for p in pieces if p.image is not None]
    texts = [p for p in pieces if p.text is not None]

    def stack(name: str, empty: Tensor) -> Tensor:
        return torch.stack([getattr(p, name) for p in pictures]) if pictures else empty

    return MaskedBatch.collate(
        stack("image", torch.zeros(0, 3, 24, 24, dtype=torch.uint8)),
        stack("hidden", torch.zeros(0, 9, dtype=torch.bool)),
        stack("visual_words", torch.zeros(0, 9, dtype=torch.long)),
        [p.words.tolist() for p in texts if p.words is not None],
        [p.masked.numpy() for p in texts if p.masked is not None],
        39,
        pairs=sum(p.image is not None and p.text is not None for p in pieces),
    )


def naive_losses(model: MaskedDataModelling, pieces: list[Piece]) -> dict[str, Tensor]:
    """Every sample alone, both heads at every position, padded, then selected by `ignore_index`."""
    logits: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    targets: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for piece in pieces:
        paired = piece.image is not None and piece.text is not None
        out = model.backbone(
            images=None if piece.image is None else normalise(piece.image[None]),
            text=piece.text,
            lengths=[] if piece.text is None else [len(piece.text)],
            pairs=int(paired),
            hidden_patches=None if piece.hidden is None else piece.hidden[None],
        )
        prefix = "pair_" if paired else ""
        if piece.visual_words is not None and piece.hidden is not None:
            assert out.vision is not None
            logits[f"{prefix}image"].append(model.image_head(out.vision[0, 1:]))
            wanted = torch.where(piece.hidden, piece.visual_words, IGNORED)
            targets[f"{prefix}image"].append(wanted)
        if piece.words is not None and piece.masked is not None:
            assert out.text is not None
            logits[f"{prefix}text"].append(model.text_head(out.text))
            targets[f"{prefix}text"].append(torch.where(piece.masked, piece.words, IGNORED))
    return {
        kind: F.cross_entropy(
            torch.nn.utils.rnn.pad_sequence(logits[kind], batch_first=True).transpose(1, 2),
            torch.nn.utils.rnn.pad_sequence(
                targets[kind], batch_first=True, padding_value=float(IGNORED)
            ),
            ignore_index=IGNORED,
        )
        for kind in KINDS
        if logits[kind]
    }


def build(
    config: ModelConfig = PAPER, weights: ObjectiveWeights | None = None
) -> MaskedDataModelling:
    torch.manual_seed(0)
    return MaskedDataModelling(config, weights)


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_losses_and_gradients_equal_the_naive_reference(config: ModelConfig) -> None:
    model = build(config, ObjectiveWeights(image=0.5, text=1.5, pair_image=2.0, pair_text=0.25))
    pieces = draw(images=3, texts=4, pairs=3)
    results = model(pack(pieces))
    expected = naive_losses(model, pieces)
    assert set(expected) == set(KINDS)
    for kind in KINDS:
        torch.testing.assert_close(results[f"loss/{kind}"], expected[kind])
    total = sum(getattr(model.weights, kind) * expected[kind] for kind in KINDS)
    torch.testing.assert_close(results["loss"], total)

    ours = gradients(model, results["loss"])
    theirs = gradients(model, sum(getattr(model.weights, k) * expected[k] for k in KINDS))  # type: ignore[arg-type]
    assert ours.keys() >= theirs.keys()
    for name, gradient in ours.items():
        other = theirs.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_step_does_not_depend_on_how_many_batches_it_is_cut_into(cut: int) -> None:
    """Not even if one of them has nothing to predict of a kind, or hides more than the others."""
    model = build(PAPER, ObjectiveWeights(image=0.5, text=1.5, pair_image=2.0, pair_text=0.25))
    pieces = draw(images=6, texts=6, pairs=6)
    for piece in pieces[::3]:
        if piece.masked is not None and piece.image is None:
            assert piece.words is not None
            piece.masked[:], piece.text = False, piece.words
    whole = model(pack(pieces))
    wanted = gradients(model, whole["loss"])
    parts = [model(batch) for batch in of_one_step([pack(pieces[i::cut]) for i in range(cut)])]
    found = gradients(model, torch.stack([part["loss"] for part in parts]).mean())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-4)
    for name, value in whole.items():
        mean = torch.stack([part[name].detach() for part in parts]).mean()
        torch.testing.assert_close(mean, value.detach(), atol=1e-6, rtol=1e-5)


def test_accuracies_count_the_masked_positions_only() -> None:
    model = build()
    batch = pack(draw(images=2, texts=2, pairs=2))

    def with_targets(shift: int) -> MaskedBatch:
        with torch.no_grad():
            logits = model.predict(batch)
        masked = {
            kind: replace(part, targets=(logits[kind].argmax(-1) + shift) % logits[kind].shape[1])
            for kind, part in batch.masked.items()
        }
        return replace(batch, masked=masked)

    for shift, accuracy in ((0, 1.0), (1, 0.0)):
        results = model(with_targets(shift))
        assert [float(results[f"accuracy/{kind}"]) for kind in KINDS] == [accuracy] * 4


def test_restoring_fills_the_hidden_places_only() -> None:
    model = build()
    batch = pack(draw(images=2, texts=2, pairs=2))
    words, text = model.restore(batch)
    logits = model.predict(batch)
    for kind, whole in (("image", words), ("pair_image", words), ("text", text)):
        places = batch.masked[kind].places
        assert torch.equal(whole.flatten()[places], logits[kind].argmax(-1))
    assert torch.equal(words[~batch.hidden_patches], batch.visual_words[~batch.hidden_patches])
    assert torch.equal(text[batch.text != 39], batch.text[batch.text != 39])


def test_heads_see_masked_positions_only() -> None:
    model = build()
    batch = pack(draw(images=2, texts=3, pairs=2))
    rows: dict[str, int] = {}
    for name in ("image_head", "text_head"):
        getattr(model, name).register_forward_hook(
            lambda _, given, __, name=name: rows.__setitem__(name, len(given[0]))
        )
    loss = model(batch)["loss"]
    hidden = {kind: len(part.places) for kind, part in batch.masked.items()}
    assert hidden["image"] + hidden["pair_image"] == int(batch.hidden_patches.sum())
    assert hidden["text"] + hidden["pair_text"] == int((batch.text == 39).sum())
    assert rows == {
        "image_head": hidden["image"] + hidden["pair_image"],
        "text_head": hidden["text"] + hidden["pair_text"],
    }
    # The gradient of a bias is the sum of softmax - target: over the masked positions, no others.
    logits = model.predict(batch)
    model.zero_grad()
    loss.backward()
    for head, kinds in ((model.text_head, TEXT_OBJECTIVES), (model.image_head, IMAGE_OBJECTIVES)):
        errors = [
            logits[k].softmax(-1) - F.one_hot(batch.masked[k].targets, logits[k].shape[1])
            for k in kinds
        ]
        torch.testing.assert_close(head.bias.grad, errors[0].mean(0) + errors[1].mean(0))


def traced(model: MaskedDataModelling, pieces: list[Piece]) -> tuple[list[str], list[str]]:
    """The modules with parameters that a batch calls, each with whether what it is given has a
    gradient, and the parameters, as their gradients are ready."""
    called: list[str] = []
    ready: list[str] = []
    handles = [
        module.register_forward_hook(
            lambda _, given, __, name=name: called.append(f"{name} {given[0].requires_grad}")
        )
        for name, module in model.named_modules()
        if list(module.parameters(recurse=False))
    ]
    handles += [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: ready.append(name))
        for name, parameter in model.named_parameters()
    ]
    model(pack(pieces))["loss"].backward()
    for handle in handles:
        handle.remove()
    return called, ready


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
def test_whatever_a_batch_holds_the_same_modules_are_called(
    config: ModelConfig, checkpointing: Literal["none", "blocks"]
) -> None:
    """In the same order, forward and backward: engines gather parameters and reduce gradients as
    modules are called, all workers together."""
    model = build(replace(config, checkpoint_activations=checkpointing))
    called, ready = traced(model, draw(images=2, texts=2, pairs=2))
    assert sorted(ready) == sorted(name for name, _ in model.named_parameters())
    unmasked, unhidden = (draw(images=2, texts=2, pairs=2) for _ in range(2))
    for piece in unmasked:
        if piece.masked is not None:
            piece.masked[:], piece.text = False, piece.words
    for piece in unhidden:
        if piece.hidden is not None:
            piece.hidden[:] = False
    for other in (
        unmasked,
        unhidden,
        draw(images=4, texts=4, pairs=0),
        draw(images=0, texts=2, pairs=2),
        draw(images=2, texts=0, pairs=2),
        draw(images=0, texts=0, pairs=1),
    ):
        assert traced(model, other) == (called, ready)


def test_targets_of_visible_patches_do_not_matter() -> None:
    model = build()
    pieces = draw(images=2, texts=0, pairs=2)
    before = model(pack(pieces))["loss"]
    for piece in pieces:
        assert piece.visual_words is not None and piece.hidden is not None
        piece.visual_words[~piece.hidden] += 1
    assert torch.equal(model(pack(pieces))["loss"], before)
    for piece in pieces:
        assert piece.visual_words is not None and piece.hidden is not None
        piece.visual_words[piece.hidden] = (piece.visual_words[piece.hidden] + 1) % 20
    assert not torch.equal(model(pack(pieces))["loss"], before)


@pytest.mark.parametrize("off", KINDS)
def test_an_objective_of_weight_0_is_off(off: str) -> None:
    pieces = draw(images=2, texts=2, pairs=2)
    model = build(weights=replace(ObjectiveWeights(), **{off: 0.0}))
    results = model(pack(pieces))
    others = [kind for kind in KINDS if kind != off]
    expected = sum(results[f"loss/{kind}"] for kind in others)
    assert f"loss/{off}" in results  # still measured
    assert not results[f"loss/{off}"].requires_grad
    torch.testing.assert_close(results["loss"], expected)
    naive = naive_losses(model, pieces)
    ours = gradients(model, results["loss"])
    theirs = gradients(model, sum(naive[kind] for kind in others))  # type: ignore[arg-type]
    for name in ("image_head.weight", "text_head.weight", "backbone.text_positions"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-4)


def test_what_is_off_cannot_spoil_the_rest() -> None:
    model = build(weights=ObjectiveWeights(pair_image=0.0))
    batch = pack(draw(images=2, texts=2, pairs=2))
    wanted = model(batch)["loss"]
    places = batch.masked["pair_image"]
    broken = replace(places, targets=torch.full_like(places.targets, IGNORED))  # 0 / 0
    results = model(replace(batch, masked={**batch.masked, "pair_image": broken}))
    assert results["loss/pair_image"].isnan() and torch.equal(results["loss"], wanted)


@pytest.mark.parametrize(
    ("off", "head"),
    [(("image", "pair_image"), "image_head"), (("text", "pair_text"), "text_head")],
)
def test_a_head_with_all_its_objectives_off_learns_nothing(off: tuple[str, ...], head: str) -> None:
    model = build(weights=replace(ObjectiveWeights(), **dict.fromkeys(off, 0.0)))
    model(pack(draw(images=2, texts=2, pairs=2)))["loss"].backward()
    for parameter in getattr(model, head).parameters():
        assert parameter.grad is not None and not parameter.grad.any()  # engines want one


def test_weights_below_0_are_refused() -> None:
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"objectives\.pair_text: expected a weight of 0 or"):
            ObjectiveWeights(pair_text=value)


# -- pixels as the target --------------------------------------------------------------------------


def naive_pixels(model: MaskedDataModelling, pieces: list[Piece], *, pairs: bool) -> Tensor:
    """Mean squared error of the hidden patches, patch by patch."""
    errors = []
    for piece in pieces:
        if piece.image is None or piece.hidden is None or (piece.text is not None) != pairs:
            continue
        out = model.backbone(
            images=normalise(piece.image[None]),
            text=piece.text,
            lengths=[] if piece.text is None else [len(piece.text)],
            pairs=int(pairs),
            hidden_patches=piece.hidden[None],
        )
        assert out.vision is not None
        for number in piece.hidden.nonzero().flatten().tolist():
            top, left = 8 * (number // 3), 8 * (number % 3)
            true = piece.image[:, top : top + 8, left : left + 8].float() / 255
            true = ((true - true.mean()) / (true.var() + 1e-6).sqrt()).permute(1, 2, 0)
            errors.append((model.pixel_head(out.vision[0, 1 + number]) - true.flatten()).pow(2))
    return torch.stack(errors).mean()


PIXELS = ObjectiveWeights(image=0.5, pair_image=2.0, image_target="pixels")


def test_pixels_of_hidden_patches_equal_the_naive_reference() -> None:
    model = build(weights=replace(PIXELS, text=0.0, pair_text=0.0))
    pieces = draw(images=3, texts=2, pairs=3)
    results = model(pack(pieces))
    alone, paired = (naive_pixels(model, pieces, pairs=pairs) for pairs in (False, True))
    torch.testing.assert_close(results["loss/image"], alone)
    torch.testing.assert_close(results["loss/pair_image"], paired)
    total = 0.5 * alone + 2 * paired
    torch.testing.assert_close(results["loss"], total)
    assert {key for key in results if key.startswith("accuracy/")} == {
        "accuracy/text",
        "accuracy/pair_text",
    }
    ours, theirs = gradients(model, results["loss"]), gradients(model, total)
    assert ours.keys() >= theirs.keys() and ours["pixel_head.weight"].any()
    for name, gradient in ours.items():
        other = theirs.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, other, atol=1e-6, rtol=1e-4)


def test_codes_do_not_matter_to_pixels() -> None:
    model = build(weights=PIXELS)
    pieces = draw(images=2, texts=0, pairs=2)
    before = model(pack(pieces))["loss"]
    for piece in pieces:
        assert piece.visual_words is not None
        piece.visual_words = (piece.visual_words + 1) % 20
    assert torch.equal(model(pack(pieces))["loss"], before)


def test_a_patch_of_one_colour_has_a_finite_loss() -> None:
    model = build(weights=PIXELS)
    pieces = draw(images=1, texts=0, pairs=0)
    pieces[0].image = torch.full((3, 24, 24), 200, dtype=torch.uint8)
    assert bool(model(pack(pieces))["loss"].isfinite())


def test_restoring_pixels_paints_the_hidden_patches_only() -> None:
    model = build(weights=PIXELS)
    batch = pack(draw(images=2, texts=2, pairs=2))
    words, text = model.restore(batch)
    assert torch.equal(words, batch.visual_words)
    assert not torch.equal(text, batch.text)
    restored = model.restore_pixels(batch)
    assert restored.dtype == torch.uint8 and restored.shape == batch.images.shape
    changed = (patches(restored, 8) != patches(batch.images, 8)).any(-1)
    assert torch.equal(changed, batch.hidden_patches.flatten())

    # A head that predicts the truth paints the picture as it was.
    places = torch.cat([batch.masked[kind].places for kind in ("image", "pair_image")])
    true = model._pixels(batch, places)
    model.pixel_head.register_forward_hook(lambda *_: true)
    assert torch.equal(model.restore_pixels(batch), batch.images)
    assert float(model(batch)["loss/image"]) < 1e-6
    with pytest.raises(ValueError, match="the target of images is codes"):
        build().restore_pixels(batch)


def test_patches_are_cut_in_the_order_of_the_model() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    cut = patches(images, 2)
    assert cut.shape == (2 * 2 * 3, 2 * 2 * 3)
    # The second picture's patch of row 1, column 2: its pixels row by row, colours together.
    assert torch.equal(cut[6 + 3 + 2], images[1, :, 2:4, 4:6].permute(1, 2, 0).flatten())


@pytest.mark.parametrize(
    ("images", "texts", "pairs", "present"),
    [
        (2, 0, 0, {"image"}),
        (0, 2, 0, {"text"}),
        (0, 0, 2, {"pair_image", "pair_text"}),
        (2, 2, 0, {"image", "text"}),
    ],
)
def test_kinds_may_be_absent(images: int, texts: int, pairs: int, present: set[str]) -> None:
    model = build()
    pieces = draw(images=images, texts=texts, pairs=pairs)
    results = model(pack(pieces))
    expected = naive_losses(model, pieces)
    assert {k.removeprefix("loss/") for k in results if k.startswith("loss/")} == present
    torch.testing.assert_close(results["loss"], sum(expected[kind] for kind in present))
    results["loss"].backward()
    for head in (model.image_head, model.text_head):  # engines want a gradient for every parameter
        assert head.weight.grad is not None


def test_a_batch_with_nothing_hidden_has_loss_0() -> None:
    model = build()
    pieces = draw(images=1, texts=1, pairs=1)
    for piece in pieces:
        for mask in (piece.hidden, piece.masked):
            if mask is not None:
                mask[:] = False
    results = model(pack(pieces))
    assert set(results) == {"loss"}
    assert results["loss"].item() == 0.0
    results["loss"].backward()


def test_dual_encoder_equals_the_naive_reference() -> None:
    torch.manual_seed(0)
    model = DualEncoder(PAPER)
    pieces = draw(images=0, texts=0, pairs=5)
    images = torch.stack([p.image for p in pieces if p.image is not None])
    texts = [p.words for p in pieces if p.words is not None]
    results = model(images, torch.cat(texts), [len(t) for t in texts])

    rows, columns = [], []
    for image, text in zip(images, texts, strict=True):
        vision = model.backbone(images=normalise(image[None])).vision
        language = model.backbone(text=text, lengths=[len(text)]).text
        assert vision is not None
        assert language is not None
        row, column = (
            vision[0, 0] @ model.vision_head.weight.T,
            language[0] @ (model.language_head.weight.T),
        )
        rows.append(row / row.norm())
        columns.append(column / column.norm())
    scale = float(model.logit_scale.detach().exp())
    assert scale == pytest.approx(1 / 0.07)
    loss = 0.0
    for i in range(5):
        to_texts = torch.stack([scale * rows[i] @ column for column in columns])
        to_images = torch.stack([scale * row @ columns[i] for row in rows])
        loss -= (to_texts.log_softmax(0)[i] + to_images.log_softmax(0)[i]).item() / 10
    torch.testing.assert_close(results["loss"].item(), loss, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_images(images), torch.stack(rows).detach())
        encoded = model.encode_texts(torch.cat(texts), [len(t) for t in texts])
        torch.testing.assert_close(encoded, torch.stack(columns).detach())


def test_dual_encoder_learns_every_part() -> None:
    torch.manual_seed(0)
    model = DualEncoder(replace(PAPER, vl_layers=0))
    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8)
    model(images, torch.randint(4, 39, (12,)), [3, 4, 5])["loss"].backward()
    assert model.logit_scale.grad is not None
    assert float(model.logit_scale.grad.abs()) > 0
    for name in ("vision_head", "language_head"):
        assert float(getattr(model, name).weight.grad.abs().sum()) > 0


def test_gather_on_one_process_is_the_identity() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    assert gather(x) is x
