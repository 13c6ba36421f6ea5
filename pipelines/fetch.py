"""Fetching images from the web: what may be fetched, how, and why it failed.

Downloads run through img2dataset; redirects are checked as the URLs of the annotations are, and
bodies are bounded in size and time. Every URL ends as an image or as one of few stable reasons.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import string
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.images import CleanImage, ImagePolicy, Rejected, clean_image


@dataclass(frozen=True)
class FetchPolicy:
    """How images are fetched, and from where; the fields are explained in `IngestConfig`."""

    threads: int = 64
    timeout: float = 10.0
    max_seconds: float = 60.0
    max_megabytes: int = 64
    retries: int = 1
    user_agent_token: str = "beit3-ray"
    respect_robots: bool = True
    allow_loopback: bool = False


_UNREACHED = ("connection failed", "host not found", "timed out")
_MANY = 50
_ROBOTS = ["noai", "noimageai", "noindex", "noimageindex"]
_REASONS = (  # the first that matches what the downloader said
    (r"X-Robots-Tag", "robots: disallowed"),
    (r"redirect: (private address|unsupported scheme|bad url)", "{}"),
    (r"Redirection to url .* is not allowed", "unsupported scheme"),
    (r"too large: ", "too large"),
    (r"redirect error", "redirect loop"),
    (r"HTTP Error (\d{3})", "http {}"),
    (r"timed out|too slow: ", "timed out"),
    (r"getaddrinfo|Name or service|No address associated|name resolution", "host not found"),
    (r"SSL|certificate", "tls failed"),
    (r"IncompleteRead", "incomplete download"),
    (r"Connection|unreachable|closed connection|No route|Errno|BadStatusLine", "connection failed"),
    (r"URL|url|port|codec|label", "bad url"),
)


def fetch_images(
    urls: Iterable[str], policy: FetchPolicy, images: ImagePolicy | None = None
) -> dict[str, CleanImage | Rejected]:
    """Download and clean images; every URL, each fetched once, gets an image or a reason.

    Raises:
        ConnectionError: of many URLs not one host answered, so that it must be our network.
    """
    outcomes: dict[str, CleanImage | Rejected] = {}
    wanted: list[str] = []
    for url in dict.fromkeys(urls):
        refused = refuse(url, allow_loopback=policy.allow_loopback)
        if refused:
            outcomes[url] = refused
        else:
            wanted.append(url)
    lost = Rejected("download failed", "the downloader lost it", "download")
    fetched: dict[str, CleanImage | Rejected] = dict.fromkeys(wanted, lost)
    for index, data, error in _download([_wire_url(url) for url in wanted], policy):
        if data is None:
            fetched[wanted[index]] = Rejected(failure_reason(error), error[:200], "download")
        else:
            fetched[wanted[index]] = clean_image(data, images)
    if len(fetched) >= _MANY and all(
        isinstance(r, Rejected) and r.reason in _UNREACHED for r in fetched.values()
    ):
        raise ConnectionError(
            f"not one of {len(fetched)} URLs could be reached: is the network up?"
        )
    return outcomes | fetched


def refuse(url: str, *, allow_loopback: bool = False) -> Rejected | None:
    """Why a URL must not be fetched: its scheme, or a host on this machine or a private network.

    Looks at the URL only: a public name may still resolve to a private address.
    """
    try:
        parts = urlsplit(_wire_url(url))
        host, _ = (parts.hostname or "").rstrip("."), parts.port
    except ValueError as error:  # UnicodeError, of a host name, is one
        return Rejected("bad url", str(error)[:200], "annotations")
    if parts.scheme not in ("http", "https"):
        return Rejected("unsupported scheme", parts.scheme, "annotations")
    if not host:
        return Rejected("bad url", "no host", "annotations")
    address = _literal(host)
    if host == "localhost" or host.endswith(".localhost") or (address and address.is_loopback):
        return None if allow_loopback else Rejected("private address", host, "annotations")
    if address and not address.is_global:
        return Rejected("private address", host, "annotations")
    return None


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        try:  # the old spellings that resolvers take too: 127.1, 2130706433, 0x7f000001
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except (OSError, ValueError):
            return None
    return getattr(address, "ipv4_mapped", None) or address


def _wire_url(url: str) -> str:
    """The URL as HTTP wants it: international names and letters encoded, the rest untouched."""
    if url.isascii() and url.isprintable() and " " not in url:
        return url
    scheme, slashes, rest = url.partition("://")
    netloc, slash, path = rest.partition("/")
    if not netloc.isascii():
        netloc = netloc.encode("idna").decode()
    return f"{scheme}{slashes}{netloc}{slash}{quote(path, safe=string.punctuation)}"


def failure_reason(error: str) -> str:
    """One of few stable reasons for what the downloader said."""
    for pattern, reason in _REASONS:
        found = re.search(pattern, error)
        if found:
            return reason.format(*found.groups())
    return "download failed"


def _download(urls: Sequence[str], policy: FetchPolicy) -> Iterator[tuple[int, bytes | None, str]]:
    """Download with img2dataset; yields, in any order, index, bytes or None, what went wrong."""
    if not urls:
        return
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Here, because these imports take seconds: once in each worker process.
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    with tempfile.TemporaryDirectory(prefix="beit3-ingest-") as folder:
        shard = Path(folder, "urls.arrow")
        table = pa.table({"url": pa.array(urls, pa.string())})
        with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        downloader = Downloader(
            sample_writer_class=ParquetSampleWriter,
            resizer=Resizer(
                image_size=256,  # unused: see below
                resize_mode="no",
                resize_only_if_bigger=False,
                disable_all_reencoding=True,  # the bytes as they came: clean_image decides
            ),
            thread_count=min(policy.threads, len(urls)),
            save_caption=False,
            extract_exif=False,
            output_folder=folder,
            column_list=["url"],
            timeout=policy.timeout,
            number_sample_per_shard=len(urls),
            oom_shard_count=1,
            compute_hash=None,
            verify_hash_type=None,
            encode_format="jpg",
            retries=policy.retries,
            user_agent_token=policy.user_agent_token,
            disallowed_header_directives=_ROBOTS if policy.respect_robots else None,
        )
        urllib.request.install_opener(_opener(policy))
        try:
            downloader.download_shard((0, str(shard)))
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]  # the default again
        with pq.ParquetFile(Path(folder, "0.parquet")) as file:
            columns = ["key", "status", "error_message", "jpg"]
            for batch in file.iter_batches(batch_size=64, columns=columns):
                for row in batch.to_pylist():
                    good = row["status"] == "success"
                    yield int(row["key"]), row["jpg"] if good else None, row["error_message"] or ""


def _opener(policy: FetchPolicy) -> urllib.request.OpenerDirector:
    """What img2dataset opens URLs with: redirects are checked as URLs are, and bodies bounded."""
    # One TLS context for all: making one reads the whole list of authorities.
    secure = urllib.request.HTTPSHandler(context=ssl.create_default_context())
    bounded = _Bounded(policy.max_megabytes << 20, policy.max_seconds)
    return urllib.request.build_opener(secure, _Redirects(policy.allow_loopback), bounded)


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, allow_loopback: bool) -> None:
        self.allow_loopback = allow_loopback

    def redirect_request(self, req, fp, code, msg, headers, newurl):  # type: ignore[no-untyped-def]
        refused = refuse(newurl, allow_loopback=self.allow_loopback)
        if refused:
            raise urllib.error.URLError(f"redirect: {refused.reason}: {refused.detail}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Bounded(urllib.request.BaseHandler):
    """Ends a body that is too large, or too slow as a whole: a timeout only ends silence."""

    def __init__(self, most_bytes: int, most_seconds: float) -> None:
        self.most_bytes, self.most_seconds = most_bytes, most_seconds

    def http_response(self, request: Any, response: Any) -> Any:
        deadline = time.monotonic() + self.most_seconds

        def read() -> bytes:
            body = bytearray()
            while chunk := response.read1(1 << 16):
                body += chunk
                if len(body) > self.most_bytes:
                    raise urllib.error.URLError(f"too large: over {self.most_bytes} bytes")
                if time.monotonic() > deadline:
                    raise urllib.error.URLError(f"too slow: over {self.most_seconds} s")
            if response.length:  # what Content-Length promised and did not come
                raise urllib.error.URLError(f"IncompleteRead: {response.length} bytes are missing")
            return bytes(body)

        response.read = read
        return response

    https_response = http_response
