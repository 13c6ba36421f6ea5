"""The training loop: what a run leaves, what ends it, and what it survives."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train.torch
import small_corpus
import torch
import torch.distributed as dist
from PIL import Image
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from two_workers import on_two_workers, run

from beit3 import weights
from beit3.objectives import MaskedDataModelling
from pipelines import (
    bundles,
    checkpoints,
    cluster,
    models,
    pretrain,
    token_checks,
    tracking,
    trainer,
    training_worker,
)
from pipelines import recipe as recipes
from pipelines.loader_workers import check_room
from pipelines.progress import progress
from pipelines.recipe import Run, TrainConfig
from pipelines.run_logger import Logger
from pipelines.storage import Store, StoreError
from pipelines.trainer import fit

OBJECTIVES = ("image", "text", "pair_image", "pair_text")


@dataclass
class Batch:
    step: int
    data: Tensor


class Line(nn.Module):
    """A small network that writes down its steps, and may come to harm at one of them."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.layer = nn.Linear(4, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        folder, rank = Path(self.recipe.folder), dist.get_rank()
        with (folder / f"steps-{rank}").open("a") as file:
            file.write(f"{batch.step}\n")
        loss = (self.last(self.layer(batch.data).relu()) - batch.data[:, :2]).pow(2).mean()
        if batch.step in self.recipe.at and rank == dist.get_world_size() - 1:
            marker = folder / f"harmed-{batch.step}"
            if self.recipe.harm == "kill-saved" and not marker.exists():
                saved = f"checkpoints/step-{batch.step // 2 * 2:08d}/{bundles.MANIFEST}"
                while not list(folder.glob(f"store/runs/*/{saved}")):
                    time.sleep(0.01)
            if self.recipe.harm.startswith("kill") and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if self.recipe.harm == "nan":
                loss = loss * float("nan")
        return {"loss": loss, "loss/line": loss.detach(), "vector": batch.data[0].detach()}


@dataclass(frozen=True)
class Recipe(recipes.Recipe):
    folder: str
    harm: str = ""
    at: tuple[int, ...] = ()
    """The batches that the harm comes with."""

    def build(self) -> nn.Module:
        if self.harm == "unbuildable":
            with (Path(self.folder) / "built").open("a") as file:
                file.write("once\n")
            raise ValueError("model.layers 12: the bundle has 11")
        return Line(self)

    def layers(self) -> int:
        return 1

    def samples_per_batch(self) -> int:
        return 8

    def batches(self, rank: int, world: int) -> Callable[[int], Batch]:
        def batch(step: int) -> Batch:
            whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            return Batch(step, whole[rank::world])

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        return {"at": float(step)}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        tensors = {k: v.clone() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        environment = {k: v for k, v in os.environ.items() if k.startswith("MALLOC_")}
        return {"kind": "line", "niceness": os.nice(0), "environment": environment}

    def steps(self, rank: int = 0) -> list[int]:
        """The batches that a worker's forward has seen, in order."""
        return [int(line) for line in (Path(self.folder) / f"steps-{rank}").read_text().split()]


START = TrainConfig(
    steps=8, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=2, log_every=1, threads=1,
    max_failures=0,
)  # fmt: skip


def train(store: Store, name: str, recipe: Recipe, *, track: bool = False, **changes: Any) -> Any:
    return fit(
        store, name=name, output=f"models/{name}", fingerprint="same", recipe=recipe,
        config=replace(START, **changes), parameters={"depth": 2}, track=track,
    )  # fmt: skip


def trained(store: Store, name: str) -> dict[str, Tensor]:
    return load_file(store.path("models", name, "model.safetensors"))


def history(store: Store, run_id: str, key: str) -> dict[int, float]:
    """Values of a metric by step; a step that was logged twice fails the test."""
    found = tracking.client(tracking.tracking_uri(store)).get_metric_history(run_id, key)
    assert len({m.step for m in found}) == len(found), key
    return {m.step: m.value for m in sorted(found, key=lambda m: m.step)}


# -- two workers, DeepSpeed ZeRO 1 -----------------------------------------------------------------


def test_pretraining_leaves_a_model(corpus: Store, pretrained: dict[str, Any]) -> None:
    assert (pretrained["steps"], pretrained["kind"]) == (6, "pretrained")
    assert pretrained == bundles.info(corpus, "models/pretrained")
    assert {f"accuracy/{name}" for name in ("pair_image", "pair_text")} <= set(
        pretrained["metrics"]
    )
    with models.opened(corpus, "models/pretrained") as folder:
        shape, notes = weights.load_config(folder)
        assert shape == small_corpus.SHAPE and notes["kind"] == "pretrained"
        assert models.tokenizer_of(folder).identity == pretrained["text_tokenizer"]
        module = MaskedDataModelling(shape)
        weights.load_into(module, weights.load_tensors(folder))
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert progress(corpus, "runs/pretrained") == 6
    # The last step needs no checkpoint: the model is there.
    assert corpus.list("runs/pretrained/checkpoints") == ["step-00000002", "step-00000004"]


def test_pretraining_leaves_its_curves(corpus: Store, pretrained: dict[str, Any]) -> None:
    run_id = pretrained["mlflow_run"]
    assert list(history(corpus, run_id, "train/loss")) == [1, 2, 3, 4, 5, 6]
    for name in OBJECTIVES:
        losses = history(corpus, run_id, f"train/loss/{name}")
        shares = history(corpus, run_id, f"train/accuracy/{name}")
        assert len(losses) >= 5 and losses.keys() == shares.keys()
        assert all(0 < v < 10 for v in losses.values())
        assert all(0 <= v <= 1 for v in shares.values())
    rates = history(corpus, run_id, "train/learning_rate")
    assert max(rates.values()) == pytest.approx(1e-3) and rates[6] < rates[3] < rates[2]
    for key in ("train/gradient_norm", "train/samples_per_second"):
        assert all(v > 0 for v in history(corpus, run_id, key).values())
    final = history(corpus, run_id, "final/accuracy/pair_image")
    assert final == history(corpus, run_id, "eval/accuracy/pair_image")
    assert final == {6: pretrained["metrics"]["accuracy/pair_image"]}
    run = tracking.client(tracking.tracking_uri(corpus)).get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "pretrained"
    assert run.data.params["train.steps"] == "6" and run.data.params["model.hidden"] == "32"


def test_pretraining_leaves_a_picture_of_masked_inputs(
    corpus: Store, pretrained: dict[str, Any], tmp_path: Path
) -> None:
    tracker = tracking.client(tracking.tracking_uri(corpus))
    paths = [f.path for f in tracker.list_artifacts(pretrained["mlflow_run"], "masked")]
    assert paths == ["masked/step-0000006.png"]
    file = tracker.download_artifacts(pretrained["mlflow_run"], paths[0], str(tmp_path))
    with Image.open(file) as picture:
        colours = picture.convert("RGB").getcolors(1 << 20)
        assert picture.height == 4 * (3 * small_corpus.SIZE + 4) + 4  # four rows of pictures
    assert colours and (128, 128, 128) in {colour for _, colour in colours}  # hidden patches


def test_trained_is_skipped_and_other_options_are_refused(
    corpus: Store,
    pretrained: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(trainer, "_launch", None)  # not called
    config = small_corpus.pretraining(corpus)
    elsewhere = replace(config, train=replace(config.train, workers=0, zero_stage=2, threads=2))
    for same in (config, elsewhere):  # where and how fast it runs decides nothing
        assert pretrain.run(same) == pretrained
        assert "models/pretrained: already trained (6 steps), skipped" in capsys.readouterr().out
    for train_changes in ({"steps": 7}, {"learning_rate": 2e-3}, {"seed": 1}):
        other = replace(config, train=replace(config.train, **train_changes))
        with pytest.raises(StoreError, match=r"other inputs or options: choose another name"):
            pretrain.run(other)
    tracker = tracking.client(tracking.tracking_uri(corpus))
    experiment = tracker.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    runs = tracker.search_runs([experiment.experiment_id])
    assert sum(r.info.run_name == "pretrained" for r in runs) == 1


def test_two_workers_checkpoint_goes_on_with_one(
    copied: Callable[..., Store], pretrained: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    store = copied("images", "tasks", "tokens", "tokenizers", "runs/pretrained/checkpoints")
    before = load_file(store.path(checkpoints.folder("runs/pretrained", 4), "model.safetensors"))
    config = small_corpus.pretraining(store)
    datasets = [store.dataset(f"tokens/{name}") for name in ("alone", "words", "pairs")]
    recipe = pretrain.PretrainRecipe(config, token_checks.check_tokens(store, config, datasets))
    result = fit(
        store, name="pretrained", output="models/pretrained",
        fingerprint=pretrained["fingerprint"], recipe=recipe, config=config.train, parameters={},
        track=False,
    )  # fmt: skip
    assert "runs/pretrained: resumed from step 4" in capsys.readouterr().out
    assert result["steps"] == 6
    with models.opened(store, "models/pretrained") as folder:
        after = weights.load_tensors(folder)
    moved = {k: (after[k] - v).abs().max() for k, v in before.items() if k in after}
    assert len(moved) == len(before) and 0 < max(moved.values()) < 4e-3  # two steps of 1e-3


@pytest.fixture(scope="module", autouse=True)
def travelling() -> Iterator[None]:
    """Ray's workers can't import this file: its classes travel as they are."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    yield
    cloudpickle.unregister_pickle_by_value(here)


@pytest.fixture(scope="module")
def undisturbed(corpus: Store, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What two workers make of a small network."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = Recipe(str(folder))
    on_two_workers(partial(_undisturbed, corpus, recipe), folder)
    assert recipe.steps(0) == recipe.steps(1) == list(range(8))
    return trained(corpus, "undisturbed")


def _undisturbed(store: Store, recipe: Recipe, rank: int) -> None:
    run(store, "undisturbed", recipe, replace(START, workers=2, keep_checkpoints=9))


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 6])
def test_two_workers_state_is_all_that_one_needs(
    step: int, corpus: Store, undisturbed: dict[str, Tensor], tmp_path: Path
) -> None:
    """The workers' shares are equal here, so that one worker's gradient is the mean of theirs."""
    name = checkpoints.folder("runs/undisturbed", step)
    for file in corpus.list(name):
        corpus.write(
            f"{name.replace('undisturbed', f'alone-{step}')}/{file}", corpus.read(f"{name}/{file}")
        )
    recipe = Recipe(str(tmp_path))
    train(corpus, f"alone-{step}", recipe)
    assert recipe.steps() == list(range(step, 8))
    for key, tensor in trained(corpus, f"alone-{step}").items():
        torch.testing.assert_close(tensor, undisturbed[key], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_else_changes(
    corpus: Store,
    undisturbed: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = Recipe(str(tmp_path), "kill", (5,))
    result = train(corpus, "killed", recipe, workers=2, max_failures=1, track=True)
    assert (tmp_path / "harmed-5").exists()
    assert recipe.steps(1) == [*range(6), *range(4, 8)]  # from the checkpoint of step 4
    assert "runs/killed: resumed from step 4" in capsys.readouterr().out
    found = trained(corpus, "killed")
    assert all(torch.equal(found[k], undisturbed[k]) for k in undisturbed)
    assert list(history(corpus, result["mlflow_run"], "train/loss")) == list(range(1, 9))


def test_a_worker_on_cpus_keeps_its_memory_and_gives_way_to_no_other_process(
    corpus: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "3")  # a user's own stands
    found = train(corpus, "kept", Recipe(str(tmp_path)), workers=1, steps=1, warmup=0)
    assert found["niceness"] == os.nice(0)
    assert found["environment"]["MALLOC_ARENA_MAX"] == "3"
    assert found["environment"]["MALLOC_MMAP_MAX_"] == "0"


def test_deepspeed_takes_the_gpu_that_ray_gave_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(cluster, "device", lambda gpus: "cuda")
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:3"))
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training_worker._join(START) == (0, 1, torch.device("cuda:3"))
    assert taken == [torch.device("cuda:3")] and os.environ["LOCAL_RANK"] == "3"


@pytest.mark.slow
def test_workers_are_not_started_again_for_a_bad_step(ray_session: None, tmp_path: Path) -> None:
    """It would come again."""
    recipe = Recipe(str(tmp_path), "nan", (3,))
    with pytest.raises(FloatingPointError, match="the loss is not a number at step 4"):
        train(Store(tmp_path / "store"), "run", recipe, workers=2, max_failures=3)
    assert recipe.steps(0) == recipe.steps(1) == [0, 1, 2, 3]


@pytest.mark.slow
def test_failures_count_anew_after_a_checkpoint(
    ray_session: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, recipe = Store(tmp_path / "store"), Recipe(str(tmp_path), "kill-saved", (3,))
    assert train(store, "run", recipe, workers=1, max_failures=0)["steps"] == 8
    assert recipe.steps() == [*range(4), *range(2, 8)]
    said = capsys.readouterr().out
    assert said.count("failed after new checkpoints; the workers are started again") == 1
    with pytest.raises(ray.train.TrainingFailedError):
        train(store, "other", Recipe(str(tmp_path), "kill", (1,)), workers=1, max_failures=0)


@pytest.mark.slow
def test_what_would_fail_again_is_not_tried_again(ray_session: None, tmp_path: Path) -> None:
    recipe = Recipe(str(tmp_path), "unbuildable")
    with pytest.raises(ValueError, match=r"model.layers 12: the bundle has 11"):
        train(Store(tmp_path / "store"), "run", recipe, workers=2, max_failures=3)
    assert (tmp_path / "built").read_text() == "once\n" * 2  # on each of the workers


def test_a_worker_lost_after_the_model_was_left_trains_nothing_again(tmp_path: Path) -> None:
    store, recipe = Store(tmp_path / "store"), Recipe(str(tmp_path))
    train(store, "run", recipe, checkpoint_every=3)
    before = store.read("models/run/_bundle.json")
    training_worker.work(Run(store.uri, "runs/run", "models/run", "same", recipe, START))
    assert recipe.steps() == list(range(8)) and store.read("models/run/_bundle.json") == before


def test_ray_keeps_its_files_in_the_store_whatever_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        ray.train.torch, "TorchTrainer", lambda *_, **options: given.update(options)
    )
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for uri, wanted in (
        ("s3://bucket/prefix?region=us-west-2", "s3://bucket/prefix/runs/x/ray?region=us-west-2"),
        ("s3://bucket/prefix", "s3://bucket/prefix/runs/x/ray"),
    ):
        trainer._trainer(Run(uri, "runs/x", "models/x", "", Recipe(""), START))
        assert given["run_config"].storage_path == wanted


def test_what_a_step_says_is_the_mean_of_its_passes(corpus: Store, tmp_path: Path) -> None:
    single = train(corpus, "single", Recipe(str(tmp_path)), track=True, steps=6, learning_rate=0.0)
    twice = train(
        corpus, "twice", Recipe(str(tmp_path)), track=True, steps=3, accumulate=2, learning_rate=0.0
    )
    one = history(corpus, single["mlflow_run"], "train/loss/line")
    means = {step: (one[2 * step - 1] + one[2 * step]) / 2 for step in (1, 2, 3)}
    assert history(corpus, twice["mlflow_run"], "train/loss/line") == pytest.approx(means)


def test_workers_without_room_are_refused_where_no_machine_will_come(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_room(TrainConfig(workers=2))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"workers": 4}, "train.workers 4: they want 4 CPUs; there are 2: set fewer, or"),
        (
            {"workers": 2, "loader_workers": 1},
            r"loader_workers 1 in all 2 more; .* set fewer of either",
        ),
        (
            {"workers": 1, "gpus_per_worker": 1.0},
            "1 GPUs, and there are 0: .* 0 to train on CPUs",
        ),
    ]
    for options, said in wrong:
        with pytest.raises(ValueError, match=said):
            check_room(TrainConfig(**options))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    check_room(TrainConfig(workers=4))
    assert "waiting until the cluster has grown (" in capsys.readouterr().out


# -- one process -----------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run(corpus: Store, tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="loss is not a number at step 4"):
        train(corpus, "nan", Recipe(str(tmp_path), "nan", (3,)), track=True)
    assert not bundles.exists(corpus, "models/nan")
    handle = tracking.RunHandle(**corpus.read_json("runs/nan/mlflow.json"))
    run = tracking.client(handle.uri).get_run(handle.run_id)
    assert run.info.status == "FAILED"
    assert list(history(corpus, handle.run_id, "train/loss")) == [1, 2, 3]


def test_no_checkpoint_is_made_of_it(tmp_path: Path) -> None:
    """Else the run would go on from weights that are no numbers, whatever is done about it."""
    store = Store(tmp_path / "store")
    with pytest.raises(FloatingPointError, match="at step 4"):
        train(store, "nan", Recipe(str(tmp_path), "nan", (3,)), log_every=8, zero_stage=0)
    assert store.list("runs/nan/checkpoints") == ["step-00000002"]
    saved = load_file(store.path(checkpoints.folder("runs/nan", 2), "model.safetensors"))
    assert all(bool(tensor.isfinite().all()) for tensor in saved.values())


def test_an_interrupted_run_does_not_go_on_with_other_options(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with pytest.raises(FloatingPointError):
        train(store, "run", Recipe(str(tmp_path), "nan", (3,)))
    other: dict[str, Any] = {
        "name": "run", "output": "models/run", "recipe": Recipe(str(tmp_path)),
        "config": TrainConfig(steps=8, warmup=2, workers=0), "parameters": {}, "track": False,
    }  # fmt: skip
    with pytest.raises(StoreError, match=r"runs/run was begun with other inputs or options"):
        fit(store, fingerprint="other", **other)
    assert fit(store, fingerprint="same", **other)["steps"] == 8
    assert bundles.exists(store, "models/run")


def test_a_store_that_cant_be_written_ends_it_before_it_starts(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="can't write there"):
        train(Store(tmp_path / "file"), "run", Recipe(str(tmp_path)))
    assert not (tmp_path / "steps-0").exists()


def test_evaluations_come_when_they_are_due(corpus: Store, tmp_path: Path) -> None:
    result = train(corpus, "evaluated", Recipe(str(tmp_path)), track=True, evaluate_every=3)
    assert history(corpus, result["mlflow_run"], "eval/at") == {3: 3.0, 6: 6.0, 8: 8.0}
    assert result["metrics"] == {"at": 8.0}
    assert history(corpus, result["mlflow_run"], "final/at") == {8: 8.0}


def test_metrics_are_scalars_every_so_many_steps(corpus: Store, tmp_path: Path) -> None:
    result = train(
        corpus, "rare", Recipe(str(tmp_path)), track=True, log_every=3, checkpoint_every=0
    )
    tracker = tracking.client(tracking.tracking_uri(corpus))
    run = tracker.get_run(result["mlflow_run"])
    assert list(history(corpus, result["mlflow_run"], "train/loss/line")) == [3, 6, 8]
    assert "train/vector" not in run.data.metrics and run.data.params == {"depth": "2"}


def test_precision_and_clipping_reach_the_engine(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    names = {"plain": {}, "bf16": {"precision": "bf16"}, "clipped": {"clip": 0.01}}
    found = {}
    for name, changes in names.items():
        train(store, name, Recipe(str(tmp_path)), **changes)
        found[name] = trained(store, name)["layer.weight"]
    assert all(t.dtype == torch.float32 for t in found.values())
    assert not torch.equal(found["plain"], found["bf16"])
    torch.testing.assert_close(found["plain"], found["bf16"], rtol=0.3, atol=0.05)
    assert not torch.equal(found["plain"], found["clipped"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "train.steps"),
        ({"log_every": 0}, "train.log_every: expected at least 1"),
        ({"accumulate": 0}, "train.accumulate: expected at least 1"),
        ({"workers": -1}, "train.workers: expected 0 or more"),
        ({"learning_rate": -1.0}, "train.learning_rate: expected 0 or more"),
        ({"betas": (0.9, 1.0)}, "train.betas: expected decays"),
        ({"checkpoint_every": 1000, "keep_every": 1500}, "train.keep_every 1500: .* multiple"),
        ({"checkpoint_every": 0, "keep_every": 2}, "train.keep_every 2: .* multiple"),
        ({"steps": 10, "warmup": 10}, "train.warmup 10 is not below"),
        ({"workers": 0, "gpus_per_worker": 1.0}, "needs train.workers"),
        ({"workers": 1, "gpus_per_worker": 2.0}, "got 2: for more GPUs set train.workers"),
        ({"workers": 2, "gpus_per_worker": 0.5}, "each needs a GPU of its own"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**options)


def test_progress_of_a_run_that_said_nothing_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    assert progress(store, "runs/none") == 0
    store.write("runs/none/progress.json", b"{")
    assert progress(store, "runs/none") == 0
