"""Bundles: there whole, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines import bundles, storage
from pipelines.storage import Store, StoreError


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_store"))
    return Store(tmp_path / "store")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local folder with a file, and another in a folder of its own."""
    folder = tmp_path / "made"
    (folder / "inner").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "inner" / "notes.txt").write_text("ä note")
    return folder


def test_what_is_saved_is_loaded(store: Store, folder: Path, tmp_path: Path) -> None:
    assert not bundles.exists(store, "models/a")
    bundles.save(store, "models/a", folder, {"steps": 3})
    assert bundles.exists(store, "models/a") and bundles.info(store, "models/a") == {"steps": 3}
    assert bundles.load(store, "models/a", tmp_path / "to") == {"steps": 3}
    for file in ("weights.bin", "inner/notes.txt"):
        assert (tmp_path / "to" / file).read_bytes() == (folder / file).read_bytes()
    assert not (tmp_path / "to" / bundles.MANIFEST).exists()


def test_identity_is_of_the_files_alone(store: Store, folder: Path) -> None:
    bundles.save(store, "one", folder, {"name": "one"})
    bundles.save(store, "two", folder, {"name": "two"})
    assert bundles.identity(store, "one") == bundles.identity(store, "two")
    (folder / "inner" / "notes.txt").write_text("another note")
    bundles.save(store, "two", folder, {"name": "two"})
    assert bundles.identity(store, "one") != bundles.identity(store, "two")


def test_a_missing_bundle_says_what_to_do(store: Store, folder: Path, tmp_path: Path) -> None:
    for look in (bundles.info, bundles.identity):
        with pytest.raises(StoreError, match=r"models/a: missing or half written; run the job"):
            look(store, "models/a")
    bundles.save(store, "models/a", folder, {})
    store.delete(f"models/a/{bundles.MANIFEST}")
    with pytest.raises(StoreError, match="half written"):
        bundles.load(store, "models/a", tmp_path / "to")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_damage_is_noticed(harm: str, store: Store, folder: Path, tmp_path: Path) -> None:
    bundles.save(store, "models/a", folder, {})
    data = store.read("models/a/weights.bin")
    if harm == "missing":
        store.delete("models/a/weights.bin")
    else:
        store.write("models/a/weights.bin", data[:-1] if harm == "truncated" else b"!" + data[1:])
    reason = "weights.bin" if harm == "missing" else r"weights\.bin: damaged"
    with pytest.raises(StoreError, match=reason):
        bundles.load(store, "models/a", tmp_path / "to")


def test_a_disk_that_takes_nothing_is_no_damage(store: Store, folder: Path, tmp_path: Path) -> None:
    """Or a run would go on from an older checkpoint than the one that is there."""
    bundles.save(store, "models/a", folder, {})
    (tmp_path / "to" / "weights.bin").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        bundles.load(store, "models/a", tmp_path / "to")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
def test_a_large_bundle_is_never_in_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 6 << 20)
    folder, size = tmp_path / "made", 160 << 20
    folder.mkdir()
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(size)
    before = peak_memory(reset=True)
    bundles.save(store, "models/a", folder, {})
    bundles.load(store, "models/a", tmp_path / "to")
    assert peak_memory() - before < size / 2
    assert (tmp_path / "to" / "weights.bin").stat().st_size == size


def peak_memory(*, reset: bool = False) -> int:
    """Bytes that this process had in memory at most, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


@pytest.mark.parametrize("left", [b"", b'{"files": {"weig'])
def test_a_damaged_manifest_is_noticed(left: bytes, store: Store, folder: Path) -> None:
    bundles.save(store, "models/a", folder, {})
    store.write(f"models/a/{bundles.MANIFEST}", left)
    for look in (bundles.info, bundles.identity):
        with pytest.raises(StoreError, match=rf"models/a/{bundles.MANIFEST}: damaged"):
            look(store, "models/a")


def test_a_save_that_is_cut_short_leaves_no_bundle(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even a mixture with the one that was there: the old manifest goes first."""
    bundles.save(store, "models/a", folder, {"version": 1})
    (folder / "inner" / "notes.txt").write_text("another note")
    real = Store.upload
    sent: list[str] = []

    def dies_at_the_second(self: Store, local: Path, name: str) -> object:
        if sent:
            raise KeyboardInterrupt
        sent.append(name)
        return real(self, local, name)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "upload", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            bundles.save(store, "models/a", folder, {"version": 2})
    assert sent and not bundles.exists(store, "models/a")
    bundles.save(store, "models/a", folder, {"version": 2})
    assert bundles.info(store, "models/a") == {"version": 2}


def test_the_manifest_says_what_each_file_should_be(store: Store, folder: Path) -> None:
    bundles.save(store, "models/a", folder, {})
    files = json.loads(store.read(f"models/a/{bundles.MANIFEST}"))["files"]
    assert {name: record["bytes"] for name, record in files.items()} == {
        "weights.bin": 256 * 40,
        "inner/notes.txt": len("ä note".encode()),
    }
    assert all(len(record["sha256"]) == 64 for record in files.values())
