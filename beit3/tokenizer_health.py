"""Measures whether an image tokenizer is usable, and explains the numbers in words.

A codebook can collapse: a few codes stand for everything, and pretraining learns to predict nothing
(microsoft/unilm issues 877, 936 and 1724 report that). The loss alone doesn't show it. So usage and
reconstruction are measured on pictures that the tokenizer was not trained on, and reconstruction is
compared with two others of the same features:

- the floor: the best single vector for all patches. A score that is not above it says nothing.
- k-means: one centre per code, fitted to the teacher's features of training pictures; each held-out
  feature is replaced by its nearest centre.

K-means and the tokenizer have different tasks. K-means is given the teacher's feature of the very
patch that it reconstructs; the tokenizer sees pixels only. But the tokenizer's decoder reads all
codes of a picture at once, k-means one. So k-means is a yardstick, not a bound either way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3.vqkd import VQKD, kmeans, nearest, usage_health

Verdict = Literal["usable", "doubtful", "unusable"]
ITERATIONS = 5
PER_CENTRE = 40
"""Maximum training features per centre that k-means learns from."""
_MORE_PICTURES = "more and more varied pictures"


@dataclass(frozen=True)
class Baseline:
    """Baselines for reconstruction, from the teacher's features of training pictures.

    centres: unit vectors `[centres, dim]`; fewer than codes where there were fewer features.
    mean: `[dim]` mean direction of the features, the floor's vector.
    features: number of features that the centres were fitted to.
    """

    centres: Tensor
    mean: Tensor
    features: int

    @staticmethod
    def of(features: Iterable[Tensor], codes: int) -> Baseline:
        """Fit to a teacher's features of training pictures, `[pictures, patches, dim]` each.

        If there are too many features, evenly spread ones are used.
        """
        parts = [F.normalize(part.float(), dim=-1).flatten(0, 1) for part in features]
        rows = torch.cat(parts)
        most = PER_CENTRE * codes
        if len(rows) > most:
            rows = rows[torch.linspace(0, len(rows) - 1, most, device=rows.device).long()]
        centres = kmeans(rows, min(codes, len(rows)), ITERATIONS)
        return Baseline(centres, F.normalize(rows.mean(0), dim=-1), len(rows))

    def cosines(self, target: Tensor) -> tuple[float, float]:
        """Cosines of k-means and of the floor, summed over a held-out `target`'s patches."""
        rows = F.normalize(target.float(), dim=-1).flatten(0, -2)
        found = self.centres[nearest(rows, self.centres)]
        return float((rows * found).sum()), float((rows @ self.mean).sum())


@dataclass(frozen=True)
class Health:
    """A tokenizer's numbers on held-out pictures; `judge` says what they mean.

    used, dead, perplexity: of the pictures' visual words.
    expected: the codes that `words` words would use if all codes were equally likely: with few
        pictures not every code can occur.
    cosine, kmeans, floor: cosines of the reconstruction and its baselines; None without a teacher.
    centres, baseline_features: k-means' numbers of centres and features.
    held_out: False if the tokenizer was trained on these pictures.
    """

    pictures: int
    words: int
    codes: int
    used: float
    dead: int
    perplexity: float
    expected: float
    held_out: bool
    cosine: float | None = None
    kmeans: float | None = None
    floor: float | None = None
    centres: int = 0
    baseline_features: int = 0

    @property
    def usage(self) -> float:
        """Used codes as a share of the expected codes, at most 1."""
        return min(1.0, self.used * self.codes / self.expected)

    @property
    def evenness(self) -> float:
        """Perplexity as a share of the expected codes, at most 1."""
        return min(1.0, self.perplexity / self.expected)

    @property
    def gain(self) -> float | None:
        """The reconstruction's gain over the floor, as a share of k-means' gain."""
        if self.cosine is None or self.kmeans is None or self.floor is None:
            return None
        return (self.cosine - self.floor) / max(1e-6, self.kmeans - self.floor)

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics for a tracker."""
        values = {
            "used": self.used,
            "dead": float(self.dead),
            "perplexity": self.perplexity,
            "cosine": self.cosine,
            "cosine_kmeans": self.kmeans,
            "cosine_floor": self.floor,
        }
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Judgement:
    """A verdict, its reasons, and what to try; `text` says all of it."""

    verdict: Verdict
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    @property
    def text(self) -> str:
        lines = [f"The tokenizer is {self.verdict}.", *(f"- {reason}" for reason in self.reasons)]
        if self.advice:
            lines += ["What to try:", *(f"- {advice}" for advice in self.advice)]
        return "\n".join(lines)

    def to_dict(self, health: Health) -> dict[str, Any]:
        """Verdict and numbers, as JSON."""
        return {**asdict(self), "text": self.text, "numbers": asdict(health)}


@torch.no_grad()
def measure(
    model: VQKD,
    batches: Iterable[tuple[Tensor, Tensor | None]],
    baseline: Baseline | None = None,
    *,
    held_out: bool = True,
) -> Health:
    """Measure a tokenizer on pictures.

    Args:
        batches: uint8 `[n, 3, size, size]` with the teacher's features `[n, patches, dim]`, or with
            None where there is no teacher; both on the model's device.
        held_out: Whether the tokenizer was not trained on these pictures.

    Raises:
        ValueError: there are no pictures.
    """
    was_training = model.training
    model.eval()
    codes = model.config.codebook_size
    counts = torch.zeros(codes)
    pictures, sums = 0, torch.zeros(3, dtype=torch.float64)
    compared = False
    for images, target in batches:
        words = model.encode(images)
        counts += torch.bincount(words.flatten(), minlength=codes).float().cpu()
        pictures += len(images)
        if target is not None:
            made = model.decode(words).float()
            cosine = float(F.cosine_similarity(made, target.float(), dim=-1).sum())
            others = baseline.cosines(target) if baseline else (0.0, 0.0)
            sums += torch.tensor([cosine, *others], dtype=torch.float64)
            compared = True
    model.train(was_training)
    words_seen = int(counts.sum())
    if not words_seen:
        raise ValueError("no pictures to measure the tokenizer on")
    found = usage_health(counts)
    means = (sums / words_seen).tolist()
    return Health(
        pictures=pictures,
        words=words_seen,
        codes=codes,
        used=found["used"],
        dead=int(found["dead"]),
        perplexity=found["perplexity"],
        expected=codes * (1 - (1 - 1 / codes) ** words_seen),
        held_out=held_out,
        cosine=means[0] if compared else None,
        kmeans=means[1] if compared and baseline else None,
        floor=means[2] if compared and baseline else None,
        centres=len(baseline.centres) if baseline else 0,
        baseline_features=baseline.features if baseline else 0,
    )


def same_in_bf16(model: VQKD, batches: Iterable[Tensor]) -> float:
    """Share of visual words that are the same in fp32 and bf16.

    Args:
        batches: uint8 `[n, 3, size, size]`, on the model's device.
    """
    same = [(model.encode(part) == model.encode(part, "bf16")).flatten() for part in batches]
    return float(torch.cat(same).float().mean())


def judge(health: Health, *, revived: bool = False, trained_on: int = 0) -> Judgement:
    """Judge a tokenizer's numbers, and advise what to try.

    Usable: at least half of the expected codes occur, they are used evenly enough, and the
    reconstruction has at least half of k-means' gain over the floor. Unusable: under a tenth, or no
    better than the floor. Else doubtful.

    Args:
        revived: Whether dead codes were revived in training.
        trained_on: Number of training pictures, if known.
    """
    reasons, grades = [], []

    def grade(share: float, reason: str) -> None:
        grades.append("usable" if share >= 0.5 else "doubtful" if share >= 0.1 else "unusable")
        reasons.append(reason)

    occur = round(health.used * health.codes)
    grade(
        health.usage,
        f"Usage: {occur:,} of {health.codes:,} codes occur in {health.words:,} patches of "
        f"{health.pictures:,} pictures; {health.expected:,.0f} would if all were equally likely "
        f"({health.usage:.0%} of that).",
    )
    # As in a language, a few words are common: a fifth of the possible counts as even.
    grade(
        min(1.0, health.evenness / 0.2) if occur > 1 else 0.0,
        f"Perplexity: {health.perplexity:,.1f}, as if so many codes were used equally.",
    )
    gain = health.gain
    if gain is not None:
        grade(
            gain,
            f"Reconstruction: cosine {health.cosine:.3f} to the teacher, where one vector for all "
            f"patches has {health.floor:.3f} and k-means with {health.centres:,} centres "
            f"{health.kmeans:.3f} ({gain:.0%} of the way). K-means is given the teacher's "
            "features, the tokenizer pixels only; its decoder reads all codes of a picture, "
            "k-means one.",
        )
    elif health.cosine is not None:
        reasons.append(f"Reconstruction: cosine {health.cosine:.3f}, with nothing to compare it.")
    else:
        reasons.append("Reconstruction: not measured, since there is no teacher here.")
    if not health.held_out:
        reasons.append(
            "The pictures are of those that it learned from: of others this says nothing."
        )
    if health.words < 4 * health.codes:
        reasons.append(
            f"{health.words:,} patches are few for {health.codes:,} codes: measure on more pictures"
            " for a firmer answer."
        )
    ranks: list[Verdict] = ["unusable", "doubtful", "usable"]
    verdict = min(grades, key=lambda g: ranks.index(g))  # type: ignore[arg-type]
    poor_use = grades[0] != "usable" or grades[1] != "usable"
    poor_cosine = len(grades) > 2 and grades[2] != "usable"
    return Judgement(
        verdict=verdict,  # type: ignore[arg-type]
        reasons=tuple(reasons),
        advice=_advice(health, poor_use, poor_cosine, revived, trained_on),
    )


def _advice(
    health: Health, poor_use: bool, poor_cosine: bool, revived: bool, trained_on: int
) -> tuple[str, ...]:
    advice = []
    if poor_use:
        if not revived:
            advice.append("revive dead codes: --tokenizer.revive-below 0.01")
        smaller = 1 << max(3, round(2 * health.perplexity).bit_length())
        if smaller < health.codes:
            advice.append(f"a smaller codebook: --tokenizer.codebook-size {smaller}")
        advice.append(
            "a larger batch: the codebook starts from the features of the first, which should be "
            f"several times its {health.codes:,} codes"
        )
    if poor_cosine:
        advice.append("train longer: --train.steps")
        advice.append("a deeper decoder: --tokenizer.decoder-layers 3")
    if poor_use or poor_cosine:
        few = trained_on and trained_on * health.words / health.pictures < 100 * health.codes
        said = f" (there were {trained_on:,})" if few else ""
        advice.append(f"learn from {_MORE_PICTURES}{said}")
    return tuple(advice)
