"""The bill: nodes that come and go, prices, what is printed, and what MLflow keeps."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import bill, tracking
from pipelines.recipe import TrainConfig
from pipelines.storage import Store


class Clock:
    """Hours that pass as a test has it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def pass_hours(self, hours: float) -> None:
        self.seconds += hours * 3600


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types of the nodes that there are."""
    nodes: list[str] = []
    monkeypatch.setattr(bill, "_alive", lambda: list(nodes))
    return nodes


def test_nodes_count_while_they_are_there(alive: list[str]) -> None:
    clock = Clock()
    meter = bill.Meter(clock)
    clock.pass_hours(0.5)  # the job reads its inputs before it joins the cluster
    alive += ["head"]
    meter.look()
    alive += ["gpu", "gpu"]
    clock.pass_hours(1)
    meter.look()
    alive.remove("gpu")  # a spot machine is taken back
    clock.pass_hours(2)
    meter.look()
    alive.remove("gpu")
    clock.pass_hours(0.25)
    assert meter.hours() == pytest.approx({"gpu": 4.0, "head": 3.75})


def test_a_ray_that_does_not_answer_is_asked_again(
    alive: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    meter = bill.Meter(clock)
    with monkeypatch.context() as patch:
        patch.setattr(bill, "_alive", lambda: 1 / 0)
        clock.pass_hours(1)
        meter.look()
    alive += ["cpu"]
    clock.pass_hours(1)
    assert meter.hours() == pytest.approx({"cpu": 2.0})


def test_without_ray_it_is_this_machine(alive: list[str]) -> None:
    clock = Clock()
    meter = bill.Meter(clock)
    clock.pass_hours(3)
    assert meter.hours() == pytest.approx({"machine": 3.0})


def test_ray_says_what_is_alive(ray_session: None) -> None:
    assert bill._alive() == ["machine"]


def test_kuberays_head_is_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    groups = ["headgroup", "cpu", "cpu", ""]
    nodes = [{"Alive": True, "Labels": {"ray.io/node-group": group}} for group in groups]
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [*nodes, {"Alive": False, "Labels": {}}])
    assert bill._alive() == ["head", "cpu", "cpu", "machine"]


@pytest.mark.parametrize("written", ["head=0.5 gpu=10", "head=0.5,gpu=10", " head=0.5,  gpu=10 "])
def test_what_has_a_price_costs(written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bill.PRICES, written)
    assert bill.cost({"head": 2, "gpu": 3}, bill.prices()) == pytest.approx(31)
    said = bill.sentence({"gpu": 3, "head": 2}, bill.prices())
    assert said == "node-hours: gpu 3.000, head 2.000; cost: 31.00"


def test_what_has_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bill.PRICES, "head=0.5")
    assert bill.cost({"head": 2, "cpu": 3}, bill.prices()) is None
    said = bill.sentence({"cpu": 3, "head": 2}, bill.prices())
    assert "unknown" in said and said.endswith("no price of cpu")


def test_a_wrong_price_ends_the_job_before_it_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(bill.PRICES, "gpu=much")
    with pytest.raises(SystemExit), bill.printed():
        pytest.fail("the job began")
    assert "gpu=much" in capsys.readouterr().err


def test_a_job_that_fails_says_its_bill_too(
    alive: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    alive += ["head"]
    with pytest.raises(RuntimeError), bill.printed():
        raise RuntimeError
    assert "node-hours: head" in capsys.readouterr().out


def test_a_training_adds_up_over_its_starts_in_mlflow(
    alive: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv(bill.PRICES, "gpu=10 head=1")
    handle = tracking.start_run(Store(tmp_path), "run", {})
    bill.track(handle, {"gpu": 2.0, "head": 1.0})
    bill.track(handle, {"gpu": 1.0})
    metrics = tracking.client(handle.uri).get_run(handle.run_id).data.metrics
    wanted = {"bill/node_hours_gpu": 3, "bill/node_hours_head": 1, "bill/cost": 31}
    assert metrics == pytest.approx(wanted)
    alive += ["gpu"]
    with bill.of_training(handle, TrainConfig(price_per_hour=36e6, workers=2)):
        pass
    assert "workers: 2 for 0.000 hours; cost: " in capsys.readouterr().out
    metrics = tracking.client(handle.uri).get_run(handle.run_id).data.metrics
    assert metrics["bill/node_hours_gpu"] > 3


def test_a_server_that_is_away_harms_no_job(
    alive: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = tracking.RunHandle(f"sqlite:///{tmp_path}/none/mlflow.db", "0", "0")
    bill.track(gone, {"head": 1.0})
    assert any(record.name == "pipelines.bill" for record in caplog.records)
