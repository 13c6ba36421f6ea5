"""Search space for finetuning on any task without one of its own."""

from typing import Any

from pipelines.finetune import FinetuneConfig
from tuning.spaces import choice, rates


def space(base: FinetuneConfig) -> dict[str, Any]:
    return {
        "train.learning_rate": rates(0.15, 3.0, base.train.learning_rate),
        "train.layer_decay": choice(0.7, 0.85, 1.0, base.train.layer_decay),
        "drop_path": choice(0.0, 0.1, base.drop_path),
    }
