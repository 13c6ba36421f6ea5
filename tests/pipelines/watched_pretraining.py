"""Pretraining whose rows are written down and whose workers come to harm: a recipe, and a program.

    python watched_pretraining.py settings.json

The settings' `configs` are pretraining jobs of the small corpus, run one after the other on a local
Ray cluster: `store`, `name`, `train` (changes of its TrainConfig), and `folder` and `held`, as
`Witness` has them.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest import mock

import small_corpus
import torch.distributed as dist
from torch import nn
from two_nodes import Driver

from beit3.objectives import MaskedBatch
from pipelines import cluster, pretrain
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PretrainConfig
from pipelines.storage import Store


@dataclass(frozen=True)
class Numbered(MaskedBatch):
    number: int = -1


@dataclass(frozen=True)
class Witness:
    """What is seen of a run, and what is done to it.

    folder: Where `rows-RANK` of each worker goes, a line for each batch that it was trained on, its
        number and the names of its rows, and `held-NUMBER`, the id of a process that waits to be
        killed.
    held: Numbers of batches before which a worker waits, once, and that worker's rank.
    fails: The number of a batch before which every worker fails.
    """

    folder: str
    held: tuple[tuple[int, int], ...] = ()
    fails: int = -1

    def before(self, batch: Numbered) -> None:
        rank, folder = dist.get_rank(), Path(self.folder)
        if batch.number == self.fails:
            raise RuntimeError(f"as it was told to, before batch {batch.number}")
        mark = folder / f"held-{batch.number}"
        if (batch.number, rank) in self.held and not mark.exists():
            draft = mark.with_suffix(".draft")
            draft.write_text(str(os.getpid()))
            draft.replace(mark)  # whole or not at all
            threading.Event().wait()
        with (folder / f"rows-{rank}").open("a") as file:
            file.write(json.dumps([batch.number, list(batch.ids)]) + "\n")

    def trained_on(self, rank: int) -> list[tuple[int, list[str]]]:
        """The batches of the workers of a rank, in order: numbers and rows."""
        lines = (Path(self.folder) / f"rows-{rank}").read_text().splitlines()
        return [(number, ids) for number, ids in map(json.loads, lines)]

    def numbers(self, rank: int) -> list[int]:
        return [number for number, _ in self.trained_on(rank)]


@dataclass(frozen=True)
class Watched(PretrainRecipe):
    witness: Witness = Witness("")

    def build(self) -> nn.Module:
        module = super().build()
        module.register_forward_pre_hook(lambda _, given: self.witness.before(given[0]))
        return module

    def batches(self, rank: int, world: int) -> Callable[[int], Numbered]:
        make = super().batches(rank, world)

        def batch(number: int) -> Numbered:
            made = make(number)
            return Numbered(**{f.name: getattr(made, f.name) for f in fields(made)}, number=number)

        return batch


@contextmanager
def watching(witness: Witness) -> Iterator[None]:
    """Have pretraining jobs of this process train a `Watched` recipe."""
    Path(witness.folder).mkdir(exist_ok=True)
    real = pretrain.fit

    def fit(store: Store, *, recipe: PretrainRecipe, **options: Any) -> dict[str, Any]:
        watched = Watched(recipe.cfg, recipe.tokenizer, recipe.words_in_step, witness)
        return real(store, recipe=watched, **options)

    with mock.patch.object(pretrain, "fit", fit):
        yield


class Job(Driver):
    """The program, as tests start it."""

    program = __file__


def config(store: Store, name: str, **train: Any) -> PretrainConfig:
    """Two workers of one thread each."""
    train = {"workers": 2, "threads": 1, "keep_checkpoints": 99, **train}
    return small_corpus.pretraining(store, name=name, held_out="", train=train)


def main(settings: dict[str, Any]) -> None:
    cluster.start(cpus=2)
    for given in settings["configs"]:
        held = tuple((number, rank) for number, rank in given["held"])
        with watching(Witness(given["folder"], held)):
            pretrain.run(config(Store(given["store"]), given["name"], **given["train"]))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
