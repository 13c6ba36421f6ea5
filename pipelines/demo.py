"""Runs the whole pipeline on a small drawn world: from URL lists to a finetuned, evaluated BEiT-3.

    make demo                    # or: python pipelines/demo.py --root demo

Runs every job of the project on its usual engine, and ends with `report.html`. When run again, it
skips what is finished and resumes what was interrupted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelines import config, console


@dataclass(frozen=True)
class DemoConfig:
    """Run the demo."""

    root: Path = Path("demo")
    """Folder for the sample world, the store, MLflow's file and the report."""
    store: str = ""
    """Another store, such as s3://bucket/prefix; by default a folder below root."""
    port: int = 8765
    """Port of the sample world's web server on 127.0.0.1; it is part of every URL in the lists."""
    small: bool = False
    """A few steps on a tiny world: shows that everything runs, learns nothing."""

    @property
    def store_uri(self) -> str:
        return self.store or str((self.root / "store").absolute())


PRESETS = {"demo": DemoConfig()}


def run(cfg: DemoConfig) -> Path:
    """Run every stage; returns the path of the report.

    Raises:
        StoreError: the store or the tracking server can't be used.
        OSError: the port of the sample world's web server is taken.
    """
    # On a busy machine, torch threads that spin while waiting take the cores from each other: a
    # step can take twenty times as long. Must be set before torch loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.filterwarnings("ignore")
    clock = Clock(cfg.root / "stages.json")
    with _quiet(), clock.whole():
        with clock.stage("setting out"):
            from pipelines import (
                cluster,
                contrast,
                demo_report,
                pretrain,
                tokenize_corpus,
                train_image_tokenizer,
                train_text_tokenizer,
            )
            from pipelines import demo_stages as stages
            from pipelines.sample_world import serve
            from pipelines.storage import Store
            from tuning import sweep

            store = Store(cfg.store_uri)
            store.check_writable()
        with clock.stage("1/12 sample world"):
            world = stages.make_world(cfg)
        with clock.stage("2/12 Ray and the tasks' data"):
            cluster.start(cpus=2)
            stages.prepare(cfg, world)
        with clock.stage("3/12 ingestion"), serve(world.root, port=world.port):
            stages.ingest_all(cfg, world)
        with clock.stage("4/12 text tokenizer"):
            train_text_tokenizer.run(stages.text_tokenizer(cfg))
        with clock.stage("5/12 teacher (contrastive)"):
            contrast.run(stages.teacher(cfg))
        with clock.stage("6/12 image tokenizer (VQ-KD)"):
            train_image_tokenizer.run(stages.image_tokenizer(cfg))
        with clock.stage("7/12 tokens"):
            tokenize_corpus.run(stages.tokens(cfg))
        with clock.stage("8/12 pretraining"):
            pretrain.run(stages.pretraining(cfg))
        with clock.stage("9/12 contrastive stage, for retrieval"):
            contrast.run(stages.aligning(cfg))
        with clock.stage("10/12 finetuning and evaluation"):
            stages.finetune_all(cfg)
        with clock.stage("11/12 sweep"):
            sweep.run(stages.sweeping(cfg))
        with clock.stage("12/12 report"):
            path = demo_report.write(cfg, store, clock.seconds)
    demo_report.show(store, path)
    return path


class Clock:
    """Times the stages; a stage's seconds add up across interrupted runs."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self.seconds = json.loads(file.read_text())

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        start = time.monotonic()
        with console.stage(title):
            yield
        self._add(title, time.monotonic() - start)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._add("total", time.monotonic() - start)

    def _add(self, title: str, seconds: float) -> None:
        self.seconds[title] = self.seconds.get(title, 0.0) + seconds
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.seconds, indent=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the engines' chatter off the console; BEIT3_RAY_LOGS=1 lets it through."""
    if not os.environ.get("BEIT3_RAY_LOGS"):
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
