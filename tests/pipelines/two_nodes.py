"""Ingestion on a Ray cluster of two local nodes: a program of its own, and how tests start it.

    python two_nodes.py settings.json

The settings are `configs`, a list of `IngestConfig`'s arguments, ingested one after the other, and
`node`, a file that gets the process id of the second node's raylet. The first node is the driver's.
A second node that dies is replaced, as an autoscaler would.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import psutil

SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
"""So that a dead node is missed within seconds."""
MARK = "BEIT3_TEST_MARK"


class Driver:
    """A started program, with everything it started; only these processes are ever killed."""

    program = __file__

    def __init__(self, folder: Path, configs: Sequence[dict[str, Any]], **environment: str) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / f"{self.mark}.log"
        self.node = folder / f"{self.mark}.node"
        settings = folder / f"{self.mark}.json"
        settings.write_text(json.dumps({"configs": list(configs), "node": str(self.node)}))
        # Sockets' paths must be short, and another cluster's address file left alone.
        self.ray_folder = tempfile.mkdtemp(prefix="b3-", dir="/tmp")
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        inherited |= {"PYTHONWARNINGS": "ignore", "RAY_TMPDIR": self.ray_folder, MARK: self.mark}
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, self.program, str(settings)],
                stdout=sink,
                stderr=sink,
                start_new_session=True,
                env=inherited | environment,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]

    def finish(self, seconds: float) -> None:
        """Wait for the end, which must be good."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done within {seconds} s: {self.said()}") from None
        assert code == 0, self.said()

    def kill(self) -> None:
        """Kill the driver's process group and, whatever group they are in, all it started."""
        started = self._tree(self.process.pid)
        if self.process.poll() is None:  # else its number may be another's by now
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        deadline = time.monotonic() + 30
        while left := [p for p in (*started, *self._marked()) if _alive(p)]:
            assert time.monotonic() < deadline, left
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)

    def worker(self) -> psutil.Process | None:
        """A process that makes parts."""
        for process in self._tree(self.process.pid):
            with contextlib.suppress(psutil.Error):
                if "_part_task" in " ".join(process.cmdline()):
                    return process
        return None

    def kill_worker(self) -> bool:
        """Kill a process that makes parts, if there is one now."""
        worker = self.worker()
        if worker is None:
            return False
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
            return True
        return False

    def kill_node(self) -> bool:
        """Kill the second node, raylet and workers, if there is one now and it has work."""
        try:
            raylet = psutil.Process(int(self.node.read_text()))
            with_it = self._tree(raylet.pid)
            if not any("_part_task" in " ".join(p.cmdline()) for p in with_it):
                return False
            raylet.kill()
        except (FileNotFoundError, psutil.Error):
            return False
        for process in with_it:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return True

    def _tree(self, pid: int) -> list[psutil.Process]:
        if self.process.poll() is not None:
            return []
        try:
            return psutil.Process(pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def _marked(self) -> Iterator[psutil.Process]:
        """Processes with this program's mark in their environment: orphans have it too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(MARK) == self.mark:
                    yield process


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def main(settings: dict[str, Any]) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from pipelines import ingest

    # Without exit hooks, which Ray can only set in the main thread: nodes are added in another.
    cluster = Cluster(shutdown_at_exit=False)
    cluster.add_node(num_cpus=1, include_dashboard=False, _system_config=SOON)
    done = threading.Event()
    keeper = threading.Thread(target=keep_second, args=(cluster, Path(settings["node"]), done))
    keeper.start()
    try:
        os.environ["RAY_ADDRESS"] = cluster.address or ""
        for config in settings["configs"]:
            ingest.run(ingest.IngestConfig(**config))
    finally:
        done.set()
        keeper.join()
        ray.shutdown()
        cluster.shutdown()


def keep_second(cluster: Any, told: Path, done: threading.Event) -> None:
    """Add a second node, and another one whenever it has died."""
    raylet = None
    while not done.is_set():
        if raylet is None or raylet.poll() is not None:
            node = cluster.add_node(num_cpus=1)
            raylet = node.all_processes["raylet"][0].process
            draft = told.with_suffix(".draft")
            draft.write_text(str(raylet.pid))
            draft.replace(told)  # whole or not at all
        done.wait(0.1)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
