"""Measures whether an image tokenizer is usable, and says so in words.

    python pipelines/check_tokenizer.py --store store --name vqkd --images captioning/val

Reports usage and perplexity of its codebook, where its reconstruction of the teacher's features
lies between that of a single vector and that of k-means (see `beit3.tokenizer_health`), and how
many of its tokens stay the same in bf16. Exits with status 1 if the tokenizer is unusable.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from beit3.tokenizer_health import Judgement, judge, same_in_bf16
from pipelines import bundles, console, job, pictures
from pipelines.storage import Store
from pipelines.tokenizers import EVALUATED, health_of, load_image_tokenizer, open_teacher


@dataclass(frozen=True)
class CheckConfig:
    """Check an image tokenizer."""

    store: str = "store"
    """Where datasets and tokenizers live: a folder or an s3:// URI."""
    name: str = "vqkd"
    """`tokenizers/image/<name>`."""
    images: tuple[str, ...] = ()
    """Images to measure on, preferably unseen in its training: `images/<name>`, or, with a slash in
    the name, `tasks/<name>`."""
    learned: tuple[str, ...] = ()
    """Image datasets that k-means learns from; empty: those that the tokenizer learned from."""
    teacher: str = ""
    """As in training; empty: the one that it was trained with. An imported tokenizer has none, and
    then only the use of its codes is measured."""
    count: int = 512
    """Images to measure on, from each dataset."""
    baseline_images: int = 1024
    gpu: bool = False

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images: name at least one dataset")
        for name in ("count", "baseline_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


PRESETS = {"default": CheckConfig(images=("cc3m",))}


def run(cfg: CheckConfig) -> Judgement:
    """Measure, print and return the judgement.

    Raises:
        StoreError: the tokenizer, its teacher or a dataset is missing.
        ValueError: the teacher's features differ in width from those that the tokenizer makes.
    """
    store = Store(cfg.store)
    info = bundles.info(store, f"tokenizers/image/{cfg.name}")
    tokenizer, _ = load_image_tokenizer(store, cfg.name)
    device = torch.device("cuda" if cfg.gpu else "cpu")
    name = cfg.teacher or info.get("teacher") or ""
    teacher = None
    if name:
        teacher = open_teacher(store, name, tokenizer.config).to(device)
        if teacher.dim != tokenizer.config.teacher_dim:
            raise ValueError(
                f"teacher {name}: its features are {teacher.dim} wide, the tokenizer makes "
                f"{tokenizer.config.teacher_dim}: it was trained with another"
            )
    learned = [f"images/{n}" for n in cfg.learned or info.get("images", [])]
    named = [f"tasks/{n}" if "/" in n else f"images/{n}" for n in cfg.images]
    size = tokenizer.config.image_size
    images = torch.cat([pictures.some_images(store.dataset(n), cfg.count, size) for n in named])
    own = {f"images/{n}" for n in info.get("images", [])}
    found = health_of(
        tokenizer.to(device),
        teacher,
        images,
        learned=[store.dataset(n) for n in learned],
        baseline_images=cfg.baseline_images,
        held_out=not own & set(named),
    )
    judged = judge(
        found,
        revived=tokenizer.config.revive_below > 0,
        trained_on=sum(store.dataset(n).commit().rows for n in own),
    )
    console.say(f"tokenizers/image/{cfg.name}: {judged.text}")
    parts = (part.to(device) for part in images.split(EVALUATED))
    same = same_in_bf16(tokenizer.eval(), parts)
    console.say(f"{same:.1%} of the words stay the same in bf16 (tokenize_corpus: precision)")
    return judged


def main() -> None:
    def judged(chosen: CheckConfig) -> None:
        sys.exit(1 if run(chosen).verdict == "unusable" else 0)

    job.main(PRESETS, __doc__, judged, billed=False)


if __name__ == "__main__":
    main()
