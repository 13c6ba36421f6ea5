"""Serves photos for benchmarks, in a process of its own: many URLs, always well behaved.

    python -m benchmarks._photos --photos 200     # prints its address, and serves until killed

The pictures are noise with the spectrum of photos (amplitude falls with frequency), so that their
JPEGs have about the decoding cost and size of photos. `/<number>.jpg` is one of them; `/stats`
gives the number of requests for them, and the time of the first by the system's monotonic clock;
`/reset` forgets both.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

SIDES = (400, 640)
QUALITY = 85


def draw(rng: np.random.Generator) -> bytes:
    """A JPEG with sides between 400 and 640 pixels."""
    width, height = (int(n) for n in rng.integers(*SIDES, 2, endpoint=True))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1.0
    shape = (3, *frequency.shape)
    spectrum = (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / frequency**1.5
    light, red, blue = np.fft.irfft2(spectrum, s=(height, width))
    light, red, blue = (plane / plane.std() for plane in (light, red, blue))
    planes = np.stack([128 + 55 * light, 128 + 14 * blue, 128 + 14 * red], axis=-1)
    out = io.BytesIO()
    Image.fromarray(planes.clip(0, 255).astype(np.uint8), "YCbCr").convert("RGB").save(
        out, "JPEG", quality=QUALITY
    )
    return out.getvalue()


class _Answer(asyncio.Protocol):
    """One request, one answer, and the connection closes, as the downloader asks for."""

    photos: tuple[bytes, ...] = ()
    first: float | None = None
    count = 0

    def connection_made(self, transport: Any) -> None:
        self.transport, self.head = transport, b""

    def data_received(self, data: bytes) -> None:
        self.head += data
        if b"\r\n\r\n" not in self.head:
            return
        path = self.head.split(b" ", 2)[1].decode("ascii", "replace")
        kind, body = self.answer(path)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
        self.transport.write(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.transport.close()

    def answer(self, path: str) -> tuple[str, bytes]:
        if path.endswith(".jpg"):
            _Answer.first = _Answer.first or time.monotonic()
            _Answer.count += 1
            number = int(path.strip("/").removesuffix(".jpg"))
            return "image/jpeg", self.photos[number % len(self.photos)]
        if path == "/reset":
            _Answer.first, _Answer.count = None, 0
        size = sum(map(len, self.photos)) / len(self.photos)
        found = {"first": self.first, "count": self.count, "bytes": size}
        return "application/json", json.dumps(found).encode()


async def _serve(photos: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    _Answer.photos = tuple(draw(rng) for _ in range(photos))
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Answer, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


@dataclass(frozen=True)
class Web:
    """The running server."""

    url: str

    def ask(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)


@contextlib.contextmanager
def serve(photos: int = 200, seed: int = 0) -> Iterator[Web]:
    """Run the server during the context."""
    command = [sys.executable, "-m", __name__, "--photos", str(photos), "--seed", str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Web(process.stdout.readline().strip())
        finally:
            process.kill()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks._photos", description=__doc__)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(asked.photos, asked.seed))
