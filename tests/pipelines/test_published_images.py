"""Images out of the published zips and folders."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from pipelines.images import Rejected
from pipelines.published_images import MISSING, ImageFiles
from pipelines.storage import Store

MOST = 1 << 20


def make_zip(file: Path, members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(out.getvalue())
    return out.getvalue()


def reason(outcome: bytes | Rejected) -> str:
    assert isinstance(outcome, Rejected), outcome
    return outcome.reason


def test_zips_and_folders_side_by_side(tmp_path: Path) -> None:
    make_zip(tmp_path / "images.zip", {"VG_100K/1.jpg": b"one"})
    make_zip(tmp_path / "images2.zip", {"VG_100K_2/2.jpg": b"two"})
    (tmp_path / "VG_100K").mkdir()
    (tmp_path / "VG_100K/3.jpg").write_bytes(b"three")
    files = ImageFiles(str(tmp_path))
    assert files.read(["VG_100K/1.jpg", "VG_100K_2/1.jpg"], MOST) == b"one"
    assert files.read(["VG_100K/2.jpg", "VG_100K_2/2.jpg"], MOST) == b"two"
    assert files.read(["VG_100K/3.jpg"], MOST) == b"three"
    missing = files.read(["VG_100K/4.jpg", "4.jpg"], MOST)
    assert missing == Rejected(MISSING, "VG_100K/4.jpg, 4.jpg", "files")
    assert [d["file"] for d in files.described] == ["images/images.zip", "images/images2.zip"]


def test_one_zip_alone_and_a_bucket(tmp_path: Path, s3_store: str) -> None:
    data = make_zip(tmp_path / "val2014.zip", {"val2014/COCO_val2014_1.jpg": b"one"})
    alone = ImageFiles(str(tmp_path / "val2014.zip"))
    assert alone.read(["val2014/COCO_val2014_1.jpg"], MOST) == b"one"
    assert reason(alone.read(["val2014.zip"], MOST)) == MISSING  # only what is inside
    Store(s3_store).write("raw/val2014.zip", data)
    Store(s3_store).write("raw/train2014/2.jpg", b"two")
    bucket = ImageFiles(f"{s3_store}/raw")
    assert bucket.read(["val2014/COCO_val2014_1.jpg"], MOST) == b"one"
    assert bucket.read(["train2014/2.jpg"], MOST) == b"two"
    assert reason(bucket.read(["train2014/3.jpg"], MOST)) == MISSING


def test_nothing_there_is_said_at_once(tmp_path: Path) -> None:
    for uri in (tmp_path / "nothing", tmp_path / "train2017.zip"):
        with pytest.raises(FileNotFoundError, match=r"no images there. Expected .*train2017.zip"):
            ImageFiles(str(uri))
    (tmp_path / "train2017.zip").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"train2017.zip: .*download it again"):
        ImageFiles(str(tmp_path)).read(["x"], MOST)


@pytest.mark.parametrize(
    "path", ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:\\x", "nul\0", ""]
)
def test_no_path_leads_out(path: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    make_zip(tmp_path / "in/a.zip", {"../secret": b"x", "/etc/passwd": b"x", "ok": b"fine"})
    files = ImageFiles(str(tmp_path / "in"))
    assert reason(files.read([path], MOST)) == "bad file name"
    assert files.read(["ok"], MOST) == b"fine"


def test_broken_and_large_members(tmp_path: Path) -> None:
    text = bytes(range(256)) * 20
    data = bytearray(make_zip(tmp_path / "a.zip", {"broken": text, "lies": bytes(5 << 20)}))
    start = data.index(b"broken") + len("broken")
    data[start : start + 60] = bytes(60)
    # The directory says that `lies` is small.
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    data[entry + 24 : entry + 28] = (100).to_bytes(4, "little")
    (tmp_path / "a.zip").write_bytes(data)
    (tmp_path / "big.jpg").write_bytes(bytes(2 << 20))
    files = ImageFiles(str(tmp_path))
    assert reason(files.read(["broken"], MOST)) == "broken file"
    assert reason(files.read(["lies"], MOST)) in ("broken file", "file too large")
    assert reason(files.read(["big.jpg"], MOST)) == "file too large"
