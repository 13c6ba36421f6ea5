"""What may be fetched and for how long: addresses, names, redirects, TLS, limits."""

from __future__ import annotations

import datetime
import gc
import ipaddress
import socket
import ssl
import threading
import time
import urllib.error
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_web
import pytest
from hostile_web import HostileServer, dribble, forever, redirect, response

from pipelines import safe_http
from pipelines.addresses import blocked_port, inside
from pipelines.fetch import FetchPolicy, failure_reason, fetch_images, refuse
from pipelines.images import CleanImage, Rejected, clean_image
from pipelines.safe_http import Limits, opener

POLICY = FetchPolicy(threads=8, retries=0, max_megabytes=1, allow_loopback=True)
GOOD = hostile_web.picture(hostile_web.random.Random(0))


@pytest.fixture
def server() -> Iterator[HostileServer]:
    with HostileServer({"/good": response(GOOD)}) as running:
        yield running


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The tests' own resolver, and how often it was asked for each name."""
    asked: Counter[str] = Counter()
    known = hostile_web.resolver(socket.getaddrinfo)

    def counting(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        if not options.get("flags", 0) & socket.AI_NUMERICHOST:
            asked[host] += 1
        return known(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", counting)
    return asked


def outcome(url: str, policy: FetchPolicy = POLICY) -> CleanImage | Rejected:
    (found,) = fetch_images([url], policy).values()
    return found


def reason(url: str, policy: FetchPolicy = POLICY) -> str:
    found = outcome(url, policy)
    return found.reason if isinstance(found, Rejected) else ""


# -- addresses ------------------------------------------------------------------------------------


INSIDE = """
    127.0.0.1 127.255.255.254 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 172.31.255.255 192.168.0.1
    169.254.169.254 100.64.0.1 100.127.255.255 192.0.0.1 192.0.0.192 192.0.2.1 198.18.0.1
    198.51.100.1 203.0.113.1 192.88.99.1 224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255
    168.63.129.16 :: ::1 ::2 ::10.0.0.1 ::8.8.8.8 ::ffff:127.0.0.1 ::ffff:10.0.0.1
    ::ffff:0:10.0.0.1 64:ff9b::10.0.0.1 64:ff9b::169.254.169.254 64:ff9b:1::8.8.8.8
    2002:a00:1:: 2002:a9fe:a9fe::1 2002:7f00:1:: 2001::1 2001:0:53aa:64c:0:0:f5ff:fffe
    2001:10::1 2001:20::1 2001:db8::1 3fff::1 100::1 5f00::1 fc00::1 fd00:ec2::254 fe80::1
    febf::1 fec0::1 ff02::1 ff0e::1 4000::1
"""
OUTSIDE = """
    1.1.1.1 8.8.8.8 93.184.216.34 172.15.0.1 172.32.0.1 100.63.0.1 100.128.0.1 192.0.1.1
    223.255.255.255 168.63.129.15 2606:4700::1111 2a00:1450::1 2001:4860::8888 2001:200::1
    64:ff9b::8.8.8.8 ::ffff:8.8.8.8 2002:808:808::1
"""


@pytest.mark.parametrize(
    "address",
    INSIDE.split(),
)
def test_addresses_inside(address: str) -> None:
    assert inside(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    OUTSIDE.split(),
)
def test_addresses_outside(address: str) -> None:
    assert not inside(ipaddress.ip_address(address))


@pytest.mark.parametrize("url", [url for url in hostile_web.PRIVATE if "%" not in url])
def test_every_spelling_of_a_private_address(url: str) -> None:
    for spelled in (url, url.replace("http:", "HTTPS:"), url.replace("/", "//", 1).upper()):
        found = refuse(spelled, allow_loopback=True)
        assert found is not None and found.reason in ("private address", "bad url")
    assert refuse(url, allow_loopback=True) == refuse(url)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org:80/", None),
        ("http://example.org:8080/", None),
        ("https://example.org:8443/", None),
        ("http://example.org:50000/", None),
        ("http://example.org:22/", "blocked port"),
        ("http://example.org:0/", "blocked port"),
        ("http://example.org:25/", "blocked port"),
        ("http://example.org:6667/", "blocked port"),
        ("http://user:secret@example.org/", "bad url"),
        ("http://example.org\\@10.0.0.1/", "bad url"),
        ("http://localhost.localdomain.internal/", "private address"),
        ("http://metadata.google.internal./", "private address"),
        ("http://１０.0.0.1/", "private address"),  # full-width digits
        ("http://10。0。0。1/", "private address"),
        ("http://\ud800/", "bad url"),
        ("http://example.org/\udcff", "bad url"),
        ("data:image/png;base64,AAAA", "unsupported scheme"),
        ("", "unsupported scheme"),
    ],
)
def test_urls(url: str, reason: str | None) -> None:
    found = refuse(url)
    assert (found.reason if found else None) == reason


def test_loopback_has_every_port_where_it_is_allowed_at_all() -> None:
    assert refuse("http://127.0.0.1:25/", allow_loopback=True) is None
    assert blocked_port(25) and not blocked_port(443)


# -- names and connections ------------------------------------------------------------------------


@pytest.mark.usefixtures("names")
def test_names_of_addresses_inside_are_not_connected_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("it was connected to")

    monkeypatch.setattr(safe_http.socket, "socket", connect)
    inside_names = [n for n in hostile_web.NAMES if n not in ("pictures.test", "nowhere.test")]
    urls = [f"{scheme}://{n}/x.jpg" for n in inside_names for scheme in ("http", "https")]
    found = fetch_images(urls, POLICY)
    assert {r.reason for r in found.values() if isinstance(r, Rejected)} == {"private address"}
    assert reason("http://nowhere.test/x.jpg") == "host not found"
    strict = replace(POLICY, allow_loopback=False)
    assert reason("http://pictures.test/x.jpg", strict) == "private address"


def test_a_name_is_asked_for_once_and_its_checked_address_connected_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A name that means something else the second time (DNS rebinding) gains nothing."""
    asked: list[str] = []
    connected: list[Any] = []

    def resolve(host: str, *_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if flags & socket.AI_NUMERICHOST:
            raise socket.gaierror
        asked.append(host)
        number = "93.184.216.34" if len(asked) == 1 else "10.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (number, 0))]

    class Socket:
        def __init__(self, *_: Any) -> None:
            pass

        def settimeout(self, seconds: float) -> None:
            pass

        def connect(self, address: Any) -> None:
            connected.append(address)
            raise ConnectionRefusedError(111, "Connection refused")

        def close(self) -> None:
            pass

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(safe_http.socket, "socket", Socket)
    patient = replace(POLICY, retries=3)
    assert reason("http://changing.test/x.jpg", patient) == "connection failed"
    assert asked == ["changing.test"] and connected == [("93.184.216.34", 80)] * 4


def test_one_lookup_for_many_images(server: HostileServer, names: Counter[str]) -> None:
    base = f"http://pictures.test:{server.port}"
    server.answers |= {f"/{i}": response(GOOD) for i in range(60)}
    found = fetch_images([f"{base}/{i}" for i in range(60)], POLICY)
    assert all(isinstance(f, CleanImage) and f.data == GOOD for f in found.values())
    assert names == {"pictures.test": 1}


def test_images_leave_memory_with_their_shard(server: HostileServer) -> None:
    server.answers |= {f"/{i}": response(GOOD) for i in range(20)}
    gc.collect()
    gc.disable()  # nothing must wait for its next sweep
    try:
        found = fetch_images([f"{server.url}/{i}" for i in range(20)], POLICY)
        alive = [weakref.ref(image) for image in found.values()]
        assert all(isinstance(reference(), CleanImage) for reference in alive)
        del found
        assert not any(reference() for reference in alive)
    finally:
        gc.enable()


def test_proxies_of_the_environment_are_not_used(
    server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostileServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert reason(f"{server.url}/good") == ""
        assert not proxy.requests


def test_the_opener_speaks_http_and_nothing_else(tmp_path: Path) -> None:
    made = opener(Limits(1000, 1.0))
    assert set(made.handle_open) == {"http", "https", "unknown"}  # type: ignore[attr-defined]
    (tmp_path / "secret").write_text("secret")
    for url in (f"file://{tmp_path}/secret", "ftp://127.0.0.1/x", "data:,x"):
        with pytest.raises(urllib.error.URLError, match="unknown url type"):
            made.open(url)


def test_what_is_said_about_us(server: HostileServer) -> None:
    """Nothing but who we are; not where we came from, and nothing that servers told us to say."""
    login = response(b"", "302 Found", "Location: /good", "Set-Cookie: id=1; Path=/", "Refresh: 0")
    server.answers["/login"] = login
    assert reason(f"{server.url}/login") == ""
    assert len(server.requests) == 2
    for request in server.requests:
        lines = request.decode().strip().split("\r\n")[1:]
        headers = dict(line.split(": ", 1) for line in lines)
        assert headers.pop("User-Agent").endswith("+https://github.com/rom1504/img2dataset)")
        host = f"127.0.0.1:{server.port}"
        assert headers == {"Host": host, "Connection": "close", "Accept-Encoding": "identity"}


def test_line_breaks_in_urls_say_nothing_to_servers(server: HostileServer) -> None:
    evil = "\r\nX-Evil: 1\r\n\r\nGET /secret HTTP/1.1"
    assert reason(f"{server.url}/{evil}") == "http 404"
    assert reason(f"http://127.0.0.1:{server.port}{evil}/") == "bad url"
    assert len(server.requests) == 1 and server.requests[0].count(b"\r\n") == 6


# -- limits ---------------------------------------------------------------------------------------

_HEAD = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "again", "reasons"),
    [
        (_HEAD + b"\r\n", b"x", {"too large"}),
        (_CHUNKED, b"1\r\nx\r\n", {"too large"}),
        (_CHUNKED, b"1;" + b"x" * 60_000 + b"\r\ny\r\n", {"too large"}),
        (_CHUNKED + b"0\r\n", b"Trailer: x\r\n", {"too large"}),
        (_HEAD, b"X: " + b"y" * 60_000 + b"\r\n", {"too large"}),
        (_HEAD, b"X: y\r\n", {"bad response"}),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n", {"too large"}),
        (b"", b"\0", {"bad response", "too large"}),
        (b"HTTP/1.1 404 No\r\nX:", b" ", {"bad response", "too large"}),
        (b"HTTP/1.1 302 On\r\nLocation: /good\r\n\r\n", b"x", {""}),
    ],
)
def test_what_never_ends_is_ended(
    server: HostileServer, start: bytes, again: bytes, reasons: set[str]
) -> None:
    server.answers["/endless"] = forever(start, again)
    began = time.monotonic()
    assert reason(f"{server.url}/endless") in reasons
    assert time.monotonic() - began < 10


def test_one_clock_over_everything(server: HostileServer, names: Counter[str]) -> None:
    def late(connection: socket.socket) -> None:
        time.sleep(0.3)
        connection.sendall(redirect(f"/hop/{time.monotonic()}"))

    class Hops(dict[str, Any]):
        def get(self, path: str, default: Any = None) -> Any:
            return late if path.startswith("/hop/") else super().get(path, default)

    server.answers = Hops(
        {
            "/head": dribble(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 1000, 0.1),
            "/line": dribble(b"HTTP/1.1 200 " + b"y" * 1000, 0.1),
            "/body": dribble(response(GOOD, length=10_000), 0.1),
            "/chunk": dribble(_CHUNKED + b"1;" + b"z" * 1000, 0.1),
            "/silent": lambda connection: time.sleep(5),
            "/good": response(GOOD),
        }
    )
    paths = ["/head", "/line", "/body", "/chunk", "/silent", "/hop/0", "/good"]
    hurried = replace(POLICY, max_seconds=2.0)
    fetch_images([f"{server.url}/good"], POLICY)  # imports
    began = time.monotonic()
    found = fetch_images([server.url + path for path in paths], hurried)
    assert time.monotonic() - began < 10
    reasons = {u: r.reason for u, r in found.items() if isinstance(r, Rejected)}
    assert set(reasons.values()) == {"timed out"} and len(reasons) == len(paths) - 1


def test_a_resolver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def resolve(*_: Any, flags: int = 0, **__: Any) -> list[Any]:
        if not flags & socket.AI_NUMERICHOST:
            answer.wait(20)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    began = time.monotonic()
    assert reason("http://slow.test/x.jpg", replace(POLICY, max_seconds=0.5)) == "timed out"
    assert time.monotonic() - began < 10
    answer.set()


def test_large_bodies_take_turns(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_http, "LARGE_BODY", 1 << 16)
    monkeypatch.setattr("pipelines.fetch.LARGE_BODY", 1 << 16)
    body = b"x" * (1 << 18)
    cut = response(body, length=1 << 19)  # these give their places back, too
    server.answers |= {f"/{i}": cut if i % 3 == 0 else response(body) for i in range(60)}
    server.answers["/image"] = response(GOOD + bytes(1 << 18))
    urls = [f"{server.url}/{i}" for i in range(60)] + [f"{server.url}/image"]
    found = fetch_images(urls, replace(POLICY, threads=32))
    reasons = Counter(f.reason if isinstance(f, Rejected) else "" for f in found.values())
    assert reasons == {"not an image": 40, "incomplete download": 20, "": 1}


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("HTTP Error 404: X-Robots-Tag", "http 404"),
        ("HTTP Error 500: <urlopen error timed out>", "http 500"),
        ("HTTP Error 999: Request denied", "bad response"),
        ("<urlopen error <urlopen error too slow: over 1 s>>", "timed out"),
        ("<urlopen error private address: timed.out.test is 10.0.0.1>", "private address"),
        ("<urlopen error redirect: blocked port: 22>", "blocked port"),
        ("<urlopen error timed out: looking up x>", "timed out"),
        ("<urlopen error bad response: LineTooLong>", "bad response"),
        ("URL can't contain control characters. '/SSL' (found at least ' ')", "bad url"),
        ("", "download failed"),
    ],
)
def test_reasons_are_not_the_servers_to_choose(said: str, reason: str) -> None:
    assert failure_reason(said) == reason


# -- TLS ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for pictures.test that nobody signed, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "pictures.test")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("pictures.test")]), False)
        .sign(key, hashes.SHA256())
    )
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    form = serialization.Encoding.PEM
    secret = key.private_bytes(
        form, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(signed.public_bytes(form) + secret)
    return file


def test_tls_is_checked_against_the_name(
    certificate: Path,
    server: HostileServer,
    names: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    asked_for: list[str | None] = []
    context.sni_callback = lambda _, name, __: asked_for.append(name)

    def over_tls(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            secure.recv(65536)
            secure.sendall(response(GOOD))

    monkeypatch.setattr(server, "_answer", over_tls)
    url = f"https://pictures.test:{server.port}/x.jpg"
    assert reason(url) == "tls failed"

    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(safe_http, "_tls_context", lambda: trusting)
    found = outcome(url)
    assert isinstance(found, CleanImage) and found == clean_image(GOOD)
    assert asked_for == ["pictures.test"] * 2
    assert reason(f"https://127.0.0.1:{server.port}/x.jpg") == "tls failed"


def test_a_handshake_that_never_comes(server: HostileServer, names: Counter[str]) -> None:
    server._answer = dribble(b"\x16\x03\x03\x40\x00" + bytes(1000), 0.1)  # type: ignore[method-assign]
    url = f"https://pictures.test:{server.port}/x.jpg"
    began = time.monotonic()
    assert reason(url, replace(POLICY, max_seconds=0.5)) in ("timed out", "tls failed")
    assert time.monotonic() - began < 10
