"""Estimates how much each hyperparameter matters, by Optuna's fANOVA."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune.search.optuna import OptunaSearch

LEAST = 4
"""Minimum number of scores to say anything."""


def importance(
    space: Mapping[str, Any], trials: Sequence[tuple[Mapping[str, Any], float]], *, seed: int
) -> dict[str, float]:
    """Each hyperparameter's share of the differences between scores, the largest first.

    fANOVA (Hutter et al. 2014): a random forest learns scores from values; the share is the part of
    its predictions' variance that the hyperparameter explains alone. Shares add up to 1.

    Args:
        trials: The values and the score of each.

    Returns:
        An empty dict if there are fewer than `LEAST` trials or their scores don't differ.
    """
    scores = [score for _, score in trials]
    if len(trials) < LEAST or max(scores) == min(scores):
        return {}
    import optuna
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(logging.WARNING)
    distributions = OptunaSearch.convert_search_space(dict(space))
    study = optuna.create_study(direction="maximize")
    study.add_trials(
        optuna.trial.create_trial(
            params=dict(values), distributions=distributions, value=score
        )
        for values, score in trials
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the evaluator is experimental
        try:
            found = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=seed))
        except RuntimeError:  # every tree predicts the same for all values
            return {}
    return {name: float(share) for name, share in found.items()}
