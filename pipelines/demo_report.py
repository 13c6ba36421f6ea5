"""Writes the demo's report from what each stage left in the store and in MLflow."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from beit3 import tasks, weights
from beit3.objectives import MaskedDataModelling
from beit3.tasks import Example
from beit3.tasks.retrieval import unpack
from beit3.transforms import apply_view, decode
from pipelines import (
    bundles,
    console,
    demo_stages,
    lineage,
    models,
    report,
    run_logger,
    tracking,
)
from pipelines import report_content as page
from pipelines.baselines import blind
from pipelines.demo import DemoConfig
from pipelines.masked_batches import held_out_batches
from pipelines.pictures import to_image
from pipelines.storage import Store
from pipelines.tokenize_corpus import stored_view
from pipelines.tokenizers import load_image_tokenizer, load_text_tokenizer

MAIN_METRICS = {
    "vqa": [("accuracy", "VQA accuracy", True)],
    "retrieval": [
        ("text_recall_1", "text recall@1", True),
        ("text_recall_5", "text recall@5", True),
        ("image_recall_1", "image recall@1", True),
        ("image_recall_5", "image recall@5", True),
    ],
    "captioning": [("cider", "CIDEr", False), ("bleu_4", "BLEU-4", True)],
}
SHOWN = 8


def write(cfg: DemoConfig, store: Store, seconds: dict[str, float]) -> Path:
    """Write `report.html` below the demo's root, and log page and pictures to MLflow."""
    content = gather(cfg, store, seconds)
    path = report.write(content, cfg.root / "report.html")
    handle = tracking.start_run(store, "report", {"root": cfg.root}, key="runs/report")
    with run_logger.Logger(handle) as logger:
        for score in content.headline.scores:
            name = f"{score.task}/{score.metric}".replace("@", "_at_").replace(" ", "_")
            for column in ("blind", "scratch", "pretrained"):
                logger.metrics(0, {f"{name}/{column}": getattr(score, column)})
        report.to_mlflow(content, logger)
        logger.close()
    tracking.finish_run(handle)
    return path


def show(store: Store, path: Path) -> None:
    """Print the score table and where to find the results."""
    console.say("")
    console.say(f"{'task':<12} {'metric':<16} {'blind':>8} {'scratch':>8} {'pretrained':>11}")
    for score in scores(store):
        values = (score.blind, score.scratch, score.pretrained)
        shown = [_shown(value, percent=score.percent) for value in values]
        console.say(
            f"{score.task:<12} {score.metric:<16} {shown[0]:>8} {shown[1]:>8} {shown[2]:>11}"
        )
    console.say("")
    console.say(f"report:  {path.absolute()}")
    for place in _where(store):
        console.say(f"{place.label + ':':<8} {place.what}")


def _shown(value: float | None, *, percent: bool) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}%" if percent else f"{value:.3f}"


def gather(cfg: DemoConfig, store: Store, seconds: dict[str, float]) -> page.Report:
    """Everything that the page shows."""
    version = lineage.code_version()
    model, _ = _model(store)
    parameters = sum(p.numel() for p in model.backbone.parameters())
    names = [f"images/{n}" for n in (*demo_stages.PAIRS, *demo_stages.IMAGES)]
    return page.Report(
        headline=page.Headline(
            title="BEiT-3, from URL lists to answers",
            summary=(
                "A small drawn world, published in the formats of the real sources, was "
                "downloaded, tokenized, pretrained on, and used for three tasks. Every score is "
                "on pictures that no stage was trained on."
            ),
            date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
            code_version=version["beit3-ray"]
            + (f" ({version['git'][:10]})" if "git" in version else ""),
            seconds=sum(v for k, v in seconds.items() if k != "total"),
            facts={"Backbone": f"{parameters / 1e6:.2f} million parameters"},
            scores=scores(store),
            note=(
                "Blind answers what the same words mostly got in training, ranks at random, or "
                "gives a random training caption. From scratch is the same architecture, data and "
                "number of finetuning steps from random weights. Pretrained, for retrieval, is "
                "the pretrained model after the contrastive stage on the same pairs, as in the "
                "paper's appendix A."
            ),
        ),
        ingestion=report.gather_ingestion(
            store, [*names, *(f"text/{n}" for n in demo_stages.TEXTS)]
        ),
        tokenizers=tokenizers(store),
        pretraining=pretraining(cfg, store),
        captions=captions(store),
        answers=[answers(store)],
        retrieval=retrieval(store),
        sweeps=[sweep(store)],
        where=_where(store),
    )


# -- scores ---------------------------------------------------------------------------------------


def scores(store: Store) -> list[page.Score]:
    """The score table: blind (without the picture), from scratch, pretrained."""
    rows = []
    for task, metrics in MAIN_METRICS.items():
        found = {
            s: store.read_json(f"scores/{task}-{s}.json")["metrics"] for s in demo_stages.STARTS
        }
        unseen = blind(store, task)
        rows += [
            page.Score(
                task=task,
                metric=title,
                blind=unseen.get(key),
                scratch=found["scratch"].get(key),
                pretrained=found["pretrained"].get(key),
                percent=percent,
            )
            for key, title, percent in metrics
        ]
    return rows


def predictions(store: Store, name: str) -> list[tuple[Example, Any]]:
    """An evaluation's examples and their predictions, in order."""
    table = store.dataset(f"predictions/{name}").read_table().to_pylist()
    return [
        (
            Example(row["example"], row["id"], json.loads(row["target"])),
            None if row["prediction"] is None else json.loads(row["prediction"]),
        )
        for row in table
    ]


def task_rows(store: Store, task: str) -> dict[str, dict[str, Any]]:
    """Rows of a task's test split, by id."""
    split = tasks.load(task).about.test_split
    return {r["id"]: r for r in store.dataset(f"tasks/{task}/{split}").read_table().to_pylist()}


# -- tokenizers and pretraining -------------------------------------------------------------------


def tokenizers(store: Store) -> page.TokenizerSection:
    """Both vocabularies, with examples of what they do to text and pictures."""
    text = load_text_tokenizer(store, "sentencepiece")
    info = bundles.info(store, "tokenizers/text/sentencepiece")
    captions = store.dataset("images/cc3m").read_table(["captions"]).slice(0, 4).to_pylist()
    lines = [row["captions"][0] for row in captions]
    image = bundles.info(store, "tokenizers/image/vqkd")
    health = image["metrics"]
    counts = word_counts(store)
    return page.TokenizerSection(
        text=page.TextTokenizer(
            vocabulary=text.vocab_size,
            examples=[(line, text.pieces.EncodeAsPieces(line)) for line in lines],
            facts={"Sentences learned from": f"{info['sentences']:,}"},
        ),
        image=page.ImageTokenizer(
            codes=image["codebook_size"],
            used=round(health["used"] * image["codebook_size"]),
            perplexity=health["perplexity"],
            dead=int(health["dead"]),
            cosine=health["cosine"],
            usage=[counts.get(str(code), 0) for code in range(image["codebook_size"])],
            maps=_code_maps(store),
            patches=_code_patches(store),
        ),
    )


def _views(store: Store, name: str, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Views of the first rows of a tokenized dataset, and their visual words `[grid, grid]`."""
    tokenizer, _ = load_image_tokenizer(store, "vqkd")
    commit = store.dataset(f"tokens/{name}").commit()
    source = store.dataset(commit.lineage["inputs"][0]["dataset"])
    found = []
    for file, origin in zip(commit.files, source.commit().files, strict=True):
        rows = pq.read_table(store.path(f"tokens/{name}", file.path), filesystem=store.fs)
        pictures = pq.read_table(store.path(source.name, origin.path), filesystem=store.fs)
        for row in rows.slice(0, count - len(found)).to_pylist():
            view = row["views"][0]
            data = pictures["image"][row["image_row"]].as_py()["bytes"]
            pixels = apply_view(decode(data), stored_view(view), tokenizer.config.image_size)
            words = np.asarray(view["words"]).reshape(tokenizer.grid, tokenizer.grid)
            found.append((pixels, words))
        if len(found) >= count:
            break
    return found


def _code_maps(store: Store) -> list[page.CodeMap]:
    return [page.CodeMap(to_image(p, 1), w.tolist()) for p, w in _views(store, "coco", SHOWN)]


def _code_patches(store: Store) -> dict[int, list[Any]]:
    """Patches of common words, from a few hundred views."""
    found: dict[int, list[Any]] = {}
    for pixels, words in _views(store, "coco", 250):
        side = pixels.shape[1] // len(words)
        for (y, x), word in np.ndenumerate(words):
            cut = pixels[:, y * side : (y + 1) * side, x * side : (x + 1) * side]
            found.setdefault(int(word), []).append(cut)
    common = sorted(found, key=lambda word: -len(found[word]))[:: max(1, len(found) // 24)][:8]
    return {
        w: [to_image(c, 4) for c in found[w][:: max(1, len(found[w]) // 8)][:8]] for w in common
    }


def pretraining(cfg: DemoConfig, store: Store) -> page.TrainingSection:
    """Curves of each objective, and masked pictures with predicted words."""
    info = bundles.info(store, "models/pretrained")
    handle = tracking.handle_of(store, "runs/pretrained")
    assert handle is not None

    def curves(kind: str, names: dict[str, str]) -> list[page.Curve]:
        keys = {f"train/{kind}/{name}": label for name, label in names.items()}
        return report.gather_curves(handle, handle.run_id, keys)

    pictures = {"image": "images alone", "pair_image": "images of pairs"}
    words = {"text": "texts alone", "pair_text": "captions of pairs"}
    common_word, common_token = baselines(store)
    label = "always the commonest"
    charts = [
        page.Chart("Loss, visual words", curves("loss", pictures)),
        page.Chart("Loss, words", curves("loss", words)),
        page.Chart(
            "Accuracy on hidden patches",
            curves("accuracy", pictures),
            baseline=common_word,
            baseline_label=label,
            percent=True,
        ),
        page.Chart(
            "Accuracy on hidden words",
            curves("accuracy", words),
            baseline=common_token,
            baseline_label=label,
            percent=True,
        ),
    ]
    measured = {
        f"Held-out {k.removeprefix('accuracy/').replace('_', ' ')} accuracy": f"{100 * v:.1f} %"
        for k, v in info["metrics"].items()
        if k.startswith("accuracy/")
    }
    return page.TrainingSection(
        charts=charts,
        masked=_masked(cfg, store),
        facts={"Steps": f"{info['steps']:,}", **measured},
        note="The pictures are of the held-out split; the model never saw them.",
    )


def baselines(store: Store) -> tuple[float, float]:
    """Accuracy of always predicting the most common visual word, or the most common text token."""
    visual = word_counts(store)
    tokens: list[int] = []
    for name in demo_stages.PAIRS:
        column = store.dataset(f"tokens/{name}").read_table(["captions"])["captions"]
        tokens += [t for row in column.to_pylist() for caption in row for t in caption[1:-1]]
    counts = np.bincount(tokens)
    return max(visual.values()) / sum(visual.values()), float(counts.max() / counts.sum())


def word_counts(store: Store) -> dict[str, int]:
    """How often each visual word occurs in the tokenized pairs."""
    commits = [store.dataset(f"tokens/{name}").commit() for name in demo_stages.PAIRS]
    counts: Counter[str] = Counter()
    for commit in commits:
        counts.update(commit.stats["words"])
    return dict(counts)


def _model(store: Store) -> tuple[MaskedDataModelling, Any]:
    with models.opened(store, "models/pretrained") as folder:
        shape, _ = weights.load_config(folder)
        model = MaskedDataModelling(shape)
        weights.load_into(model, weights.load_tensors(folder))
        return model.eval(), models.tokenizer_of(folder)


def _masked(cfg: DemoConfig, store: Store) -> list[page.MaskedExample]:
    model, tokenizer = _model(store)
    batch = held_out_batches(demo_stages.pretraining(cfg), tokenizer)(0)
    predicted, restored = model.restore(batch)
    grid = model.backbone.config.grid
    patch = model.backbone.config.patch_size
    ends = np.cumsum(batch.lengths)
    examples = []
    for i, mask in enumerate(batch.hidden_patches):
        start, end = int(ends[i]) - batch.lengths[i], int(ends[i])
        seen = _say(tokenizer, batch.text[start:end].tolist())
        spoken = _say(tokenizer, restored[start:end].tolist())
        cells = mask.view(grid, grid)
        dark = cells.numpy().repeat(patch, 0).repeat(patch, 1)
        shown = np.where(dark[None], 128, batch.images[i].numpy()).astype(np.uint8)
        words = f"{seen}  →  {spoken}" if spoken != seen else seen
        any_hidden = bool(mask.any())
        examples.append(
            page.MaskedExample(
                image=to_image(batch.images[i], 1),
                masked=to_image(shown, 1),
                predicted=predicted[i].view(grid, grid).tolist() if any_hidden else None,
                true=batch.visual_words[i].view(grid, grid).tolist() if any_hidden else None,
                hidden=cells.tolist() if any_hidden else None,
                text=words,
            )
        )
    return [e for e in examples if e.hidden][:6] + [e for e in examples if not e.hidden][:6]


def _say(tokenizer: Any, ids: list[int]) -> str:
    """A text with `▢` where a token is hidden."""
    parts: list[str] = []
    for i in ids:
        if i == tokenizer.mask_id:
            parts.append(" ▢")
        elif i > 3:
            parts.append(tokenizer.pieces.IdToPiece(i - 1).replace("▁", " "))
    return "".join(parts).strip()


# -- tasks ----------------------------------------------------------------------------------------


def captions(store: Store) -> list[page.CaptionExample]:
    rows = task_rows(store, "captioning")
    plain = {e.id: p for e, p in predictions(store, "captioning-scratch")}
    return [
        page.CaptionExample(
            image=rows[str(e.text)]["images"][0]["bytes"],
            generated=p or "",
            baseline=plain.get(e.id),
            truths=e.target[:3],
        )
        for e, p in _spread(predictions(store, "captioning-pretrained"), 12)
    ]


def answers(store: Store) -> page.AnswerSection:
    rows = task_rows(store, "vqa")
    questions = {e["id"]: e["text"] for row in rows.values() for e in row["examples"]}
    plain = {e.id: p for e, p in predictions(store, "vqa-scratch")}
    task = tasks.create("vqa", labels=(), options=None)

    def right(answer: Any, example: Example) -> bool:
        return task.score([answer], [example])["accuracy"] >= 0.5

    examples = []
    for example, answer in _spread(predictions(store, "vqa-pretrained"), 16):
        given = example.target["answers"]
        examples.append(
            page.AnswerExample(
                images=[rows[str(example.text)]["images"][0]["bytes"]],
                question=questions[example.id],
                truth=max(set(given), key=given.count),
                pretrained=str(answer),
                scratch=str(plain.get(example.id)),
                right=right(answer, example),
                scratch_right=right(plain.get(example.id), example),
            )
        )
    return page.AnswerSection("Questions answered", examples)


def retrieval(store: Store) -> page.RetrievalSection:
    rows = task_rows(store, "retrieval")
    texts = {e["id"]: e["text"] for row in rows.values() for e in row["examples"]}
    found = predictions(store, "retrieval-pretrained")
    gallery = {str(e.target): unpack(p["image"]) for e, p in found if p and p["image"]}
    names = list(gallery)
    pictures = np.stack([gallery[n] for n in names])
    spoken = [(e, unpack(p["text"])) for e, p in found if p]
    matrix = np.stack([vector for _, vector in spoken])

    images = {
        str(json.loads(row["examples"][0]["target"])): row["images"][0]["bytes"]
        for row in rows.values()
    }
    by_text = []
    for example, vector in _spread(spoken, 6):
        similar = pictures @ vector
        best = [
            page.RankedImage(images[names[i]], names[i] == str(example.target), float(similar[i]))
            for i in np.argsort(-similar)[:5]
        ]
        by_text.append((texts[example.id], best))
    by_image = []
    for place in np.linspace(0, len(names) - 1, 6).astype(int):
        similar = matrix @ pictures[place]
        best = [
            page.RankedText(
                texts[spoken[i][0].id],
                str(spoken[i][0].target) == names[place],
                float(similar[i]),
            )
            for i in np.argsort(-similar)[:5]
        ]
        by_image.append((images[names[place]], best))
    return page.RetrievalSection(by_text, by_image)


def sweep(store: Store) -> page.SweepSection:
    table = store.read_json("sweeps/retrieval.json")
    return page.SweepSection(
        "Sweep of retrieval finetuning",
        table["metric"].replace("_", " "),
        [
            page.Trial(row["parameters"], row["score"], row["steps"], row["status"])
            for row in table["trials"]
        ],
        note="Scores are on the validation split; poor trials were stopped early (ASHA).",
    )


def _spread(items: list[Any], count: int) -> list[Any]:
    """At most `count` items spread evenly over a list, always the same ones."""
    step = max(1, len(items) // count)
    return items[::step][:count]


def _where(store: Store) -> list[page.Where]:
    uri = tracking.tracking_uri(store)
    look = uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"
    return [
        page.Where("MLflow", look),
        page.Where("the sweep's trials, step by step", f"{store.uri}/sweeps/retrieval.html"),
        page.Where("store", store.uri),
    ]
