"""Bad steps end a run, or are left out."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import torch
from safetensors.torch import load_file
from small_net import same
from small_run import Recipe, config, train, trained
from torch import Tensor
from two_workers import on_two_workers, run

from pipelines import bundles, checkpoints, guards, models, tracking
from pipelines.recipe import TrainConfig
from pipelines.storage import Store

pytestmark = pytest.mark.usefixtures("unwatched")
STAGES = (0, 1, 2, 3)
SHARDED: list[dict[str, Any]] = [
    *({"zero_stage": stage} for stage in STAGES),
    *({"zero_stage": stage, "offload": True} for stage in STAGES[1:]),
]


@pytest.fixture
def few_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three good steps are enough to tell a spike."""
    monkeypatch.setattr(guards, "LEAST", 3)


def state(store: Store, run: str, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint."""
    folder = Path(store.path(checkpoints.folder(f"runs/{run}", step)))
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) >= 2
    return {f"{file.stem}/{k}": v for file in files for k, v in load_file(file).items()}


def record(store: Store, name: str, step: int, rank: int = 0) -> dict[str, Any]:
    return store.read_json(f"runs/{name}/bad-steps/step-{step:08d}-rank-{rank}.json")


# -- bad steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("harm", "said", "loss"),
    [
        ("nan", "the loss is not a number at step 6", "nan"),
        ("inf", "the loss is infinite at step 6", "inf"),
        ("gradient", "the gradient is not finite at step 6", None),
        ("spike", r"is above train.spike_factor 5 times .*, the median of the last 5 steps", None),
    ],
)
def test_a_bad_step_ends_the_run_and_names_its_samples(
    harm: str, said: str, loss: str | None, stage: int, few_losses: None, store: Store
) -> None:
    """Whenever it comes: here numbers are logged at the end only."""
    with pytest.raises(FloatingPointError, match=said) as raised:
        train(
            store, "run", Recipe(((5, harm),)), zero_stage=stage, spike_factor=5.0, log_every=8,
            checkpoint_every=2,
        )  # fmt: skip
    assert f"{store.uri}/runs/run/bad-steps/step-00000006-rank-*.json" in str(raised.value)
    assert "set train.on_bad_step to skip" in str(raised.value)
    found = record(store, "run", 6)
    assert found["ids"] == [f"5/{row}" for row in range(8)]
    assert (found["step"], found["rank"], found["action"]) == (6, 0, "stopped")
    assert found["reason"] in str(raised.value)
    if loss:
        assert found["losses"] == [loss] and found["mean_loss"] == loss
    else:
        assert found["losses"] == [pytest.approx(found["mean_loss"])]
    if harm == "spike":
        assert found["mean_loss"] > 100 and 0 < found["gradient_norm"] < 1e6
    else:
        assert found["gradient_norm"] in ("nan", "inf")
    assert not bundles.exists(store, "models/run")
    assert store.list("runs/run/checkpoints") == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("harm", ["nan", "inf", "gradient", "spike"])
def test_a_step_that_is_left_out_changes_nothing(
    harm: str, sharded: dict[str, Any], few_losses: None, store: Store
) -> None:
    """Parameters, both moments and buffers; the steps after it are taken."""
    options: dict[str, Any] = {
        **sharded, "on_bad_step": "skip", "spike_factor": 5.0, "checkpoint_every": 1,
        "keep_checkpoints": 9,
    }  # fmt: skip
    train(store, "run", Recipe(((5, harm),)), **options)
    before, at, after = (state(store, "run", step) for step in (5, 6, 7))
    assert same(before, at) and not any(torch.equal(at[k], after[k]) for k in at)
    assert all(bool(tensor.isfinite().all()) for tensor in trained(store, "run").values())
    assert record(store, "run", 6)["action"] == "skipped"
    train(store, "well", Recipe(), **options)
    assert same(before, state(store, "well", 5)) and not same(at, state(store, "well", 6))


def test_stages_agree_on_the_gradient_of_a_spike(few_losses: None, store: Store) -> None:
    norms = []
    for number, sharded in enumerate(SHARDED):
        train(
            store, f"run-{number}", Recipe(((4, "spike"),)), on_bad_step="skip", spike_factor=5.0,
            **sharded,
        )  # fmt: skip
        norms.append(record(store, f"run-{number}", 5)["gradient_norm"])
    assert norms == pytest.approx([norms[0]] * len(SHARDED), rel=1e-5)
    first = trained(store, "run-0")
    for number in range(1, len(SHARDED)):
        for key, tensor in trained(store, f"run-{number}").items():
            torch.testing.assert_close(tensor, first[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_the_gradient_is_clipped(stage: int, store: Store) -> None:
    """After one step the first moment is a tenth of the gradient that the optimizer was given."""
    norms = []
    for clip in (0.0, 1e9, 1e-3):
        name = f"clip-{clip}"
        train(store, name, Recipe(), zero_stage=stage, clip=clip, checkpoint_every=1, keep_every=1)
        moments = [t for k, t in state(store, name, 1).items() if k.endswith(":exp_avg")]
        norms.append(float(sum(m.double().pow(2).sum() for m in moments) ** 0.5))
    assert norms[0] == norms[1] > 1e-2
    assert norms[2] == pytest.approx(1e-4, rel=1e-2)


@pytest.mark.parametrize("sharded", SHARDED)
@pytest.mark.parametrize("bad", [6, 7])
def test_one_bad_batch_of_two_spoils_the_step(
    bad: int, sharded: dict[str, Any], store: Store
) -> None:
    train(
        store, "run", Recipe(((bad, "nan"),)), accumulate=2, on_bad_step="skip",
        checkpoint_every=1, keep_checkpoints=9, **sharded,
    )  # fmt: skip
    found = record(store, "run", 4)
    assert found["ids"] == [f"{number}/{row}" for number in (6, 7) for row in range(8)]
    assert [isinstance(loss, str) for loss in found["losses"]] == [bad == 6, bad == 7]
    assert same(state(store, "run", 3), state(store, "run", 4))
    assert not same(state(store, "run", 4), state(store, "run", 5))


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_goes_on_after_a_step_was_left_out_ends_the_same(
    stage: int, few_losses: None, store: Store, tmp_path: Path
) -> None:
    """Adam's count of steps and the losses that spikes are measured by are those of before."""
    options: dict[str, Any] = {
        "zero_stage": stage, "on_bad_step": "skip", "spike_factor": 5.0, "checkpoint_every": 1,
        "keep_checkpoints": 9,
    }  # fmt: skip
    recipe = Recipe(((1, "nan"), (5, "spike")))
    train(store, "run", recipe, **options)
    for step in (2, 5, 6):
        again = Store(tmp_path / f"{step}")
        name = checkpoints.folder("runs/run", step)
        for part in (name, "runs/run/bad-steps"):
            shutil.copytree(store.path(part), again.path(part))
        again.write("runs/run/recent-losses.json", store.read("runs/run/recent-losses.json"))
        train(again, "run", recipe, **options)
        assert same(trained(again, "run"), trained(store, "run")), step


def test_the_first_step_may_be_left_out(store: Store) -> None:
    train(
        store, "run", Recipe(((0, "nan"),)), zero_stage=0, on_bad_step="skip", checkpoint_every=1,
        keep_checkpoints=9,
    )  # fmt: skip
    assert store.list("runs/run/checkpoints")[0] == "step-00000002"  # of 1 there was no state


def test_left_out_steps_are_counted_and_said(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(
        store, "run", Recipe(((2, "nan"), (3, "inf"), (5, "nan"))), track=True, on_bad_step="skip",
        checkpoint_every=4, zero_stage=0,
    )  # fmt: skip
    tracker = tracking.client(tracking.tracking_uri(store))

    def history(key: str) -> dict[int, float]:
        found = tracker.get_metric_history(result["mlflow_run"], key)
        return {m.step: m.value for m in found}

    assert history("train/skipped_steps") == {3: 1, 4: 2, 6: 3}
    assert sorted(history("train/loss")) == [1, 2, 5, 7, 8]
    norms = history("train/gradient_norm")
    assert sorted(norms) == [1, 2, 5, 7, 8] and all(0 < norm < 1e3 for norm in norms.values())
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert len(lines) == 3 and len(set(lines)) == 3
    assert "runs/run: step 4 left out: the loss is infinite; its samples are named in" in lines[1]
    assert "bad-steps/step-00000004-rank-*.json" in lines[1]


def test_too_many_bad_steps_in_a_row_end_it(store: Store) -> None:
    harm = tuple((number, "nan") for number in (1, 3, 4, 5))
    options: dict[str, Any] = {"on_bad_step": "skip", "checkpoint_every": 1}
    with pytest.raises(FloatingPointError, match="at step 6, after 2 left out in a row") as raised:
        train(store, "run", Recipe(harm), max_bad_steps=3, **options)
    assert "raise train.max_bad_steps" in str(raised.value)
    actions = {step: record(store, "run", step)["action"] for step in (2, 4, 5, 6)}
    assert actions == {2: "skipped", 4: "skipped", 5: "skipped", 6: "stopped"}
    train(store, "run", Recipe(harm), max_bad_steps=4, **options)  # the same run goes on
    assert record(store, "run", 6)["action"] == "skipped"


def test_losses_that_just_rise_are_no_spikes(few_losses: None, store: Store) -> None:
    train(store, "run", Recipe(((1, "spike"),)), spike_factor=2.0)  # too early to tell
    train(store, "other", Recipe(((5, "spike"),)))  # not asked for
    assert not store.list("runs/run/bad-steps") and not store.list("runs/other/bad-steps")


@pytest.fixture(scope="module")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Runs of two workers, `run-<ZeRO stage>`, of which one is harmed at some steps."""
    folder = tmp_path_factory.mktemp("left-out")
    store = Store(folder / "store")
    on_two_workers(partial(_leave_out, store), folder)
    return store


def _leave_out(store: Store, rank: int) -> None:
    recipe = Recipe(((3, "nan"), (5, "gradient"), (20, "spike")))
    options = config(
        workers=2, on_bad_step="skip", spike_factor=5.0, steps=23, checkpoint_every=1,
        keep_checkpoints=23,
    )  # fmt: skip
    for stage in (2, 3):
        run(store, f"run-{stage}", recipe, replace(options, zero_stage=stage))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_all_workers_leave_out_what_one_finds_bad(stage: int, left_out: Store) -> None:
    store, name = left_out, f"run-{stage}"
    for step in (4, 6, 21):
        assert same(state(store, name, step - 1), state(store, name, step))
        assert not same(state(store, name, step), state(store, name, step + 1))
        for rank in (0, 1):
            found = record(store, name, step, rank)
            assert found["ids"] == [f"{step - 1}/{row}" for row in range(rank, 8, 2)]
            assert found["action"] == "skipped"
    harmed, well = record(store, name, 4, 1), record(store, name, 4, 0)
    assert harmed["losses"] == ["nan"] and 0 < well["losses"][0] < 100
    assert harmed["mean_loss"] == well["mean_loss"] == "nan"


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"spike_factor": 0.5}, "train.spike_factor: expected 0 or more than 1"),
        ({"max_bad_steps": 0}, "train.max_bad_steps"),
        ({"max_hours": -1.0}, "train.max_hours"),
        ({"max_cost": 5.0}, "train.max_cost needs train.price_per_hour"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainConfig(**options)


def test_guards_may_change_when_a_run_goes_on(store: Store) -> None:
    plain = small_corpus.pretraining(store)
    guarded = small_corpus.pretraining(store, train={
        "on_bad_step": "skip", "spike_factor": 3.0, "max_bad_steps": 5, "spot_notice": True,
        "max_hours": 1.0, "max_cost": 9.0, "price_per_hour": 2.0,
    })  # fmt: skip
    assert models.decisive(plain) == models.decisive(guarded)
