"""What a training run logs of its speed, its machine and what it can do without more training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import small_corpus

from pipelines import contrast, run_logger, tracking
from pipelines.storage import Store, StoreError
from pipelines.task_data import SCHEMA as TASK_SCHEMA


def test_utilisation_waiting_and_retrieval_are_logged(corpus: Store) -> None:
    cfg = small_corpus.teacher(corpus, name="measured", held_out="images/pairs", held_out_images=30)
    train = replace(cfg.train, steps=12, warmup=2, log_every=3, evaluate_every=6)
    info = contrast.run(replace(cfg, train=train))
    recalls = {f"{kind}_recall_{k}" for kind in ("text", "image") for k in (1, 5, 10)}
    assert recalls < info["metrics"].keys()
    assert 0 < info["metrics"]["image_recall_10"] <= 1
    tracker = tracking.client(tracking.tracking_uri(corpus))

    def history(key: str) -> list[float]:
        return [m.value for m in tracker.get_metric_history(info["mlflow_run"], key)]

    assert len(history("eval/text_recall_1")) == 2
    shares = history("train/data_wait_share")
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
    used, speed = history("train/mfu"), history("train/tflops_per_worker")
    assert all(0 < u < 1.5 for u in used)  # of a tiny model on a busy machine: what it is varies
    ratios = [s / u for s, u in zip(speed, used, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4)  # the peak


def test_retrieval_is_measured_on_a_captioning_split_too(corpus: Store) -> None:
    cfg = small_corpus.teacher(corpus, name="on-captions", held_out="tasks/captioning/val")
    found = contrast.run(cfg)["metrics"]
    assert found["image_recall_10"] == 1  # there are 9 pictures


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tasks/vqa/val", "held_out: .*vqa/val holds no captions, but what vqa asks"),
        ("images/alone", "held_out: no caption in the first 1000 rows of images/alone"),
        ("images/none", "images/none does not exist"),
    ],
)
def test_a_set_without_captions_is_refused_before_the_first_step(
    name: str, said: str, copied: Callable[..., Store], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = copied("images", "tokenizers")
    questions = small_corpus.task_rows(3)
    small_corpus.publish(store, "tasks/vqa/val", TASK_SCHEMA, questions, task="vqa")
    monkeypatch.setattr(contrast, "fit", None)  # not called
    with pytest.raises(StoreError, match=said):
        contrast.run(small_corpus.teacher(store, held_out=name))


def test_the_machines_use_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    store = Store(tmp_path)
    handle = tracking.start_run(store, "run", {})
    found: dict[str, float] = {}
    with run_logger.Logger(handle) as logger:
        for step in range(1, 600):
            logger.machine(step)
            found = tracking.client(handle.uri).get_run(handle.run_id).data.metrics
            if found:
                break
            time.sleep(0.1)
    assert 0 < found["system/system_memory_usage_percentage"] <= 100
    assert "system/cpu_utilization_percentage" in found


def test_a_dead_tracker_does_not_stop_the_looking(tmp_path: Path) -> None:
    dead = tracking.RunHandle("http://127.0.0.1:9", "0" * 32, "0")
    logger = run_logger.Logger(dead)
    begun = time.monotonic()
    for step in range(100):
        logger.machine(step)
    assert time.monotonic() - begun < 5
    logger.close(timeout=0.1)
