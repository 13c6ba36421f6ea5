"""The configuration of pretraining: the data, what is masked and predicted, and the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from beit3.config import PRESETS as MODELS
from beit3.config import ModelConfig
from beit3.masking import Masking
from beit3.objectives import ObjectiveWeights
from pipelines.budget import Assumptions
from pipelines.config import indifferent
from pipelines.loader import STREAMS
from pipelines.recipe import TrainConfig

HELD_OUT_PAIRS = 64  # in an evaluation batch
# The objectives that samples of each kind can serve.
OBJECTIVES = {"images": ("image",), "texts": ("text",), "pairs": ("pair_image", "pair_text")}


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a BEiT-3."""

    store: str = indifferent("store", noted="")
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "pretrained"
    """The model becomes `models/<name>`, the run `runs/<name>`."""
    images: tuple[str, ...] = ("imagenet21k",)
    """Tokenized image datasets to use without captions (`tokens/<name>`)."""
    texts: tuple[str, ...] = ("wiki",)
    """Tokenized text datasets."""
    pairs: tuple[str, ...] = ("cc3m", "cc12m", "sbu", "coco", "vg")
    """Tokenized image datasets to use with their captions."""
    image_weights: tuple[float, ...] = ()
    """How often each of `images` is drawn, relative to the others; empty: in proportion to size."""
    text_weights: tuple[float, ...] = ()
    """The same for `texts`."""
    pair_weights: tuple[float, ...] = ()
    """The same for `pairs`. A picture with several captions counts once, and one caption is drawn;
    the paper's 21M pairs count each caption, of which Visual Genome has some 50 per picture."""
    image_batch: int = 2048
    """Images without text per step, over all workers."""
    text_batch: int = 2048
    """Texts without images per step."""
    pair_batch: int = 2048
    """Pairs per step."""
    held_out: str = ""
    """Tokenized pairs, such as captioning/val, whose masked accuracies are measured at the end, and
    every `train.evaluate_every` steps; empty: nothing is measured, and MLflow's pictures of masked
    inputs show training data."""
    held_out_batches: int = 4
    held_out_ranked: int = 0
    """Held-out pairs, up to 64, for zero-shot retrieval of pictures by caption; 0: no retrieval.
    The model reads the square of this number of pairs (`pipelines/zero_shot.py`)."""
    inspect_step: int | None = indifferent(None, noted=None)
    """Train nothing, but show what this step reads; the first is 1, as in MLflow."""
    dry_run: bool = indifferent(False, noted=False)
    """Train nothing, but print what the run would take in memory, hours and money, according to
    `assume`, and whether tokens and model fit together."""
    assume: Assumptions = indifferent(Assumptions(), noted=None)
    """Assumptions of a dry run."""
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: Masking = field(default_factory=Masking)
    objectives: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for kind in OBJECTIVES:
            named, batch = getattr(self, kind), getattr(self, f"{kind[:-1]}_batch")
            if bool(named) != (batch > 0):
                raise ValueError(
                    f"{kind} names {len(named)} datasets, but {kind[:-1]}_batch is {batch}: "
                    "set both or neither"
                )
            self.train.check_shared(f"{kind[:-1]}_batch", batch)
            weights = self.weights(kind)
            if weights and len(weights) != len(named):
                raise ValueError(
                    f"{kind[:-1]}_weights: {len(weights)} weights for the {len(named)} datasets of "
                    f"{kind}: set one for each, or none"
                )
            if not all(0 < weight < math.inf for weight in weights):
                raise ValueError(
                    f"{kind[:-1]}_weights: expected numbers above 0, got "
                    f"{' '.join(map(str, weights))}; leave out of {kind} what is not to be drawn"
                )
        workers = self.train.workers
        if workers and STREAMS % workers and workers % STREAMS:
            raise ValueError(
                f"train.workers {workers}: the {STREAMS} streams that samples are read in can't be "
                "shared out equally, and every worker would read all of the data: set a divisor or "
                f"a multiple of {STREAMS}"
            )
        if not any(map(self.drawn, OBJECTIVES)):
            raise ValueError(
                "image_batch, text_batch, pair_batch: all are 0, or the objectives of what is not "
                "are: nothing to train on"
            )
        for kind in OBJECTIVES:
            if self.held_out and self.held_out in self.used(kind):
                raise ValueError(
                    f"held_out {self.held_out!r} is one of {kind}, which are trained on: name "
                    f"others, such as captioning/val, or leave it out of {kind}"
                )
        if self.held_out_ranked and not self.held_out:
            raise ValueError(
                f"held_out_ranked {self.held_out_ranked}: without held_out there is nothing to "
                "rank: name tokenized pairs there, such as captioning/val, or set 0"
            )
        if self.train.evaluate_every and not self.held_out and not self.predicted:
            raise ValueError(
                f"train.evaluate_every {self.train.evaluate_every}: without held_out nothing is "
                "measured, and no hidden patches are predicted that could be shown: name tokenized "
                "pairs there, such as captioning/val, or set 0"
            )
        if not 0 <= self.held_out_ranked <= HELD_OUT_PAIRS:
            raise ValueError(
                f"held_out_ranked: expected 0 to {HELD_OUT_PAIRS}, got {self.held_out_ranked}"
            )
        if self.inspect_step is not None and not 1 <= self.inspect_step <= self.train.steps:
            raise ValueError(
                f"inspect_step {self.inspect_step} is not within 1..train.steps {self.train.steps}"
            )

    def weights(self, kind: str) -> tuple[float, ...]:
        return getattr(self, f"{kind[:-1]}_weights")

    def drawn(self, kind: str) -> int:
        """Samples of a kind per step; 0 if all objectives that they could serve are off."""
        on = any(getattr(self.objectives, name) for name in OBJECTIVES[kind])
        return getattr(self, f"{kind[:-1]}_batch") if on else 0

    def used(self, kind: str) -> tuple[str, ...]:
        """The datasets that samples of a kind are drawn from."""
        return getattr(self, kind) if self.drawn(kind) else ()

    @property
    def predicted(self) -> str:
        """A kind of samples whose hidden patches are predicted; empty if there is none."""
        weights = {"pairs": self.objectives.pair_image, "images": self.objectives.image}
        return next((kind for kind in weights if weights[kind] and self.drawn(kind)), "")

    @property
    def hidden(self) -> Masking:
        """`masking`, but hiding nothing in pairs that only an objective of weight 0 predicts."""
        image, text = self.objectives.pair_image, self.objectives.pair_text
        if bool(image) == bool(text):
            return self.masking
        return replace(self.masking, pairs="separate", pair_text_share=float(bool(text)))


def _paper(name: str, **train: Any) -> PretrainConfig:
    """Table 11 of the paper: 1M steps of 2048 images, texts and pairs; AdamW; DropPath 0.1.

    `loader_workers` is the number that a dry run recommends: enough to decode 1.5 times the
    pictures that its assumed GPUs take. Nodes of 8 GPUs then need 8 CPUs for training and at most
    32 for these processes; the nodes of the files in `infra` have 90 or more.
    """
    shape = {f: getattr(MODELS[name], f) for f in MODELS[name].__dataclass_fields__}
    shape |= {"drop_path": 0.1, "checkpoint_activations": "blocks"}
    defaults: dict[str, Any] = {
        "steps": 1_000_000,
        "warmup": 10_000,
        "learning_rate": 1e-3,
        "precision": "bf16",
        "workers": 64,
        "gpus_per_worker": 1,
        "checkpoint_every": 1000,
    }
    return PretrainConfig(model=ModelConfig(**shape), train=TrainConfig(**(defaults | train)))


PRESETS = {
    "tiny": PretrainConfig(
        image_batch=8,
        text_batch=16,
        pair_batch=64,
        model=MODELS["tiny"],
        masking=Masking(min_block=4, pair_text_share=0.75),
        # With all weights at 1, the pictures' larger losses dominate a model this small, and it
        # takes several times longer to learn words.
        objectives=ObjectiveWeights(pair_text=4.0),
        train=TrainConfig(
            steps=500, warmup=30, learning_rate=2e-3, workers=2, checkpoint_every=100
        ),
    ),
    "base": _paper("base", workers=16, loader_workers=4),
    "large": _paper("large", workers=32, loader_workers=1),
    "giant": _paper("giant", loader_workers=1),
}
