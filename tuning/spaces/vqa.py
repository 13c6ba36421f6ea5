"""Search space for finetuning on questions."""

from ray import tune

SPACE = {
    "train.learning_rate": tune.loguniform(3e-4, 6e-3),
    "train.layer_decay": tune.choice([0.7, 0.85, 1.0]),
    "train.head_scale": tune.choice([1.0, 5.0]),
    "drop_path": tune.choice([0.0, 0.1]),
}
