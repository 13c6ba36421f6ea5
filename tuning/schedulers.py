"""Decides which trials go on: ASHA, and population based training on this project's checkpoints.

Tune's `PopulationBasedTraining` copies checkpoints that trials have handed to Tune. A trial with
Ray Train workers hands over none: `TuneReportCallback` passes on metrics only, so that scheduler
skips every copy ("didn't save any checkpoint before and can't be exploited"). Here the copy is one
of the run's checkpoints in the store, from which any number of workers can resume.

When a sweep is killed, Tune keeps no scheduler state, and the trials' state of some seconds before.
The schedulers here need none: it follows from the trials' results; and a trial that starts is told
which of its results Tune has.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from tuning import spaces, trials
from tuning.trials import HEARD, ORIGIN

ENDED = (Trial.TERMINATED, Trial.ERROR)


class Controller(Protocol):
    """The part of Tune that a scheduler may call."""

    def get_trials(self) -> Sequence[Trial]: ...

    def pause_trial(self, trial: Trial, should_checkpoint: bool = True) -> None: ...


class Known(Protocol):
    """The evaluations of a trial by step, as MLflow has them."""

    def __call__(self, chosen: Mapping[str, Any]) -> Sequence[tuple[int, float]]: ...


class Limited(FIFOScheduler):
    """Runs at most `workers` trials at once, all to their end.

    Left alone, Tune starts every trial whose own process finds room. It doesn't know of the Ray
    Train workers that a trial will need: trials could wait for each other's room for ever.
    """

    def __init__(self, *, workers: int, **options: Any) -> None:
        super().__init__(**options)
        self.workers = workers

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        if trial.status == Trial.PENDING:
            trial.set_status(Trial.PAUSED)

    def choose_trial_to_run(self, tune_controller: Controller) -> Trial | None:
        known = tune_controller.get_trials()
        begun = sum(t.status in (Trial.RUNNING, Trial.PENDING) for t in known)
        waiting = [t for t in known if t.status == Trial.PAUSED]
        if begun >= self.workers or not waiting:
            return None
        chosen = min(waiting, key=lambda trial: (self.rank(trial), drawn(trial)))
        chosen.set_config({**chosen.config, HEARD: reached(chosen)})
        return chosen

    def rank(self, trial: Trial) -> int:
        """The lowest rank starts next; among equals, the first drawn."""
        return 0


class Halving(Limited, ASHAScheduler):
    """ASHA (Li et al. 2018, arXiv:1810.05934) that a killed sweep can resume.

    Args:
        known: Gives the earlier results of a trial that Tune has restored.
    """

    def __init__(self, known: Known, *, workers: int, metric: str, **options: Any) -> None:
        super().__init__(workers=workers, time_attr="step", metric=metric, mode="max", **options)
        self._known = known

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        last = trial.last_result.get("step", 0)
        for step, score in self._known(trial.config) if last else ():
            if step <= last:  # results that Tune missed will be reported again
                self.on_trial_result(tune_controller, trial, {"step": step, self.metric: score})


class Population(Limited):
    """Population based training (Jaderberg et al. 2017, arXiv:1711.09846).

    Every `every` steps, a trial that is among the worst gives up: it continues from the newest
    checkpoint of one of the best, with values slightly off that one's. Its new values make it a new
    run. If there are more trials than room, they take turns, so that all get equally far.

    Args:
        sweep: The sweep's name.
        space: The search space.
        metric: The result to maximise.
        every: Steps between two such decisions on a trial.
        steps: Steps of a whole trial.
        share: The share of trials that give up, and of those that may be copied.
        seed: Decisions are a function of it, the trial's name and the step.
    """

    FACTORS = (0.8, 1.2)  # as in the paper's experiments
    RESAMPLED = 0.25  # probability of drawing a value anew

    def __init__(
        self,
        *,
        workers: int,
        sweep: str,
        space: dict[str, Any],
        metric: str,
        every: int,
        steps: int,
        share: float,
        seed: int,
    ) -> None:
        super().__init__(workers=workers)
        self._metric = metric
        self.sweep, self.space = sweep, space
        self.every, self.steps, self.share, self.seed = every, steps, share, seed

    def on_trial_result(
        self, tune_controller: Controller, trial: Trial, result: dict[str, Any]
    ) -> str:
        step = int(result["step"])
        if step >= self.steps or step % self.every:
            return self.CONTINUE
        others = [t for t in tune_controller.get_trials() if t is not trial]
        name = trials.run_name(self.sweep, trial.config)
        rng = np.random.default_rng([self.seed, int(name.rpartition("/")[2], 16), step])
        donor = self._donor(trial, float(result[self._metric or ""]), others, rng)
        if donor is not None:
            tune_controller.pause_trial(trial, should_checkpoint=False)
            origin = {
                "run": trials.run_name(self.sweep, donor.config),
                "step": reached(donor),
                "by": name,
            }
            moved = perturbed(self.space, trials.values(donor.config), rng)
            trial.set_config({**moved, ORIGIN: origin})
            return self.NOOP
        if any(t.status == Trial.PAUSED and reached(t) < step for t in others):
            tune_controller.pause_trial(trial, should_checkpoint=False)
            return self.NOOP
        return self.CONTINUE

    def rank(self, trial: Trial) -> int:
        return reached(trial)

    def _donor(
        self, trial: Trial, score: float, others: Sequence[Trial], rng: np.random.Generator
    ) -> Trial | None:
        """The trial to take weights from; None: this one is good enough to keep its own."""
        living = [
            t for t in others
            if t.status not in ENDED and self._metric in t.last_result and heard(t)
        ]  # fmt: skip
        scored = [(_comparable(t.last_result[self._metric]), t) for t in living]
        ranked = sorted(
            [*scored, (_comparable(score), trial)],
            key=lambda pair: (pair[0], trials.among_equals(pair[1].config)),
        )
        count = min(math.ceil(self.share * len(ranked)), len(ranked) // 2)
        worst, best = ranked[:count], ranked[len(ranked) - count :]
        if not any(t is trial for _, t in worst):
            return None
        above, donor = best[int(rng.integers(count))]
        return donor if above > _comparable(score) else None


class Drawn(BasicVariantGenerator):
    """Draws all trials at the beginning, but finishes only when they do.

    Once a search is finished, Tune ends the process of each trial that ends; here a waiting trial
    takes it over.
    """

    def is_finished(self) -> bool:
        return super().is_finished() and not self._live_trials


def drawn(trial: Trial) -> int:
    """A trial's number in the order of drawing. Tune restores trials in another order."""
    return int(trial.experiment_tag.partition("_")[0])


def reached(trial: Trial) -> int:
    """Steps that a trial's weights were trained for, as far as Tune knows."""
    return int(trial.last_result.get("step", 0) if heard(trial) else trial.config[ORIGIN]["step"])


def heard(trial: Trial) -> bool:
    """Whether a trial's last result is of its present weights, not of those it gave up."""
    origin = trial.config.get(ORIGIN)
    return origin is None or trial.last_result.get("config", {}).get(ORIGIN) == origin


def perturbed(
    space: Mapping[str, Any], chosen: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    """Values near the chosen ones: numbers a fifth up or down, choices one place up or down.

    Now and then a value is drawn from the space as if for a new trial.
    """
    moved: dict[str, Any] = {}
    for name, field in spaces.read(space).items():
        if rng.random() < Population.RESAMPLED:
            value = space[name].sample(random_state=rng)
            moved[name] = value.item() if isinstance(value, np.generic) else value
        elif isinstance(field, spaces.Choice):
            place = field.values.index(chosen[name]) + int(rng.choice((-1, 1)))
            moved[name] = field.values[min(max(place, 0), len(field.values) - 1)]
        else:
            value = chosen[name] * float(rng.choice(Population.FACTORS))
            value = round(value) if field.whole else value
            moved[name] = min(max(value, field.low), field.high)
    return moved


def _comparable(score: float) -> float:
    return -math.inf if math.isnan(score) else score
