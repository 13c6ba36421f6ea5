"""A cluster on this machine that grows and shrinks by itself, as infra/ray_cluster.yaml has it.

    python fake_nodes.py TYPE GCS_ADDRESS      # a node, until its raylet ends

Node types and the head's command are the file's. A machine is a node of Ray on loopback, with the
CPUs and GPUs of `SHAPES`. `Machines` runs in the autoscaler, `Cluster` in a test.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import psutil
import yaml
from ray.autoscaler.node_provider import NodeProvider
from ray.autoscaler.tags import NODE_KIND_HEAD, TAG_RAY_NODE_KIND, TAG_RAY_USER_NODE_TYPE

ROOT = Path(__file__).parents[2]
FILE = ROOT / "infra" / "ray_cluster.yaml"
SHAPES: dict[str, dict[str, int]] = {
    "head": {"CPU": 0, "GPU": 0},
    "cpu": {"CPU": 2, "GPU": 0},
    "gpu": {"CPU": 2, "GPU": 1},
}
HEAD = "head-0"
MARK = "BEIT3_TEST_MARK"
_OBJECTS = 100 << 20  # bytes of each node's object store
_RAY = str(Path(sys.executable).with_name("ray"))


def head_command(*options: str) -> list[str]:
    """The file's own `ray start` of the head, but for ports and the autoscaler's file."""
    commands = yaml.safe_load(FILE.read_text())["head_start_ray_commands"]
    (line,) = [command for command in commands if "ray start" in command]
    told = shlex.split(line.split("ray start", 1)[1])
    kept = [o for o in told if not re.match(r"--(\S*port|autoscaling-config)=", o)]
    return [_RAY, "start", *kept, "--node-ip-address=127.0.0.1", "--block", *options]


def node_environment(kind: str, name: str) -> dict[str, str]:
    """What tells the autoscaler which of its machines a node is."""
    inherited = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return inherited | {"RAY_CLOUD_INSTANCE_ID": name, "RAY_NODE_TYPE_NAME": kind}


# -- in the autoscaler -----------------------------------------------------------------------------


class Machines(NodeProvider):
    """Ray's interface to a cloud. A machine whose process has died is gone, as a spot one is."""

    def __init__(self, provider_config: dict[str, Any], cluster_name: str) -> None:
        super().__init__(provider_config, cluster_name)
        self._lock = threading.RLock()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._tags = {HEAD: {TAG_RAY_NODE_KIND: NODE_KIND_HEAD, TAG_RAY_USER_NODE_TYPE: "head"}}

    def create_node_with_resources_and_labels(
        self, node_config: Any, tags: dict[str, str], count: int, resources: Any, labels: Any
    ) -> None:
        kind = tags[TAG_RAY_USER_NODE_TYPE]
        for _ in range(count):
            with self._lock:
                name = f"{kind}-{len(self._tags)}"
                self._running[name] = subprocess.Popen(
                    [sys.executable, __file__, kind, self.provider_config["gcs"]],
                    env=node_environment(kind, name),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
                self._tags[name] = dict(tags)
                self._note("came", name)

    def non_terminated_nodes(self, tag_filters: Mapping[str, str]) -> list[str]:
        with self._lock:
            for name in [n for n, process in self._running.items() if process.poll() is not None]:
                self._note("went", name)
                del self._running[name]
            wanted = tag_filters.items()
            return [n for n in (HEAD, *self._running) if wanted <= self._tags[n].items()]

    def terminate_node(self, node_id: str) -> None:
        with self._lock:
            if node_id not in self._running:
                return
            self._note("went", node_id)
            process = self._running.pop(node_id)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def is_running(self, node_id: str) -> bool:
        return node_id == HEAD or node_id in self._running

    def is_terminated(self, node_id: str) -> bool:
        return not self.is_running(node_id)

    def node_tags(self, node_id: str) -> dict[str, str]:
        return self._tags[node_id]

    def external_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    def internal_ip(self, node_id: str) -> str:
        return "127.0.0.1"

    def set_node_tags(self, node_id: str, tags: dict[str, str]) -> None:
        self._tags[node_id] |= tags

    @staticmethod
    def bootstrap_config(cluster_config: dict[str, Any]) -> dict[str, Any]:
        return cluster_config

    def _note(self, event: str, name: str) -> None:
        kind = self._tags[name][TAG_RAY_USER_NODE_TYPE]
        row = {"event": event, "name": name, "type": kind, "time": time.time()}
        row["pid"] = self._running[name].pid
        with Path(self.provider_config["events"]).open("a") as file:
            file.write(json.dumps(row) + "\n")


# -- in a test -------------------------------------------------------------------------------------


class Cluster:
    """A head that starts at once, and workers that come and go. Use as a context manager.

    Only processes that it started are ever killed. `ray stop` would take other clusters with it.
    """

    def __init__(self, folder: Path, *, idle_minutes: float) -> None:
        self.folder, self.events_file = folder, folder / "events.jsonl"
        self.mark = uuid.uuid4().hex
        # Sockets' paths must be short, and another cluster's address file left alone.
        self.ray_folder = tempfile.mkdtemp(prefix="b3-", dir="/tmp")
        token = folder / "token"
        token.write_text(uuid.uuid4().hex + uuid.uuid4().hex)
        token.chmod(0o600)
        gcs, self.dashboard = _free_port(), f"http://127.0.0.1:{_free_port()}"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        bin_folder = Path(sys.executable).parent
        self.environment = inherited | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "PYTHONPATH": f"{Path(__file__).parent}:{ROOT}",  # the autoscaler imports `Machines`
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # this node's address is loopback
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": self.ray_folder,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",  # a dead node is missed within seconds
            "RAY_enable_autoscaler_v2": "1",  # as `ray up` does
            MARK: self.mark,
        }
        config = folder / "cluster.yaml"
        config.write_text(yaml.safe_dump(self._config(f"127.0.0.1:{gcs}", idle_minutes)))
        options = [f"--port={gcs}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        # Its usual one may be another cluster's: then this head takes no jobs.
        options += [f"--dashboard-agent-listen-port={_free_port()}"]
        options += [f"--autoscaling-config={config}", f"--object-store-memory={_OBJECTS}"]
        self.log = folder / "head.log"
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(
                head_command(*options),
                env=node_environment("head", HEAD) | self.environment,
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )

    def _config(self, gcs: str, idle_minutes: float) -> dict[str, Any]:
        """The file without what is the cloud's."""
        written = yaml.safe_load(FILE.read_text())
        for kind, node in written["available_node_types"].items():
            node |= {"resources": SHAPES[kind], "node_config": {}}
        machines = {
            "type": "external",
            "module": f"{__name__}.{Machines.__name__}",
            "gcs": gcs,
            "events": str(self.events_file),
            "disable_node_updaters": True,  # a machine starts Ray itself
        }
        nothing: dict[str, Any] = {"file_mounts": {}, "cluster_synced_files": []}
        nothing |= {"setup_commands": [], "worker_setup_commands": []}
        limits = {"max_workers": 4, "idle_timeout_minutes": idle_minutes}  # this machine is small
        return written | {"provider": machines, "auth": {}} | nothing | limits

    def __enter__(self) -> Cluster:
        port = int(self.dashboard.rpartition(":")[2])
        deadline = time.monotonic() + 90
        while True:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                if self._takes_jobs():
                    return self
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def _takes_jobs(self) -> bool:
        """The head's agent, which starts them, comes some seconds after the port is open."""
        command = [_RAY, "job", "submit", "--address", self.dashboard, "--no-wait", "--", "true"]
        return subprocess.run(command, env=self.environment, capture_output=True).returncode == 0

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 30
        while left := list(self.processes()):
            assert time.monotonic() < deadline, left
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.05)
        self.process.wait()
        shutil.rmtree(self.ray_folder, ignore_errors=True)

    def processes(self) -> Iterator[psutil.Process]:
        """All that belongs to this cluster and still runs: by its mark, so orphans too."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                lives = process.status() != psutil.STATUS_ZOMBIE
                if lives and process.environ().get(MARK) == self.mark:
                    yield process

    def events(self) -> list[dict[str, Any]]:
        """What became of machines so far: `event` (came, went), `name`, `type`, `pid`, `time`."""
        if not self.events_file.exists():
            return []
        return [json.loads(line) for line in self.events_file.read_text().splitlines()]

    def up(self) -> dict[str, dict[str, Any]]:
        """The machines that are there, by name."""
        found: dict[str, dict[str, Any]] = {}
        for event in self.events():
            if event["event"] == "came":
                found[event["name"]] = event
            else:
                found.pop(event["name"], None)
        return found

    def submit(self, *entrypoint: str, env_vars: Mapping[str, str]) -> subprocess.Popen[str]:
        """`ray job submit`, as docs/operations.md has it; its output is the job's."""
        command = [_RAY, "job", "submit", "--address", self.dashboard, "--working-dir", str(ROOT)]
        command += ["--runtime-env-json", json.dumps({"env_vars": dict(env_vars)}), "--"]
        return subprocess.Popen(
            [*command, *entrypoint],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def kill(self, name: str) -> None:
        """Take a machine away without a word: all its processes at once."""
        head = psutil.Process(self.up()[name]["pid"])
        for process in [*head.children(recursive=True), head]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def finish(job: subprocess.Popen[str], seconds: float) -> str:
    """Wait for a submitted job's end, which must be good; returns what it said."""
    try:
        said, _ = job.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        job.kill()
        said, _ = job.communicate()
        raise AssertionError(f"not done within {seconds} s: {said[-4000:]}") from None
    assert job.returncode == 0, said[-4000:]
    return said


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# -- a node ----------------------------------------------------------------------------------------


def main(kind: str, gcs: str) -> None:
    """`ray start` refuses a worker whose address is loopback: start what it would."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    parameters = RayParams(
        node_ip_address="127.0.0.1",
        gcs_address=gcs,
        num_cpus=SHAPES[kind]["CPU"],
        num_gpus=SHAPES[kind]["GPU"],
        object_store_memory=_OBJECTS,
        min_worker_port=0,
        max_worker_port=0,
        dashboard_agent_listen_port=0,
        include_log_monitor=cast(Any, False),
        # Nodes share a folder here: each must only delete the working directories of its own.
        runtime_env_dir_name=f"runtime-{os.environ['RAY_CLOUD_INSTANCE_ID']}",
    )
    node = Node(parameters, head=False, shutdown_at_exit=True, spawn_reaper=False)
    node.all_processes["raylet"][0].process.wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
