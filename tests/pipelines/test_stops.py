"""Stops that keep the work: signals, limits, spot machines, a later start of the same run."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import small_run
from small_net import same
from small_run import Recipe, config, train, trained

from pipelines import bundles, progress, stops, tracking
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store, StoreError

pytestmark = pytest.mark.usefixtures("unwatched")


# -- stops -----------------------------------------------------------------------------------------


def start(folder: Path, workers: int, held: int, *names: str) -> subprocess.Popen[str]:
    """`small_run.py`; if it is to be held somewhere, it is now."""
    arguments = [small_run.__file__, str(folder), str(workers), str(held), *names]
    started = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    while held >= 0 and not (folder / "held").exists():
        assert started.poll() is None, started.communicate()
        time.sleep(0.05)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_started_twice_goes_on_in_the_later_job(workers: int, tmp_path: Path) -> None:
    earlier = start(tmp_path, workers, 4, "run")
    later = start(tmp_path, workers, -1, "run", "unbroken")
    said, _ = later.communicate(timeout=240)
    assert later.returncode == 0, said
    given_way, _ = earlier.communicate(timeout=120)
    assert earlier.returncode == 1
    wanted = "runs/run was started again elsewhere, and goes on there; this job ends at step 4"
    assert wanted in given_way
    store = Store(tmp_path / "store")
    assert same(trained(store, "run"), trained(store, "unbroken"))
    assert bundles.info(store, "models/run")["steps"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_keeps_the_work(workers: int, tmp_path: Path) -> None:
    stopped = start(tmp_path, workers, 4, "stopped")
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert stopped.returncode == 143
    assert (
        "runs/stopped: stopped at step 5 of 8, with a checkpoint (SIGTERM received): run the same "
        "command to go on"
    ) in said
    store = Store(tmp_path / "store")
    assert store.list("runs/stopped/checkpoints") == ["step-00000005"]
    assert not bundles.exists(store, "models/stopped")

    finished = start(tmp_path, workers, -1, "stopped", "unbroken")
    said, _ = finished.communicate(timeout=240)
    assert finished.returncode == 0 and "runs/stopped: resumed from step 5" in said
    assert same(trained(store, "stopped"), trained(store, "unbroken"))


@dataclass(frozen=True)
class Signalled(Recipe):
    """Gets signals as it trains."""

    signals: int = 1

    def before(self, number: int) -> None:
        if number == self.held:
            for _ in range(self.signals):
                signal.raise_signal(signal.SIGTERM)
            assert small_run.watch().stop.wait(120)


def test_a_stopped_run_is_killed_to_the_tracker_and_goes_on_there(store: Store) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(stops.Stopped) as raised:
        train(store, "run", Signalled(held=2), track=True)
    assert raised.value.code == 143
    handle = tracking.RunHandle(**store.read_json("runs/run/mlflow.json"))
    tracker = tracking.client(handle.uri)
    assert tracker.get_run(handle.run_id).info.status == "KILLED"
    result = train(store, "run", Recipe(), track=True)
    assert result["mlflow_run"] == handle.run_id
    assert tracker.get_run(handle.run_id).info.status == "FINISHED"
    steps = [m.step for m in tracker.get_metric_history(handle.run_id, "train/loss")]
    assert sorted(steps) == list(range(1, 9))
    assert signal.getsignal(signal.SIGTERM) is before


@dataclass(frozen=True)
class StartedAgain(Recipe):
    """The same training is started elsewhere as this one takes the step `held`."""

    def before(self, number: int) -> None:
        if number == self.held:
            store = Store(self.folder)
            noted = store.read_json("runs/run/run.json")
            store.write_json("runs/run/run.json", {**noted, "start": "later"})
            assert small_run.watch().lost.wait(120)


def test_an_earlier_start_gives_way_to_a_later_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It writes no checkpoint, nor says how the run ended: that is the later one's."""
    monkeypatch.setattr(stops, "START_POLL_SECONDS", 0.05)
    recipe = StartedAgain(held=5, folder=store.uri)
    with pytest.raises(stops.TakenOver, match=r"was started again elsewhere, .* ends at step 5"):
        train(store, "run", recipe, track=True, checkpoint_every=2)
    assert store.list("runs/run/checkpoints") == ["step-00000002", "step-00000004"]
    handle = tracking.RunHandle(**store.read_json("runs/run/mlflow.json"))
    tracker = tracking.client(handle.uri)
    assert tracker.get_run(handle.run_id).info.status == "RUNNING"
    assert not bundles.exists(store, "models/run")
    train(store, "run", Recipe(), track=True, checkpoint_every=2)
    train(store, "unbroken", Recipe())
    assert same(trained(store, "run"), trained(store, "unbroken"))
    assert tracker.get_run(handle.run_id).info.status == "FINISHED"


def test_what_an_earlier_start_leaves_does_not_end_a_later_one(store: Store) -> None:
    earlier, later = (
        Run(store.uri, "runs/run", "models/run", "same", Recipe(), small_run.config(), start=name)
        for name in ("earlier", "later")
    )
    with stops.stoppable(store, later, time.monotonic()):
        asked = {"reason": "SIGTERM received", "hint": "", "code": 143}
        store.write_json(stops.note(earlier, "stop"), asked)
        progress.begin(store, earlier, [])
        assert stops.report(store, earlier) and stops.report(store, later) is None
        with stops.Watch(later, store, 0) as watch:
            assert not watch.stop.is_set() and not watch.lost.is_set()
        stops.tell(store, earlier, stops.Ended("gave way", error=stops.TakenOver))


def test_how_an_earlier_start_ended_is_its_own(store: Store) -> None:
    """Whichever of the two jobs ends first."""
    earlier, later = (
        Run(store.uri, "runs/run", "models/run", "same", Recipe(), small_run.config(), start=name)
        for name in ("earlier", "later")
    )
    with (
        pytest.raises(stops.TakenOver),
        stops.stoppable(store, earlier, time.monotonic()),
        pytest.raises(stops.Stopped, match="75"),
        stops.stoppable(store, later, time.monotonic()),
    ):
        stops.tell(store, earlier, stops.Ended("gave way", error=stops.TakenOver))
        stops.tell(store, later, stops.Ended("stopped", stops.LIMIT_CODE))
    assert not store.list("runs/run")  # nothing is left lying about


def test_who_can_t_begin_takes_nothing_over(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither without a tracker, nor with other options, nor without room."""
    noted = {"fingerprint": "same", "parameters": {}, "start": "earlier"}
    store.write_json("runs/run/run.json", noted)
    with pytest.raises(ValueError, match=r"train\.workers 9999"):
        train(store, "run", Recipe(), workers=9999)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(StoreError):
        train(store, "run", Recipe(), track=True)
    assert store.read_json("runs/run/run.json") == noted
    store.write_json("runs/run/run.json", {**noted, "fingerprint": "another"})
    with pytest.raises(StoreError, match="was begun with other inputs or options"):
        train(store, "run", Recipe())
    assert store.read_json("runs/run/run.json")["start"] == "earlier"


def test_a_second_sigterm_ends_it_at_once(store: Store) -> None:
    with pytest.raises(stops.Stopped):
        train(store, "run", Signalled(held=2, signals=2))
    assert not store.list("runs/run/checkpoints")


def test_a_stop_in_the_last_step_comes_too_late(store: Store) -> None:
    assert train(store, "run", Signalled(held=7))["steps"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_hours": 1e-9}, "train.max_hours 1e-09 is reached"),
        ({"max_cost": 1e-9, "price_per_hour": 32.0}, "train.max_cost 1e-09 is reached"),
    ],
)
def test_a_limit_ends_it_with_a_checkpoint(
    options: dict[str, Any], said: str, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    """So small a limit is over before the first step; each start takes one."""
    for step in (1, 2):
        with pytest.raises(stops.Stopped) as raised:
            train(store, "run", Recipe(), **options)
        assert raised.value.code == 75
        out = capsys.readouterr().out
        assert f"stopped at step {step} of 8, with a checkpoint ({said}): run the same" in out
        assert f"with a larger train.{next(iter(options))}" in out
    train(store, "run", Recipe(), **{**options, next(iter(options)): 1e9})
    assert "resumed from step 2" in capsys.readouterr().out
    train(store, "unbroken", Recipe())
    assert same(trained(store, "run"), trained(store, "unbroken"))


def test_the_nearest_limit_counts() -> None:
    config = TrainConfig(workers=4, max_hours=3.0, max_cost=16.0, price_per_hour=2.0)
    for changes, seconds, option in (
        ({}, 7200.0, "train.max_cost 16"),  # 4 workers cost 8 an hour
        ({"max_hours": 1.0}, 3600.0, "train.max_hours 1"),
        ({"max_cost": 0.0}, 10800.0, "train.max_hours 3"),
        ({"workers": 0}, 10800.0, "train.max_hours 3"),
    ):
        found = stops._limit(replace(config, **changes))
        assert found is not None and found[0] == pytest.approx(seconds)
        assert found[1] == f"{option} is reached"
    assert stops._limit(TrainConfig()) is None


@pytest.mark.parametrize("begun", [False, True])
def test_a_limit_ends_what_only_waits_for_machines(
    begun: bool, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_run.config(max_hours=0.3 / 3600)
    run, asked = Run(store.uri, "runs/run", "models/run", "same", Recipe(), config), False
    with (
        pytest.raises(stops.Stopped) if not begun else contextlib.nullcontext() as raised,
        stops.stoppable(store, run, time.monotonic()),
    ):
        if begun:
            progress.begin(store, run, [])
        for _ in range(1200):
            time.sleep(0.05)
            if store.exists(stops.note(run, "stop")):
                asked = True
                break
    assert asked == begun
    said = capsys.readouterr().out
    assert ("no worker has begun: run the same command to go on" in said) == (not begun)
    if not begun:
        assert raised is not None and raised.value.code == stops.LIMIT_CODE


class Metadata(http.server.BaseHTTPRequestHandler):
    """A cloud's metadata service; of another cloud's paths it knows none."""

    notice = threading.Event()

    def do_GET(self) -> None:
        self.answer(404, b"")

    do_PUT = do_GET

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class EC2(Metadata):
    """Version 2 of the service."""

    def do_PUT(self) -> None:
        asked = self.headers.get("X-aws-ec2-metadata-token-ttl-seconds")
        ok = self.path == "/latest/api/token" and asked is not None
        self.answer(200 if ok else 400, b"a token")

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != "a token":
            self.answer(401, b"")
        elif self.path != "/latest/meta-data/spot/instance-action" or not self.notice.is_set():
            self.answer(404, b"")
        else:
            found = {"action": "terminate", "time": "2030-01-01T00:02:00Z"}
            self.answer(200, json.dumps(found).encode())


class GCE(Metadata):
    def do_GET(self) -> None:
        if self.headers.get("Metadata-Flavor") != "Google":
            self.answer(403, b"")
        elif self.path != "/computeMetadata/v1/instance/preempted":
            self.answer(404, b"")
        else:
            self.answer(200, b"TRUE" if self.notice.is_set() else b"FALSE")


@contextlib.contextmanager
def served(cloud: type[Metadata], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This cloud's service where both are looked for, as they are at one address."""
    Metadata.notice.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), cloud)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{address}/")
    monkeypatch.setenv("GCE_METADATA_HOST", address)
    monkeypatch.setattr(stops, "SPOT_POLL_SECONDS", 0.01)
    yield
    server.shutdown()
    thread.join()
    server.server_close()


@dataclass(frozen=True)
class TakenBack(Recipe):
    """Its machine gets the notice as it trains."""

    def before(self, number: int) -> None:
        if number == self.held:
            Metadata.notice.set()
            assert small_run.watch().save.wait(120)


@pytest.mark.parametrize("cloud", [EC2, GCE])
def test_a_spot_notice_makes_a_checkpoint_at_once(
    cloud: type[Metadata], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(cloud, monkeypatch):
        asked = {EC2: stops.ec2_notice, GCE: stops.gce_notice}
        here = asked.pop(cloud)
        (elsewhere,) = asked.values()
        assert here() is False and elsewhere() is None
        assert train(store, "run", TakenBack(held=3), spot_notice=True)["steps"] == 8
        assert here() is True and elsewhere() is None
    assert store.list("runs/run/checkpoints") == ["step-00000004"]


def watched(store: Store, said: Callable[[str], None]) -> stops.Watch:
    """What looks for a notice on a worker that is not the first."""
    settings = config(spot_notice=True)
    watched = Run(store.uri, "runs/run", "models/run", "same", Recipe(), settings)
    return stops.Watch(watched, store, 1, said)


def test_a_machine_that_gets_no_notice_says_so_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: queue.Queue[str] = queue.Queue()
    looks: queue.Queue[None] = queue.Queue()
    real = stops.gce_notice
    with served(Metadata, monkeypatch):
        monkeypatch.setattr(stops, "gce_notice", lambda: (looks.put(None), real())[1])
        with watched(store, said.put) as watch:
            for _ in range(3):
                looks.get(timeout=60)
        assert not watch.save.is_set()
        assert "train.checkpoint_every" in said.get_nowait() and said.empty()


@pytest.mark.parametrize("cloud", [EC2, GCE])
def test_a_machine_that_gets_notices_says_nothing(
    cloud: type[Metadata], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with served(cloud, monkeypatch), watched(store, said.append) as watch:
        assert not watch.save.wait(0.2)
        cloud.notice.set()
        assert watch.save.wait(60)
    assert said == []


def test_a_node_that_ray_drains_is_a_notice(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    with served(Metadata, monkeypatch):
        monkeypatch.setattr(stops, "drained", lambda: True)
        with watched(store, said.append) as watch:
            assert watch.save.wait(60)
    assert said == []


@pytest.mark.slow
def test_a_worker_learns_that_its_node_is_told_to_end(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(
        prefix="b3-", dir="/tmp"
    ) as folder:  # for short sockets' paths
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, Path(__file__).with_name("draining_node.py")],
            env=environment | {"RAY_TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    # Ray may print a raylet's last lines at its end.
    told = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert list(map(json.loads, told)) == [[False, True]]


def test_where_nobody_answers_there_is_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as closed:
        port = closed.server_address[1]
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCE_METADATA_HOST", f"127.0.0.1:{port}")
    assert stops.ec2_notice() is None and stops.gce_notice() is None
