"""Masked data modelling and contrastive alignment: heads, losses, accuracies.

Sources: "Image as a Foreign Language" section 2.2 (mask-then-predict on images, texts and pairs)
and appendix A (the contrastive stage); "Masked Autoencoders Are Scalable Vision Learners" (arXiv
2111.06377) section 3 for normalised pixels as the target.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.model import BEiT3
from beit3.multiway import Layout, Read, Streams

# In the order of their places in a batch.
IMAGE_OBJECTIVES = ("image", "pair_image")
TEXT_OBJECTIVES = ("pair_text", "text")
OBJECTIVES = (*IMAGE_OBJECTIVES, *TEXT_OBJECTIVES)
PIXEL_EPS = 1e-6


def normalise(images: Tensor) -> Tensor:
    """uint8 `[..., 3, height, width]` to floats in [-1, 1]: mean and deviation 0.5."""
    return images.float() / 127.5 - 1.0


@dataclass(frozen=True)
class Masked:
    """Targets of one objective, and where they are; all fields are `[masked]`.

    targets: the visual words or token ids that were there.
    places: indices into the batch's patches, `[images * patches]`, or its text tokens.
    rows: the rows of the encoder's read output that predict them.
    """

    targets: Tensor
    places: Tensor
    rows: Tensor


@dataclass(frozen=True)
class StepPlaces:
    """The masked places in all batches that a worker reads in one optimizer step.

    kinds: the objectives that have any.
    mean: float `[4]`, their number in a batch on average, in the order of `OBJECTIVES`.
    """

    kinds: tuple[str, ...]
    mean: Tensor


@dataclass(frozen=True)
class MaskedBatch:
    """Images, texts and pairs, already corrupted. `collate` makes one.

    images: uint8 `[images, 3, height, width]`, pictures of pairs last.
    hidden_patches: bool `[images, patches]`.
    visual_words: `[images, patches]` codes of the image tokenizer.
    text: `[tokens]` packed ids, texts of pairs first, masked ones replaced by `<mask>`.
    layout: where each sample stands in the two streams.
    read: the encoder outputs that are read: masked positions, `[CLS]` and `<s>`.
    masked: what is predicted, by objective (`image`, `text`, `pair_image`, `pair_text`); an
        objective with nothing to predict is absent.
    lengths: tokens of each text.
    pairs: how many of the pictures and texts are pairs.
    ids, sources: names of each sample and of its dataset, for inspection.
    step: if an optimizer step reads several batches, what all of them hide; see `of_one_step`.
    """

    images: Tensor
    hidden_patches: Tensor
    visual_words: Tensor
    text: Tensor
    layout: Layout
    read: Read
    masked: dict[str, Masked]
    lengths: tuple[int, ...]
    pairs: int
    ids: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    step: StepPlaces | None = None

    def original_text(self) -> Tensor:
        """`text` with the masked tokens put back, `[tokens]`."""
        text = self.text.clone()
        for kind in TEXT_OBJECTIVES:
            if kind in self.masked:
                text[self.masked[kind].places] = self.masked[kind].targets
        return text

    def with_visual_words(self, words: Tensor) -> MaskedBatch:
        """The batch with `words`, `[images, patches]`, as the visual words to predict."""
        codes = words.flatten()
        masked = {
            kind: replace(one, targets=codes[one.places]) if kind in IMAGE_OBJECTIVES else one
            for kind, one in self.masked.items()
        }
        return replace(self, visual_words=words, masked=masked)

    @staticmethod
    def collate(
        images: Tensor,
        hidden_patches: Tensor,
        visual_words: Tensor,
        texts: Sequence[Sequence[int]],
        token_masks: Sequence[np.ndarray],
        mask_id: int,
        *,
        pairs: int,
        ids: Sequence[str] = (),
        sources: Sequence[str] = (),
    ) -> MaskedBatch:
        """Pack samples: pictures alone before those of pairs, captions before texts alone.

        Texts alone are sorted by length, so that neighbours need little padding.

        Args:
            images: uint8 `[images, 3, height, width]`; the last `pairs` of them belong to pairs.
            hidden_patches: bool `[images, patches]`, True where a patch is hidden and predicted.
            visual_words: `[images, patches]`.
            texts: Ids of each text, uncorrupted; the first `pairs` of them belong to pairs.
            token_masks: bool `[tokens]` for each text, True where a token is to be predicted.
            mask_id: The id of `<mask>`.
            ids, sources: Names for images alone, pairs and texts alone, in this order.

        Raises:
            ValueError: shapes or counts don't fit; the message names the argument.
        """
        if not len(images) == len(hidden_patches) == len(visual_words):
            raise ValueError(
                f"images, hidden_patches, visual_words: of different lengths, {len(images)}, "
                f"{len(hidden_patches)}, {len(visual_words)}"
            )
        if hidden_patches.shape != visual_words.shape:
            raise ValueError(
                f"hidden_patches: {list(hidden_patches.shape)} is not the shape of visual_words, "
                f"{list(visual_words.shape)}"
            )
        if [len(text) for text in texts] != [len(mask) for mask in token_masks]:
            raise ValueError("token_masks: not of the lengths of texts")
        order = [*range(pairs), *sorted(range(pairs, len(texts)), key=lambda i: len(texts[i]))]
        texts, token_masks = [texts[i] for i in order], [token_masks[i] for i in order]
        samples = [*range(len(images)), *(len(images) + i - pairs for i in order[pairs:])]
        lengths = tuple(len(text) for text in texts)
        patches = hidden_patches.shape[1] if len(images) else 0
        text = torch.tensor([i for words in texts for i in words], dtype=torch.long)
        in_text = np.concatenate([*token_masks, np.zeros(0, bool)])
        text_places = torch.from_numpy(in_text).bool().nonzero().flatten()
        image_places = hidden_patches.flatten().nonzero().flatten()
        of_singles = int((image_places < (len(images) - pairs) * patches).sum())
        of_pairs = int((text_places < sum(lengths[:pairs])).sum())
        layout = Layout.build(len(images), 1 + patches, lengths, pairs)
        tokens = image_places + image_places // max(1, patches) + 1  # each picture's [CLS] is first
        vision = torch.cat([tokens, torch.arange(len(images)) * (1 + patches)]).sort().values
        language = torch.cat([text_places, layout.starts]).unique()
        image_rows = torch.searchsorted(vision, tokens)
        text_rows = torch.searchsorted(language, text_places)
        codes = visual_words.flatten().long()
        masked = {
            kind: Masked(targets[places], places, rows)
            for kind, places, rows, targets in (
                ("image", image_places[:of_singles], image_rows[:of_singles], codes),
                ("pair_image", image_places[of_singles:], image_rows[of_singles:], codes),
                ("pair_text", text_places[:of_pairs], text_rows[:of_pairs], text),
                ("text", text_places[of_pairs:], text_rows[of_pairs:], text),
            )
            if len(places)
        }
        corrupted = text.clone()
        corrupted[text_places] = mask_id
        return MaskedBatch(
            images=images,
            hidden_patches=hidden_patches,
            visual_words=visual_words,
            text=corrupted,
            layout=layout,
            read=layout.reading(vision, language),
            masked=masked,
            lengths=lengths,
            pairs=pairs,
            ids=tuple(ids[i] for i in samples) if ids else (),
            sources=tuple(sources[i] for i in samples) if sources else (),
        )


@dataclass(frozen=True)
class ObjectiveWeights:
    """The objectives and the weight of each in the loss; 0 turns it off."""

    image: float = 1.0
    """Hidden patches of images alone."""
    text: float = 1.0
    """Words of texts alone."""
    pair_image: float = 1.0
    """Hidden patches of images with a caption."""
    pair_text: float = 1.0
    """Words of captions with an image."""
    image_target: Literal["codes", "pixels"] = "codes"
    """Target for a hidden patch: its visual word, or its pixels, each patch normalised by its own
    mean and deviation (mean squared error)."""

    def __post_init__(self) -> None:
        for name in OBJECTIVES:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"objectives.{name}: expected a weight of 0 or more, got {getattr(self, name)}"
                )


class MaskedDataModelling(nn.Module):
    """BEiT-3 with its two pretraining heads, computed at masked positions only.

    The image head is `image_head`, one output per visual word, or, if pixels are the target,
    `pixel_head`, one output per value of a patch.
    """

    def __init__(self, config: ModelConfig, weights: ObjectiveWeights | None = None) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.weights = weights or ObjectiveWeights()
        self.pixels = self.weights.image_target == "pixels"
        if self.pixels:
            self.pixel_head = nn.Linear(config.hidden, 3 * config.patch_size**2)
        else:
            self.image_head = nn.Linear(config.hidden, config.codebook_size)
        self.text_head = nn.Linear(config.hidden, config.vocab_size)
        for head in (self.head_of_images, self.text_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    @property
    def head_of_images(self) -> nn.Linear:
        return self.pixel_head if self.pixels else self.image_head

    def predict(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """Predictions for each objective present: logits `[masked, codes]` of images (or
        normalised pixels `[masked, patch * patch * 3]`), logits `[masked, words]` of texts."""
        found = self._predictions(self._hidden(batch), batch)
        return {kind: own for kind, own in found.items() if kind in batch.masked}

    def _hidden(self, batch: MaskedBatch) -> Streams:
        some = len(batch.images) > 0
        return self.backbone.hidden(
            normalise(batch.images) if some else None,
            batch.text,
            batch.layout,
            batch.hidden_patches if some else None,
            batch.read,
        )

    def _predictions(self, hidden: Streams, batch: MaskedBatch) -> dict[str, Tensor]:
        """Predictions of all objectives, `[0, out]` where nothing is masked: both heads are always
        called, since workers that gather their parameters must call the same modules."""
        some = next(output for output in hidden if output is not None)
        nothing = batch.layout.starts[:0]
        predictions: dict[str, Tensor] = {}
        for head, output, kinds in (
            (self.head_of_images, hidden.vision, IMAGE_OBJECTIVES),
            (self.text_head, hidden.language, TEXT_OBJECTIVES),
        ):
            # One matrix product for all of a head's objectives.
            rows = [batch.masked[k].rows if k in batch.masked else nothing for k in kinds]
            read = (some if output is None else output).index_select(0, torch.cat(rows))
            parts = head(read).split([len(own) for own in rows])
            predictions |= dict(zip(kinds, parts, strict=True))
        return predictions

    @torch.no_grad()
    def restore(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """The batch restored: visual words `[images, patches]` and text `[tokens]`, both with the
        likeliest prediction at each hidden place and the input at the others. If pixels are the
        target, the visual words stay as they are; see `restore_pixels`."""
        words, text = batch.visual_words.clone(), batch.text.clone()
        for kind, found in self.predict(batch).items():
            if self.pixels and kind in IMAGE_OBJECTIVES:
                continue
            whole = words.view(-1) if kind in IMAGE_OBJECTIVES else text
            whole[batch.masked[kind].places] = found.argmax(-1)
        return words, text

    @torch.no_grad()
    def restore_pixels(self, batch: MaskedBatch) -> Tensor:
        """The batch's images, uint8 `[images, 3, height, width]`, with the hidden patches as
        predicted; a patch's mean and deviation, which are not predicted, are the true ones.

        Raises:
            ValueError: pixels are not the target.
        """
        if not self.pixels:
            raise ValueError("restore_pixels: the target of images is codes")
        size = self.backbone.config.patch_size
        whole = patches(batch.images, size).float()
        for kind, found in self.predict(batch).items():
            if kind in IMAGE_OBJECTIVES:
                places = batch.masked[kind].places
                true = whole[places]
                deviation = (true.var(-1, keepdim=True) + 255**2 * PIXEL_EPS).sqrt()
                whole[places] = found.float() * deviation + true.mean(-1, keepdim=True)
        grid = batch.images.shape[-2] // size, batch.images.shape[-1] // size
        tiles = whole.round().clamp(0, 255).to(torch.uint8).view(-1, *grid, size, size, 3)
        return tiles.permute(0, 5, 1, 3, 2, 4).reshape(batch.images.shape)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """The loss and, per objective present, `loss/*` and `accuracy/*` (scalars); pixels have no
        accuracy. An objective of weight 0 is measured if the batch has it, but not trained.

        In training with several workers, metrics are means over all workers' masked places, and the
        loss is the workers' mean of `loss`: every worker must call this. If a step reads several
        batches (`of_one_step`), the mean of their results is that of the step."""
        results: dict[str, Tensor] = {}
        hidden = self._hidden(batch)
        predictions = self._predictions(hidden, batch)
        # Outputs that enter no loss stay in the graph: engines want a gradient for every parameter,
        # the same ones on every worker.
        kept = [output for output in hidden if output is not None]
        kept += [p for k, p in predictions.items() if not self._learns(batch, k)]
        loss = torch.stack([output.float().sum() for output in kept]).sum() * 0.0
        parts: dict[str, Tensor] = {}
        for name in batch.masked:
            found = predictions[name]
            if self.pixels and name in IMAGE_OBJECTIVES:
                part = F.mse_loss(found.float(), self._pixels(batch, batch.masked[name].places))
            else:
                targets = batch.masked[name].targets
                part = F.cross_entropy(found.float(), targets)
                results[f"accuracy/{name}"] = (found.argmax(-1) == targets).float().mean()
            parts[name] = part
            results[f"loss/{name}"] = part if getattr(self.weights, name) else part.detach()
        shares: dict[str, Any] = dict.fromkeys(parts, 1.0)
        if self.training and (batch.step or _workers() > 1):
            places = {name: len(batch.masked[name].places) for name in parts}
            means, shares = over_step(results, places, batch.step, loss.device)
            kinds = batch.step.kinds if batch.step else tuple(parts)
            results = {f"loss/{kind}": means[f"loss/{kind}"] for kind in kinds}
            results |= {
                f"accuracy/{kind}": means[f"accuracy/{kind}"]
                for kind in kinds
                if not (self.pixels and kind in IMAGE_OBJECTIVES)
            }
        for name, part in parts.items():
            weight = getattr(self.weights, name)
            if weight:
                loss = loss + weight * shares[name] * part
        results["loss"] = loss
        return results

    def _learns(self, batch: MaskedBatch, kind: str) -> bool:
        return kind in batch.masked and getattr(self.weights, kind) > 0

    def _pixels(self, batch: MaskedBatch, places: Tensor) -> Tensor:
        """Patches `[places, patch * patch * 3]`, each with mean 0 and deviation 1."""
        size = self.backbone.config.patch_size
        true = patches(batch.images, size)[places].float() / 255
        centred = true - true.mean(-1, keepdim=True)
        return centred / (true.var(-1, keepdim=True) + PIXEL_EPS).sqrt()


def of_one_step(batches: Sequence[MaskedBatch]) -> list[MaskedBatch]:
    """A worker's batches of one optimizer step, so that each masked place counts alike in it.

    Batches hide different numbers of places: in the mean of their means, a place of a batch with
    few would count for more, and a step would depend on the number of batches it is split into.
    """
    if len(batches) == 1:
        return list(batches)
    counts = {
        kind: sum(len(one.masked[kind].places) for one in batches if kind in one.masked)
        for kind in OBJECTIVES
    }
    kinds = tuple(kind for kind, count in counts.items() if count)
    step = StepPlaces(kinds, torch.tensor([float(n) for n in counts.values()]) / len(batches))
    return [replace(batch, step=step) for batch in batches]


def over_step(
    means: dict[str, Tensor],
    places: dict[str, int],
    step: StepPlaces | None,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Means over the masked places of all workers, which must all call this, and of a step's
    batches.

    Workers have equally many samples but different numbers of masked places, so the mean of their
    means would depend on the number of workers.

    Args:
        means: `loss/*` and `accuracy/*` over a worker's own places.
        places: Number of the worker's own places, by objective.
        step: What all of the worker's batches of a step hide, if there are several.

    Returns:
        `loss/*` and `accuracy/*` over all workers' places; in a step of several batches, such that
        their mean over the batches is that over the step's places. And, by objective, the factor
        of the worker's own loss: its number of places divided by the mean number over all workers
        and the step's batches.
    """
    none = torch.zeros((), device=device)
    counts = torch.stack([none + places.get(kind, 0) for kind in OBJECTIVES])
    sums = [
        torch.stack([means.get(f"{of}/{kind}", none).detach() for kind in OBJECTIVES]) * counts
        for of in ("loss", "accuracy")
    ]
    told = torch.stack([counts if step is None else step.mean, *sums])
    if _workers() > 1:
        dist.all_reduce(told)
    total = told[0].masked_fill(told[0] == 0, 1.0)
    values = (told[1:] / total).unbind()
    found = {
        f"{of}/{kind}": value
        for of, row in zip(("loss", "accuracy"), values, strict=True)
        for kind, value in zip(OBJECTIVES, row, strict=True)
    }
    shares = counts * _workers() / total
    return found, dict(zip(OBJECTIVES, shares, strict=True))


def _workers() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def patches(images: Tensor, size: int) -> Tensor:
    """`[images, 3, height, width]` cut into patches: `[images * patches, size * size * 3]`, in the
    order in which the model reads them."""
    tiles = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)


class DualEncoder(nn.Module):
    """Encodes images and texts apart into one space: for the contrastive stage and retrieval."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.vision_head = nn.Linear(config.hidden, config.hidden, bias=False)
        self.language_head = nn.Linear(config.hidden, config.hidden, bias=False)
        # One element, not a scalar: DeepSpeed can't view scalars as bytes to broadcast them.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        for head in (self.vision_head, self.language_head):
            nn.init.xavier_normal_(head.weight)

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to unit vectors `[n, hidden]`."""
        out = self.backbone(images=normalise(images))
        return F.normalize(self.vision_head(out.image_summary), dim=-1)

    def encode_patches(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to projected patch features `[n, patches, hidden]`."""
        out = self.backbone(images=normalise(images))
        assert out.vision is not None
        return self.vision_head(out.vision[:, 1:])

    def encode_texts(self, text: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed ids `[sum(lengths)]` to unit vectors `[texts, hidden]`."""
        out = self.backbone(text=text, lengths=lengths)
        return F.normalize(self.language_head(out.text_summary), dim=-1)

    def forward(self, images: Tensor, text: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Symmetric contrastive loss of `n` pictures and their `n` texts over all workers."""
        out = self.backbone(images=normalise(images), text=text, lengths=lengths)
        pictures = F.normalize(self.vision_head(out.image_summary), dim=-1)
        texts = F.normalize(self.language_head(out.text_summary), dim=-1)
        all_pictures, all_texts = gather(pictures), gather(texts)
        scale = self.logit_scale.exp()
        first = dist.get_rank() * len(images) if dist.is_initialized() else 0
        targets = torch.arange(first, first + len(images), device=images.device)
        by_picture = scale * pictures @ all_texts.T
        by_text = scale * texts @ all_pictures.T
        loss = (F.cross_entropy(by_picture, targets) + F.cross_entropy(by_text, targets)) / 2
        accuracy = (by_picture.argmax(-1) == targets).float().mean()
        return {"loss": loss, "accuracy/contrastive": accuracy}


def gather(x: Tensor) -> Tensor:
    """Rows of all workers, in rank order, with gradients; the input itself on one worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))
