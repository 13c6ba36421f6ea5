"""The jobs on a GPU, and on two: what they compute there is what they compute on a CPU.

    BEIT3_DEVICE=cpu python -m pytest -m gpu

rehearses it where there is no GPU: Ray then takes two for granted, and the workers compute on CPUs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_corpus
import small_net
import torch
from ray import cloudpickle
from small_net import DECAY, STAGES, STEPS, agree, begun, close, state, train
from torch import Tensor

from pipelines import (
    evaluate,
    finetune,
    pretrain,
    tokenize_corpus,
    tracking,
)
from pipelines.evaluate import EvaluateConfig
from pipelines.finetune import FinetuneConfig
from pipelines.parts import Resources
from pipelines.storage import Store
from pipelines.task_data import SCHEMA

pytestmark = pytest.mark.gpu

ON_GPU: dict[str, Any] = {"workers": 1, "gpus_per_worker": 1.0}
KEPT: dict[str, Any] = {"keep_checkpoints": STEPS, "ema": DECAY, "dropout": 0.0}


@pytest.fixture(scope="module")
def on_cpu(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A run on a CPU, with all of its checkpoints; without dropout, which draws as devices do."""
    store = Store(tmp_path_factory.mktemp("on-cpu"))
    train(store, **KEPT)
    cloudpickle.register_pickle_by_value(small_net)  # no worker can import it
    yield store
    cloudpickle.unregister_pickle_by_value(small_net)


def assert_as(store: Store, wanted: Store, steps: range) -> None:
    """The checkpoints and the model are the same to rounding."""
    for step in steps:
        agree(store, wanted, step)
    close(state(store, "models/run")["model"], state(wanted, "models/run")["model"])


@pytest.mark.parametrize(
    ("stage", "offload"), [*((stage, False) for stage in STAGES), (1, True), (2, True), (3, True)]
)
def test_a_gpu_trains_as_a_cpu_does(
    stage: int, offload: bool, on_cpu: Store, tmp_path: Path
) -> None:
    store = Store(tmp_path)
    train(store, **ON_GPU, **KEPT, zero_stage=stage, offload=offload)
    assert_as(store, on_cpu, range(1, STEPS))


@pytest.mark.parametrize("stage", STAGES)
def test_a_gpu_goes_on_where_a_cpu_was(stage: int, on_cpu: Store, tmp_path: Path) -> None:
    """With its moments, steps and average: they are put where the parameters are."""
    store = begun(on_cpu, tmp_path, 3)
    train(store, **ON_GPU, **KEPT, zero_stage=stage)
    assert_as(store, on_cpu, range(4, STEPS))


@pytest.mark.parametrize("stage", STAGES)
def test_two_gpus_train_as_a_cpu_does(
    stage: int, on_cpu: Store, tmp_path: Path, gpu: torch.device
) -> None:
    if gpu.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs a second CUDA device")
    store = Store(tmp_path)
    train(store, workers=2, gpus_per_worker=1.0, zero_stage=stage, **KEPT)
    found, wanted = (state(one, "models/run")["model"] for one in (store, on_cpu))
    del found["seen"], wanted["seen"]  # a worker's own samples
    close(found, wanted)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pretraining_in_bf16_says_what_the_gpu_does(
    compiled: bool, corpus: Store, gpu: torch.device
) -> None:
    if compiled and gpu.type == "cpu":
        pytest.skip("takes minutes on a CPU")
    options = {"steps": 30, "warmup": 3, "precision": "bf16", "compile": compiled, **ON_GPU}
    name = f"on-gpu-{compiled}"
    result = pretrain.run(small_corpus.pretraining(corpus, name=name, train=options))
    client = tracking.client(tracking.tracking_uri(corpus))

    def logged(metric: str) -> list[float]:
        history = client.get_metric_history(result["mlflow_run"], f"train/{metric}")
        return [one.value for one in sorted(history, key=lambda one: one.step)]

    losses = logged("loss")
    assert len(losses) == 30 and np.mean(losses[-5:]) < np.mean(losses[:5])
    assert all(0 < share < 1 for share in logged("mfu"))
    memory = [logged(f"gpu_{kind}_gib") for kind in ("allocated", "peak", "reserved")]
    wanted = 30 if gpu.type == "cuda" else 0
    assert all(len(values) == wanted for values in memory)
    for allocated, peak, reserved in zip(*memory, strict=True):
        assert 0 < allocated <= peak <= reserved


def test_a_gpu_finds_the_words_that_a_cpu_finds(
    corpus: Store, copied: Callable[..., Store]
) -> None:
    store = copied("images", "text", "tasks", "tokenizers")
    tokenize_corpus.run(small_corpus.tokens(store, actors=1, gpus_per_actor=1.0, batch_size=0))

    def words(of: Store) -> Tensor:
        rows = of.dataset("tokens/pairs").read_table(["views"]).to_pylist()
        return torch.tensor([view["words"] for row in rows for view in row["views"]])

    # Of two codes that are equally near, either may be chosen.
    assert (words(store) == words(corpus)).float().mean() > 0.99


def test_a_gpu_finetunes_and_predicts_what_a_cpu_does(
    corpus: Store, pretrained: dict[str, Any]
) -> None:
    rows = small_corpus.task_rows(9)
    for row in rows:
        row["examples"] = [{"id": row["id"], "text": "a red bar", "target": "null"}]
    small_corpus.publish(corpus, "tasks/captioning/train", SCHEMA, rows)
    tiny = finetune.preset("tiny", "captioning").train
    tuning = FinetuneConfig(
        store=corpus.uri, task="captioning", name="tuned-on-gpu", init="models/pretrained",
        batch_size=4, options={"beams": 2, "max_text_length": 12}, eval_split="",
        train=replace(tiny, steps=120, warmup=12, learning_rate=3e-3, **ON_GPU),
    )  # fmt: skip
    assert finetune.run(tuning)["steps"] == 120
    said = []
    for gpus in (0, 1):
        where = EvaluateConfig(
            store=corpus.uri, model=tuning.output, data="tasks/captioning/val",
            name=f"on-{gpus}-gpus", resources=Resources(actors=1, gpus=gpus),
        )  # fmt: skip
        evaluate.run(where)
        table = corpus.dataset(f"predictions/on-{gpus}-gpus").read_table(["prediction"])
        said.append(table["prediction"].to_pylist())
    assert said[0] == said[1] and set(said[0]) == {'"a red bar"'}
