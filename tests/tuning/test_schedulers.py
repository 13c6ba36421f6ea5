"""Which trials go on: decisions of population based training, and ASHA after a restart."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from ray import tune
from ray.tune.experiment import Trial

from beit3 import tasks
from pipelines import config, finetune
from pipelines.finetune import FinetuneConfig
from pipelines.recipe import TrainConfig
from tuning import spaces, trials
from tuning.schedulers import Halving, Limited, Population, perturbed, reached
from tuning.trials import HEARD, ORIGIN

SPACE = {"rate": tune.loguniform(1e-4, 1e-2), "decay": tune.choice([0.7, 0.85, 1.0])}
EVERY, STEPS = 10, 40


@dataclass
class One:
    """What a scheduler sees of a trial of Tune's."""

    trial_id: str
    config: dict[str, Any]
    status: str = Trial.RUNNING
    last_result: dict[str, Any] = field(default_factory=dict)
    experiment_tag: str = "0"

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_status(self, status: str) -> None:
        self.status = status


class Tuner:
    """What a scheduler may ask of Tune."""

    def __init__(self, trials: list[One]) -> None:
        self.trials = trials

    def get_trials(self) -> list[Trial]:
        return cast(list[Trial], self.trials)

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None:
        assert not should_checkpoint, "the run has checkpoints of its own"
        trial.status = Trial.PAUSED


def population(*scores: float, step: int = EVERY, **changes: Any) -> tuple[Population, Tuner]:
    """A population whose trials have each reported a score at a step."""
    options: dict[str, Any] = {
        "workers": 2, "sweep": "s", "space": SPACE, "metric": "score", "every": EVERY,
        "steps": STEPS, "share": 0.25, "seed": 0,
    }  # fmt: skip
    found = [
        One(str(i), {"rate": 1e-3 * (i + 1), "decay": 0.85}) for i in range(len(scores))
    ]  # fmt: skip
    for one, score in zip(found, scores, strict=True):
        one.last_result = {"step": step, "score": score, "config": dict(one.config)}
    return Population(**options | changes), Tuner(found)


def report(scheduler: Any, tuner: Tuner, place: int, score: float, step: int = EVERY) -> str:
    return scheduler.on_trial_result(
        tuner, cast(Any, tuner.trials[place]), {"step": step, "score": score}
    )


# -- population based training --------------------------------------------------------------------


def test_a_poor_trial_takes_a_good_ones_checkpoint_and_other_values() -> None:
    scheduler, tuner = population(0.1, 0.5, 0.6, 0.9)
    before = tuner.trials[0].config
    assert report(scheduler, tuner, 0, 0.1) == "NOOP"
    poor, best = tuner.trials[0], tuner.trials[3]
    assert poor.status == Trial.PAUSED  # to begin again as another run
    own, donor = trials.run_name("s", before), trials.run_name("s", best.config)
    assert poor.config[ORIGIN] == {"run": donor, "step": EVERY, "by": own}
    moved = trials.values(poor.config)
    assert moved.keys() == SPACE.keys() and moved != trials.values(best.config)
    # It is as far as the weights that it took, and in the ranking only once it has reported.
    assert reached(cast(Any, poor)) == EVERY
    poor.last_result["config"] = dict(poor.config)
    poor.last_result["step"] = 2 * EVERY
    assert reached(cast(Any, poor)) == 2 * EVERY


@pytest.mark.parametrize("place", [1, 2, 3])
def test_the_others_keep_their_own(place: int) -> None:
    scheduler, tuner = population(0.1, 0.5, 0.6, 0.9)
    before = [one.config for one in tuner.trials]
    score = tuner.trials[place].last_result["score"]
    assert report(scheduler, tuner, place, score) == "CONTINUE"
    assert [one.config for one in tuner.trials] == before


def test_decisions_follow_from_the_seed() -> None:
    def decided(seed: int) -> list[dict[str, Any]]:
        found = []
        for place in range(3):
            scheduler, tuner = population(0.1, 0.1, 0.1, 0.7, 0.8, 0.9, share=0.5, seed=seed)
            report(scheduler, tuner, place, 0.1)
            found.append(tuner.trials[place].config)
        return found

    assert decided(1) == decided(1) != decided(2)
    assert len({trials.run_name("s", config) for config in decided(1)}) == 3


@pytest.mark.parametrize(
    ("step", "score"), [(EVERY // 2, 0.1), (STEPS, 0.1), (EVERY, 0.9)],
    ids=["between decisions", "at the end", "as good as the best"],
)  # fmt: skip
def test_nothing_happens(step: int, score: float) -> None:
    scheduler, tuner = population(0.1, 0.9, 0.9, 0.9)
    assert report(scheduler, tuner, 0, score, step) == "CONTINUE"


def test_a_score_that_is_not_a_number_is_the_worst() -> None:
    scheduler, tuner = population(float("nan"), 0.2)
    assert report(scheduler, tuner, 0, float("nan")) == "NOOP"
    scheduler, tuner = population(float("nan"), 0.2)
    assert report(scheduler, tuner, 1, 0.2) == "CONTINUE"


def test_nobody_takes_from_those_that_ended_or_have_no_checkpoint_yet() -> None:
    scheduler, tuner = population(0.1, 0.9)
    tuner.trials[1].status = Trial.TERMINATED
    assert report(scheduler, tuner, 0, 0.1) == "CONTINUE"
    scheduler, tuner = population(0.1, 0.9)
    tuner.trials[1].config[ORIGIN] = {"run": "s/x", "step": EVERY, "by": "s/y"}
    assert report(scheduler, tuner, 0, 0.1) == "CONTINUE"


def test_trials_take_turns_on_few_workers() -> None:
    """One that is ahead of a waiting one makes room; the one that is behind is next."""
    scheduler, tuner = population(0.5, 0.5, 0.5, workers=1)
    ahead, behind, new = tuner.trials
    ahead.last_result["step"] = 2 * EVERY
    behind.status, new.status, new.last_result = Trial.PAUSED, Trial.PENDING, {}
    scheduler.on_trial_add(tuner, cast(Any, new))
    assert new.status == Trial.PAUSED  # or Tune would begin it, whatever `workers` is
    assert scheduler.choose_trial_to_run(tuner) is None
    assert report(scheduler, tuner, 0, 0.5, 2 * EVERY) == "NOOP"
    assert ahead.status == Trial.PAUSED and ORIGIN not in ahead.config
    assert scheduler.choose_trial_to_run(tuner) is new
    new.status = Trial.PENDING  # its process is starting
    assert scheduler.choose_trial_to_run(tuner) is None
    new.status, new.last_result = Trial.PAUSED, {"step": 2 * EVERY}
    assert scheduler.choose_trial_to_run(tuner) is behind
    behind.status = Trial.RUNNING
    # Nobody is behind it: it keeps its worker.
    assert report(scheduler, tuner, 1, 0.5, 2 * EVERY) == "CONTINUE"


def test_no_more_run_at_once_than_there_are_workers() -> None:
    """Tune's restored trials are waiting ones again, the last that it heard of first; they begin in
    the order of drawing, and each is told what Tune has heard of it."""
    known = [
        One(str(i), {"rate": 1e-3 * (i + 1)}, Trial.PENDING, experiment_tag=f"{i + 8}_rate=1")
        for i in range(4)
    ]
    known[2].last_result = {"step": 2 * EVERY}
    tuner, scheduler = Tuner([known[2], known[3], known[1], known[0]]), Limited(workers=2)
    for one in tuner.trials:
        scheduler.on_trial_add(tuner, cast(Any, one))
    names = [trials.run_name("s", one.config) for one in known]
    begun = []
    while (chosen := scheduler.choose_trial_to_run(tuner)) is not None:
        chosen.status = Trial.RUNNING
        begun.append(chosen.trial_id)
    assert begun == ["0", "1"]
    known[0].status = Trial.TERMINATED
    assert scheduler.choose_trial_to_run(tuner) is known[2]
    assert known[2].config[HEARD] == 2 * EVERY and known[1].config[HEARD] == 0
    assert [trials.run_name("s", one.config) for one in known] == names


@pytest.mark.parametrize("task", ["captioning", "imagenet", "nlvr2", "retrieval", "vqa"])
def test_values_stay_within_the_space(task: str) -> None:
    space = spaces.load(finetune.preset("base", task))
    fields, rng = spaces.read(space), np.random.default_rng(0)
    chosen = {name: domain.sample(random_state=rng) for name, domain in space.items()}
    seen: dict[str, set[Any]] = {name: set() for name in space}
    for _ in range(300):
        chosen = perturbed(space, chosen, rng)
        for name, value in chosen.items():
            kind = fields[name]
            seen[name].add(value)
            if isinstance(kind, spaces.Range):
                assert kind.low <= value <= kind.high
            else:
                assert value in kind.values
            assert not isinstance(value, np.generic)  # it goes into JSON
    assert all(len(values) > 1 for values in seen.values())


def test_values_move_a_fifth_or_one_place() -> None:
    class NeverDrawn:
        def random(self) -> float:
            return 1.0

        def choice(self, options: Any) -> Any:
            return options[1]

    whole = {"rate": tune.uniform(0.0, 1.0), "size": tune.randint(1, 11), "decay": SPACE["decay"]}
    moved = perturbed(whole, {"rate": 0.5, "size": 6, "decay": 0.85}, cast(Any, NeverDrawn()))
    assert moved == {"rate": pytest.approx(0.6), "size": 7, "decay": 1.0}
    moved = perturbed(whole, {"rate": 0.9, "size": 10, "decay": 1.0}, cast(Any, NeverDrawn()))
    assert moved == {"rate": 1.0, "size": 10, "decay": 1.0}  # at the edge


# -- ASHA -----------------------------------------------------------------------------------------


def asha(known: dict[str, list[tuple[int, float]]]) -> Halving:
    def of(chosen: Any) -> list[tuple[int, float]]:
        return known.get(chosen["id"], [])

    return Halving(
        of, workers=1, metric="score", max_t=STEPS, grace_period=EVERY, reduction_factor=2
    )


def test_asha_goes_on_as_if_it_had_not_been_killed() -> None:
    """A trial below those before it stops, also when Tune has restored those."""
    good = One("good", {"id": "good"}, Trial.TERMINATED, {"step": STEPS, "score": 0.9})
    poor = One("poor", {"id": "poor"})
    tuner = Tuner([good, poor])
    whole = asha({})
    for one in tuner.trials:
        whole.on_trial_add(cast(Any, tuner), cast(Any, one if one is poor else One("good", {})))
    for step in range(EVERY, STEPS, EVERY):
        whole.on_trial_result(cast(Any, tuner), cast(Any, good), {"step": step, "score": 0.9})
    assert report(whole, tuner, 1, 0.1) == "STOP"

    history = [(step, 0.9) for step in range(EVERY, STEPS + 1, EVERY)]
    for known, action in (({"good": history}, "STOP"), ({}, "CONTINUE")):
        resumed = asha(known)
        for one in tuner.trials:
            resumed.on_trial_add(cast(Any, tuner), cast(Any, one))
        assert report(resumed, tuner, 1, 0.1) == action


def test_asha_decides_on_what_tune_had_not_heard_of() -> None:
    """MLflow may know more than Tune: that evaluation comes again, and its decision with it."""
    good = One("good", {"id": "good"}, Trial.TERMINATED, {"step": STEPS, "score": 0.9})
    poor = One("poor", {"id": "poor"})  # killed before Tune had its first result
    tuner = Tuner([good, poor])
    scheduler = asha({"good": [(EVERY, 0.9)], "poor": [(EVERY, 0.1)]})
    for one in tuner.trials:
        scheduler.on_trial_add(cast(Any, tuner), cast(Any, one))
    assert report(scheduler, tuner, 1, 0.1) == "STOP"


# -- spaces ---------------------------------------------------------------------------------------


def test_what_a_space_may_hold() -> None:
    fields = spaces.read(
        {"a": tune.uniform(0, 1), "b": tune.lograndint(1, 9), "c": tune.choice([1, 2])}
    )
    assert fields == {
        "a": spaces.Range(0, 1),
        "b": spaces.Range(1, 8, log=True, whole=True),
        "c": spaces.Choice((1, 2)),
    }
    for wrong in (tune.randn(), tune.quniform(0, 1, 0.5), tune.grid_search([1]), 3):
        with pytest.raises(ValueError, match=r"x: expected tune\.uniform, loguniform"):
            spaces.read({"x": wrong})


def test_a_space_needs_a_continuous_range(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials of the same values would share a folder."""
    from tuning.spaces import vqa

    monkeypatch.setattr(vqa, "space", lambda base: {"drop_path": spaces.choice(0.0, 0.1)})
    with pytest.raises(ValueError, match=r"tuning/spaces/vqa.py: give a field a continuous range"):
        spaces.load(FinetuneConfig(task="vqa"))


@pytest.mark.parametrize("size", ["base", "large"])
@pytest.mark.parametrize("task", tasks.names())
def test_a_recipe_is_within_the_space_around_it(task: str, size: str) -> None:
    base = finetune.preset(size, task)
    values = config.flatten(base)
    for name, kind in spaces.read(spaces.load(base)).items():
        if isinstance(kind, spaces.Range):
            assert kind.low == pytest.approx(0.15 * values[name])
            assert kind.high == pytest.approx(3 * values[name])
        else:
            assert values[name] in kind.values and list(kind.values) == sorted(kind.values)


def test_a_space_around_usual_values_is_exact_and_in_order() -> None:
    """What a seed draws depends on both."""
    usual = FinetuneConfig(task="vqa", train=TrainConfig(learning_rate=2e-3))
    expected = {
        "train.learning_rate": spaces.Range(3e-4, 6e-3, log=True),
        "train.layer_decay": spaces.Choice((0.7, 0.85, 1.0)),
        "train.head_scale": spaces.Choice((1.0, 5.0)),
        "drop_path": spaces.Choice((0.0, 0.1)),
    }
    found = spaces.read(spaces.load(usual))
    assert list(found.items()) == list(expected.items())
    del expected["train.head_scale"]
    found = spaces.read(spaces.load(dataclasses.replace(usual, task="retrieval")))
    assert list(found.items()) == list(expected.items())


def test_a_rate_without_a_range_is_named_with_its_file() -> None:
    still = FinetuneConfig(task="nlvr2", train=TrainConfig(learning_rate=0.0))
    with pytest.raises(ValueError, match=r"tuning/spaces/_default.py: .*greater than 0"):
        spaces.load(still)


@pytest.mark.parametrize("task", ["captioning", "imagenet", "nlvr2", "retrieval", "vqa"])
def test_optuna_takes_the_spaces(task: str) -> None:
    from ray.tune.search.optuna import OptunaSearch

    space = spaces.load(finetune.preset("base", task))
    found = OptunaSearch.convert_search_space(space)
    for name, kind in spaces.read(space).items():
        if isinstance(kind, spaces.Range):
            assert (found[name].low, found[name].high, found[name].log) == (
                kind.low, kind.high, kind.log,
            )  # fmt: skip
        else:
            assert found[name].choices == kind.values
