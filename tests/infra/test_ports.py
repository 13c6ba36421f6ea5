"""A port scan of all that a job starts on one machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ports
import psutil
import pytest
from ports import Socket, family, listening
from ray import cloudpickle


def test_loopback_is_told_from_the_rest() -> None:
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1"):
        assert Socket(address, 1, "").on_loopback
    for address in ("0.0.0.0", "::", "::ffff:192.0.2.2", "192.0.2.2", "fe80::1"):
        assert not Socket(address, 1, "").on_loopback


@pytest.mark.slow
def test_on_one_machine_nothing_listens_off_loopback(ray_session: None, tmp_path: Path) -> None:
    """Ray, its workers, a training's process group, and the mock of S3."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.process_group import GroupConfig

    for module in (ports, sys.modules[__name__]):  # workers can't import these
        cloudpickle.register_pickle_by_value(module)
    TorchTrainer(
        _scan_itself,
        train_loop_config={"folder": str(tmp_path)},
        torch_config=GroupConfig("gloo"),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    ranks = {rank: json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)}
    of_ranks = [Socket(**one) for rank in ranks.values() for one in rank["sockets"]]
    assert {"127.0.0.1"} == {rank["master"][0] for rank in ranks.values()}
    assert int(ranks[0]["master"][1]) in {socket.port for socket in of_ranks}
    of_all = listening(family(psutil.Process()))
    assert any("raylet" in socket.program for socket in of_all)
    assert [socket for socket in of_ranks + of_all if not socket.on_loopback] == []


def _scan_itself(config: dict[str, Any]) -> None:
    """In a worker: note what it listens at while the group is there."""
    import os

    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size() == 2
    sockets = [asdict(socket) for socket in listening([psutil.Process()])]
    master = [os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]]
    file = Path(config["folder"]) / f"{dist.get_rank()}.json"
    file.write_text(json.dumps({"sockets": sockets, "master": master}))
    dist.barrier()


def test_a_ray_that_stays_up_can_be_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """What docs/cluster.md tells to set before `ray start` is what Ray reads."""
    import importlib

    from ray._private import ray_constants, services

    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        assert not importlib.reload(ray_constants).ENABLE_RAY_CLUSTER
        assert services.get_localhost_ip() == "127.0.0.1"
    finally:
        monkeypatch.undo()
        importlib.reload(ray_constants)
