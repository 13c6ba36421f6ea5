"""Configuration: presets, YAML and command line, and what is said of a wrong one."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import dacite
import pytest
import yaml

from pipelines import config
from pipelines.lineage import fingerprint


@dataclass(frozen=True)
class Rates:
    """Learning rates."""

    peak: float = 1e-3
    """Highest learning rate, in furlongs."""
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.floor > self.peak:
            raise ValueError(f"rates.floor: {self.floor} is above peak {self.peak}")


@dataclass(frozen=True)
class Job:
    """A job."""

    store: str = "store"
    names: tuple[str, ...] = ("a",)
    """Names of things."""
    steps: int = 10
    fast: bool = False
    span: tuple[float, float] = (0.2, 1.0)
    kind: Literal["round", "square"] = "round"
    limit: float | None = None
    rates: Rates = field(default_factory=Rates)


PRESETS = {"small": Job(), "large": Job(steps=1000, rates=Rates(peak=0.5))}


def read(*args: str) -> Job:
    return config.cli(PRESETS, description="Does a job.", args=args)


def written(folder: Path, text: str) -> str:
    (folder / "my.yaml").write_text(text)
    return str(folder / "my.yaml")


def refused(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What is printed of wrong arguments; the exit code must be 2."""
    with pytest.raises(SystemExit) as stopped:
        read(*args)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


# -- precedence ----------------------------------------------------------------------------------


def test_the_first_preset_is_the_default() -> None:
    assert read() == PRESETS["small"]
    assert read("--preset", "large") == PRESETS["large"]


def test_yaml_lies_over_the_preset_and_the_command_line_over_both(tmp_path: Path) -> None:
    file = written(tmp_path, "steps: 7\nrates:\n  floor: 0.25\nnames: [x, y]\n")
    job = read("--preset", "large", "--config", file, "--steps", "8", "--rates.floor", "0.125")
    assert job == Job(steps=8, names=("x", "y"), rates=Rates(peak=0.5, floor=0.125))
    assert read("--config", file, "--preset", "large").rates == Rates(peak=0.5, floor=0.25)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert read("--config", written(tmp_path, "# nothing\n")) == PRESETS["small"]


# -- mistakes ------------------------------------------------------------------------------------


def test_an_unknown_preset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(capsys, "--preset", "huge")
    assert error == "error: --preset huge: unknown; one of small, large\n"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("stesp: 7", "stesp"),
        ("rates: {peek: 1}", "peek"),
        ("steps: many", "steps"),
        ("steps: 2.5", "steps"),
        ("steps: true", "steps"),
        ("steps: null", "steps"),
        ("fast: 1", "fast"),
        ("store: 3", "store"),
        ("rates: {peak: true}", "rates.peak"),
        ("rates: {peak: fast}", "rates.peak"),
        ("rates: {peak: null}", "rates.peak"),
        ("rates: 1", "rates"),
        ("names: cc3m", "names"),
        ("names: null", "names"),
        ("names: [a, 1]", "names"),
        ("span: [0.1]", "span"),
        ("span: [0.1, 0.2, 0.3]", "span"),
        ("span: [true, 1.0]", "span"),
        ("span: {a: 1}", "span"),
        ("limit: true", "limit"),
        ("limit: high", "limit"),
        ("kind: oval", "kind"),
        ("rates: {floor: 2.0}", "rates.floor"),
    ],
)
def test_a_wrong_file_is_refused_by_its_name_and_field(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, field: str
) -> None:
    file = written(tmp_path, text)
    error = refused(capsys, "--config", file)
    assert error.startswith(f"error: --config {file}: ")
    assert field in error.removeprefix(f"error: --config {file}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["steps: [1", "- a\n- b", "words"])
def test_a_file_that_is_no_mapping_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    file = written(tmp_path, text)
    assert refused(capsys, "--config", file).startswith(f"error: --config {file}: ")


def test_a_missing_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "absent.yaml")
    assert f"--config {file}: " in refused(capsys, "--config", file)


@pytest.mark.parametrize(
    ("args", "field"),
    [
        (["--stesp", "7"], "--stesp"),
        (["--steps", "many"], "--steps"),
        (["--steps", "2.5"], "--steps"),
        (["--kind", "oval"], "--kind"),
        (["--span", "0.1"], "--span"),
        (["--rates.floor", "2"], "rates.floor"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], args: list[str], field: str
) -> None:
    assert field in refused(capsys, *args)


# -- what is printed -----------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        read(*args)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_a_printed_configuration_can_be_read_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["--preset", "large", "--steps", "8", "--names", "x", "y", "--rates.peak", "1e-05"]
    text = printed(capsys, *args, "--print-config")
    assert yaml.safe_load(text) == config.to_dict(read(*args))
    assert read("--config", written(tmp_path, text)) == read(*args)


def test_help_explains_fields_and_presets(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--help")
    assert "Does a job." in text
    assert "Highest learning rate, in furlongs." in text
    assert "small, large" in text


@pytest.mark.parametrize(
    "job",
    [
        "ingest",
        "tokenize_corpus",
        "train_text_tokenizer",
        "pretrain",
        "train_image_tokenizer",
        "import_weights",
        "check_tokenizer",
    ],
)
def test_presets_of_the_jobs_survive_yaml(job: str) -> None:
    presets = importlib.import_module(f"pipelines.{job}").PRESETS
    for preset in presets.values():
        text = yaml.safe_dump(config.to_dict(preset), sort_keys=False)
        assert config.from_dict(type(preset), yaml.safe_load(text)) == preset


# -- parts ---------------------------------------------------------------------------------------


def test_from_dict_takes_what_means_the_same() -> None:
    job = config.from_dict(
        Job, {"names": ["x"], "span": [0, 1], "limit": 3, "rates": {"peak": 1, "floor": 0.5}}
    )
    assert job == Job(names=("x",), span=(0.0, 1.0), limit=3.0, rates=Rates(1.0, 0.5))
    assert isinstance(job.rates.peak, float)
    assert isinstance(job.limit, float)
    assert isinstance(job.span, tuple)
    assert config.from_dict(Job, {"names": []}).names == ()


@pytest.mark.parametrize(
    "raw",
    [{"rates": {"peak": True}}, {"steps": True}, {"steps": 1.0}, {"names": "cc3m"}, {"extra": 1}],
)
def test_from_dict_refuses_the_rest(raw: dict[str, Any]) -> None:
    with pytest.raises(dacite.DaciteError):
        config.from_dict(Job, raw)


def test_merge_goes_into_nested_mappings_only() -> None:
    base = {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}
    over = {"b": {"c": 5}, "e": [9], "f": 7}
    assert config.merge(base, over) == {"a": 1, "b": {"c": 5, "d": 3}, "e": [9], "f": 7}
    assert base == {"a": 1, "b": {"c": 2, "d": 3}, "e": [1, 2]}
    assert config.merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_flatten_names_values_with_dots() -> None:
    assert config.flatten(Job(limit=1.5)) == {
        "store": "store",
        "names": ["a"],
        "steps": 10,
        "fast": False,
        "span": [0.2, 1.0],
        "kind": "round",
        "limit": 1.5,
        "rates.peak": 1e-3,
        "rates.floor": 0.0,
    }
    assert config.flatten({"a": {"b": {"c": 1}}}) == {"a.b.c": 1}


def test_dotted_names_become_nested_again() -> None:
    nested = {"a": 1, "b": {"c": [2, 3], "d": {"e": "f"}}}
    assert config.unflatten(config.flatten(nested)) == nested
    assert config.unflatten({}) == {}


# -- what decides a result -------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    flip: float = 0.5
    jitter: float = config.later(0.0)


@dataclass(frozen=True)
class Training:
    store: str = config.indifferent("store", noted="")
    threads: int = config.indifferent(2)
    steps: int = 10
    names: tuple[str, ...] = ("a",)
    precision: str = config.later("fp32")
    view: View = field(default_factory=View)


def test_fields_that_don_t_decide_are_left_out_or_noted_alike() -> None:
    plain = {"store": "", "steps": 10, "names": ["a"], "view": {"flip": 0.5}}
    assert config.decisive(Training()) == plain
    assert config.decisive(Training(store="s3://bucket", threads=9)) == plain
    assert config.decisive(Training(steps=9)) == {**plain, "steps": 9}


def test_fields_that_were_added_later_count_once_they_are_used() -> None:
    plain = config.decisive(Training())
    jittered = Training(precision="bf16", view=View(jitter=0.4))
    assert config.decisive(jittered) == {
        **plain, "precision": "bf16", "view": {"flip": 0.5, "jitter": 0.4},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("job", "preset", "expected"),
    [
        ("pipelines.ingest", "web", "011902c8ce2b8acb"),
        ("pipelines.train_text_tokenizer", "released", "f8018d3ace3b84aa"),
        ("pipelines.contrast", "base", "a1a8939c0cf27eb2"),
        ("pipelines.train_image_tokenizer", "base", "93f648e42b0ff659"),
        ("pipelines.tokenize_corpus", "default", "4f91e070b7075531"),
        ("pipelines.pretrain", "giant", "9f4917e99baa85ff"),
        ("pipelines.finetune", "base-vqa", "ad4343dd4a1c3743"),
        ("pipelines.evaluate", "cpu", "dd3b89d33b50be72"),
        ("tuning.sweep", "gpu", "583aabb3b9c972d6"),
    ],
)
def test_results_that_are_there_are_still_found(job: str, preset: str, expected: str) -> None:
    """If this fails, a field is gone, moved or noted otherwise, or a new one lacks `indifferent` or
    `later`: what users made would be taken for something else."""
    chosen = importlib.import_module(job).PRESETS[preset]
    found = list(declared(chosen))
    assert fingerprint("fields", found if job.endswith("evaluate") else sorted(found)) == expected


def declared(chosen: Any, prefix: str = "") -> Iterator[str]:
    """Each field that a fingerprint has, and how."""
    for one in fields(chosen):
        value, name = getattr(chosen, one.name), f"{prefix}{one.name}"
        if "noted" in one.metadata:
            if one.metadata["noted"] is not config.LEFT_OUT:
                yield f"{name} noted as {one.metadata['noted']!r}"
        elif is_dataclass(value):
            yield from declared(value, f"{name}.")
        else:
            yield f"{name}{' later' if 'later' in one.metadata else ''}"
