"""Pretraining that is killed, moved, cut off from its tracker or badly stored loses nothing.

What else it survives is tested elsewhere: damaged and unfinished checkpoints in
`test_checkpoints.py`, ZeRO's stages and other numbers of workers in `test_zero_stages.py`, bad
steps in `test_guards.py`, stops in `test_stops.py`, loader processes that die in
`test_loader_workers.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
import torch.distributed as dist
import watched_pretraining
from faulty_proxy import faulty_proxy
from ray import cloudpickle
from safetensors.torch import load_file
from small_run import Recipe
from torch import Tensor
from watched_pretraining import Job, Witness, watching

from pipelines import bundles, checkpoints, pretrain, tracking
from pipelines.storage import Store

STEPS = 60
EVERY = 7  # steps between checkpoints
SECONDS = 300  # for a run without kills, on a busy machine

pytestmark = [pytest.mark.timeout(5 * SECONDS)]


@pytest.fixture(autouse=True)
def travelling() -> Iterator[None]:
    """Ray's workers can't import these files: their classes travel as they are."""
    modules = [sys.modules[__name__], small_run, watched_pretraining]
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    yield
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


def trained(store: Store, name: str) -> dict[str, Tensor]:
    return load_file(store.path("models", name, "model.safetensors"))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def logged(store: Store, name: str, key: str) -> dict[int, float]:
    """A run's metric by step; a step that was logged twice fails the test."""
    handle = tracking.RunHandle(**store.read_json(f"runs/{name}/mlflow.json"))
    found = tracking.client(handle.uri).get_metric_history(handle.run_id, key)
    assert len({metric.step for metric in found}) == len(found), key
    return {metric.step: metric.value for metric in sorted(found, key=lambda m: m.step)}


# -- killed ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(corpus: Store) -> dict[str, Tensor]:
    """What two workers make in 60 steps."""
    config = watched_pretraining.config(corpus, "unbroken", steps=STEPS, checkpoint_every=EVERY)
    pretrain.run(config)
    return trained(corpus, "unbroken")


def drawn(rng: random.Random) -> list[int]:
    """Three steps between checkpoints."""
    return sorted(rng.sample([n for n in range(EVERY, STEPS) if n % EVERY], 3))


def before(step: int) -> int:
    """The checkpoint that a run goes on from that was killed after so many steps."""
    return step // EVERY * EVERY


def job(store: Store, name: str, folder: Path, held: list[tuple[int, int]]) -> dict[str, Any]:
    """Settings of `watched_pretraining.py`."""
    train = {"steps": STEPS, "checkpoint_every": EVERY, "max_failures": len(held)}
    return {"store": store.uri, "name": name, "folder": str(folder), "held": held, "train": train}


def wait_until_held(running: Job, store: Store, name: str, folder: Path, step: int) -> int:
    """Wait until a worker waits after `step` steps and the last checkpoint is in the store; returns
    the worker's process id."""
    mark, newest = folder / f"held-{step}", checkpoints.folder(f"runs/{name}", before(step))
    deadline = time.monotonic() + SECONDS
    while not (mark.exists() and bundles.exists(store, newest)):
        assert running.process.poll() is None, running.said()
        assert time.monotonic() < deadline, running.said()
        time.sleep(0.02)
    return int(mark.read_text())


def check_survived(store: Store, name: str, unbroken: dict[str, Tensor]) -> None:
    """The same model to the bit, and each step's metrics once."""
    assert same(trained(store, name), unbroken)
    for key in ("train/loss", "train/accuracy/image", "train/gradient_norm"):
        assert list(logged(store, name, key)) == list(range(1, STEPS + 1)), key


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_with_all_its_processes_at_three_steps(
    rank: int, corpus: Store, unbroken: dict[str, Tensor], tmp_path: Path
) -> None:
    """The same command goes on each time. `rank` is the worker that is a step behind the other."""
    name, steps = f"killed-{rank}", drawn(random.Random(rank))
    settings = job(corpus, name, tmp_path, [(step, rank) for step in steps])
    for step in steps:
        with Job(tmp_path, [settings]) as running:
            wait_until_held(running, corpus, name, tmp_path, step)
            running.kill()
        assert not bundles.exists(corpus, f"models/{name}")
    with Job(tmp_path, [settings]) as running:
        running.finish(SECONDS)
    runs = zip([0, *map(before, steps)], [*steps, STEPS], strict=True)
    assert Witness(str(tmp_path)).numbers(rank) == [n for run in runs for n in range(*run)]
    check_survived(corpus, name, unbroken)


@pytest.mark.slow
def test_workers_killed_at_three_steps(
    corpus: Store, unbroken: dict[str, Tensor], tmp_path: Path
) -> None:
    """Ray's failure policy starts them again, and the job's own process never ends."""
    name, steps = "workers-killed", drawn(random.Random(2))
    settings = job(corpus, name, tmp_path, list(zip(steps, (0, 1, 0), strict=True)))
    with Job(tmp_path, [settings]) as running:
        for step in steps:
            os.kill(wait_until_held(running, corpus, name, tmp_path, step), signal.SIGKILL)
        running.finish(SECONDS)
    for rank in (0, 1):
        numbers = Witness(str(tmp_path)).numbers(rank)
        starts = [n for last, n in itertools.pairwise(numbers) if n != last + 1]
        assert starts == [before(step) for step in steps]
    check_survived(corpus, name, unbroken)


# -- moved -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_two_and_four_workers_share_one_run(corpus: Store, tmp_path: Path) -> None:
    """The batches of one worker, row by row, and its losses to rounding."""
    whole, shares = (Witness(str(tmp_path / name)) for name in ("whole", "shares"))
    options: dict[str, Any] = {"steps": 12, "checkpoint_every": 4, "max_failures": 0}
    with watching(whole):
        pretrain.run(watched_pretraining.config(corpus, "one", workers=0, **options))
    for workers, end in ((1, 4), (2, 8), (4, 12)):
        config = watched_pretraining.config(
            corpus, "grown", workers=workers, cpus_per_worker=0.5, **options
        )
        with watching(replace(shares, fails=end)):
            if end < 12:
                with pytest.raises(Exception, match=f"as it was told to, before batch {end}"):
                    pretrain.run(config)
            else:
                pretrain.run(config)
    for number, rows in whole.trained_on(0):
        workers = (1, 2, 4)[number // 4]
        found = [dict(shares.trained_on(rank))[number] for rank in range(workers)]
        assert [len(own) for own in found] == [len(rows) // workers] * workers
        assert sorted(itertools.chain(*found)) == sorted(rows)
    objectives = ("image", "text", "pair_image", "pair_text")
    for key in ("loss", "gradient_norm", *(f"loss/{name}" for name in objectives)):
        one, grown = (logged(corpus, name, f"train/{key}") for name in ("one", "grown"))
        assert one.keys() == grown.keys() and len(one) > 9, key
        assert grown == pytest.approx(one, rel=1e-5), key


# -- cut off from its tracker ----------------------------------------------------------------------


class Tracker:
    """An MLflow server on loopback, in a process group of its own. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1", probe.getsockname()[1]
        self.folder, self.uri = folder, f"http://127.0.0.1:{self.address[1]}"
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Tracker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        log = self.folder / "tracker.log"
        command = [
            sys.executable, "-m", "mlflow", "server", "--host", self.address[0], "--port",
            str(self.address[1]), "--workers", "1", "--backend-store-uri",
            f"sqlite:///{self.folder}/tracker.db", "--artifacts-destination",
            f"{self.folder}/artifacts",
        ]  # fmt: skip
        with log.open("ab") as sink:
            self.process = subprocess.Popen(
                command, stdout=sink, stderr=sink, start_new_session=True
            )
        deadline = time.monotonic() + SECONDS
        while not self.answers():
            assert self.process.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.1)

    def answers(self) -> bool:
        try:
            with contextlib.closing(http.client.HTTPConnection(*self.address, timeout=5)) as asked:
                asked.request("GET", "/health")
                return asked.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@dataclass(frozen=True)
class Asks(Recipe):
    """Before batches of these numbers rank 0 leaves its process id in `asked-NUMBER` and waits for
    `answered-NUMBER`."""

    at: tuple[int, ...] = ()

    def before(self, number: int) -> None:
        if number in self.at and dist.get_rank() == 0:
            draft = Path(self.folder) / f"asking-{number}"
            draft.write_text(str(os.getpid()))
            draft.replace(Path(self.folder) / f"asked-{number}")  # whole or not at all
            while not (Path(self.folder) / f"answered-{number}").exists():
                time.sleep(0.05)

    def answer(self, number: int, action: Callable[[], None]) -> None:
        deadline = time.monotonic() + SECONDS
        try:
            while not (Path(self.folder) / f"asked-{number}").exists():
                assert time.monotonic() < deadline, f"batch {number} never came"
                time.sleep(0.05)
            action()
        finally:
            (Path(self.folder) / f"answered-{number}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("killed", [False, True], ids=["alive", "killed"])
def test_a_tracker_that_is_gone_for_twenty_steps(
    killed: bool,
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Steps go on, with their checkpoints; all of their metrics arrive, and none twice, even if the
    process that has them in memory is killed meanwhile."""
    at = (20, 33, 40) if killed else (20, 40)
    store, recipe = Store(tmp_path / "store"), Asks(folder=str(tmp_path), at=at)
    gone: list[bool] = []

    def bring_back() -> None:
        gone.append(not tracker.answers())
        gone.append(bundles.exists(store, checkpoints.folder("runs/run", 35)))
        tracker.start()

    def kill() -> None:
        deadline = time.monotonic() + SECONDS
        while not bundles.exists(store, checkpoints.folder("runs/run", 30)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(int((tmp_path / "asked-33").read_text()), signal.SIGKILL)

    def answer() -> None:
        recipe.answer(20, tracker.kill)
        if killed:
            recipe.answer(33, kill)
        recipe.answer(40, bring_back)

    with Tracker(tmp_path) as tracker, ThreadPoolExecutor(1) as beside:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", tracker.uri)
        answering = beside.submit(answer)
        result = small_run.train(
            store, "run", recipe, workers=2, steps=STEPS, checkpoint_every=5, track=True,
            max_failures=int(killed),
        )  # fmt: skip
        answering.result()
        assert gone == [True, True]  # 20 steps on it was still gone, and they are kept
        assert ("resumed from step 30" in capsys.readouterr().out) == killed
        for key in ("loss", "learning_rate", "gradient_norm", "samples_per_second"):
            assert list(logged(store, "run", f"train/{key}")) == list(range(1, STEPS + 1)), key
        run = tracking.client(tracker.uri).get_run(result["mlflow_run"])
        assert run.info.status == "FINISHED"


# -- badly stored ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bucket_that_fails_every_twentieth_time(
    corpus: Store, unbroken: dict[str, Tensor], s3_server: str, s3_store: str, tmp_path: Path
) -> None:
    """Every checkpoint is there and whole, and a run that is killed goes on from them."""
    store, name = Store(s3_store), "failing"
    for folder in ("images", "tokens", "tokenizers"):
        for path in filter(Path.is_file, Path(corpus.root, folder).rglob("*")):
            store.upload(path, path.relative_to(corpus.root).as_posix())
    step = 33
    settings = job(store, name, tmp_path, [(step, 1)])
    with faulty_proxy(s3_server, 0.05) as faults:
        environment = {
            "AWS_ENDPOINT_URL": faults.url,
            "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        }
        with Job(tmp_path, [settings], **environment) as running:
            wait_until_held(running, store, name, tmp_path, step)
            running.kill()
        with Job(tmp_path, [settings], **environment) as running:
            running.finish(SECONDS)
    assert faults.failed > 10
    assert Witness(str(tmp_path)).numbers(1) == [*range(step), *range(before(step), STEPS)]
    due = [f"step-{n:08d}" for n in range(EVERY, STEPS, EVERY)]
    assert store.list(f"runs/{name}/checkpoints") == due
    for part in due:
        bundles.load(store, f"runs/{name}/checkpoints/{part}", tmp_path / part)
        for file in ("model.safetensors", "optimizer.safetensors"):
            wanted = load_file(corpus.path("runs/unbroken/checkpoints", part, file))
            assert same(load_file(tmp_path / part / file), wanted), (part, file)
    bundles.load(store, f"models/{name}", tmp_path / "model")
    assert same(load_file(tmp_path / "model" / "model.safetensors"), unbroken)
