"""Measures by linear probes what frozen models and visual words know of an object's look.

    python -m benchmarks.probe --store demo/store --models teacher pretrained --tokenizers vqkd

Pictures of one object are drawn (`pipelines.sample_world`); neither training nor the store has
them. A linear classifier learns the object's shape (one of five) and its colour (one of seven) from
frozen features, and is scored on other pictures. A model's features are its image encoder's
summary, the output at the class token; a tokenizer's are how often each visual word occurs in the
picture. A teacher that doesn't know shapes makes visual words that don't either, and predicting
those teaches none.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3 import weights
from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.transforms import WHOLE, apply_view
from beit3.vqkd import VQKD
from pipelines import models
from pipelines.sample_world import draw, scenes
from pipelines.storage import Store
from pipelines.tokenizers import load_image_tokenizer

AT_ONCE = 250
LOOKS = {"shape": scenes.SHAPES, "colour": tuple(scenes.COLOURS)}


def pictures(count: int, size: int, seed: str) -> tuple[Tensor, dict[str, Tensor]]:
    """uint8 `[count, 3, size, size]`, and the index of each look `[count]`."""
    pixels, looks = [], {name: [] for name in LOOKS}
    for number in range(count):
        rng = random.Random(f"{seed}/{number}")
        kind = scenes.Kind(rng.choice(LOOKS["shape"]), rng.choice(LOOKS["colour"]))
        image = draw.paint(scenes.sample_scene(rng, kind=kind), rng)
        pixels.append(apply_view(image, WHOLE, size))
        for name, words in LOOKS.items():
            looks[name].append(words.index(getattr(kind, name)))
    return torch.from_numpy(np.stack(pixels)), {k: torch.tensor(v) for k, v in looks.items()}


def probe(known: Tensor, labels: Tensor, asked: Tensor, answers: Tensor) -> float:
    """Accuracy on `asked` `[m, dim]` of a linear classifier trained on `known` `[n, dim]`."""
    mean, deviation = known.mean(0), known.std(0) + 1e-5
    known, asked = (known - mean) / deviation, (asked - mean) / deviation
    classifier = nn.Linear(known.shape[1], int(labels.max()) + 1)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.LBFGS(
        classifier.parameters(), max_iter=150, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(classifier(known), labels)
        value = value + 1e-3 * classifier.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float((classifier(asked).argmax(-1) == answers).float().mean())


def frozen(store: Store, options: argparse.Namespace) -> Iterator[tuple[str, int, Callable]]:
    """Each model's and tokenizer's name, image size, and function of pictures to features."""
    for name in options.models:
        with models.opened(store, f"models/{name}") as folder:
            config, _ = weights.load_config(folder)
            backbone = BEiT3(config).eval()
            models.load_backbone(nn.ModuleDict({"backbone": backbone}), folder)

        def summary(images: Tensor, of: BEiT3 = backbone) -> Tensor:
            return of(images=normalise(images)).image_summary

        yield f"models/{name}", config.image_size, summary
    for name in options.tokenizers:
        tokenizer, _ = load_image_tokenizer(store, name)

        def counts(images: Tensor, of: VQKD = tokenizer) -> Tensor:
            words = F.one_hot(of.encode(images).long(), of.config.codebook_size)
            return words.sum(1).float()

        yield f"tokenizers/image/{name}", tokenizer.config.image_size, counts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--store", default="demo/store")
    parser.add_argument("--models", nargs="*", default=[], help="bundles of models/")
    parser.add_argument("--tokenizers", nargs="*", default=[], help="bundles of tokenizers/image/")
    parser.add_argument("--pictures", type=int, default=3000, help="that a classifier learns from")
    options = parser.parse_args(arguments)
    print(f"linear probes of {options.pictures:,} pictures, on {options.pictures // 3:,} others")
    print(f"{'':34} " + " ".join(f"{name:>8}" for name in LOOKS))
    print(f"{'chance':34} " + " ".join(f"{1 / len(words):>8.2f}" for words in LOOKS.values()))
    drawn: dict[int, tuple] = {}
    for name, size, features in frozen(Store(options.store), options):
        if size not in drawn:
            learnt = pictures(options.pictures, size, "learnt from")
            drawn[size] = (*learnt, *pictures(options.pictures // 3, size, "asked"))
        images, looks, others, answers = drawn[size]
        with torch.no_grad():
            known, asked = (
                torch.cat([features(part) for part in of.split(AT_ONCE)]) for of in (images, others)
            )
        found = [probe(known, looks[look], asked, answers[look]) for look in LOOKS]
        print(f"{name:34} " + " ".join(f"{accuracy:>8.2f}" for accuracy in found))


if __name__ == "__main__":
    main()
