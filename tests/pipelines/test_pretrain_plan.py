"""What a pretraining run would take, before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import torch
import yaml
from torch import nn

from beit3.config import PRESETS as MODELS
from beit3.flops import StepShape
from beit3.memory import hollow
from beit3.objectives import MaskedDataModelling
from pipelines import budget, cluster, pretrain, pretrain_plan, token_checks
from pipelines.budget import GIB, Assumptions
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PRESETS, PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError
from pipelines.trainer import fit


def test_it_needs_neither_data_nor_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = PRESETS["tiny"]
    cfg = replace(
        tiny,
        store=str(tmp_path),
        train=replace(tiny.train, steps=1000, price_per_hour=2.0, gpus_per_worker=1),
        assume=Assumptions(gpu_tflops=1e-3, mfu=0.5),
    )
    found = pretrain.plan(cfg)
    module = MaskedDataModelling(MODELS["tiny"])
    assert found["parameters"] == sum(p.numel() for p in module.parameters())
    assert found["memory"]["parameters"] == 4 * found["parameters"]
    assert found["missing"] == [f"tokens/{n}" for n in (*cfg.images, *cfg.texts, *cfg.pairs)]
    # Two workers of 1 GFLOP/s, half used, for 2 an hour each.
    assert found["hours"] == pytest.approx(1000 * found["flops_per_step"] / 2 / 0.5e9 / 3600)
    assert found["cost"] == pytest.approx(found["hours"] * 2 * 2.0)
    assert not found["problem"] and not found["stop"]
    pretrain_plan.show(found)
    said = capsys.readouterr().out
    assert "decoding takes longer" not in said and "stops the run" not in said
    assert "not checked, since not all tokens are there: tokens/imagenet21k" in said
    with pytest.raises(ValueError, match="dry_run is set"):
        pretrain.run(replace(cfg, dry_run=True))


def test_tokens_that_are_there_are_counted_and_checked(
    corpus: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start", None)
    cfg = small_corpus.pretraining(corpus, train={"steps": 17})
    found = pretrain.plan(cfg)
    rows = {row["name"]: row for row in found["datasets"]}
    assert not found["missing"]
    assert rows["tokens/pairs"] == {"name": "tokens/pairs", "rows": 34, "samples": 17 * 8}
    # The lengths are those of the tokens: a real batch costs about as much.
    tokenizer = token_checks.check_data(corpus, cfg)[1]
    recipe = PretrainRecipe(cfg, tokenizer)
    batches = recipe.batches(0, 1)
    mean = sum(recipe.flops(batches(step)) for step in range(17)) / 17
    assert found["flops_per_step"] == pytest.approx(mean, rel=0.1)
    with pytest.raises(StoreError, match="codebook_size 99 is not the tokenizer's"):
        pretrain.plan(replace(cfg, model=replace(cfg.model, codebook_size=99)))


def test_too_little_memory_is_a_problem_with_ways_out(tmp_path: Path) -> None:
    giant = PRESETS["giant"]
    model = replace(giant.model, checkpoint_activations="none")
    train = replace(giant.train, zero_stage=2)
    cfg = replace(giant, store=str(tmp_path), model=model, train=train)
    problem = pretrain.plan(replace(cfg, assume=Assumptions(gpu_gib=24)))["problem"]
    assert "its GPU has 24.0 (assume.gpu_gib)" in problem
    for way in ("train.zero_stage 3: ", "train.offload: ", "checkpoint_activations blocks: "):
        assert way in problem
    assert not pretrain.plan(replace(cfg, assume=Assumptions(gpu_gib=640)))["problem"]


def test_it_says_where_a_limit_stops_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    base = replace(PRESETS["base"], store="/nowhere")
    whole = pretrain.plan(base)["hours"]
    limited = replace(base.train, price_per_hour=1.5, max_cost=10.0, max_hours=5.0)
    found = pretrain.plan(replace(base, train=limited))
    hours = 10 / (16 * 1.5)
    stop = found["stop"]
    assert (stop["option"], stop["hours"]) == ("train.max_cost 10", pytest.approx(hours))
    assert stop["step"] == int(1_000_000 * hours / whole)
    assert (stop["starts"] - 1) * stop["step"] < 1_000_000 <= stop["starts"] * stop["step"]
    assert found["cost"] == pytest.approx(whole * 16 * 1.5)
    pretrain_plan.show(found)
    said = capsys.readouterr().out
    assert "train.max_cost 10 stops the run after 0.42 hours, " in said
    assert f"at about step {stop['step']:,}: " in said
    assert f"it takes {stop['starts']:,} starts of the command" in said
    enough = replace(base.train, max_hours=whole + 1)
    assert not pretrain.plan(replace(base, train=enough))["stop"]


def test_a_step_takes_as_long_as_decoding_its_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    base = replace(PRESETS["base"], store="/nowhere")
    slow = replace(base, train=replace(base.train, loader_workers=0, accumulate=2, steps=20_000))
    found = pretrain.plan(slow)
    pictures = 2 * (2048 + 2048) / 16
    assert found["decoding"] == pytest.approx(pictures / 300)
    assert found["decoding"] > found["computing"]
    assert found["hours"] == pytest.approx(found["decoding"] * 20_000 / 3600)
    pretrain_plan.show(found)
    said = capsys.readouterr().out
    assert f"train.loader_workers {found['loader_workers']} would do" in said
    done = replace(slow, train=replace(slow.train, loader_workers=found["loader_workers"]))
    better = pretrain.plan(done)
    assert better["computing"] == found["computing"] >= 1.5 * better["decoding"]
    assert better["hours"] == pytest.approx(better["computing"] * 20_000 / 3600)
    twice = replace(slow, assume=Assumptions(decoded_per_second=600))
    assert pretrain.plan(twice)["decoding"] == pytest.approx(found["decoding"] / 2)


def test_presets_have_the_loader_workers_that_the_plan_asks_for() -> None:
    for name in ("base", "large", "giant"):
        cfg = replace(PRESETS[name], store="/nowhere")
        found = pretrain.plan(cfg)
        assert cfg.train.loader_workers == found["loader_workers"], name
        assert found["computing"] >= 1.5 * found["decoding"], name


def test_gpu_nodes_have_the_cpus_that_presets_ask_for() -> None:
    infra = Path(__file__).parents[2] / "infra"
    google = yaml.safe_load((infra / "ray_cluster_gcp.yaml").read_text())
    resources = google["available_node_types"]["gpu"]["resources"]
    nodes = {"gcp": (resources["CPU"], resources["GPU"])}
    pods = yaml.safe_load((infra / "kuberay" / "ray-cluster.yaml").read_text())
    gpu = next(g for g in pods["spec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    wanted = gpu["template"]["spec"]["containers"][0]["resources"]["requests"]
    nodes["kuberay"] = (int(wanted["cpu"]), int(wanted["nvidia.com/gpu"]))
    for where, (cpus, gpus) in nodes.items():
        for name in ("base", "large", "giant"):
            train = PRESETS[name].train
            needed = gpus * (train.cpus_per_worker + train.loader_workers)
            assert cpus >= needed, (where, name)


@pytest.mark.parametrize(
    ("options", "shares"),  # of parameters, gradients, optimizer and host, in parameters of 4 bytes
    [
        ({"zero_stage": 0}, (1, 1, 2, 0)),
        ({"zero_stage": 1}, (1, 1, 3 / 4, 0)),
        ({"zero_stage": 2}, (1, 1 / 4, 3 / 4, 0)),
        ({"zero_stage": 3}, (1 / 4, 1 / 4, 3 / 4, 0)),
        ({"zero_stage": 2, "offload": True}, (1, 0, 0, 1)),
    ],
)
def test_zero_splits_the_state(options: dict[str, Any], shares: tuple[float, ...]) -> None:
    found = budget.states(1000, TrainConfig(workers=4, **options))
    parts = (found.parameters, found.gradients, found.optimizer, found.host)
    assert parts == tuple(4000 * share for share in shares)


def test_a_gpu_too_small_for_the_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        module = nn.Linear(1 << 14, 1 << 16, bias=False)  # 4 GiB
    config, gpu = TrainConfig(workers=2, zero_stage=0), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    budget.check_device(module, config, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 24 * GIB))
    said = r"take 16.0 GiB of each GPU, and a GPU has 15.0 GiB"
    with pytest.raises(RuntimeError, match=said):  # somebody else's may go
        budget.check_device(module, config, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 15 * GIB))
    with pytest.raises(ValueError, match=said):
        budget.check_device(module, config, gpu)
    budget.check_device(module, config, torch.device("cpu"))


def test_a_gpu_too_small_for_a_step_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    base = PRESETS["base"]
    train = replace(base.train, workers=1)
    model = replace(base.model, checkpoint_activations="none")
    cfg = replace(base, model=model, train=train)
    shape = pretrain_plan.shape_of(cfg, {})
    step, module = pretrain_plan.step_memory(cfg, shape), hollow(model)
    trained = sum(p.numel() for p in module.parameters())
    needed = budget.states(trained, train).total + step.configured
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")

    def check(total: float, step: budget.StepMemory | None) -> None:
        there = (int(total), int(total))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: there)
        budget.check_device(module, train, torch.device("cuda", 0), step)

    check(needed, step)
    check(0.5 * needed, None)  # nobody has reckoned it
    with pytest.raises(ValueError, match=r"a worker needs .* by estimate, .*\(a GPU\)") as said:
        check(0.99 * needed, step)
    for way in ("train.offload", "model.checkpoint_activations blocks: ", "or smaller batches"):
        assert way in str(said.value)
    # The dry run says the same.
    found = pretrain.plan(replace(cfg, store="/nowhere", assume=Assumptions(gpu_gib=100)))
    assert found["memory"]["in_all"] == needed
    assert f"a worker needs {needed / GIB:.1f} GiB" in found["problem"]
    assert str(said.value).split(". In")[1] == found["problem"].split(". In")[1]


def test_presets_fit_the_gpus_that_are_assumed() -> None:
    for name in ("base", "large", "giant"):
        assert not pretrain.plan(replace(PRESETS[name], store="/nowhere"))["problem"], name


def test_the_batch_of_a_worker_has_its_share() -> None:
    cfg = PretrainConfig(train=TrainConfig(workers=16))
    shape = pretrain_plan.worker_shape(cfg, [10], [100, 300])
    assert isinstance(shape, StepShape)
    assert (shape.images, shape.pairs, len(shape.lengths)) == (256, 128, 256)
    assert shape.lengths[:128] == (10,) * 128
    assert shape.lengths[128:].count(100) == shape.lengths[128:].count(300) == 64
    assert shape.masked_patches == 78 * (128 + 64)  # of every other pair the picture is masked
    assert shape.masked_tokens == round(128 * 8 * 0.5 * 0.5 + 64 * (98 + 298) * 0.15)


def test_a_run_on_gpus_tells_its_workers_what_a_step_takes(
    corpus: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start", lambda: None)
    monkeypatch.setattr(pretrain, "fit", lambda store, **given: given)
    cfg = small_corpus.pretraining(corpus, name="reckoned", train={"workers": 1})
    assert pretrain.run(cfg)["step_memory"] is None
    cfg = replace(cfg, train=replace(cfg.train, gpus_per_worker=1.0))
    found = pretrain.plan(cfg)["memory"]["activations_estimated"]
    assert pretrain.run(cfg)["step_memory"].configured == found


def test_a_worker_checks_what_a_step_takes(corpus: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(budget, "check_device", lambda *given: seen.append(given[3]))
    cfg = small_corpus.pretraining(corpus, name="checked", train={"steps": 2})
    recipe, datasets = pretrain.prepare(cfg)
    step = budget.StepMemory(1, 1)
    fit(
        corpus, name="checked", output="models/checked", recipe=recipe, config=cfg.train,
        fingerprint=pretrain.run_mark(cfg, datasets), parameters={}, step_memory=step,
        track=False,
    )  # fmt: skip
    assert seen == [step]
