"""Ablations: what each row changes, what is trained once, and the tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from beit3 import tasks
from beit3.masking import Masking
from pipelines import bundles, config, demo_stages, finetune, tracking
from pipelines.demo import DemoConfig
from pipelines.pretrain_config import PRESETS as PRETRAINING
from pipelines.sample_world import serve
from pipelines.storage import Store, StoreError
from tuning import ablate, ablations, compare, downstream
from tuning.ablate import AblateConfig, Speeds
from tuning.ablations import ABLATIONS, DEFAULT, VARIANTS
from tuning.compare import CompareConfig
from tuning.downstream import TasksConfig

ALL = {"image", "text", "pair_image", "pair_text"}
# What each variant leaves on, apart from what is no objective.
ON = {
    "mono": {"image", "text"},
    "multi": {"pair_image", "pair_text"},
    "no-text": {"image", "pair_image"},
    "mono-text": ALL - {"pair_text"},
    "multi-text": ALL - {"text"},
    "no-image": {"text", "pair_text"},
    "mono-image": ALL - {"pair_image"},
    "multi-image": ALL - {"image"},
}
TINY = ablate.PRESETS["tiny"]


# -- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["tiny", "gpu"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_its_own_option_and_nothing_else(name: str, preset: str) -> None:
    base = ablate.PRESETS[preset].pretrain
    found = ablations.variant(base, name)
    on = {kind for kind in ALL if getattr(found.objectives, kind)}
    assert on == ON.get(name, ALL)
    assert found.model.multiway == (name != "standard")
    assert found.masking.pairs == ("joint" if name == "joint" else "separate")
    assert found.objectives.image_target == ("pixels" if name == "pixels" else "codes")
    flat, before = config.flatten(found), config.flatten(base)
    changed = {key for key in flat if flat[key] != before[key]}
    allowed = {
        "standard": {"model.multiway", "model.vl_layers", "model.attention"},
        "joint": {"masking.pairs"},
    }
    assert bool(changed) == (name != DEFAULT)
    assert all(
        key in allowed.get(name, ()) or (key.startswith("objectives.") and name not in allowed)
        for key in changed
    )


def test_every_configuration_of_the_tables_is_trained_once() -> None:
    used = [row.variant for ablation in ABLATIONS for row in ablation.rows if row.variant]
    assert set(used) == set(VARIANTS)
    assert used.count(DEFAULT) == len(ABLATIONS) == 6
    assert all(used.count(name) == 1 for name in VARIANTS if name != DEFAULT)
    chosen = [json.dumps(config.to_dict(ablations.variant(TINY.pretrain, n))) for n in VARIANTS]
    assert len(set(chosen)) == len(VARIANTS)
    # The last row of each ablation is the paper's final model, everywhere with the same numbers.
    finals = {ablation.rows[-1] for ablation in ABLATIONS}
    assert {(row.variant, row.paper) for row in finals} == {(DEFAULT, (76.8, 81.4, 84.4))}


def test_seeds_differ_in_their_seed_and_name_alone() -> None:
    first, second = (config.flatten(ablate.pretraining(TINY, "joint", seed)) for seed in (0, 1))
    assert {key for key in first if first[key] != second[key]} == {"name", "train.seed"}
    assert first["name"] == "ablation/joint/0"
    tuned = [
        downstream.finetuning(TINY.tasks, "s", "vqa", init="models/x", name="n", seed=seed)
        for seed in (0, 1)
    ]
    assert tuned[0] == dataclasses.replace(
        tuned[1], train=dataclasses.replace(tuned[1].train, seed=0)
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": dataclasses.replace(PRETRAINING["tiny"].model, multiway=False, vl_layers=0)},
         "model.multiway is off"),
        ({"masking": Masking(pairs="joint")}, "masking.pairs is joint"),
        ({"images": (), "image_batch": 0}, "one of images, texts and pairs is not there"),
    ],
)  # fmt: skip
def test_a_base_that_is_no_default_is_refused(changes: dict[str, Any], said: str) -> None:
    base = dataclasses.replace(TINY.pretrain, **changes)
    with pytest.raises(ValueError, match=f"pretrain: .*{said}"):
        AblateConfig(pretrain=base)


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(ValueError, match="variants: dalle; expected some of default, standard"):
        AblateConfig(variants=("dalle",))
    with pytest.raises(ValueError, match="seeds: expected at least 1, got 0"):
        AblateConfig(seeds=0)
    with pytest.raises(ValueError, match=r"tasks\.steps: 1 for the 2 of tasks.names"):
        TasksConfig(names=("vqa", "nlvr2"), steps=(3,))
    with pytest.raises(ValueError, match=r"^inits: 1 for the 2 of tasks.names"):
        CompareConfig(inits=("models/x",), tasks=TasksConfig(names=("vqa", "nlvr2")))
    with pytest.raises(ValueError, match=r"tasks\.names: ade20k; expected some of captioning"):
        TasksConfig(names=("ade20k",))
    with pytest.raises(ValueError, match="size: 'huge' is none of tiny, base, large"):
        TasksConfig(recipe="huge")
    with pytest.raises(ValueError, match=r"speeds\.pretrain: expected 0 or more"):
        Speeds(pretrain=-1.0)


def test_tasks_have_steps_and_rates_of_their_own() -> None:
    cfg = TasksConfig(
        names=("vqa", "retrieval"), data=("vqa", "flickr30k"), steps=(100, 50),
        learning_rates=(1e-3, 2e-3),
    )  # fmt: skip
    tuned = downstream.finetuning(cfg, "s", "retrieval", init="models/x", name="n", seed=7)
    assert (tuned.train.steps, tuned.train.warmup, tuned.train.seed) == (50, 5, 7)
    assert tuned.train.learning_rate == 2e-3
    assert tuned.dataset("train") == "tasks/flickr30k/train" and tuned.eval_split == ""
    scored = downstream.evaluation(cfg, "s", "retrieval", "n")
    assert (scored.data, scored.model, scored.output) == (
        "tasks/flickr30k/test", "models/n", "n",
    )  # fmt: skip
    assert scored.in_process and not scored.track


@pytest.mark.parametrize(("size", "rate"), [("base", 1e-4), ("large", 5e-5)])
def test_flickr30k_is_finetuned_by_its_own_recipe(size: str, rate: float) -> None:
    preset = finetune.PRESETS[f"{size}-flickr30k-retrieval"]
    usual = finetune.PRESETS[f"{size}-retrieval"]
    train = dataclasses.replace(usual.train, steps=940, warmup=235, learning_rate=rate)
    assert preset.train == train
    cfg = dataclasses.replace(ablate.PRESETS["gpu"].tasks, recipe=size)
    tuned = {
        task: downstream.finetuning(cfg, "s", task, init="models/x", name="n", seed=0)
        for task in cfg.names
    }
    found = tuned["retrieval"]
    assert found.dataset("train") == "tasks/flickr30k/train"
    assert (found.train.steps, found.train.warmup, found.train.learning_rate) == (940, 235, rate)
    assert found.checkpoint_activations == usual.checkpoint_activations
    for task in ("vqa", "nlvr2"):
        assert tuned[task].train.steps == finetune.PRESETS[f"{size}-{task}"].train.steps
    coco = dataclasses.replace(cfg, data=())
    tuned_on = downstream.finetuning(coco, "s", "retrieval", init="models/x", name="n", seed=0)
    assert tuned_on.train.steps == usual.train.steps


def test_a_comparison_starts_each_task_from_its_own_weights() -> None:
    cfg = CompareConfig(
        init="models/x", inits=("", "models/y"), tasks=TasksConfig(names=("vqa", "nlvr2"))
    )
    runs = itertools.product((3,), cfg.tasks.names, compare.STARTS)
    starts = {run[1:]: compare._finetuning(cfg, run) for run in runs}
    assert {run: (c.init, c.like, c.name) for run, c in starts.items()} == {
        ("vqa", "scratch"): ("random", "models/x", "comparison/vqa-scratch/3"),
        ("vqa", "pretrained"): ("models/x", "", "comparison/vqa-pretrained/3"),
        ("nlvr2", "scratch"): ("random", "models/x", "comparison/nlvr2-scratch/3"),
        ("nlvr2", "pretrained"): ("models/y", "", "comparison/nlvr2-pretrained/3"),
    }
    alike = compare._finetuning(dataclasses.replace(cfg, inits=()), (3, "nlvr2", "pretrained"))
    assert alike.init == "models/x"


# -- tables ---------------------------------------------------------------------------------------


def scores(**accuracies: list[float]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """Scores of variants in one task, by seed."""
    return {
        name.replace("_", "-"): {"vqa": [{"accuracy": value} for value in values]}
        for name, values in accuracies.items()
    }


def test_tables_have_the_papers_rows() -> None:
    text = ablate.tables(scores(default=[0.5, 0.54], joint=[0.3, 0.33]), ["vqa"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["", "VQA accuracy", "paper: VQA"] in lines
    assert ["joint", "31.5 ± 2.1", "75.7"] in lines
    assert lines.count(["both", "52.0 ± 2.8", "76.8"]) == 3
    assert ["DALL-E's tokenizer", "–", "73.2"] in lines
    assert ["masking of pairs: joint", "20.5 ± 0.7", "1.1", "agrees"] in lines
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert len(titles) == len(ABLATIONS) + 1


def test_a_table_of_one_seed_has_no_spread_and_no_verdict() -> None:
    text = ablate.tables(scores(default=[0.5], mono=[0.4]), ["vqa"])
    assert "| images and texts alone | 40.0 | 71.3 |" in text
    assert "| 10.0 | 5.5 | open |" in text


def test_retrieval_is_the_mean_of_both_directions() -> None:
    metrics = {"text_recall_1": 0.3, "image_recall_1": 0.2, "mean_recall": 0.9}
    assert tasks.load("retrieval").about.score_of(metrics) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("here", "paper", "limit", "said"),
    [
        ([1.0, 1.2, 0.8], 2.0, 0.9, "agrees"),
        ([1.0, 1.2, 0.8], -2.0, 0.9, "contradicts"),
        ([1.0, 1.2, 0.8], 2.0, 1.1, "open"),
        ([-1.0, -1.2], 2.0, 1.0, "contradicts"),
        ([5.0], 2.0, 0.9, "open"),
        ([5.0, 5.0], 2.0, None, "open"),
    ],
)
def test_verdicts(here: list[float], paper: float, limit: float | None, said: str) -> None:
    assert ablate.verdict(here, paper, limit) == said


def test_the_limit_of_chance_is_students() -> None:
    # Two rows of two: variances 2 and 8, pooled 5 with 2 degrees of freedom; t is 4.3027.
    assert ablate.limit([[1.0, 3.0], [1.0, 5.0], [7.0]]) == pytest.approx(4.3027 * 5**0.5, 1e-4)
    assert ablate.limit([[1.0], []]) is None


def test_a_comparison_shows_how_far_from_blind_to_ceiling() -> None:
    found = {
        "vqa": {
            "blind": {"accuracy": 0.2}, "ceiling": {"data": "x", "metrics": {"accuracy": 1.0}},
            "scratch": [{"accuracy": 0.4}, {"accuracy": 0.42}],
            "pretrained": [{"accuracy": 0.6}, {"accuracy": 0.41}],
        },
        "captioning": {
            "blind": {"cider": 0.3}, "ceiling": None,
            "scratch": [{"cider": 0.5}], "pretrained": [{"cider": 0.7}],
        },
    }  # fmt: skip
    vqa, captions = compare.table(found).splitlines()[2:]
    assert vqa == (
        "| VQA accuracy | 20.0 | 41.0 ± 1.4 | 50.5 ± 13.4 | 100.0 | 1 of 2 seeds | 38 % |"
    )
    assert captions == "| CIDEr | 30.0 | 50.0 | 70.0 | – | 1 of 1 seeds | – |"


# -- a dry run ------------------------------------------------------------------------------------


def test_a_dry_run_counts_what_is_still_to_be_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    cfg = dataclasses.replace(
        TINY, store=store.uri, seeds=2, variants=("default", "joint"),
        speeds=Speeds(pretrain=10.0, finetune=25.0),
    )  # fmt: skip
    rows = ablate.plan(cfg)
    assert [row["name"] for row in rows] == ["default", "joint"]
    assert rows[0]["pretrain_steps"] == 2000 and rows[0]["finetune_steps"] == 1500
    assert rows[0]["hours"] == pytest.approx((2000 / 10 + 1500 / 25) / 3600)
    store.write_json(f"models/ablation/joint/0/{bundles.MANIFEST}", {})
    store.write_json("scores/ablation/joint/0-vqa.json", {})
    default, joint = ablate.plan(cfg)
    assert default == rows[0]
    assert (joint["pretrain_steps"], joint["finetune_steps"]) == (1000, 1250)
    ablate.show_plan([default, joint])
    assert capsys.readouterr().out.splitlines()[-1].split()[:4] == ["in", "all", "3,000", "2,750"]
    monkeypatch.setattr("os.cpu_count", lambda: 9)
    ablate.show_plan([{**default, "hours": 3.0}, {**joint, "hours": 1.0}], cpus=2)
    assert "4 rows side by side: 1.00 hours" in capsys.readouterr().out.splitlines()[-1]


def test_predictions_of_a_model_that_is_gone_are_said_before_anything_is_trained(
    tmp_path: Path,
) -> None:
    store = Store(tmp_path)
    names = ("ablation/joint/1-vqa", "comparison/vqa-scratch/0")
    for name in names:
        dataset = store.dataset(f"predictions/{name}")
        rows = pa.table({"id": ["a"]})
        part = dataset.write_part("p", "0", rows)
        dataset.publish(
            "p", [part], schema=rows.schema, job="evaluate", inputs=[], stats={}, config={}
        )
    chosen = dataclasses.replace(TINY, store=store.uri, seeds=2, world="", speeds=Speeds(1.0, 1.0))
    pairs = dataclasses.replace(compare.PRESETS["tiny"], store=store.uri, world="")
    for job, name in (
        (partial(ablate.plan, chosen), names[0]),
        (partial(ablate.run, chosen), names[0]),
        (partial(compare.run, pairs), names[1]),
    ):
        with pytest.raises(StoreError, match=f"predictions/{name} is of a model that is gone"):
            job()
    store.write_json(f"models/{names[0]}/{bundles.MANIFEST}", {})
    assert ablate.plan(chosen)  # they are the model's own


def test_hours_of_finetuning_on_gpus_are_not_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = dataclasses.replace(
        ablate.PRESETS["gpu"], store=str(tmp_path), variants=("default",), speeds=Speeds(1.0, 0.0)
    )
    rows = ablate.plan(cfg)
    assert rows[0]["hours"] is None and rows[0]["pretrain_steps"] == 3 * 100_000
    ablate.show_plan(rows)
    assert "give --speeds.finetune" in capsys.readouterr().out


# -- side by side ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pretrain", "tasks", "cpus"),
    [
        ({}, {}, 1),
        ({"threads": 2}, {}, 2),
        ({}, {"threads": 3}, 3),
        ({"threads": 0}, {}, 0),
        ({"workers": 2}, {}, 0),
        ({}, {"workers": 2}, 0),
        ({}, {"gpus_per_worker": 1.0}, 0),
    ],
)
def test_rows_go_side_by_side_if_they_start_no_workers(
    pretrain: dict[str, Any], tasks: dict[str, Any], cpus: int
) -> None:
    train = dataclasses.replace(TINY.pretrain.train, **pretrain)
    cfg = dataclasses.replace(
        TINY,
        pretrain=dataclasses.replace(TINY.pretrain, train=train),
        tasks=dataclasses.replace(TINY.tasks, **tasks),
    )
    assert cfg.cpus == cpus


# -- all of it ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> DemoConfig:
    """The demo's data and tokenizers, small, and a pretrained model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    from pipelines import (
        contrast,
        pretrain,
        tokenize_corpus,
        train_image_tokenizer,
        train_text_tokenizer,
    )

    cfg = DemoConfig(root=tmp_path_factory.mktemp("demo"), port=port, small=True)
    world = demo_stages.make_world(cfg)
    demo_stages.prepare(cfg, world)
    with serve(world.root, port=world.port):
        demo_stages.ingest_all(cfg, world)
    train_text_tokenizer.run(demo_stages.text_tokenizer(cfg))
    contrast.run(demo_stages.teacher(cfg))
    train_image_tokenizer.run(demo_stages.image_tokenizer(cfg))
    tokenize_corpus.run(demo_stages.tokens(cfg))
    pretrain.run(
        dataclasses.replace(
            demo_stages.pretraining(cfg),
            train=dataclasses.replace(demo_stages.pretraining(cfg).train, workers=0),
        )
    )
    return cfg


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ablations_and_comparison_from_end_to_end(
    demo: DemoConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Few of each: what is drawn beside the demo's world is large.
    monkeypatch.setattr(downstream, "_MORE", {"nlvr2": 40, "imagenet1k": 16, "synsets": 4})
    store = Store(demo.store_uri)
    cfg = dataclasses.replace(
        TINY, store=store.uri, world=str(demo.root / "world"), seeds=2,
        variants=("default", "joint"),
        pretrain=dataclasses.replace(
            TINY.pretrain, image_batch=2, text_batch=2, pair_batch=4, held_out_batches=1,
            model=demo_stages.model(demo),
            train=dataclasses.replace(TINY.pretrain.train, steps=2, warmup=1),
        ),
        tasks=TasksConfig(names=("vqa", "nlvr2"), steps=(2, 2)),
    )  # fmt: skip
    measured = ablate.plan(dataclasses.replace(cfg, variants=("default",)))
    assert measured[0]["hours"] > 0
    # Killed after its first row, it goes on and trains nothing twice.
    publish = ablate.publish
    monkeypatch.setattr(ablate, "publish", _killed)
    with pytest.raises(KeyboardInterrupt):
        ablate.run(cfg)
    trained = Path(store.path("models/ablation"))
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*.safetensors")}
    done = {path.parent.relative_to(trained).as_posix() for path in before}
    assert done >= {"default/0", "default/0-vqa", "default/0-nlvr2"}
    monkeypatch.setattr(ablate, "publish", publish)
    outcome = ablate.run(cfg)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert {name: {t: len(v) for t, v in of.items()} for name, of in outcome["scores"].items()} == {
        name: {"vqa": 2, "nlvr2": 2} for name in ("default", "joint")
    }
    assert store.read_json("ablations/ablation.json") == outcome
    text = store.read("ablations/ablation.md").decode()
    assert text == ablate.tables(outcome["scores"], cfg.tasks.names)
    tracker = tracking.client(tracking.tracking_uri(store))
    experiment = tracker.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    nested = tracker.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{outcome['mlflow_run']}'"
    )
    assert len(nested) == 2 * 2 * (1 + 2)  # variants, seeds, a pretraining and two finetunings

    other = dataclasses.replace(cfg, pretrain=dataclasses.replace(cfg.pretrain, pair_batch=6))
    with pytest.raises(StoreError, match="other inputs or options"):
        ablate.run(other)

    compared = compare.run(
        CompareConfig(
            store=store.uri, seeds=1, world=cfg.world,
            tasks=TasksConfig(
                names=("vqa", "nlvr2", "retrieval", "captioning", "imagenet"), steps=(2,) * 5
            ),
        )
    )  # fmt: skip
    assert store.read("comparisons/comparison.md").decode() == compare.table(compared["tasks"])
    for scores in compared["tasks"].values():
        assert len(scores["scratch"]) == len(scores["pretrained"]) == 1
        keys = set(scores["ceiling"]["metrics"]) & set(scores["blind"])
        assert keys and all(scores["ceiling"]["metrics"][k] >= scores["blind"][k] for k in keys)
    assert "| ImageNet top-1 |" in capsys.readouterr().out


def _killed(*args: Any) -> None:
    raise KeyboardInterrupt
