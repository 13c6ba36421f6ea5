"""Builds HTML that is safe by construction, with embedded pictures and human-readable numbers."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable
from functools import cache
from typing import TypeAlias

from PIL import Image

from pipelines.report_content import Picture


class Html(str):
    """Markup. Any other string is text, and is escaped when joined with markup."""

    __slots__ = ()


Content: TypeAlias = "str | int | float | None | Iterable[Content]"
Section: TypeAlias = "tuple[str, str, Html | None]"
"""A section's id, title and content."""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_VOID = {"img", "meta", "br"}
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffe\uffff]")


def text(value: object) -> Html:
    """Any value as visible text: escaped, without control characters or lone surrogates."""
    if isinstance(value, Html):
        return value
    plain = str(value).encode(errors="replace").decode()
    return Html(html.escape(_UNSEEN.sub("\N{REPLACEMENT CHARACTER}", plain), quote=True))


def join(*children: Content) -> Html:
    """Children one after the other; None is skipped."""
    parts: list[str] = []
    for child in children:
        if child is None:
            continue
        if isinstance(child, str | int | float):
            parts.append(text(child))
        else:
            parts.append(join(*child))
    return Html("".join(parts))


def el(tag: str, *children: Content, **attributes: object) -> Html:
    """An element. `class_` is the attribute class, `view_box` viewBox, other `_` become `-`."""
    shown = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = "viewBox" if name == "view_box" else name.rstrip("_").replace("_", "-")
        shown.append(f' {name}="{text(value)}"' if value is not True else f" {name}")
    start = f"<{tag}{''.join(shown)}>"
    return Html(start if tag in _VOID else f"{start}{join(*children)}</{tag}>")


# -- pictures -------------------------------------------------------------------------------------


def opened(picture: Picture) -> Image.Image | None:
    """The picture in RGB, or None if its bytes can't be read."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    try:
        with Image.open(io.BytesIO(picture), formats=("JPEG", "PNG", "WEBP")) as image:
            return image.convert("RGB")
    except Exception:  # decoders raise nearly anything; one bad picture must not cost the page
        return None


def data_uri(picture: Picture, side: int, *, exact: bool = False) -> str | None:
    """The picture, at most `side` pixels long; re-encoded, so that no stored byte gets in.

    `exact` preserves each pixel (PNG): for code maps and patches.
    """
    image = opened(picture)
    if image is None:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if exact:
        image.save(out, "PNG", optimize=True)
    else:
        image.save(out, "JPEG", quality=84)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"


def img(picture: Picture, alt: str, *, side: int = 240, exact: bool = False) -> Html:
    """An image element, or a placeholder if the picture can't be read."""
    source = data_uri(picture, side, exact=exact)
    if source is None:
        return el("span", "picture can't be read", class_="missing", role="img", aria_label=alt)
    return el("img", src=source, alt=alt, class_="exact" if exact else None, loading="lazy")


def figure(picture: Picture, alt: str, *below: Content, side: int = 240, frame: str = "") -> Html:
    """A picture with the content below it."""
    caption = el("figcaption", *below) if any(b is not None for b in below) else None
    return el("figure", img(picture, alt, side=side), caption, class_=frame or None)


# -- numbers --------------------------------------------------------------------------------------


def number(value: float | None, *, percent: bool = False) -> str:
    """A value in a few digits; a dash if there is none."""
    if value is None or value != value:
        return "–"
    if percent:
        return f"{100 * value:.1f} %"
    if isinstance(value, int) or (abs(value) >= 1000 and float(value).is_integer()):
        return f"{int(value):,}"
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def size(count: int) -> str:
    """A number of bytes in human-readable units."""
    amount, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            break
        amount /= 1000
    return f"{amount:.0f} {unit}" if unit == "B" or amount >= 100 else f"{amount:.1f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as hours, minutes, seconds."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


# -- small blocks ---------------------------------------------------------------------------------


def facts(pairs: Iterable[tuple[str, str]]) -> Html | None:
    """Labelled values in a row."""
    shown = [
        el("div", el("dt", label), el("dd", value))
        for label, value in pairs
        if value not in ("", "–")
    ]
    return el("dl", shown, class_="facts") if shown else None


def table(
    head: Iterable[str], rows: Iterable[Html], *, left: Iterable[str] = (), class_: str = ""
) -> Html:
    """A table that scrolls horizontally on a narrow screen; `left` names left-aligned columns."""
    cells = [el("th", cell, scope="col", class_="left" if cell in left else None) for cell in head]
    body = el("table", el("thead", el("tr", cells)), el("tbody", *rows), class_=class_ or None)
    return el("div", body, class_="scroll")


def note(words: str) -> Html | None:
    return el("p", words, class_="note") if words else None


def page(title: str, summary: str, known: Html | None, sections: Iterable[Section]) -> str:
    """A whole page: a header with links, then the sections that have content.

    It opens offline, and its policy allows no script and no request.
    """
    shown = [(id, name, body) for id, name, body in sections if body]
    links = [el("a", name, href=f"#{id}") for id, name, _ in shown]
    whole = el(
        "html",
        el(
            "head",
            el("meta", charset="utf-8"),
            el("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            el("meta", name="viewport", content="width=device-width, initial-scale=1"),
            el("title", title),
            style(),
        ),
        el(
            "body",
            el(
                "header",
                el("h1", title),
                el("p", summary, class_="summary") if summary else None,
                known,
                el("nav", *links, aria_label="Sections") if links else None,
            ),
            el("main", *(el("section", el("h2", n), body, id=id) for id, n, body in shown)),
            el("footer", el("p", "Everything on this page is inside this one file.")),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{whole}\n"


@cache
def style() -> Html:
    """The page's style sheet."""
    return el("style", Html(_CSS))


_CSS = """
:root{--ink:#1b2430;--soft:#5a6675;--line:#dde2e8;--paper:#fff;--ground:#f5f6f8;--deep:#17607d;
--warm:#c0752f;--grey:#98a2ae;--good:#2c7a4b;--bad:#b3423a}
*{box-sizing:border-box}
html{scroll-behavior:smooth;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue",Arial,"DejaVu Sans",sans-serif}
header,main,footer{max-width:1200px;margin:0 auto;padding:0 24px}
header{padding-top:40px}
h1{font-size:2rem;line-height:1.2;margin:0 0 8px;letter-spacing:-.01em}
h2{font-size:1.35rem;margin:0 0 16px;letter-spacing:-.005em}
h3{font-size:1rem;margin:28px 0 10px}
h4{font-size:.9rem;margin:18px 0 8px;color:var(--soft);font-weight:600}
h2+h3{margin-top:0}
p{margin:0 0 12px;max-width:75ch}
a{color:var(--deep)}
.summary{font-size:1.08rem;color:var(--soft)}
.note,figcaption,.small{font-size:.84rem;color:var(--soft)}
.note{margin-top:10px}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:24px 28px;
margin:20px 0}
nav{display:flex;flex-wrap:wrap;gap:4px 18px;margin:20px 0 0;font-size:.9rem}
nav a{text-decoration:none}nav a:hover{text-decoration:underline}
.facts{display:flex;flex-wrap:wrap;gap:10px 36px;margin:0 0 16px}
.facts dt{font-size:.76rem;color:var(--soft)}
.facts dd{margin:0;font-weight:600;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.scroll{overflow-x:auto;margin:0 0 8px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.92rem}
th{font-weight:600;font-size:.8rem;color:var(--soft);text-align:right;vertical-align:bottom;
padding:6px 10px;border-bottom:2px solid var(--line)}
td{text-align:right;padding:7px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child,th.left,td.left,.words th,.words td{text-align:left}
td:first-child,th:first-child{padding-left:0}
tbody tr:last-child td{border-bottom:0}
td.wide{width:24%;min-width:150px}
td:first-child{white-space:normal;min-width:110px}
tr.best td{background:#eef6f3}
td .small{display:block;white-space:normal}
.best-value{font-weight:700;color:var(--deep)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:18px 16px}
.grid.wide{grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:24px 20px}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));
gap:24px 28px}
figure{margin:0;min-width:0}
figure>img{width:100%;aspect-ratio:4/3;object-fit:contain;background:var(--ground);
border-radius:6px;display:block}
figure.right>img{box-shadow:0 0 0 3px var(--good)}
figure.square>img{aspect-ratio:1}
figcaption{margin-top:6px;overflow-wrap:anywhere;unicode-bidi:isolate}
figcaption p{margin:0 0 4px;unicode-bidi:isolate}
img.exact{image-rendering:pixelated}
.missing{display:flex;align-items:center;justify-content:center;aspect-ratio:4/3;border-radius:6px;
background:var(--ground);color:var(--soft);font-size:.8rem;text-align:center;padding:8px}
.saying{display:grid;grid-template-columns:5.6em 1fr;gap:0 6px;align-items:baseline}
.tag{font-size:.74rem;color:var(--soft)}
.said{color:var(--ink)}
.good{color:var(--good)}.bad{color:var(--bad)}
.good::before{content:"\\2713\\00a0"}.bad::before{content:"\\2717\\00a0"}
.pieces{display:flex;flex-wrap:wrap;gap:3px;margin:4px 0 14px;font-size:.88rem}
.pieces span{background:#e8f0f3;border-radius:4px;padding:1px 6px;white-space:pre-wrap;
overflow-wrap:anywhere}
.pieces span:nth-child(even){background:#f4eadf}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.strip{display:grid;grid-template-columns:repeat(auto-fill,minmax(96px,1fr));gap:8px}
.strip img,.strip .missing,.pair img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:4px;
display:block}
.codes{display:grid;grid-template-columns:repeat(auto-fill,minmax(260px,1fr));gap:12px 24px}
.code{display:grid;grid-template-columns:5.6em 1fr;align-items:center}
.code b{font-size:.78rem;font-weight:600;white-space:nowrap;font-variant-numeric:tabular-nums}
.code div{display:flex;flex-wrap:wrap;gap:4px}
.code img{width:32px;height:32px;border-radius:3px}
.query{margin:22px 0 0;padding-top:14px;border-top:1px solid var(--line)}
.query>p{font-weight:600;margin-bottom:10px;unicode-bidi:isolate}
.ranked{display:grid;grid-template-columns:repeat(5,minmax(0,1fr));gap:12px}
.texts{display:grid;grid-template-columns:200px 1fr;gap:20px;align-items:start}
ol{margin:0;padding-left:1.6em}li{margin:0 0 5px;overflow-wrap:anywhere;unicode-bidi:isolate}
.bar{display:flex;height:16px;border-radius:4px;overflow:hidden;background:var(--ground)}
.bar span{min-width:1px}
.bars{display:grid;grid-template-columns:minmax(90px,auto) 1fr minmax(70px,auto);gap:8px 14px;
align-items:center;font-size:.88rem;margin:0 0 12px;font-variant-numeric:tabular-nums}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.82rem;color:var(--soft);margin:6px 0 0}
.legend i{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:6px;
vertical-align:-1px}
.legend i.dashed{height:0;width:20px;border-top:2px dashed var(--soft);border-radius:0;
vertical-align:4px}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit;font-size:12px;fill:var(--soft)}
svg .grid-line{stroke:var(--line);stroke-width:1}
blockquote{margin:0 0 10px;padding:0 0 0 14px;border-left:3px solid var(--line);color:var(--soft);
font-size:.9rem;overflow-wrap:anywhere;unicode-bidi:isolate}
code{font:.86rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;
background:var(--ground);border:1px solid var(--line);border-radius:5px;padding:3px 8px;
overflow-wrap:anywhere;white-space:pre-wrap}
.words td{white-space:normal}
footer{padding-bottom:40px;color:var(--soft);font-size:.82rem}
@media(max-width:640px){header,main,footer{padding-left:12px;padding-right:12px}
header{padding-top:24px}section{padding:18px 16px;border-radius:8px}h1{font-size:1.5rem}
.grid{grid-template-columns:repeat(2,1fr)}.grid.wide{grid-template-columns:1fr}
.ranked{grid-template-columns:repeat(3,minmax(0,1fr))}.texts{grid-template-columns:1fr}
.texts figure{max-width:240px}th,td{padding-left:7px;padding-right:7px}
td.words{white-space:normal}table{font-size:.86rem}}
@media print{body{background:#fff}section{break-inside:avoid-page;border:0;padding:0}
nav{display:none}}
"""
