"""Tries a finetuned model on one image or a folder of images.

    python pipelines/predict.py --model models/vqa --path photo.jpg --text "what is this?"
    python pipelines/predict.py --model models/captioning --path photos/
    python pipelines/predict.py --model models/retrieval --path photos/ --text "two red circles"
    python pipelines/predict.py --model models/imagenet --path photo.jpg
    python pipelines/predict.py --model models/nlvr2 --path a.jpg --right b.jpg --text "..."

Depending on what the model was finetuned for, it answers a question, writes a caption, ranks the
images by a text, names an image's likeliest classes, or says whether a statement is true of two
images. Prints one readable line per image, or with `--json` the same as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import UnidentifiedImageError

from beit3.tasks import Example, Sample
from pipelines import job
from pipelines.finetuned import Finetuned, evaluation_image, load
from pipelines.storage import Store

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


@dataclass(frozen=True)
class PredictConfig:
    """The model to try, and the images to try it on."""

    path: str = "."
    """An image, or a folder of images (including its subfolders)."""
    model: str = "models/vqa"
    """Bundle of a finetuned model."""
    store: str = "store"
    """Where models live: a folder or an s3:// URI."""
    text: str = ""
    """The question to answer, the text to rank the images by, or the statement to judge."""
    right: str = ""
    """For a model that reads two images, such as NLVR2's: the right one; `path` is the left one."""
    top: int = 5
    """How many to show of the ranked images, or of an image's (at most 5) likeliest classes."""
    class_names: str = ""
    """For ImageNet: a file of class names, a WordNet id and a name per line, such as Kaggle's
    LOC_synset_mapping.txt, or a JSON object, such as the sample world's classes.json."""
    options: dict[str, float] = field(default_factory=dict)
    """The task's options to change, e.g. `--options beams 5`."""
    batch_size: int = 32
    device: str = "cpu"
    """Torch device: cpu, cuda."""
    json: bool = False
    """Print JSON instead of lines to read."""

    def __post_init__(self) -> None:
        if self.top < 1 or self.batch_size < 1:
            raise ValueError("top and batch_size must be at least 1")


PRESETS: dict[str, PredictConfig] = {
    "cpu": PredictConfig(),
    "gpu": PredictConfig(device="cuda"),
}


def run(config: PredictConfig) -> list[dict[str, Any]]:
    """A result per image: `image` and `prediction`, for retrieval `similarity`; or `error`. A
    statement about two images has one result, with `right`, too.

    For retrieval the nearest images come first, best first, followed by those with an error.

    Raises:
        FileNotFoundError: the image or the file of class names doesn't exist, or the folder has no
            images.
        StoreError: there is no such model.
        ValueError: the model's task needs a text or a second image, or the file of class names has
            none of the model's classes.
    """
    files = [(file,) for file in _files(Path(config.path))]
    model = load(Store(config.store), config.model, config.options, config.device)
    about = model.task.about
    text = _text(model, config)
    if about.images == 2:
        files = [_pair(config)]
    names = _class_names(config, model.task.labels)
    results: list[dict[str, Any]] = []
    for start in range(0, len(files), config.batch_size):
        results += _predict(model, files[start : start + config.batch_size], text)
    for result in results:
        if isinstance(result.get("prediction"), list):
            result["prediction"] = result["prediction"][: config.top]
            if names:
                result["names"] = [names.get(label, label) for label in result["prediction"]]
    return _rank(results, config.top) if about.similarity else results


def _text(model: Finetuned, config: PredictConfig) -> str | None:
    asks = model.task.about.asks
    if bool(config.text) != bool(asks):
        wanted = f"give a {asks}" if asks else "it reads no text, leave it out"
        raise ValueError(f"text: {config.model} is a model for {model.task_name}: {wanted}")
    return config.text or None


def _class_names(config: PredictConfig, labels: Sequence[str]) -> dict[str, str]:
    """The names of the classes in the file, by label; empty without a file."""
    if not config.class_names:
        return {}
    file = Path(config.class_names)
    if file.suffix == ".json":
        try:
            names = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"class_names: {file}: not JSON ({error})") from error
        if not isinstance(names, dict):
            raise ValueError(f"class_names: {file}: expected an object, a name for each class")
    else:
        pairs = (line.strip().partition(" ") for line in file.read_text().splitlines())
        names = {label: name for label, _, name in pairs if name}
    if not set(names) & set(labels):
        raise ValueError(
            f"class_names: {file} names none of the {len(labels)} classes of {config.model}"
            + (f": it needs lines such as {labels[0]!r} and a name" if labels else "")
        )
    return names


def _pair(config: PredictConfig) -> tuple[Path, ...]:
    for name in ("path", "right"):
        if not Path(getattr(config, name)).is_file():
            raise ValueError(f"{name}: {config.model} reads two images: give one file as {name}")
    return Path(config.path), Path(config.right)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise FileNotFoundError(f"path: no images in {path}")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"path: {path} does not exist")
    return [path]


def _predict(
    model: Finetuned, files: Sequence[tuple[Path, ...]], text: str | None
) -> list[dict[str, Any]]:
    samples: list[Sample] = []
    results: list[dict[str, Any]] = []
    good: list[dict[str, Any]] = []
    for images in files:
        result: dict[str, Any] = dict(zip(("image", "right"), map(str, images), strict=False))
        results.append(result)
        try:
            pixels = tuple(
                evaluation_image(model.task, file.read_bytes(), model.image_size) for file in images
            )
        except UnidentifiedImageError:
            result["error"] = "not an image"
            continue
        except OSError as error:
            result["error"] = f"not a readable image: {error}"
            continue
        samples.append(Sample(pixels, (Example(result["image"], text, None),)))
        good.append(result)
    if samples:
        for result, prediction in zip(good, model.predict(samples), strict=True):
            result.update(_shown(model, prediction))
    return results


def _shown(model: Finetuned, prediction: Any) -> dict[str, Any]:
    similarity = model.task.about.similarity
    if similarity:
        return {"similarity": round(similarity(prediction), 4)}
    return {"prediction": prediction}


def _rank(results: list[dict[str, Any]], top: int) -> list[dict[str, Any]]:
    good = [r for r in results if "similarity" in r]
    good.sort(key=lambda r: -r["similarity"])
    return good[:top] + [r for r in results if "error" in r]


def lines(results: list[dict[str, Any]]) -> Iterator[str]:
    """The results as readable lines."""
    for result in results:
        images = ", ".join(result[key] for key in ("image", "right") if key in result)
        if "error" in result:
            yield f"{images}: {result['error']}"
        elif "similarity" in result:
            yield f"{result['similarity']:7.4f}  {images}"
        else:
            found = result.get("names", result["prediction"])
            yield f"{images}: {'; '.join(found) if isinstance(found, list) else found}"


def main() -> None:
    def shown(chosen: PredictConfig) -> None:
        results = run(chosen)
        if chosen.json:
            json.dump(results, sys.stdout, indent=1)
            print()
        else:
            print("\n".join(lines(results)))

    job.main(PRESETS, __doc__, shown, billed=False)


if __name__ == "__main__":
    main()
