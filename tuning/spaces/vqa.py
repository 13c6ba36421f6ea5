"""Search space for finetuning on questions."""

from typing import Any

from pipelines.finetune import FinetuneConfig
from tuning.spaces import choice, rates


def space(base: FinetuneConfig) -> dict[str, Any]:
    return {
        "train.learning_rate": rates(0.15, 3.0, base.train.learning_rate),
        "train.layer_decay": choice(0.7, 0.85, 1.0, base.train.layer_decay),
        "train.head_scale": choice(1.0, 5.0, base.train.head_scale),
        "drop_path": choice(0.0, 0.1, base.drop_path),
    }
