"""The shared main program of all jobs: reads options, prints the bill, and errors in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pipelines import bill, config
from pipelines.storage import StoreError

T = TypeVar("T")


def main(
    presets: Mapping[str, T],
    description: str | None,
    run: Callable[[T], object],
    *,
    billed: bool = True,
) -> None:
    """Read the options, run the job and print the machine time it used.

    Input or options that a job can't use end it with exit code 2 and the error in one line.

    Args:
        presets, description: As for `config.cli`.
        billed: Whether the job uses enough machine time to report; a dry run never does.
    """
    chosen = located(config.cli(presets, description=description or ""))
    try:
        if billed and not getattr(chosen, "dry_run", False):
            with bill.printed():
                run(chosen)
        else:
            run(chosen)
    except (FileNotFoundError, StoreError, ValueError) as error:
        config.stop(str(error))


def located(chosen: T) -> T:
    """The options with a local store's path made absolute, as workers may run in other folders."""
    store = getattr(chosen, "store", None)
    if not isinstance(store, str) or "://" in store:
        return chosen
    return dataclasses.replace(cast(Any, chosen), store=str(Path(store).absolute()))
