"""Fetches images from the web: each URL yields an image or one of a few stable failure reasons.

Downloads run through img2dataset, over the opener of `pipelines.safe_http`. Images are cleaned as
they arrive, while others are still downloading, so that only a few bodies are in memory.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
import urllib.request
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from pipelines.addresses import refuse, wire_url
from pipelines.images import CleanImage, ImagePolicy, Rejected, clean_image
from pipelines.safe_http import LARGE_BODY, Limits, opener


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
_MANY, _HOSTS = 50, 20
_ROBOTS = ["noai", "noimageai", "noindex", "noimageindex"]
_OURS = "^(?:<urlopen error )*"  # urllib wraps the opener's message, sometimes twice
_REASONS = (  # the first match to the downloader's error counts; servers can't fake the first ones
    (_OURS + r"(?:redirect: )?(private address|unsupported scheme|bad url|blocked port): ", "{}"),
    (_OURS + r"(too large|bad response): ", "{}"),
    (_OURS + r"too slow: ", "timed out"),
    (r"^Use of image disallowed by X-Robots-Tag", "robots: disallowed"),
    (r"^HTTP Error 3\d\d: The HTTP server returned a redirect error", "redirect loop"),
    (r"^HTTP Error 3\d\d: .*Redirection to url", "unsupported scheme"),
    (r"^HTTP Error ([1-5]\d\d)", "http {}"),
    (r"^HTTP Error", "bad response"),
    (r"^URL can't contain|^nonnumeric port", "bad url"),
    (r"timed out", "timed out"),
    (r"getaddrinfo|Name or service|No address associated|name resolution", "host not found"),
    (r"SSL|certificate", "tls failed"),
    (r"IncompleteRead", "incomplete download"),
    (r"Connection|unreachable|closed connection|No route|Errno", "connection failed"),
    (r"URL|url|port|codec|label", "bad url"),
)


def fetch_images(
    urls: Iterable[str], policy: FetchPolicy, images: ImagePolicy | None = None
) -> dict[str, CleanImage | Rejected]:
    """Download and clean images; every URL, each fetched once, gets an image or a reason.

    Raises:
        ConnectionError: not one host of many URLs answered, so the fault must be our network.
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
    for index, outcome in _download([wire_url(url) for url in wanted], policy, images).items():
        fetched[wanted[index]] = outcome
    hosts = {urlsplit(url).hostname for url in fetched}
    if (
        len(fetched) >= _MANY
        and len(hosts) >= _HOSTS
        and all(isinstance(r, Rejected) and r.reason in _UNREACHED for r in fetched.values())
    ):
        raise ConnectionError(
            f"not one of {len(fetched)} URLs on {len(hosts)} hosts could be reached: is the "
            "network up? "
            "(The environment's proxies are not used.)"
        )
    return outcomes | fetched


def failure_reason(error: str) -> str:
    """One of a few stable reasons for the downloader's error message."""
    for pattern, reason in _REASONS:
        found = re.search(pattern, error)
        if found:
            return reason.format(*found.groups())
    return "download failed"


def _download(
    urls: Sequence[str], policy: FetchPolicy, images: ImagePolicy | None
) -> dict[int, CleanImage | Rejected]:
    """Download with img2dataset; the outcomes by index."""
    outcomes: dict[int, CleanImage | Rejected] = {}
    if not urls:
        return outcomes
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    # Here, because these imports take seconds: once in each worker process.
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer

    limits = Limits(policy.max_megabytes << 20, policy.max_seconds, policy.allow_loopback)
    with tempfile.TemporaryDirectory(prefix="beit3-ingest-") as folder:
        shard = Path(folder, "urls.arrow")
        table = pa.table({"url": pa.array(urls, pa.string())})
        with pa.OSFile(str(shard), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        downloader = Downloader(
            sample_writer_class=functools.partial(_Cleaner, outcomes, images, limits),
            resizer=Resizer(
                image_size=256,  # unused: see below
                resize_mode="no",
                resize_only_if_bigger=False,
                disable_all_reencoding=True,  # keep the bytes as received: clean_image decides
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
        urllib.request.install_opener(opener(limits))
        try:
            downloader.download_shard((0, str(shard)))
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]  # the default again
    # img2dataset's closures form cycles, which would keep a shard's images until the next GC.
    taken = dict(outcomes)
    outcomes.clear()
    return taken


class _Cleaner:
    """Replaces img2dataset's writers: takes each download as soon as it arrives."""

    def __init__(
        self,
        outcomes: dict[int, CleanImage | Rejected],
        images: ImagePolicy | None,
        limits: Limits,
        *settings: Any,
    ) -> None:
        self.outcomes, self.images, self.limits = outcomes, images, limits

    def write(self, data: bytes | None, key: str, caption: None, meta: dict[str, Any]) -> None:
        if data is None:
            error = _printable(meta["error_message"] or "")
            self.outcomes[int(key)] = Rejected(failure_reason(error), error[:200], "download")
            return
        try:
            self.outcomes[int(key)] = clean_image(data, self.images)
        finally:
            if len(data) > LARGE_BODY:
                self.limits.large_bodies.release()

    def close(self) -> None:
        pass


def _printable(text: str) -> str:
    """A server's message, made safe for a table and a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:1000])
