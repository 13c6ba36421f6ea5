"""Writes pages that show what a pretraining step reads: pictures, texts, masks, names, datasets.

`pipelines/pretrain.py --inspect-step N` makes the batches again, with the function that made them
for training, and writes to the store

    runs/<name>/inspect/step-00001234/index.html         how much came from which dataset
    runs/<name>/inspect/step-00001234/worker-0000.html   a worker's samples; open it in a browser
    runs/<name>/inspect/step-00001234/worker-0000.json   the same, for programs

Texts and names come from the data and are hostile input: `report_html.el` escapes them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from beit3.objectives import TEXT_OBJECTIVES, MaskedBatch
from beit3.text import UNK, TextTokenizer
from pipelines import console, stops
from pipelines.pictures import to_image
from pipelines.report_html import Html, el, figure, join, page, table
from pipelines.storage import Store

GREY = 128
SHADE = 0.65  # share of grey in a hidden patch: people can still see what it hides


@dataclass(frozen=True)
class Share:
    """The worker that a batch belongs to, and the batch's number."""

    worker: int
    batch: int


@dataclass(frozen=True)
class Inspected:
    """A sample of a batch.

    kind: `image`, `pair` or `text`.
    hidden: indices of the hidden patches, row by row.
    tokens: ids before masking; `masked`: the positions of the masked ones.
    picture: uint8 `[3, height, width]`.
    """

    kind: str
    id: str
    source: str
    hidden: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    masked: tuple[int, ...] = ()
    picture: Tensor | None = None


def check(store: Store, run: str, fingerprint: str) -> None:
    """Warn if the run in the store was begun with other options, and so read other batches."""
    found = f"{run}/{stops.NOTE}"
    if store.exists(found) and store.read_json(found)["fingerprint"] != fingerprint:
        console.say(
            f"{store.uri}/{run} was begun with other inputs or options: what is shown is what a "
            "run with these would read"
        )


def write(
    store: Store,
    folder: str,
    step: int,
    batches: Iterable[tuple[Share, MaskedBatch]],
    tokenizer: TextTokenizer,
    patch: int,
) -> dict[str, Any]:
    """Write the pages of a step; returns the folder's URI and the samples per dataset.

    Args:
        batches: All workers' batches, worker by worker.
        patch: Side of a patch in pixels.
    """
    counts: Counter[tuple[str, str]] = Counter()
    pages: list[tuple[str, int]] = []
    records: list[dict[str, Any]] = []
    sections: list[tuple[str, str, Html | None]] = []

    def finish(worker: int) -> None:
        name = f"worker-{worker:04d}"
        store.write_json(f"{folder}/{name}.json", {"step": step, "samples": records})
        shown = page(f"Step {step}, worker {worker}", _LEGEND, None, sections)
        store.write(f"{folder}/{name}.html", shown.encode())
        pages.append((name, len(records)))
        records.clear()
        sections.clear()

    before: int | None = None
    for share, batch in batches:
        if before is not None and share.worker != before:
            finish(before)
        before = share.worker
        found = list(samples(batch))
        counts.update((one.kind, one.source) for one in found)
        records += [_record(one, share, tokenizer) for one in found]
        sections += _sections(found, share, batch.hidden_patches.shape[1], tokenizer, patch)
    if before is not None:
        finish(before)
    store.write(f"{folder}/index.html", _index(step, counts, pages).encode())
    uri = f"{store.uri}/{folder}"
    console.say(f"{uri}/index.html: {sum(counts.values()):,} samples")
    return {
        "folder": uri,
        "step": step,
        "sources": {f"{kind}/{source}": n for (kind, source), n in sorted(counts.items())},
    }


def samples(batch: MaskedBatch) -> Iterator[Inspected]:
    """A batch split into its samples, with the masked tokens of its texts restored."""
    text, masked = batch.original_text(), torch.zeros(len(batch.text), dtype=torch.bool)
    for kind in TEXT_OBJECTIVES:
        if kind in batch.masked:
            masked[batch.masked[kind].places] = True
    lengths = list(batch.lengths)
    texts = list(zip(text.split(lengths), masked.split(lengths), strict=True)) if lengths else []
    singles = len(batch.images) - batch.pairs
    for number, (id, source) in enumerate(zip(batch.ids, batch.sources, strict=True)):
        shown, said = number < len(batch.images), number >= singles
        tokens, places = texts[number - singles] if said else (text[:0], masked[:0])
        yield Inspected(
            kind="pair" if shown and said else "image" if shown else "text",
            id=id,
            source=source,
            hidden=_places(batch.hidden_patches[number]) if shown else (),
            tokens=tuple(tokens.tolist()),
            masked=_places(places),
            picture=batch.images[number] if shown else None,
        )


def greyed(images: Tensor, hidden: Tensor, patch: int, shade: float = 1.0) -> np.ndarray:
    """Pictures with hidden patches blended with grey by `shade`; uint8 `[n, 3, height, width]`.

    Args:
        images: uint8 `[n, 3, height, width]`.
        hidden: bool `[n, patches]`.
    """
    rows, columns = images.shape[-2] // patch, images.shape[-1] // patch
    cells = hidden.view(-1, 1, rows, columns).numpy().repeat(patch, 2).repeat(patch, 3)
    mixed = shade * GREY + (1 - shade) * images.numpy()
    return np.where(cells, mixed, images.numpy()).astype(np.uint8)


def _places(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero().flatten().tolist())


def _record(one: Inspected, share: Share, tokenizer: TextTokenizer) -> dict[str, Any]:
    record: dict[str, Any] = {"kind": one.kind, "id": one.id, "dataset": one.source}
    record |= {"worker": share.worker, "batch": share.batch}
    if one.picture is not None:
        record["hidden_patches"] = one.hidden
    if one.tokens:
        record |= {"tokens": one.tokens, "masked": one.masked}
        record["text"] = "".join(piece for piece, _ in pieces(one, tokenizer)).strip()
    return record


def pieces(one: Inspected, tokenizer: TextTokenizer) -> Iterator[tuple[str, bool]]:
    """A text's tokens as strings, and whether each is masked; without `<s>`, `</s>`."""
    masked = set(one.masked)
    for place, id in enumerate(one.tokens):
        if id >= UNK:
            piece = tokenizer.pieces.IdToPiece(id - 1) if id > UNK else "\N{REPLACEMENT CHARACTER}"
            yield piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " "), place in masked


# -- pages ----------------------------------------------------------------------------------------

_LEGEND = "Hidden patches are grey, masked words are marked: what is shown there is what was there."
_TITLES = {"image": "Images alone", "pair": "Pairs", "text": "Texts alone"}
_MARK = "background:#f2c879;border-radius:3px"


def _sections(
    found: list[Inspected], share: Share, patches: int, tokenizer: TextTokenizer, patch: int
) -> list[tuple[str, str, Html | None]]:
    made = []
    for kind, title in _TITLES.items():
        shown = [_shown(one, patches, tokenizer, patch) for one in found if one.kind == kind]
        if shown:
            body = el("div", shown, class_="grid" if kind != "text" else None)
            made.append((f"{kind}-{share.batch}", f"{title}, batch {share.batch}", body))
    return made


def _shown(one: Inspected, patches: int, tokenizer: TextTokenizer, patch: int) -> Html:
    words = [
        el("mark", piece, style=_MARK) if masked else piece
        for piece, masked in pieces(one, tokenizer)
    ]
    name = el("p", f"{one.source}: {one.id}", class_="tag")
    below = join(el("p", words) if words else None, name)
    if one.picture is None:
        return el("blockquote", below)
    hidden = torch.zeros(1, patches, dtype=torch.bool)
    hidden[0, list(one.hidden)] = True
    picture = to_image(greyed(one.picture[None], hidden, patch, SHADE)[0], zoom=1)
    return figure(picture, one.id, below, side=max(picture.size), frame="square")


def _index(step: int, counts: Counter[tuple[str, str]], pages: list[tuple[str, int]]) -> str:
    of_kind = Counter[str]()
    for (kind, _), number in counts.items():
        of_kind[kind] += number
    rows = [
        el(
            "tr",
            el("td", _TITLES[kind]),
            el("td", source, class_="left"),
            el("td", f"{number:,}"),
            el("td", f"{number / of_kind[kind]:.1%}"),
        )
        for (kind, source), number in sorted(counts.items())
    ]
    head = ("kind", "dataset", "samples", "of its kind")
    links = [
        el(
            "li",
            el("a", name, href=f"{name}.html"),
            f", {number:,} samples; ",
            el("a", "JSON", href=f"{name}.json"),
        )
        for name, number in pages
    ]
    sections = [
        ("sources", "Where the samples come from", table(head, rows, left=("dataset",))),
        ("workers", "Samples by worker", el("ol", links)),
    ]
    return page(f"Step {step}", "What this step of pretraining reads.", None, sections)
