"""Imports weights trained elsewhere: the authors' models and tokenizers, and CLIP as a teacher.

    python pipelines/import_weights.py --kind model --name released-vqa \
        --path beit3_base_patch16_480_vqa.pth --text-tokenizer released --labels answer2label.txt
    python pipelines/import_weights.py --kind image-tokenizer --name vqkd \
        --path vqkd_encoder_base_decoder_3x768x12_clip.pth
    python pipelines/import_weights.py --kind text-tokenizer --name released --path beit3.spm
    python pipelines/import_weights.py --kind teacher --name clip --path clip-vit-base-patch16

Reads local files only. Writes `models/<name>`, `tokenizers/image/<name>`, `tokenizers/text/<name>`
or `teachers/<name>`, which the other jobs use as if they were made here: a pretrained model can be
finetuned, a finetuned one evaluated and tried. Only tensors are read from pickles; errors name what
does not fit.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from beit3 import released, tasks, teachers, vqkd, vqkd_released
from beit3.tasks.imagenet import WNID
from beit3.text import TOKENIZER_FILE, TextTokenizer
from pipelines import bundles, config, console, job, models
from pipelines.finetuned import TASK_FILE, task_notes
from pipelines.lineage import fingerprint
from pipelines.storage import Store
from pipelines.tokenizers import load_text_tokenizer

FOLDERS = {
    "model": "models",
    "image-tokenizer": "tokenizers/image",
    "text-tokenizer": "tokenizers/text",
    "teacher": "teachers",
}
RELEASED_PIECES = 64_000
"""Number of pieces in the authors' beit3.spm."""


@dataclass(frozen=True)
class ImportConfig:
    """Import weights into the store."""

    kind: Literal["model", "image-tokenizer", "text-tokenizer", "teacher"]
    """The file's content: a BEiT-3 checkpoint of the authors, pretrained or finetuned; their VQ-KD
    checkpoint (or a folder that `beit3.vqkd_released` made); a SentencePiece model, such as their
    beit3.spm; or a CLIP vision tower: a folder that transformers or OpenCLIP wrote, or an OpenCLIP
    weights file."""
    path: str
    """The file or folder."""
    name: str
    """Name in the store."""
    store: str = "store"
    """Where datasets and models live: a folder or an s3:// URI."""
    text_tokenizer: str = "released"
    """Model: the tokenizer it was trained with (`tokenizers/text/<name>`); import it first."""
    labels: str = ""
    """Model: the file that names the classes of its head. For VQA the authors' answer2label.txt;
    for ImageNet a file whose lines begin with a WordNet id, such as Kaggle's
    LOC_synset_mapping.txt."""
    image_size: int = 0
    """Model or image tokenizer: side in pixels to interpolate its position embeddings for; 0: keep
    them."""
    heads: int = 0
    """Number of attention heads, if the file doesn't say and they are not 64 wide."""
    activation: Literal["", "gelu", "quick_gelu"] = ""
    """Teacher: activation of a bare OpenCLIP weights file, which doesn't say. OpenAI's models use
    quick_gelu, most others gelu."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name: say what it is to be called")


PRESETS = {"default": ImportConfig("image-tokenizer", "vqkd.pth", "vqkd")}


def run(cfg: ImportConfig) -> dict[str, Any]:
    """Import, unless it is there already; returns the bundle's info.

    Raises:
        StoreError: the name is taken by another file.
        ValueError: the file is not of this kind, or does not fit.
        FileNotFoundError: there is no such file.
    """
    path = Path(cfg.path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    store = Store(cfg.store)
    output = f"{FOLDERS[cfg.kind]}/{cfg.name}"
    options = config.to_dict(cfg) | {"store": "", "path": "", "name": "", "labels": ""}
    if cfg.kind != "model":
        del options["labels"], options["text_tokenizer"]
    sources = _checksums(path)
    if cfg.labels:
        sources |= _checksums(Path(cfg.labels))
    print_of = fingerprint("import_weights", options, [str(sources)])
    taken = "exists and comes from elsewhere: choose another --name, or delete that folder first"
    found = bundles.finished(store, output, print_of, taken)
    if found is not None:
        console.say(f"{output}: already there, skipped")
        return found
    store.check_writable()
    read = {
        "model": _model,
        "image-tokenizer": _image_tokenizer,
        "text-tokenizer": _text_tokenizer,
        "teacher": _teacher,
    }[cfg.kind]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        said, notes = read(cfg, folder)
        info = {"fingerprint": print_of, "imported": {"from": path.name, "sha256": sources}}
        bundles.save(store, output, folder, info | notes)
    console.say(f"{output}: {said}")
    return bundles.info(store, output)


def _model(cfg: ImportConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    model = released.load_released(
        Path(cfg.path), image_size=cfg.image_size or None, heads=cfg.heads or None
    )
    # Their retrieval models are dual encoders like those of the contrastive stage.
    task = "retrieval" if model.kind == "dual_encoder" else model.kind
    labels = read_labels(task, cfg.labels, model.classes)
    tokenizer = load_text_tokenizer(Store(cfg.store), cfg.text_tokenizer)
    models.check_vocabulary(tokenizer, model.config)
    released.save_folder(folder, model)
    models.add_tokenizer(folder, tokenizer)
    shape = model.config
    said = f"{model.kind}, {shape.layers} layers of {shape.hidden}, {shape.image_size} px"
    info: dict[str, Any] = {"kind": model.kind, "text_tokenizer": tokenizer.identity, "steps": 0}
    if task in tasks.names():
        notes = json.dumps(task_notes(task, labels, shape), indent=1)
        (folder / TASK_FILE).write_text(notes + "\n")
        said += f", {len(labels):,} classes" if labels else ""
        info["task"] = task
        if model.kind != "dual_encoder":
            info["kind"] = "finetuned"
    return said, info | {"metrics": {}}


def read_labels(task: str, file: str, classes: int) -> list[str]:
    """The classes of a released head, in its order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: no file is given though one is needed, or one though none is; or it names other
            classes than the head has.
    """
    if not classes:
        if file:
            raise ValueError(f"labels: a checkpoint of {task} has no classes to name")
        return []
    wanted = {
        "vqa": "the authors' answer2label.txt (microsoft/unilm, beit3, writes it as it prepares "
        "VQAv2)",
        "imagenet": "a file with a WordNet id first in each line (Kaggle's LOC_synset_mapping.txt)",
    }[task]
    if not file:
        raise ValueError(f"labels: the head has {classes:,} classes without names; give {wanted}")
    lines = [line for line in Path(file).read_text().splitlines() if line.strip()]
    try:
        found = _answers(lines) if task == "vqa" else sorted(_wordnet_id(line) for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"labels: {file} is not {wanted} ({error})") from error
    if len(set(found)) != len(found) or len(found) != classes:
        raise ValueError(
            f"labels: {file} names {len(set(found)):,} classes in {len(found):,} lines, the head "
            f"has {classes:,}"
        )
    return found


def _answers(lines: list[str]) -> list[str]:
    """The classes in answer2label.txt: per line a JSON object with `answer` and its `label`."""
    places = {}
    for line in lines:
        raw = json.loads(line)
        places[int(raw["label"])] = str(raw["answer"])
    if sorted(places) != list(range(len(lines))):
        raise ValueError(f"its labels are not 0 to {len(lines) - 1:,}")
    return [places[place] for place in range(len(lines))]


def _wordnet_id(line: str) -> str:
    word = line.split()[0]
    if not WNID.fullmatch(word):
        raise ValueError(f"{word!r} is no WordNet id such as n01440764")
    return word


def _image_tokenizer(cfg: ImportConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    path = Path(cfg.path)
    if path.is_dir():
        if cfg.image_size or cfg.heads:
            raise ValueError("image_size, heads: belong to a released file, not to a folder")
        model = vqkd.load(path)
        shape, tensors = model.config, model.state_dict()
    else:
        shape, tensors = vqkd_released.load_released(
            path, image_size=cfg.image_size or None, heads=cfg.heads or None
        )
    vqkd.save_tensors(folder, tensors, shape)
    grid = shape.image_size // shape.patch_size
    said = f"{shape.codebook_size:,} codes, {grid}x{grid} patches at {shape.image_size} pixels"
    # The same info as a trained one has, but nothing is known of its training.
    unknown = {"steps": 0, "metrics": {}, "teacher": "", "images": [], "health": None}
    return said, {"codebook_size": shape.codebook_size, **unknown}


def _text_tokenizer(cfg: ImportConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    tokenizer = TextTokenizer.from_file(cfg.path)
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)
    pieces = tokenizer.vocab_size - 2
    said = f"{pieces:,} pieces, {tokenizer.vocab_size:,} ids, <mask> is {tokenizer.mask_id}"
    if pieces != RELEASED_PIECES:
        said += f" (the authors' beit3.spm has {RELEASED_PIECES:,} pieces)"
    return said, {
        "identity": tokenizer.identity,
        "vocab_size": tokenizer.vocab_size,
        "sentences": 0,
        "inputs": {},
    }


def _teacher(cfg: ImportConfig, folder: Path) -> tuple[str, dict[str, Any]]:
    shape, tensors = teachers.read_clip(
        Path(cfg.path), activation=cfg.activation or None, heads=cfg.heads or None
    )
    teachers.save_clip(folder, shape, tensors)
    grid = shape.image_size // shape.patch_size
    said = (
        f"a CLIP of {shape.layers} layers, {grid}x{grid} patches at {shape.image_size} pixels, "
        f"{shape.dim} features"
    )
    return said, {"kind": "clip", "dim": shape.dim}


def _checksums(path: Path) -> dict[str, str]:
    """SHA-256 of the file, or of each file of the folder."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    sums = {}
    for file in files:
        with file.open("rb") as opened:
            sums[file.name] = hashlib.file_digest(opened, "sha256").hexdigest()
    return sums


def main() -> None:
    job.main(PRESETS, __doc__, run, billed=False)


if __name__ == "__main__":
    main()
