"""The demo, small: every job after the other, run again, and killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipelines import demo, demo_stages, tracking
from pipelines.storage import Store

SECONDS = 600  # for one run, on a busy machine
DATASETS = (
    *(f"images/{name}" for name in (*demo_stages.PAIRS, *demo_stages.IMAGES)),
    *(f"text/{name}" for name in demo_stages.TEXTS),
    *(f"tokens/{n}" for n in (*demo_stages.PAIRS, *demo_stages.IMAGES, *demo_stages.TEXTS)),
    f"tokens/{demo_stages.HELD_OUT}",
    *(f"tasks/{task}/{split}" for task in demo_stages.TASKS for split in ("train", "val")),
)
PREDICTIONS = tuple(f"{t}-{s}" for t in demo_stages.TASKS for s in demo_stages.STARTS)
STAGES = (
    "sample world", "Ray and the tasks' data", "ingestion", "text tokenizer",
    "teacher (contrastive)", "image tokenizer (VQ-KD)", "tokens", "pretraining",
    "contrastive stage, for retrieval", "finetuning and evaluation", "sweep", "report",
)  # fmt: skip

pytestmark = pytest.mark.timeout(4 * SECONDS)


@dataclass
class Demo:
    """A demo's folder, its port, and what the last run of it said."""

    root: Path
    port: int
    output: str = ""
    bucket: str = ""
    """Another store than the folder's, `s3://bucket/prefix`."""

    @property
    def store(self) -> Store:
        return Store(self.bucket or self.root / "store")

    def start(self, log: Path) -> tuple[subprocess.Popen[bytes], str]:
        """The running demo in a process group of its own, and a mark that its processes bear."""
        mark = uuid.uuid4().hex
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
        environment |= {"PYTHONWARNINGS": "ignore", "BEIT3_TEST_MARK": mark}
        command = [
            sys.executable, demo.__file__, "--small", "--root", str(self.root), "--port",
            str(self.port),
        ]  # fmt: skip
        command += ["--store", self.bucket] if self.bucket else []
        with log.open("wb") as sink:
            process = subprocess.Popen(
                command, stdout=sink, stderr=sink, start_new_session=True, env=environment
            )
        return process, mark

    def run(self) -> Demo:
        """Run to the end, which must be good."""
        log = self.root.with_suffix(".log")
        process, mark = self.start(log)
        try:
            code = process.wait(SECONDS)
        finally:
            end(process, mark)
        self.output = log.read_text()
        assert code == 0, self.output[-4000:]
        return self

    def killed_when(self, reached: Callable[[], bool]) -> None:
        """Start, and kill every process at once when a condition holds."""
        process, mark = self.start(self.root.with_suffix(".log"))
        deadline = time.monotonic() + SECONDS
        try:
            while not reached():
                log = self.root.with_suffix(".log").read_text()
                assert process.poll() is None, f"it ended before: {log[-2000:]}"
                assert time.monotonic() < deadline, log[-2000:]
                time.sleep(0.005)
        finally:
            end(process, mark)


def end(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a demo's process group, and those of its processes that left the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while left := list(marked(mark)):
        assert time.monotonic() < deadline
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def marked(mark: str) -> Iterator[int]:
    """Living processes with this mark in their environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                if mark.encode() in (folder / "environ").read_bytes():
                    yield int(folder.name)


@pytest.fixture(scope="module")
def port() -> int:
    """A free port: it stands in every URL, so every demo of these tests has the same."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def whole(port: int, tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A demo that nothing disturbed."""
    return Demo(tmp_path_factory.mktemp("demo") / "whole", port).run()


class Page(HTMLParser):
    """Elements of a page: the ids of sections, headings, and what would be loaded from where."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.policies: list[str] = []
        self.cells: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id" and tag == "section":
                self.ids.append(value or "")
            if name == "content":
                self.policies.append(value or "")
            if name in {"src", "href", "srcset", "data", "action", "poster"}:
                self.loaded.append(value or "")

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


# -- a run ----------------------------------------------------------------------------------------


def test_every_stage_runs_once_and_says_its_time(whole: Demo) -> None:
    titles = re.findall(r"^== (?:\d+/12 )?(.+)$", whole.output, re.M)
    assert titles == ["setting out", *STAGES]
    seconds = json.loads((whole.root / "stages.json").read_text())
    assert len(seconds) == len(STAGES) + 2  # with "setting out", and the total
    assert all(value > 0 for value in seconds.values())
    assert seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], rel=0.05)
    assert "Traceback" not in whole.output


def test_every_dataset_and_model_is_there(whole: Demo) -> None:
    store = whole.store
    for name in DATASETS:
        assert store.dataset(name).commit().rows > 0, name
    models = {f"{task}-{start}" for task in demo_stages.TASKS for start in demo_stages.STARTS}
    assert models | {"teacher", "pretrained", "aligned"} <= set(store.list("models"))
    held = store.dataset("images/coco").commit().stats["set_aside"]
    assert any(reason.startswith("held out") for reason in held)


def test_the_score_table_is_printed(whole: Demo) -> None:
    lines = whole.output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("task "))
    assert lines[start].split() == ["task", "metric", "blind", "scratch", "pretrained"]
    rows = [re.split(r"\s{2,}", line) for line in lines[start + 1 : start + 8]]
    found = {(row[0].split()[0], value) for row in rows for value in row[-3:]}
    assert {task for task, _ in found} == set(demo_stages.TASKS)
    assert all(re.fullmatch(r"\d+\.\d+%?", value) for _, value in found), rows
    path = whole.root / "report.html"
    assert f"report:  {path.absolute()}" in whole.output
    assert f"mlflow ui --backend-store-uri sqlite:///{whole.root}/store/mlflow.db" in whole.output


def test_the_report_has_every_section_and_loads_nothing(whole: Demo) -> None:
    text = (whole.root / "report.html").read_text()
    page = Page(text)
    assert page.ids == [
        "scores", "ingestion", "tokenizers", "pretraining", "captions", "answers-1", "retrieval",
        "sweep-1", "where",
    ]  # fmt: skip
    assert page.tags.count("img") > 60 and page.tags.count("svg") > 4
    assert {"script", "link", "iframe", "object", "embed", "base"}.isdisjoint(page.tags)
    assert page.loaded and all(v.startswith(("data:image/", "#")) for v in page.loaded)
    assert not re.search(r"url\(|@import", text)
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page.policies
    words = " ".join(page.cells)
    for source in (*demo_stages.PAIRS, *demo_stages.IMAGES, *demo_stages.TEXTS):
        assert source in words, source
    for reason in ("http 404", "truncated image", "held out"):
        assert reason in words, reason
    assert "picture can't be read" not in text and "no values were logged" not in text


def test_mlflow_has_a_run_for_every_training(whole: Demo) -> None:
    tracker = tracking.client(tracking.tracking_uri(whole.store))
    experiment = tracker.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    runs = {r.info.run_name: r for r in tracker.search_runs([experiment.experiment_id])}
    assert {"teacher", "vqkd", "pretrained", "aligned", "report", "sweep/retrieval"} <= set(runs)
    assert {name for name in PREDICTIONS if name in runs} == set(PREDICTIONS)
    assert {f"evaluate/{name}" for name in PREDICTIONS} <= set(runs)
    nested = {name for name, run in runs.items() if "mlflow.parentRunId" in run.data.tags}
    assert len(nested) == 2 and all(str(name).startswith("retrieval/") for name in nested)
    assert {r.info.status for name, r in runs.items() if name not in nested} == {"FINISHED"}
    assert {runs[name].info.status for name in nested} <= {"FINISHED", "KILLED"}
    report = runs["report"].info.run_id
    paths = {file.path for file in tracker.list_artifacts(report, "report")}
    assert {"report/report.html", "report/captions", "report/pretraining"} <= paths


# -- another run ----------------------------------------------------------------------------------


def stamps(store: Store) -> dict[str, tuple[int, int]]:
    """Files of the store with size and time, but for those that the report's run writes."""
    root = Path(store.root)
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not name.startswith(("mlflow", "runs/report/")):
            found[name] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


@pytest.mark.slow
def test_another_run_skips_everything(whole: Demo) -> None:
    before = stamps(whole.store)
    first = whole.output
    try:
        output = whole.run().output
    finally:
        whole.output = first
    assert stamps(whole.store) == before
    skipped = {
        line.split(":")[0].strip() for line in output.splitlines() if line.endswith("skipped")
    }
    wanted = {
        "sample world", *DATASETS, "tokenizers/text/sentencepiece", "tokenizers/image/vqkd",
        "models/teacher", "models/pretrained", "models/aligned",
        *(f"models/{name}" for name in PREDICTIONS),
        *(f"scores/{name}.json" for name in PREDICTIONS), "sweeps/retrieval.json",
    }  # fmt: skip
    assert wanted <= skipped, wanted - skipped
    # Work shows a bar, or a line of its own: there was none.
    assert "step/s" not in output and "resumed" not in output

    def scores(text: str) -> list[str]:
        return text[text.index("task         metric") :].splitlines()[:8]

    assert scores(output) == scores(first)


@pytest.mark.slow
def test_in_a_bucket_it_makes_the_same(whole: Demo, s3_store: str, tmp_path: Path) -> None:
    other = Demo(tmp_path / "demo", whole.port, bucket=s3_store).run()
    assert commits(other.store) == commits(whole.store)
    files = [d.store.read_json("models/pretrained/_bundle.json")["files"] for d in (other, whole)]
    assert files[0] == files[1]  # the same weights, to the bit
    assert (other.root / "report.html").exists()
    assert {path.name for path in other.root.iterdir()} >= {"world", "report.html"}
    assert not (other.root / "store" / "models").exists()


# -- killed ---------------------------------------------------------------------------------------


def commits(store: Store) -> dict[str, Any]:
    """What each dataset is; the same for one that was made at another time."""
    names = (*DATASETS, *(f"predictions/{name}" for name in PREDICTIONS))
    found = {name: store.dataset(name).commit() for name in names}
    return {n: (c.fingerprint, c.rows, c.files, c.set_aside, c.stats) for n, c in found.items()}


@pytest.mark.slow
def test_killed_while_it_ingests(whole: Demo, port: int, tmp_path: Path) -> None:
    broken = Demo(tmp_path / "killed", port)
    second = broken.root / "store" / "images" / demo_stages.PAIRS[1]
    broken.killed_when(second.exists)
    assert not (second / "_commits").exists() or not (second.parent / "vg").exists()
    broken.run()
    done = f"images/{demo_stages.PAIRS[0]}: already there"
    assert done in broken.output and "sample world: already there" in broken.output
    assert commits(broken.store) == commits(whole.store)


@pytest.mark.slow
def test_killed_while_it_pretrains(whole: Demo, port: int, tmp_path: Path) -> None:
    broken = Demo(tmp_path / "killed", port)
    run = broken.root / "store" / "runs" / "pretrained"
    saved = run / "checkpoints" / "step-00000003" / "_bundle.json"
    broken.killed_when(saved.exists)
    broken.store.delete("models/pretrained")  # where the kill came late
    broken.run()
    assert "runs/pretrained: resumed from step 3" in broken.output
    assert commits(broken.store) == commits(whole.store)
    files = [d.store.read_json("models/pretrained/_bundle.json")["files"] for d in (broken, whole)]
    assert files[0] == files[1]  # the same weights, to the bit
