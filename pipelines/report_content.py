"""The content of a report, as plain values.

Every section is optional; one that is None or empty is left out of the page. Nothing here depends
on where values come from (`pipelines.report` gathers them) or how they look
(`pipelines.report_page`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from PIL import Image

Picture = Image.Image | bytes
"""A picture, or the bytes of one (JPEG, PNG or WEBP)."""
Codes = Sequence[Sequence[int]]
"""Visual tokens in rows and columns, as returned by a numpy array's `tolist()`."""


# -- headline -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A row of the score table; an unknown value is None."""

    task: str
    metric: str
    blind: float | None = None
    scratch: float | None = None
    pretrained: float | None = None
    percent: bool = True
    """Values are shares (0.42 shows as 42.0 %); otherwise they are shown as they are."""
    lower_is_better: bool = False
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """The report's subject and main results."""

    title: str
    summary: str = ""
    date: str = ""
    code_version: str = ""
    seconds: float | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further labelled values, such as {"Parameters": "2.1 million"}."""
    scores: Sequence[Score] = ()
    note: str = ""
    """Shown below the scores: how to read them, and how far to trust them."""


# -- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """A picture and its captions (or a class name)."""

    image: Picture
    captions: Sequence[str] = ()


@dataclass(frozen=True)
class IngestedSource:
    """The yield of one published source. `rows` counts images, or documents of a text source."""

    name: str
    read: int
    rows: int
    captions: int = 0
    bytes: int = 0
    set_aside: Mapping[str, int] = field(default_factory=dict)
    """Number of records set aside, by reason."""
    samples: Sequence[Sample] = ()
    texts: Sequence[str] = ()
    """Samples of a text source."""


@dataclass(frozen=True)
class IngestionSection:
    sources: Sequence[IngestedSource]
    note: str = ""


# -- tokenizers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextTokenizer:
    vocabulary: int
    examples: Sequence[tuple[str, Sequence[str]]] = ()
    """Texts and the pieces they are cut into."""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CodeMap:
    """A picture as it was tokenized (the crop), and the code of each of its patches."""

    image: Picture
    codes: Codes


@dataclass(frozen=True)
class ImageTokenizer:
    codes: int
    """Size of the codebook."""
    used: int | None = None
    perplexity: float | None = None
    dead: int | None = None
    cosine: float | None = None
    """Mean cosine similarity of the decoder's output to the teacher's features."""
    usage: Sequence[float] = ()
    """How often each code was used, in any order."""
    maps: Sequence[CodeMap] = ()
    patches: Mapping[int, Sequence[Picture]] = field(default_factory=dict)
    """Example patches, by their code."""
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerSection:
    text: TextTokenizer | None = None
    image: ImageTokenizer | None = None


# -- training -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    label: str
    points: Sequence[tuple[float, float]]
    """Step and value."""


@dataclass(frozen=True)
class Chart:
    title: str
    curves: Sequence[Curve]
    x_label: str = "step"
    baseline: float | None = None
    """A dashed line across the chart, such as chance or the score of a unigram model."""
    baseline_label: str = "baseline"
    percent: bool = False
    smooth: bool = True
    """Draw a moving average over the values if there are many."""
    note: str = ""


@dataclass(frozen=True)
class MaskedExample:
    """An image with hidden patches, and the codes that the model predicted for them."""

    image: Picture
    masked: Picture
    predicted: Codes | None = None
    true: Codes | None = None
    hidden: Sequence[Sequence[bool]] | None = None
    """Which patches were hidden; others are dimmed in the maps."""
    text: str = ""
    """For a pair: its text, with hidden and predicted tokens, as readable text."""


@dataclass(frozen=True)
class TrainingSection:
    charts: Sequence[Chart] = ()
    masked: Sequence[MaskedExample] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


# -- tasks ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionExample:
    image: Picture
    generated: str
    baseline: str | None = None
    """The caption by the model without pretraining."""
    truths: Sequence[str] = ()


@dataclass(frozen=True)
class AnswerExample:
    """A question about one or more images: VQA, a statement of NLVR2, a class to name."""

    images: Sequence[Picture]
    truth: str
    pretrained: str
    scratch: str | None = None
    question: str = ""
    right: bool | None = None
    """Whether `pretrained` counts as right; by default, whether it equals the truth."""
    scratch_right: bool | None = None


@dataclass(frozen=True)
class AnswerSection:
    title: str
    examples: Sequence[AnswerExample]
    note: str = ""


@dataclass(frozen=True)
class RankedImage:
    image: Picture
    right: bool = False
    score: float | None = None


@dataclass(frozen=True)
class RankedText:
    text: str
    right: bool = False
    score: float | None = None


@dataclass(frozen=True)
class RetrievalSection:
    """Galleries of both directions: the best results first."""

    text_to_image: Sequence[tuple[str, Sequence[RankedImage]]] = ()
    image_to_text: Sequence[tuple[Picture, Sequence[RankedText]]] = ()
    note: str = ""


@dataclass(frozen=True)
class Trial:
    parameters: Mapping[str, float | int | str | bool]
    score: float | None
    steps: int
    status: str = "finished"
    name: str = ""


@dataclass(frozen=True)
class SweepSection:
    title: str
    metric: str
    trials: Sequence[Trial]
    percent: bool = True
    lower_is_better: bool = False
    note: str = ""


@dataclass(frozen=True)
class Where:
    """A place to look further: a command to copy, a folder, a file."""

    label: str
    what: str


@dataclass(frozen=True)
class Report:
    """Everything that the page can show."""

    headline: Headline
    ingestion: IngestionSection | None = None
    tokenizers: TokenizerSection | None = None
    pretraining: TrainingSection | None = None
    captions: Sequence[CaptionExample] = ()
    answers: Sequence[AnswerSection] = ()
    retrieval: RetrievalSection | None = None
    sweeps: Sequence[SweepSection] = ()
    where: Sequence[Where] = ()
