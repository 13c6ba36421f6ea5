"""The rows of the paper's ablations: what each changes in pretraining, and the paper's numbers.

Source: "Image as a Foreign Language", the ablation studies of its supplement: VQA accuracy, NLVR2
accuracy and Flickr30k retrieval R@1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines import config
from pipelines.pretrain_config import PretrainConfig

DEFAULT = "default"
# A variant's values override the common ones.
VARIANTS: dict[str, Mapping[str, Any]] = {
    DEFAULT: {},
    "standard": {"model": {"multiway": False, "vl_layers": 0, "attention": "shared"}},
    "joint": {"masking": {"pairs": "joint"}},
    "mono": {"objectives": {"pair_image": 0.0, "pair_text": 0.0}},
    "multi": {"objectives": {"image": 0.0, "text": 0.0}},
    "pixels": {"objectives": {"image_target": "pixels"}},
    "no-text": {"objectives": {"text": 0.0, "pair_text": 0.0}},
    "mono-text": {"objectives": {"pair_text": 0.0}},
    "multi-text": {"objectives": {"text": 0.0}},
    "no-image": {"objectives": {"image": 0.0, "pair_image": 0.0}},
    "mono-image": {"objectives": {"pair_image": 0.0}},
    "multi-image": {"objectives": {"image": 0.0}},
}
PAPER_TASKS = {"vqa": "VQA", "nlvr2": "NLVR2", "retrieval": "F30K"}
"""The tasks of the paper's ablations, as its tables call them."""


@dataclass(frozen=True)
class Row:
    """A row: one of VARIANTS ("" if we have none), and the paper's numbers by `PAPER_TASKS`."""

    label: str
    variant: str
    paper: tuple[float, float, float]

    def published(self, task: str) -> float:
        return self.paper[list(PAPER_TASKS).index(task)]


@dataclass(frozen=True)
class Ablation:
    """One of the paper's ablations."""

    title: str
    rows: tuple[Row, ...]


_FINAL = (76.8, 81.4, 84.4)
ABLATIONS = (
    Ablation(
        "Backbone",
        (
            Row("standard Transformer", "standard", (76.1, 80.8, 82.8)),
            Row("Multiway Transformer", DEFAULT, _FINAL),
        ),
    ),
    Ablation(
        "Masking of pairs",
        (
            Row("joint", "joint", (75.7, 79.0, 83.1)),
            Row("separate", DEFAULT, _FINAL),
        ),
    ),
    Ablation(
        "Masked prediction on",
        (
            Row("images and texts alone", "mono", (71.3, 64.6, 79.3)),
            Row("pairs", "multi", (75.8, 79.3, 81.1)),
            Row("both", DEFAULT, _FINAL),
        ),
    ),
    Ablation(
        "Image target",
        (
            Row("DALL-E's tokenizer", "", (73.2, 77.7, 76.6)),
            Row("normalised pixels", "pixels", (73.3, 77.1, 75.9)),
            Row("VQ-KD", DEFAULT, _FINAL),
        ),
    ),
    Ablation(
        "Text reconstruction on",
        (
            Row("nothing", "no-text", (71.5, 69.3, 77.8)),
            Row("texts alone", "mono-text", (73.2, 76.4, 81.3)),
            Row("pairs", "multi-text", (76.5, 80.6, 82.7)),
            Row("both", DEFAULT, _FINAL),
        ),
    ),
    Ablation(
        "Image reconstruction on",
        (
            Row("nothing", "no-image", (71.6, 74.3, 71.7)),
            Row("images alone", "mono-image", (75.8, 79.8, 82.0)),
            Row("pairs", "multi-image", (75.6, 79.5, 81.9)),
            Row("both", DEFAULT, _FINAL),
        ),
    ),
)


def variant(base: PretrainConfig, name: str) -> PretrainConfig:
    """The configuration common to all rows, with a variant's values laid over it."""
    return config.from_dict(PretrainConfig, config.merge(config.to_dict(base), VARIANTS[name]))


def check_default(base: PretrainConfig) -> None:
    """
    Raises:
        ValueError: the common configuration is not the paper's default where rows differ.
    """
    objectives, wrong = base.objectives, ""
    if not base.model.multiway:
        wrong = "model.multiway is off"
    elif base.masking.pairs != "separate":
        wrong = f"masking.pairs is {base.masking.pairs}"
    elif objectives.image_target != "codes":
        wrong = f"objectives.image_target is {objectives.image_target}"
    elif not all(map(base.drawn, ("images", "texts", "pairs"))) or not all(
        getattr(objectives, name) for name in ("image", "text", "pair_image", "pair_text")
    ):
        wrong = "an objective is off, or one of images, texts and pairs is not there"
    if wrong:
        raise ValueError(f"pretrain: {wrong}; the rows change it themselves, so leave it as it is")
