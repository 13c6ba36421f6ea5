"""Writes an exported model's README.md: what it is, how it was made, and how to load it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from beit3.config import ModelConfig
from pipelines import config

KINDS = {
    "pretrained": "BEiT-3, pretrained by masked data modelling on images, texts and pairs",
    "dual_encoder": "BEiT-3 as a dual encoder: images and texts in one space",
}
_OPTIONS = ("learning_rate", "warmup", "weight_decay", "betas", "clip", "layer_decay", "precision")
_OPTIONS += ("accumulate", "seed", "ema")

_LOAD = """\
from pathlib import Path

import torch

from beit3 import weights

folder = Path(".")  # where this README is
config, notes = weights.load_config(folder)
"""
_PRETRAINED = """\
from beit3.objectives import MaskedDataModelling, ObjectiveWeights

target = ObjectiveWeights(image_target=notes.get("image_target", "codes"))
model = MaskedDataModelling(config, target)
weights.load_into(model, weights.load_tensors(folder))
model.eval()

from beit3.objectives import normalise

images = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
with torch.no_grad():
    features = model.backbone(images=normalise(images)).image_summary  # [images, hidden]
"""
_DUAL = """\
from beit3.objectives import DualEncoder
from beit3.text import TextTokenizer

model = DualEncoder(config)
weights.load_into(model, weights.load_tensors(folder))
model.eval()

tokenizer = TextTokenizer.from_file(folder / "tokenizer.spm")
text = tokenizer.wrap(tokenizer.encode("two red circles"), 64)
images = torch.zeros(1, 3, config.image_size, config.image_size, dtype=torch.uint8)
with torch.no_grad():
    similarity = model.encode_images(images) @ model.encode_texts(
        torch.tensor(text), [len(text)]
    ).T
"""
_TASK = """\
import json

from beit3 import tasks

notes = json.loads((folder / "task.json").read_text())
task = tasks.create(notes["task"], labels=notes["labels"], options=notes["options"])
model = task.build(config)
weights.load_into(model, weights.load_tensors(folder))
model.eval()
"""


def write(name: str, kind: str, model: ModelConfig, info: dict[str, Any]) -> str:
    """The card of a model.

    Args:
        kind: `pretrained`, `dual_encoder`, or the task that it was finetuned for.
        info: Its bundle's info.
    """
    what = KINDS.get(kind, f"BEiT-3, finetuned for {kind}")
    sections = {
        name: [f"{what}."],
        "How to load it": ["```python", loading(kind).rstrip("\n"), "```"],
        "Model": _table(asdict(model)),
        "Training": list(_training(info)),
        **({"Sweep": list(_sweep(info["sweep"]))} if "sweep" in info else {}),
        "Data": list(_data(info)),
        "Licence": [
            "The weights come with no licence of their own: whoever publishes them says which. The "
            "sources above have terms of use that differ; `pipelines/sources/<source>.py` and "
            "`docs/data.md` of beit3-ray name them. The images and texts belong to their owners."
        ],
    }
    parts = [
        f"{'#' if title == name else '##'} {title}\n\n" + "\n".join(lines)
        for title, lines in sections.items()
    ]
    return "\n\n".join(parts) + "\n"


def loading(kind: str) -> str:
    """Python that loads a model of this kind from the folder it is run in."""
    return _LOAD + {"pretrained": _PRETRAINED, "dual_encoder": _DUAL}.get(kind, _TASK)


def _training(info: dict[str, Any]) -> Iterator[str]:
    chosen = info.get("config", {})
    options = {"steps": info.get("steps")}
    options |= {key: value for key, value in chosen.items() if key.endswith("batch")}
    options |= {key: chosen[key] for key in ("batch_size", "init") if chosen.get(key)}
    train = chosen.get("train", {})
    options |= {key: train[key] for key in _OPTIONS if key in train}
    options["code"] = " ".join(f"{k} {v}" for k, v in info.get("code", {}).items()) or None
    options["text tokenizer, SHA-256 begins"] = info.get("text_tokenizer")
    yield from _table({key: value for key, value in options.items() if value is not None})
    metrics = info.get("metrics", {})
    if not metrics:
        known = "Nothing was measured" if metrics == {} else "It is not known what was measured"
        yield f"\n{known} on held-out data."
        return
    measured = chosen.get("held_out") or chosen.get("eval_split") or "held-out data"
    when = f"After step {info['evaluated']:,}" if "evaluated" in info else "At the end"
    yield f"\n{when}, on {measured}:\n"
    yield from _table({key: f"{value:.4f}" for key, value in metrics.items()})


def _sweep(sweep: dict[str, Any]) -> Iterator[str]:
    """The trials of the sweep that this model won."""
    rows = sweep["trials"]
    yield f"The best of the {len(rows)} trials of the sweep `{sweep['name']}`:\n"
    names = list(rows[0]["parameters"])
    yield f"| trial | {' | '.join(names)} | {sweep['metric']} | steps | |"
    yield f"|---|{'---:|' * (len(names) + 2)}---|"
    for row in rows:
        values = [_short(row["parameters"][name]) for name in names]
        score = "–" if row["score"] is None else f"{row['score']:.4f}"
        yield f"| {' | '.join([row['name'], *values, score, str(row['steps']), row['status']])} |"
    if len(sweep["runs"]) > 1:
        yield "\nIts weights are of several runs, one after the other:\n"
        for run in sweep["runs"]:
            values = ", ".join(f"{name} {_short(v)}" for name, v in run["values"].items())
            yield f"- `{run['run']}` from step {run['step']}: {values}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _data(info: dict[str, Any]) -> Iterator[str]:
    if "data" not in info:
        yield "Not recorded: it was trained before bundles said so."
        return
    yield from ("| dataset | rows | commit | source | tokenizers |", "|---|---:|---|---|---|")
    for dataset in info["data"]:
        yield from _rows(dataset, 0)


def _rows(dataset: dict[str, Any], depth: int) -> Iterator[str]:
    """A dataset and, indented, what it was made from."""
    used = dataset.get("tokenizers", {}).values()
    cells = (
        "&nbsp;" * 4 * depth + dataset["dataset"],
        f"{dataset['rows']:,}" if "rows" in dataset else "no longer there",
        dataset.get("identity", ""),
        dataset.get("source", ""),
        ", ".join(f"{t['name']} {t['identity']}" for t in used),
    )
    yield f"| {' | '.join(cells)} |"
    for origin in dataset.get("from", ()):
        yield from _rows(origin, depth + 1)


def _table(values: dict[str, Any]) -> list[str]:
    flat = config.flatten(values)
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in flat.items())]
