"""The benchmark of the training loop: both of its runs train on the same, and come to the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import training_loop

SMALL = ["--preset", "tiny", "--samples", "3", "--log-every", "1", "--steps", "2", "--repeats", "1"]


def test_the_bare_loop_trains_on_what_was_committed(tmp_path: Path) -> None:
    threads = str(torch.get_num_threads())  # of this process, which tests after this one use
    options = training_loop.parse([*SMALL, "--store", str(tmp_path), "--threads", threads])
    training_loop.prepare(options)
    batch = training_loop.recipe(options).batches(0, 1)(0)
    assert (len(batch.images), len(batch.lengths)) == (6, 6)
    found = training_loop.run_bare(options)
    assert min(found["seconds"], found["busy"]) > 0
    assert 1 < found["loss"] < 100


@pytest.mark.slow
def test_the_job_and_the_bare_loop_have_the_same_loss(capsys: pytest.CaptureFixture[str]) -> None:
    training_loop.main(SMALL)  # raises if they have not
    assert "steps/s" in capsys.readouterr().out
