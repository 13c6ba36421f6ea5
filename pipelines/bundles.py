"""Bundles: folders of files in the store that are present whole or not at all.

Models and checkpoints are bundles. The files are written first and `_bundle.json`, which lists each
with its size and SHA-256, last; a folder without it, or whose files don't match it, is no bundle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from pipelines.storage import Store, StoreError

MANIFEST = "_bundle.json"


class Damaged(StoreError):
    """A file of a bundle is not as it was written: it is lost, cut off or changed."""


def save(store: Store, name: str, folder: Path, info: dict[str, Any]) -> None:
    """Upload every file of a local folder, then the manifest with `info`."""
    store.delete(f"{name}/{MANIFEST}")
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder).as_posix()
        record = store.upload(path, f"{name}/{relative}")
        files[relative] = {"bytes": record.bytes, "sha256": record.sha256}
    store.write_json(f"{name}/{MANIFEST}", {"files": files, "info": info})


def exists(store: Store, name: str) -> bool:
    return store.exists(f"{name}/{MANIFEST}")


def finished(store: Store, name: str, fingerprint: str, taken: str) -> dict[str, Any] | None:
    """The info of a bundle that this very job saved; None if it is still to be made.

    Args:
        fingerprint: The job's; compared with `fingerprint` in the bundle's info.
        taken: The message if a bundle of this name has another fingerprint, and what to do then.

    Raises:
        StoreError: the name is taken by another bundle, or its manifest is damaged.
    """
    if not exists(store, name):
        return None
    found = info(store, name)
    if found["fingerprint"] != fingerprint:
        raise StoreError(f"{store.uri}/{name} {taken}")
    return found


def info(store: Store, name: str) -> dict[str, Any]:
    """The `info` that a bundle was saved with.

    Raises:
        StoreError: there is none, or its manifest is damaged.
    """
    return _manifest(store, name)["info"]


def identity(store: Store, name: str) -> str:
    """Content hash of a bundle: equal for equal files.

    Raises:
        StoreError: there is none.
    """
    files = _manifest(store, name)["files"]
    text = json.dumps({path: record["sha256"] for path, record in files.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(store: Store, name: str, to: Path) -> dict[str, Any]:
    """Copy a bundle to a local folder, verified; returns its info.

    Raises:
        StoreError: it is missing, or the store doesn't answer.
        Damaged: a file is missing or differs from what was written.
    """
    manifest = _manifest(store, name)
    for relative, expected in manifest["files"].items():
        try:
            found = store.download(f"{name}/{relative}", to / relative)
        except StoreError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise Damaged(f"{store.uri}/{name}/{relative}: missing") from error
            raise
        if found.sha256 != expected["sha256"]:
            (to / relative).unlink()
            raise Damaged(f"{store.uri}/{name}/{relative}: damaged (checksum differs)")
    return manifest["info"]


def _manifest(store: Store, name: str) -> dict[str, Any]:
    if not exists(store, name):
        raise StoreError(
            f"{store.uri}/{name}: missing or half written; run the job that makes it (again)"
        )
    try:
        return store.read_json(f"{name}/{MANIFEST}")
    except ValueError as error:
        raise Damaged(f"{store.uri}/{name}/{MANIFEST}: damaged ({error})") from error
