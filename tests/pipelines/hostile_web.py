"""A web that means harm: a server that sends any bytes it is told to, and thousands of bad answers.

Everything is drawn from a seed; nothing leaves the loopback.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import random
import socket
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Answer = bytes | Callable[[socket.socket], None]

DECODE = {"broken image", "truncated image", "unsupported format", "not an image", "too complex"}
DECODE |= {"too many pixels", "too small", "aspect ratio", "empty body", "not an image (HTML)"}
FETCH = {"private address", "blocked port", "unsupported scheme", "bad url", "too large"}
FETCH |= {"redirect loop", "timed out", "host not found", "connection failed", "bad response"}
FETCH |= {"incomplete download", "tls failed", "robots: disallowed"}
HTTP = {f"http {code}" for code in range(100, 600)}
REASONS = DECODE | FETCH | HTTP


class HostileServer:
    """Listens on loopback and answers each path with the bytes, or the function, it is given."""

    def __init__(self, answers: dict[str, Answer] | None = None) -> None:
        self.answers = answers or {}
        self.requests: list[bytes] = []
        outer = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                self.request.settimeout(30)
                with contextlib.suppress(OSError):
                    outer._answer(self.request)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            request_queue_size = 256
            allow_reuse_address = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port: int = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        thread.start()

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            more = connection.recv(65536)
            if not more:
                return
            request += more
        self.requests.append(request)
        path = request.split(b" ", 2)[1].decode()
        answer = self.answers.get(path, response(b"", "404 Not Found"))
        if isinstance(answer, bytes):
            connection.sendall(answer)
        else:
            answer(connection)

    def __enter__(self) -> HostileServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


# -- answers --------------------------------------------------------------------------------------


def response(body: bytes, status: str = "200 OK", *headers: str, length: Any = None) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if length != "":
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(to: str) -> bytes:
    return response(b"elsewhere", "302 Found", f"Location: {to}")


def chunked(raw: bytes) -> bytes:
    return response(raw, "200 OK", "Transfer-Encoding: chunked", length="")


def dribble(data: bytes, seconds: float = 0.2) -> Callable[[socket.socket], None]:
    """One byte at a time."""

    def send(connection: socket.socket) -> None:
        for i in range(len(data)):
            connection.sendall(data[i : i + 1])
            time.sleep(seconds)

    return send


def forever(start: bytes, again: bytes) -> Callable[[socket.socket], None]:
    """As fast as it goes, until the other side hangs up."""

    def send(connection: socket.socket) -> None:
        connection.sendall(start)
        block = again * (1 + 65536 // len(again))
        while True:
            connection.sendall(block)

    return send


def reset(start: bytes) -> Callable[[socket.socket], None]:
    def send(connection: socket.socket) -> None:
        if start:
            connection.sendall(start)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()

    return send


# -- files ----------------------------------------------------------------------------------------


def picture(rng: random.Random, form: str = "JPEG", **options: Any) -> bytes:
    """A small picture that no other seed draws."""
    noise = np.frombuffer(rng.randbytes(8 * 8 * 3), np.uint8).reshape(8, 8, 3)
    size = rng.choice([(64, 64), (96, 64), (64, 80)])
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_with(rng: random.Random, *chunks: bytes) -> bytes:
    """A good PNG with further chunks behind its header."""
    data = picture(rng, "PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def png_of(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + png_chunk(b"IEND", b"")


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(data: bytes, *segments: bytes) -> bytes:
    """A JPEG with further segments behind its first two bytes."""
    return data[:2] + b"".join(segments) + data[2:]


def jpeg_of_many_scans(scans: int, side: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side), "gray").save(out, "JPEG", progressive=True)
    data = out.getvalue()
    start = data.rfind(b"\xff\xda")
    return data[:-2] + data[start:-2] * scans + b"\xff\xd9"


def gif_of(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b"\x2c" + bytes(9) + b"\x02"


def gif_with(data: bytes, extension: bytes) -> bytes:
    """A GIF with an extension before all others."""
    start = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    return data[:start] + extension + data[start:]


def webp_of(width: int, height: int) -> bytes:
    body = b"\x02\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    chunks = b"WEBPVP8X" + struct.pack("<I", 10) + body + b"ANIM\x06\0\0\0" + bytes(6)
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def bmp_of(width: int, height: int, packing: int = 0, depth: int = 24, body: bytes = b"") -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, depth, packing, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + head + body


def animation(rng: random.Random, form: str, frames: int) -> bytes:
    pictures = [Image.new("RGB", (48, 48), tuple(rng.randbytes(3))) for _ in range(frames)]
    out = io.BytesIO()
    pictures[0].save(out, form, save_all=True, append_images=pictures[1:], duration=10)
    return out.getvalue()


# -- the corpus -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One URL, what it answers, and what may come of it."""

    name: str
    url: str
    answer: Answer
    good: bytes | None = None
    """The image, if it must be fetched and kept."""
    reasons: frozenset[str] = frozenset()
    """Why else it may fail; with neither, all that must hold is that nothing breaks."""


FORMS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
PRIVATE = (
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.170.2/v2/credentials",
    "http://[fd00:ec2::254]/latest/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://168.63.129.16/machine",
    "http://100.100.100.200/latest/meta-data",
    "http://192.0.0.192/latest/",
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://192.168.1.1/",
    "http://0.0.0.0/",
    "http://0/",
    "http://255.255.255.255/",
    "http://224.0.0.1/",
    "http://100.64.0.1/",
    "http://198.18.0.1/",
    "http://240.0.0.1/",
    "http://2852039166/",  # the first, as one number
    "http://0xa9fea9fe/",
    "http://0251.0376.0251.0376/",
    "http://169.254.43518/",
    "http://10.1/",
    "http://012.0.0.1/",
    "http://0xa.0.0.1/",
    "http://[::]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[0:0:0:0:0:ffff:10.0.0.1]/",
    "http://[::169.254.169.254]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::a00:1]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[2001:0:53aa:64c::1]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://router.local/",
    "http://kubernetes.default.svc.cluster.local/",
    "http://%31%36%39.254.169.254/",  # urllib decodes hosts: only the connection can tell
    "http://10.0.0%2e1/",
)

NAMES = {  # what the tests' resolver says
    "pictures.test": ["127.0.0.1"],
    "metadata.test": ["169.254.169.254"],
    "ten.test": ["10.1.2.3"],
    "mixed.test": ["93.184.216.34", "192.168.0.1"],
    "six.test": ["fd00:ec2::254"],
    "mapped.test": ["::ffff:10.0.0.1"],
    "nat64.test": ["64:ff9b::a00:1"],
    "linklocal.test": ["fe80::1%1"],
    "nowhere.test": [],
}


def resolver(real: Callable[..., Any]) -> Callable[..., Any]:
    """A `getaddrinfo` that knows NAMES and numbers, and asks nobody."""

    def getaddrinfo(host: Any, port: Any, *args: Any, **options: Any) -> list[Any]:
        flags = options.get("flags", 0)
        if isinstance(host, bytes):
            host = host.decode()
        if flags & socket.AI_NUMERICHOST or host not in NAMES:
            options["flags"] = flags | socket.AI_NUMERICHOST
            return real(host, port, *args, **options)
        if not NAMES[host]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        found = []
        for number in NAMES[host]:
            family = socket.AF_INET6 if ":" in number else socket.AF_INET
            address = (number, port or 0, 0, 0) if ":" in number else (number, port or 0)
            found.append((family, socket.SOCK_STREAM, 6, "", address))
        return found

    return getaddrinfo


def corpus(seed: int, count: int, base: str) -> list[Case]:
    """So many cases for a server at `base`: every kind in turn, each with numbers of its own."""
    cases = []
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        rng = random.Random(f"{seed}/{i}")
        case = kind(rng, base, f"/{kind.__name__.strip('_')}/{i}")
        cases.append(case)
    return cases


def _bad(base: str, path: str, answer: Answer, *reasons: str) -> Case:
    return Case(path, base + path, answer, reasons=frozenset(reasons))


def _file(base: str, path: str, data: bytes, *reasons: str) -> Case:
    return _bad(base, path, response(data, "200 OK", "Content-Type: image/jpeg"), *reasons)


def _good(rng: random.Random, base: str, path: str) -> Case:
    data = picture(rng, rng.choice(FORMS))
    headers = rng.choice(
        [("Content-Type: text/html",), ("Set-Cookie: a=b", "WWW-Authenticate: Basic"), ()]
    )
    answer = response(data, "200 OK", *headers)
    if rng.random() < 0.3:
        cut = rng.randrange(1, len(data))
        parts = (data[:cut], data[cut:])
        answer = chunked(b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in parts) + b"0\r\n\r\n")
    if rng.random() < 0.1:
        base = base.replace("127.0.0.1", "pictures.test")
    return Case(path, base + path, answer, data)


def _corrupted(rng: random.Random, base: str, path: str) -> Case:
    data = bytearray(picture(rng, rng.choice(FORMS)))
    start = rng.choice([0, 2, 12, 30])
    for _ in range(rng.choice([1, 3, 10, 50])):
        data[rng.randrange(start, len(data))] = rng.randrange(256)
    return _file(base, path, bytes(data))


def _truncated(rng: random.Random, base: str, path: str) -> Case:
    data = picture(rng, rng.choice(FORMS))
    # Beyond the middle, so that enough is there to be told by, and well before the end.
    data = data[: rng.randrange(len(data) // 2, len(data) * 9 // 10)]
    return _file(base, path, data, "truncated image", "broken image")


def _wrong_type(rng: random.Random, base: str, path: str) -> Case:
    body = rng.choice(
        [
            b"<!DOCTYPE html><html><script>alert(1)</script></html>",
            b"\xef\xbb\xbf  <html>",
            b'{"error": "gone"}',
            b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"><image href="file:///x"/></svg>',
            b"<svg/>",
            b"PK\x03\x04" + rng.randbytes(300),
            b"%PDF-1.7\n" + rng.randbytes(300),
            b"%!PS-Adobe-3.0 EPSF-3.0\n(x) run",
            b"\x7fELF\x02\x01\x01" + rng.randbytes(300),
            b"MZ" + rng.randbytes(300),
            b"#!/bin/sh\ntouch /tmp/owned\n",
            b"\x1f\x8b\x08" + rng.randbytes(100),
            b"II*\0" + rng.randbytes(100),
            b"P6\n64 64\n255\n" + rng.randbytes(64 * 64 * 3),
            b"\0\0\0\x18ftypavif" + rng.randbytes(100),
            rng.randbytes(rng.randrange(1, 3000)),
            "ＧＩＦ89a".encode("utf-16"),
        ]
    )
    reasons = ("not an image", "not an image (HTML)", "unsupported format", "broken image")
    return _file(base, path, body, *reasons, "truncated image")


def _bombs(rng: random.Random, base: str, path: str) -> Case:
    side = rng.choice([20_000, 60_000])
    data, reason = rng.choice(
        [
            (png_of(side, side), "too many pixels"),
            (png_of(2**31 - 1, 2**31 - 1), "too many pixels"),
            (gif_of(side, side), "too many pixels"),
            (webp_of(2**24, 200), "too many pixels"),
            (webp_of(side, side), "too many pixels"),
            (bmp_of(side, -side), "too many pixels"),
            (bmp_of(-(2**31), 64), "too many pixels"),
            (bmp_of(9000, 9000), "truncated image"),
            (bmp_of(9000, 9000, 1, 8, b"\0\0" * 9000), "unsupported format"),
            (jpeg_of_many_scans(rng.randrange(101, 400)), "too complex"),
            (jpeg_with(picture(rng), b"\xff\xe5\0\x02" * 66_000), "too complex"),
            (png_with(rng, png_chunk(b"teXt", b"") * 66_000), "too complex"),
            (b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 1_100_000, "too complex"),
            (png_of(0, 64), "too small"),
            (png_of(31, 64), "too small"),
            (png_of(64, 6400), "aspect ratio"),
        ]
    )
    return _file(base, path, data, reason)


_INFLATES = zlib.compress(bytes(50 << 20), 9)


def _padded(rng: random.Random, base: str, path: str) -> Case:
    """Good images with a bomb or a secret in what is not the picture."""
    data = rng.choice(
        [
            lambda: png_with(rng, png_chunk(b"iCCP", b"x\0\0" + _INFLATES)),
            lambda: png_with(rng, png_chunk(b"zTXt", b"x\0\0" + _INFLATES) * 20),
            lambda: png_with(rng, png_chunk(b"iTXt", b"x\0\1\0\0\0" + _INFLATES)),
            lambda: jpeg_with(
                picture(rng), jpeg_segment(0xE1, b"Exif\0\0" + rng.randbytes(60_000))
            ),
            lambda: jpeg_with(picture(rng), *[jpeg_segment(0xE2, rng.randbytes(60_000))] * 9),
            lambda: jpeg_with(picture(rng), jpeg_segment(0xFE, b"<?php system('id'); ?>SECRET")),
            lambda: picture(rng) + b"PK\x03\x04SECRET" + rng.randbytes(1000),
            lambda: picture(rng, "PNG") + b"<html><script>SECRET</script></html>",
            lambda: gif_with(picture(rng, "GIF"), b"!\xfe\x06SECRET\0"),
            lambda: animation(rng, "GIF", 50),
            lambda: animation(rng, "WEBP", 20),
        ]
    )()
    return Case(path, base + path, response(data), data)


def _heads(rng: random.Random, base: str, path: str) -> Case:
    answer, *reasons = rng.choice(
        [
            (response(b"x", "200 OK", "X-Long: " + "a" * 70_000), "too large", "bad response"),
            (response(b"x", "200 OK", *["X-Many: b"] * 150), "bad response"),
            (response(b"x", "200 OK", *["X-Many: " + "b" * 2000] * 90), "too large"),
            (b"SSH-2.0-OpenSSH_9.7\r\n", "bad response"),
            (b"HTTP/9.9 200 OK\r\n\r\n", "bad response"),
            (b"HTTP/1.1 twohundred OK\r\n\r\n", "bad response"),
            (b"HTTP/1.1 99999 OK\r\n\r\n", "bad response"),
            (b"<html>no HTTP at all</html>\r\n\r\n", "bad response"),
            (b"\x16\x03\x01\x02\x00\x01" + rng.randbytes(200) + b"\n", "bad response"),
            (b"\0" * 3000, "bad response"),
            (b"a" * 70_000, "bad response", "too large"),
            (response(b"x", "200 OK", "X-Robots-Tag: noai"), "robots: disallowed"),
            (response(b"x", "200 OK", "X-Robots-Tag: beit3-ray: noimageai"), "robots: disallowed"),
            (b"", "connection failed"),
            (b"HTTP/1.1 200 OK\r\n", "empty body", "connection failed"),
        ]
    )
    return _bad(base, path, answer, *reasons)


def _statuses(rng: random.Random, base: str, path: str) -> Case:
    code = rng.choice([101, 300, 304, 305, 400, 401, 403, 404, 407, 410, 418, 429, 500, 503, 530])
    said = rng.choice(["No", "X-Robots-Tag timed out", "redirect error", "\x1b[31m", ""])
    headers = rng.choice([(), ("WWW-Authenticate: Basic realm=x",), ("Proxy-Authenticate: Basic",)])
    if rng.random() < 0.1:
        return _bad(base, path, response(b"x", "999 Denied"), "bad response")
    return _bad(base, path, response(b"x" * 500, f"{code} {said}", *headers), f"http {code}")


def _redirects_inside(rng: random.Random, base: str, path: str) -> Case:
    target = rng.choice(PRIVATE)
    if rng.random() < 0.2:
        target = target.removeprefix("http:")
    return _bad(base, path, redirect(target), "private address")


def _redirects_elsewhere(rng: random.Random, base: str, path: str) -> Case:
    target, *reasons = rng.choice(
        [
            (path, "redirect loop"),
            (base + path, "redirect loop"),
            ("file:///etc/passwd", "unsupported scheme"),
            ("ftp://127.0.0.1/x", "unsupported scheme"),
            ("data:image/png;base64,AAAA", "unsupported scheme"),
            ("gopher://127.0.0.1:70/x", "unsupported scheme"),
            ("javascript:alert(1)", "unsupported scheme"),
            ("jar:http://x!/", "unsupported scheme"),
            ("http://[::1", "bad url"),
            ("http://", "bad url", "redirect loop"),
            ("http://user:pass@93.184.216.34/", "bad url"),
            ("http://93.184.216.34\\@10.0.0.1/", "bad url", "private address"),
            ("http://93.184.216.34:99999/", "bad url"),
            ("http://93.184.216.34:22/", "blocked port"),
            ("http://93.184.216.34:6379%0d%0a/", "bad url"),
            ("http://93.184.216.34:25/%0d%0aMAIL", "blocked port"),
            ("http://93.184.216.34%3a22/", "blocked port", "bad url"),
            ("http://nowhere.test/", "host not found"),
            ("http://" + "a" * 300 + ".test/", "bad url", "host not found"),
            ("http://a..b/", "bad url", "host not found"),
            ("\x00\x01\x02", "http 404", "redirect loop"),
            ("/nothing/" + "a" * 9000, "http 404"),
            ("\xff\xfe/é", "http 404"),
        ]
    )
    return _bad(base, path, redirect(target), *reasons)


def _names(rng: random.Random, base: str, path: str) -> Case:
    inside = sorted(name for name in NAMES if name not in ("pictures.test", "nowhere.test"))
    name = rng.choice(inside)
    scheme = rng.choice(["http", "https"])
    port = rng.choice(["", ":8080", ":8443"])
    url = f"{scheme}://{name}{port}{path}"
    if rng.random() < 0.5:
        return _bad(base, path, redirect(url), "private address")
    return Case(path, url, b"", reasons=frozenset({"private address"}))


def _urls(rng: random.Random, base: str, path: str) -> Case:
    url = rng.choice(PRIVATE) + f"?{path}"
    return Case(path, url, b"", reasons=frozenset({"private address"}))


def _encodings(rng: random.Random, base: str, path: str) -> Case:
    data = picture(rng)
    body, name = rng.choice(
        [
            (gzip.compress(data, mtime=0), "gzip"),
            (zlib.compress(data), "deflate"),
            (_GZIP_BOMB, "gzip"),
            (gzip.compress(gzip.compress(data, mtime=0), mtime=0), "gzip, gzip"),
            (rng.randbytes(200), "br"),
        ]
    )
    answer = response(body, "200 OK", f"Content-Encoding: {name}", "Content-Type: image/jpeg")
    return _bad(base, path, answer, "not an image")


_GZIP_BOMB = gzip.compress(bytes(50 << 20), mtime=0)


def _framing(rng: random.Random, base: str, path: str) -> Case:
    data = picture(rng)
    half = data[: len(data) // 2]
    size = b"%x\r\n" % len(data)
    answer, *reasons = rng.choice(
        [
            (response(data, length=len(data) + 100), "incomplete download"),
            (response(data, length=len(data) - 200), "truncated image"),
            (response(data, length=10**15), "too large"),
            (response(b"", length=0), "empty body"),
            (response(b"", "204 No Content"), "empty body"),
            (chunked(size + half), "incomplete download"),
            (chunked(b"zz\r\n" + data), "incomplete download"),
            (chunked(b"ffffffffffff\r\n" + data), "incomplete download"),
            (chunked(b"-5\r\n" + data), "incomplete download", "truncated image", "broken image"),
            (chunked(data), "incomplete download", "bad response"),
            (chunked(size + data + b"\r\n"), "incomplete download"),
            (chunked(b"0\r\n\r\n" + data), "empty body"),
            (chunked(b"1;" + b"x" * 70_000 + b"\r\n"), "bad response", "incomplete download"),
            (response(size + data, "200 OK", "Transfer-Encoding: gzip, chunked"), "not an image"),
        ]
    )
    return _bad(base, path, answer, *reasons)


def _resets(rng: random.Random, base: str, path: str) -> Case:
    whole = response(picture(rng))
    cut = rng.choice([0, 9, 17, 40, len(whole) // 2])
    reasons = ("connection failed", "incomplete download", "bad response", "empty body")
    return _bad(base, path, reset(whole[:cut]), *reasons)


KINDS: tuple[Callable[[random.Random, str, str], Case], ...] = (
    _good,
    _corrupted,
    _truncated,
    _wrong_type,
    _corrupted,
    _padded,
    _heads,
    _good,
    _statuses,
    _redirects_inside,
    _redirects_elsewhere,
    _names,
    _corrupted,
    _urls,
    _encodings,
    _framing,
    _good,
    _resets,
    _truncated,
    _bombs,
)


def slow_cases(base: str) -> Iterator[Case]:
    """A few that would take minutes."""
    data = picture(random.Random(0))
    yield _bad(base, "/slow/head", dribble(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000), "timed out")
    yield _bad(base, "/slow/status", dribble(b"HTTP/1.1 200 " + b"a" * 1000), "timed out")
    yield _bad(base, "/slow/body", dribble(response(data, length=9999)), "timed out")
