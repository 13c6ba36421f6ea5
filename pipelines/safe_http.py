"""An opener for urllib (which img2dataset downloads with) that is safe against a hostile web.

It speaks http and https and nothing else: no files, no FTP, no proxies from the environment, no
cookies, no passwords. A host is resolved once, all its addresses are checked, and only these
addresses are connected to, so that a name can't mean one thing when checked and another when used.
One deadline covers name lookup, connection, handshake, headers, body and redirects. Bytes are
counted as they leave the socket. Nothing is decompressed.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pipelines.addresses import blocked_port, inside, is_loopback, refuse

HEAD_BYTES = 64 << 10
"""Maximum bytes of status line and headers."""
LARGE_BODY = 8 << 20
"""Only a few bodies larger than this are in memory at a time, see `Limits.large_bodies`."""
_NAME_SECONDS = 60.0  # how long the addresses of a name are cached
_MOST_NAMES = 4096

Sockaddr = tuple[Any, ...]


@dataclass(frozen=True)
class Limits:
    """The limits of one opener."""

    most_bytes: int
    most_seconds: float
    allow_loopback: bool = False
    large_bodies: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(8))
    """Acquired by a body that grows past LARGE_BODY; its receiver releases it when done."""


def opener(limits: Limits) -> urllib.request.OpenerDirector:
    """An opener to open URLs with, or to pass to `urllib.request.install_opener`."""
    made = _Opener(limits.most_seconds)
    for handler in (
        _Handler(limits),
        _Redirects(limits.allow_loopback),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.UnknownHandler(),
    ):
        made.add_handler(handler)
    return made


class _Opener(urllib.request.OpenerDirector):
    def __init__(self, most_seconds: float) -> None:
        super().__init__()
        self._most_seconds = most_seconds

    def open(self, fullurl: Any, data: Any = None, timeout: Any = None) -> Any:
        request: Any = urllib.request.Request(fullurl) if isinstance(fullurl, str) else fullurl
        if not hasattr(request, "clock"):  # a redirect keeps the clock of its first request
            seconds = self._most_seconds
            request.clock = _Clock(timeout or seconds, seconds, time.monotonic() + seconds)
        return super().open(request, data, timeout)


@dataclass(frozen=True)
class _Clock:
    silence: float
    whole: float
    deadline: float

    def left(self) -> float:
        """Seconds until the deadline; raises if it has passed."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise self.over()
        return left

    def over(self) -> urllib.error.URLError:
        return urllib.error.URLError(f"too slow: over {self.whole} s")

    def patience(self) -> float:
        """Seconds that one wait may take."""
        return min(self.silence, self.left())


# -- names and connections ------------------------------------------------------------------------


class _Names:
    """Finds the addresses of hosts; looks each host up once in a while, however many ask."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Future[list[tuple[int, Sockaddr]]]]] = {}

    def addresses(self, host: str, clock: _Clock) -> list[tuple[int, Sockaddr]]:
        with contextlib.suppress(socket.gaierror):  # a numeric address needs no lookup
            return _resolve(host, socket.AI_NUMERICHOST)
        now = time.monotonic()
        with self._lock:
            good_until, found = self._known.get(host, (0.0, None))
            if found is None or good_until < now:
                if len(self._known) >= _MOST_NAMES:
                    self._known.clear()
                found = Future()
                self._known[host] = now + _NAME_SECONDS, found
                # In a thread, because the system's resolver has no timeout.
                looking = threading.Thread(target=self._look_up, args=(host, found), daemon=True)
                looking.start()
        try:
            return found.result(clock.patience())
        except TimeoutError:
            clock.left()
            raise urllib.error.URLError(f"timed out: looking up {host}") from None

    def _look_up(self, host: str, found: Future[list[tuple[int, Sockaddr]]]) -> None:
        try:
            found.set_result(_resolve(host))
        except Exception as error:
            with self._lock:  # the next request looks it up again: the failure may be temporary
                if self._known.get(host, (0.0, None))[1] is found:
                    del self._known[host]
            found.set_exception(error)


def _resolve(host: str, flags: int = 0) -> list[tuple[int, Sockaddr]]:
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]


class _Web:
    """Connects to public hosts."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.tls = _tls_context()
        self._names = _Names()

    def connect(self, host: str, port: int, clock: _Clock) -> socket.socket:
        addresses = self._names.addresses(host, clock)
        for _, address in addresses:
            self._check(host, ipaddress.ip_address(address[0].partition("%")[0]), port)
        failure: OSError = socket.gaierror(f"getaddrinfo: no address of {host}")
        for family, (number, _, *rest) in addresses:
            try:
                connection = socket.socket(family, socket.SOCK_STREAM)
            except OSError as error:  # for example, no IPv6 here
                failure = error
                continue
            try:
                connection.settimeout(clock.patience())
                connection.connect((number, port, *rest))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    def _check(self, host: str, address: Any, port: int) -> None:
        if is_loopback(address) and self.limits.allow_loopback:
            return
        if inside(address):  # one is enough: an honest host has no internal address
            raise urllib.error.URLError(f"private address: {host} is {address}")
        if blocked_port(port):
            raise urllib.error.URLError(f"blocked port: {port}")


@functools.cache
def _tls_context() -> ssl.SSLContext:
    return ssl.create_default_context()  # once: it reads the whole list of authorities


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, *, web: _Web, clock: _Clock, **options: Any) -> None:
        super().__init__(host, **options)
        self._web, self._clock = web, clock
        self.response_class: Any = functools.partial(_Response, limits=web.limits, clock=clock)

    def connect(self) -> None:
        self.sock = self._web.connect(self.host, self.port, self._clock)


class _SecureConnection(_Connection):
    default_port = http.client.HTTPS_PORT

    def connect(self) -> None:
        super().connect()
        self.sock.settimeout(self._clock.patience())  # over the whole handshake
        self.sock = self._web.tls.wrap_socket(self.sock, server_hostname=self.host)
        self.sock.settimeout(self._clock.patience())


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, limits: Limits) -> None:
        super().__init__()
        self._web = _Web(limits)

    def http_open(self, request: Any) -> Any:
        return self.do_open(_Connection, request, web=self._web, clock=request.clock)  # type: ignore[arg-type]

    def https_open(self, request: Any) -> Any:
        return self.do_open(_SecureConnection, request, web=self._web, clock=request.clock)  # type: ignore[arg-type]

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_loopback: bool) -> None:
        self._allow_loopback = allow_loopback

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        refused = refuse(newurl, allow_loopback=self._allow_loopback)
        if refused:
            raise urllib.error.URLError(f"redirect: {refused.reason}: {refused.detail}")
        new: Any = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None:
            new.clock = req.clock
        return new


# -- responses ------------------------------------------------------------------------------------


class _Wire(io.RawIOBase):
    """A socket's incoming bytes, counted and under the clock."""

    def __init__(self, connection: socket.socket, clock: _Clock) -> None:
        self._connection, self._clock = connection, clock
        self._raw: Any = connection.makefile("rb", buffering=0)
        self.allowance = HEAD_BYTES

    def makefile(self, mode: str) -> io.BufferedReader:
        """The method of a socket that a response calls."""
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._clock.patience())
        try:
            count: int = self._raw.readinto(buffer)
        except TimeoutError:
            self._clock.left()  # raises if the overall deadline has passed
            raise
        self.allowance -= count
        if self.allowance < 0:
            raise urllib.error.URLError("too large: more bytes than headers or framing need")
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    def __init__(
        self, sock: socket.socket, *args: Any, limits: Limits, clock: _Clock, **options: Any
    ) -> None:
        self._limits, self._clock = limits, clock
        self._wire = _Wire(sock, clock)
        super().__init__(self._wire, *args, **options)  # type: ignore[arg-type]

    def begin(self) -> None:
        try:
            super().begin()
        except http.client.RemoteDisconnected:
            raise
        except http.client.HTTPException as error:
            raise _bad_response(error) from error
        # Chunks may be framed by more bytes than they hold, but not by much more.
        self._wire.allowance = 2 * self._limits.most_bytes + HEAD_BYTES
        if not 200 <= self.status < 300:
            self.close()  # bodies of redirects and errors are of no use

    def read(self, amt: int | None = None) -> bytes:
        if amt is not None or self.fp is None:
            return super().read(amt)
        with contextlib.ExitStack() as held:
            try:
                body = self._whole(held)
            except http.client.IncompleteRead:
                raise
            except http.client.HTTPException as error:
                raise _bad_response(error) from error
            held.pop_all()  # the receiver of a large body releases the semaphore
        return body

    def _whole(self, held: contextlib.ExitStack) -> bytes:
        limits, body = self._limits, bytearray()
        if (self.length or 0) > limits.most_bytes:
            raise urllib.error.URLError(f"too large: over {limits.most_bytes} bytes")
        large = False
        while chunk := self.read1(1 << 16):
            body += chunk
            if len(body) > limits.most_bytes:
                raise urllib.error.URLError(f"too large: over {limits.most_bytes} bytes")
            if len(body) > LARGE_BODY and not large:
                large = limits.large_bodies.acquire(timeout=self._clock.left())
                if not large:
                    raise self._clock.over()
                held.callback(limits.large_bodies.release)
        if self.length:  # bytes that Content-Length promised but that did not come
            raise urllib.error.URLError(f"IncompleteRead: {self.length} bytes are missing")
        return bytes(body)


def _bad_response(error: http.client.HTTPException) -> urllib.error.URLError:
    return urllib.error.URLError(f"bad response: {type(error).__name__}")  # without its quotation
