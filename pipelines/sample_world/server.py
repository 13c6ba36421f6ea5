"""The small world's web: an HTTP server that misbehaves as the real web does."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import unquote, urlsplit

FAILURES = ("404", "403", "timeout", "html", "truncated", "zero")
"""Kinds of behaviour that yield no image: two statuses, an answer that never comes, a web page,
half a file (under a Content-Length that matches the half), and an empty body."""

REDIRECT = "redirect"
"""The kind of behaviour that yields the image after one more request, at "/moved" + path."""

HOLD_SECONDS = 30.0
"""How long a request of kind "timeout" is held, unless the client leaves earlier."""

_PAGE = b"<!doctype html><html><title>Gone</title><body>This photo has moved.</body></html>\n"
_TYPES = {".jpg": "image/jpeg", ".png": "image/png", ".jpeg": "image/jpeg"}


def serve(root: Path | str, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Start serving `root`/web, in a thread of this process, and return the server.

    The world may be generated before or after: files and behaviour are read on request. Raises
    OSError if the port is taken.
    """
    return Server(Path(root), host, port)


class Server:
    """A running server; close it, or use it as a context manager.

    Attributes:
        url: base of all addresses, such as "http://127.0.0.1:8123" (no slash at the end).
        port: the port listened on.
    """

    def __init__(self, root: Path, host: str = "127.0.0.1", port: int = 0) -> None:
        self._http = _Http((host, port), Path(root) / "web")
        self.port: int = self._http.server_address[1]
        self.url = f"http://{host}:{self.port}"
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(0.05,), name="sample-world", daemon=True
        )
        self._thread.start()

    @property
    def requests(self) -> int:
        """The number of requests received so far."""
        return self._http.requests

    def close(self) -> None:
        """Stop at once: held and idle connections are cut. A second call does nothing."""
        if self._http.closing.is_set():
            return
        self._http.closing.set()
        self._http.shutdown()
        self._http.server_close()
        self._http.cut_connections()
        self._thread.join(5)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], web: Path) -> None:
        super().__init__(address, _Handler)
        self.web = web
        self.closing = threading.Event()
        self.requests = 0
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._behaviour: dict[str, str] = {}
        self._behaviour_stamp = 0

    def count_request(self) -> None:
        with self._lock:
            self.requests += 1

    def behaviour(self, path: str) -> str:
        """Return a path's kind of behaviour, "" if it behaves well."""
        file = self.web / "behaviour.json"
        try:
            stamp = file.stat().st_mtime_ns
            if stamp != self._behaviour_stamp:
                self._behaviour = json.loads(file.read_text())
                self._behaviour_stamp = stamp
        except FileNotFoundError:
            return ""
        return self._behaviour.get(path, "")

    def process_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        with self._lock:
            self._open.add(request)
        super().process_request(request, client_address)  # type: ignore[arg-type]

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):  # its handler closed it first
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:  # type: ignore[override]
        """Say nothing: clients that leave early are expected."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Http  # type: ignore[assignment]

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.count_request()
        path = unquote(urlsplit(self.path).path)
        kind = self.server.behaviour(path)
        if kind == "timeout":
            self._hold()
        elif kind == REDIRECT:
            self._answer(302, b"", location="/moved" + path)
        elif kind == "html":
            self._answer(200, _PAGE, "text/html; charset=utf-8")
        elif kind == "zero":
            self._answer(200, b"", "image/jpeg")
        elif kind in ("403", "404"):
            self._answer(int(kind), _PAGE, "text/html; charset=utf-8")
        else:
            self._send_file(path, halved=kind == "truncated")

    def _send_file(self, path: str, *, halved: bool) -> None:
        web = self.server.web.resolve()
        try:
            file = (web / path.lstrip("/")).resolve()
            if not file.is_relative_to(web) or file.suffix not in _TYPES:
                raise FileNotFoundError(path)
            body = file.read_bytes()
        except (OSError, ValueError):  # ValueError: a NUL in the path
            self._answer(404, _PAGE, "text/html; charset=utf-8")
            return
        self._answer(200, body[: len(body) // 2] if halved else body, _TYPES[file.suffix])

    def _answer(self, status: int, body: bytes, kind: str = "", location: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if kind:
            self.send_header("Content-Type", kind)
        if location:
            self.send_header("Location", location)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hold(self) -> None:
        """Answer nothing until the client leaves, the server closes or the time is up."""
        self.close_connection = True
        self.connection.settimeout(0.2)
        for _ in range(int(HOLD_SECONDS / 0.2)):
            if self.server.closing.is_set():
                return
            try:
                if not self.connection.recv(1, socket.MSG_PEEK):
                    return
                self.server.closing.wait(0.2)  # the client sent more; it can wait too
            except TimeoutError:
                continue
            except OSError:
                return
