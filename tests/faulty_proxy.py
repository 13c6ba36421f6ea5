"""A proxy before an S3 endpoint that answers some requests with 500 or 503, as S3 itself may."""

from __future__ import annotations

import http.client
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


@dataclass
class Faults:
    """How many requests passed, how many were answered with an error, and the proxy's address."""

    url: str = ""
    passed: int = 0
    failed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def faulty_proxy(
    target: str, share: float, seed: int = 0, *, forbidden: Sequence[str] = ()
) -> Iterator[Faults]:
    """Serve `target` on a port of its own, failing a share of the requests.

    Half of the failures come before the request is passed on, half after, so that it was done
    though the client is told that it was not. Requests of `forbidden` methods get 403, as of
    someone without permission.
    """
    faults, drawn, upstream = Faults(), random.Random(seed), urlparse(target)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            try:
                super().handle_one_request()
            except (ConnectionError, http.client.HTTPException):
                self.close_connection = True

        def _any(self) -> None:
            body = self._body()
            if self.command in forbidden:
                return self._answer(403, {}, b"")
            with faults.lock:
                fate = drawn.random()
                fail, late = fate < share, fate < share / 2
                faults.failed += fail
                faults.passed += not fail
            if fail and not late:
                return self._answer(503, {}, b"")
            status, headers, content = self._forward(body)
            if fail:
                return self._answer(500, {}, b"")
            return self._answer(status, headers, content)

        def _body(self) -> bytes:
            if "chunked" in self.headers.get("Transfer-Encoding", ""):
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return b"".join(parts)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
            assert upstream.hostname is not None
            connection = http.client.HTTPConnection(upstream.hostname, upstream.port, timeout=60)
            headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
            headers["Content-Length"] = str(len(body))
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            found = dict(response.getheaders())
            content = response.read()
            connection.close()
            return response.status, found, content

        def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
            self.send_response_only(status)
            length = headers.get("Content-Length", "") if self.command == "HEAD" else ""
            for name, value in headers.items():
                if name.lower() not in _HOP | {"content-length"}:
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _any

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    faults.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield faults
    finally:
        server.shutdown()
        server.server_close()
