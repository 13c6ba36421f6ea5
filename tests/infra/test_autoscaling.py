"""The cluster of infra/ray_cluster.yaml on this machine: it starts with a head alone, grows for
each job, loses a node, shrinks again; and every job ends right.

GPUs are declared and not there: BEIT3_DEVICE=cpu has the jobs compute on CPUs.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_nodes import Cluster, finish
from mlflow_service import Service, postgres
from ports import listening
from safetensors.torch import load_file

from pipelines import config, contrast, tracking, train_image_tokenizer, train_text_tokenizer
from pipelines.storage import Store

SECONDS = 240  # for one job on a busy machine
STEPS, EVERY = 160, 20
IDLE_MINUTES = 0.1
PRICES = {"head": 1.0, "cpu": 2.0, "gpu": 3.0}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def store(ray_session: None, small_corpus: Any, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Tokenizers, texts, a held-out split, and shards of pictures that are not ingested yet."""
    store = Store(tmp_path_factory.mktemp("store"))
    small_corpus.publish_sources(store)
    train_text_tokenizer.run(small_corpus.text_tokenizer(store))
    contrast.run(small_corpus.teacher(store))
    train_image_tokenizer.run(small_corpus.image_tokenizer(store))
    shards = Path(store.root) / "published"
    shards.mkdir()
    for number in range(4):
        rows = small_corpus.image_rows("mine", 12 * number, 12, captions=1)
        with tarfile.open(shards / f"{number:05d}.tar", "w") as tar:
            for row in rows:
                key = row["id"].replace("/", "-")
                _add(tar, f"{key}.jpg", row["image"]["bytes"])
                _add(tar, f"{key}.txt", row["captions"][0].encode())
    return store


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest) -> Service | None:
    return request.getfixturevalue("mlflow_service") if postgres() else None


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("cluster"), idle_minutes=IDLE_MINUTES) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def submit(
    cluster: Cluster, service: Service | None, store: Store
) -> Callable[..., subprocess.Popen[str]]:
    """Submits a job with these options."""
    env_vars = {"BEIT3_DEVICE": "cpu", "OMP_NUM_THREADS": "1"}
    env_vars["BEIT3_PRICES"] = " ".join(f"{kind}={price}" for kind, price in PRICES.items())
    env_vars |= service.environment() if service else {}

    def submitted(script: str, *options: str) -> subprocess.Popen[str]:
        return cluster.submit(
            "python", f"pipelines/{script}.py", "--store", store.uri, *options, env_vars=env_vars
        )

    return submitted


def _came(cluster: Cluster, after: float) -> set[str]:
    """The types of the machines that came since then."""
    return {e["type"] for e in cluster.events() if e["event"] == "came" and e["time"] > after}


def _open(cluster: Cluster, service: Service | None) -> list[Any]:
    processes = [*cluster.processes(), *(service.processes() if service else ())]
    sockets = listening(processes)
    assert len(sockets) > 10
    return [socket for socket in sockets if not socket.on_loopback]


def _bill(said: str) -> dict[str, float]:
    """The node-hours that a job printed, by type."""
    (line,) = re.findall(r"node-hours: (.*); cost: ([\d.,]+)", said)
    hours = {kind: float(count) for kind, count in re.findall(r"(\w+) ([\d.]+)", line[0])}
    cost = sum(count * PRICES[kind] for kind, count in hours.items())
    assert float(line[1]) == pytest.approx(cost, abs=0.02)  # both are rounded
    return hours


def test_it_starts_at_zero_workers(cluster: Cluster) -> None:
    assert cluster.up() == {}


def test_it_grows_for_ingestion(
    cluster: Cluster, submit: Callable[..., subprocess.Popen[str]], store: Store
) -> None:
    begun = time.time()
    options = ["--source", "webdataset", "--name", "mine", "--min-side", "8", "--no-report"]
    job = submit("ingest", "--annotations", f"{store.root}/published", *options)
    said = finish(job, SECONDS)
    commit = store.dataset("images/mine").commit()
    assert commit.rows == 48, commit.stats
    assert _came(cluster, begun) == {"cpu"}
    assert _bill(said).keys() == {"head", "cpu"}


MEETING = """
import sys, time
from functools import partial
from pathlib import Path
from pipelines.side_by_side import side_by_side
from pipelines.storage import Store

def meet(folder, run):
    (folder / run).touch()
    while len(list(folder.iterdir())) < 3:
        time.sleep(0.1)
    return run

folder = Path(sys.argv[1])
runs = {"a": {}, "b": {}, "c": {}}
with side_by_side(partial(meet, folder), runs, cpus=2, store=Store(str(folder))) as found:
    print("met:", *found)
"""


def test_it_grows_for_runs_side_by_side(cluster: Cluster, tmp_path: Path) -> None:
    """Three that each fill a machine, and end only together."""
    begun = time.time()
    job = cluster.submit("python", "-c", MEETING, str(tmp_path), env_vars={})
    assert "met: a b c" in finish(job, SECONDS)
    assert _came(cluster, begun) == {"cpu"}


def test_it_grows_gpus_for_tokenizing(
    cluster: Cluster, submit: Callable[..., subprocess.Popen[str]], store: Store, small_corpus: Any
) -> None:
    begun = time.time()
    cfg = small_corpus.tokens(
        store, images=("mine",), actors=2, gpus_per_actor=1.0, cpus_per_actor=1.0
    )
    said = finish(submit("tokenize_corpus", "--config", _written(store, cfg)), SECONDS)
    assert store.dataset("tokens/mine").commit().rows == 48
    assert "gpu" in _came(cluster, begun)
    assert "gpu" in _bill(said)


@pytest.fixture(scope="module")
def undisturbed(
    cluster: Cluster,
    submit: Callable[..., subprocess.Popen[str]],
    store: Store,
    small_corpus: Any,
    service: Service | None,
) -> dict[str, Any]:
    """A pretraining on two GPU machines that nothing happens to; scanned while it runs."""
    job = submit("pretrain", "--config", _pretraining(store, small_corpus, "undisturbed"))
    _step(store, "undisturbed", EVERY)
    open_sockets = _open(cluster, service)
    up = sorted(machine["type"] for machine in cluster.up().values())
    said = finish(job, SECONDS)
    return {"said": said, "open": open_sockets, "up": up}


def test_it_grows_for_a_pretraining_on_two_workers(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["up"].count("gpu") == 2, undisturbed
    assert undisturbed["said"].count(f"trained ({STEPS} steps)") == 1
    assert "gpu" in _bill(undisturbed["said"])


def test_nothing_listens_off_loopback(undisturbed: dict[str, Any]) -> None:
    assert undisturbed["open"] == []


def test_the_bill_is_in_mlflow(
    undisturbed: dict[str, Any], store: Store, service: Service | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if service is None:
        pytest.skip("PostgreSQL is not installed: the runs are in files of the head")
    for name, value in service.environment().items():
        monkeypatch.setenv(name, value)
    handle = tracking.RunHandle(**store.read_json("runs/undisturbed/mlflow.json"))
    metrics = tracking.client(service.url).get_run(handle.run_id).data.metrics
    assert metrics["bill/node_hours_gpu"] > 0 and metrics["bill/cost"] > 0


def test_a_node_is_lost_and_the_model_is_the_same(
    undisturbed: dict[str, Any],
    cluster: Cluster,
    submit: Callable[..., subprocess.Popen[str]],
    store: Store,
    small_corpus: Any,
) -> None:
    job = submit("pretrain", "--config", _pretraining(store, small_corpus, "bereft"))
    _step(store, "bereft", 2 * EVERY)
    victim = max(name for name, machine in cluster.up().items() if machine["type"] == "gpu")
    killed = time.time()
    cluster.kill(victim)
    said = finish(job, SECONDS)
    assert "gpu" in _came(cluster, killed), "a machine in place of the lost one"
    resumed = [int(step) for step in re.findall(r"resumed from step (\d+)", said)]
    assert resumed and all(0 < step < STEPS for step in resumed)
    models = [
        load_file(Path(store.root) / "models" / name / "model.safetensors")
        for name in ("undisturbed", "bereft")
    ]
    assert models[0].keys() == models[1].keys()
    assert all(models[0][key].equal(models[1][key]) for key in models[0])


def test_it_shrinks_to_the_head(cluster: Cluster) -> None:
    deadline = time.monotonic() + 60 * IDLE_MINUTES + 60
    while cluster.up():
        assert time.monotonic() < deadline, cluster.up()
        time.sleep(1)


def _pretraining(store: Store, small_corpus: Any, name: str) -> str:
    cfg = small_corpus.pretraining(
        store,
        name=name,
        images=(),
        image_batch=0,
        pairs=("mine",),
        train={
            "steps": STEPS,
            "checkpoint_every": EVERY,
            "workers": 2,
            "gpus_per_worker": 1.0,
            "max_failures": 3,
            "threads": 1,
            "log_every": EVERY,
        },
    )
    return _written(store, cfg)


def _written(store: Store, cfg: Any) -> str:
    """A file of these options, the store left out: the command names it."""
    file = Path(store.root) / f"{type(cfg).__name__}-{getattr(cfg, 'name', '')}.yaml"
    options = {k: v for k, v in config.to_dict(cfg).items() if k != "store"}
    file.write_text(yaml.safe_dump(json.loads(json.dumps(options))))
    return str(file)


def _step(store: Store, name: str, step: int) -> None:
    """Wait until a run has a checkpoint of this step or a later one."""
    deadline = time.monotonic() + SECONDS
    folder = Path(store.root) / "runs" / name / "checkpoints"
    while True:
        found = [int(p.parent.name.rpartition("-")[2]) for p in folder.glob("step-*/_bundle.json")]
        if found and max(found) >= step:
            return
        assert time.monotonic() < deadline, f"{name}: no checkpoint of step {step}"
        time.sleep(0.05)
