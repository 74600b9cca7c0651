"""The parts of the official COCO evaluation that stay in Java: METEOR, SPICE and the yardstick.

They come with the package ``pycocoevalcap`` (the extra ``official``) and need Java.
"""

import contextlib
import importlib.util
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from captioner.errors import CaptionerError

Captions = Sequence[Sequence[str]]

TOKENIZER_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
METEOR_JAR = "meteor/meteor-1.5.jar"
SPICE_JARS = (
    "spice/spice-1.0.jar",
    "spice/lib/stanford-corenlp-3.6.0.jar",
    "spice/lib/stanford-corenlp-3.6.0-models.jar",
)


class UnavailableError(CaptionerError):
    """Java or one of the official tool's files is missing."""


def require(*files: str) -> list[Path]:
    """Return the paths of files of ``pycocoevalcap``, Java being there too.

    Raises:
        UnavailableError: The message names what is missing and how to get it.
    """
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError(
            "the package pycocoevalcap isn't installed: pip install 'captioner[official]'"
        )
    if shutil.which("java") is None:
        raise UnavailableError(
            "no 'java' on the PATH: install a Java runtime (Debian: default-jre-headless)"
        )
    folder = Path(package.submodule_search_locations[0])
    for file in files:
        if not (folder / file).is_file():
            raise UnavailableError(f"pycocoevalcap's file {file} is missing from {folder}")
    return [folder / file for file in files]


def java_tokenize(captions: Sequence[str]) -> list[list[str]]:
    """Tokenise with the official Java tool, each caption by itself.

    Line breaks of all kinds count as spaces; the official wrapper does that for line feeds only.

    Raises:
        UnavailableError: Java or the tool is missing.
    """
    (jar,) = require(TOKENIZER_JAR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        names = [str(folder / str(number)) for number in range(len(captions))]
        for path, caption in zip(names, captions, strict=True):
            line = " ".join(caption.splitlines())
            Path(path).write_text(line + "\n", encoding="utf-8", newline="")
        files = "".join(f"{path} {path}.out\n" for path in names)
        (folder / "list").write_text(files, encoding="utf-8")
        command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar)]
        command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        subprocess.run(
            [*command, "-ioFileList", str(folder / "list")], check=True, capture_output=True
        )
        outputs = [Path(f"{path}.out").read_bytes().decode() for path in names]
    return [
        [token for token in line.rstrip().split(" ") if token not in DROPPED] for line in outputs
    ]


# The COCO evaluation's list of punctuation (its brackets, in capitals, never occur).
DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", ""])


def meteor(hypotheses: Captions, references: Sequence[Captions]) -> tuple[float, np.ndarray]:
    """Return METEOR 1.5 (Denkowski and Lavie, 2014) of the corpus and of each image.

    The corpus score is not the mean of the others: METEOR adds up its statistics first.

    Raises:
        UnavailableError: Java or the jar is missing, or it stopped.
    """
    (jar,) = require(METEOR_JAR)
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", str(jar)]
    process = subprocess.Popen(
        [*command, "-", "-", "-stdio", "-l", "en", "-norm"],
        cwd=jar.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None
    requests = [_meteor_line(*pair) for pair in zip(hypotheses, references, strict=True)]

    def send(lines: Sequence[str]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it stopped: there will be no reply
            stdin.writelines(lines)
            stdin.flush()

    replies: list[str] = []
    with contextlib.suppress(BrokenPipeError), process:
        # Sent from a thread: the tool doesn't read on while nobody reads its replies.
        sender = threading.Thread(target=send, args=(requests,), daemon=True)
        sender.start()
        statistics = [stdout.readline().strip() for _ in requests]
        sender.join()
        send([f"EVAL ||| {' ||| '.join(statistics)}\n"])
        replies = [stdout.readline().strip() for _ in range(len(requests) + 1)]
        process.kill()
    try:
        *scores, corpus = map(float, replies)
    except ValueError:
        raise UnavailableError("Java stopped before METEOR was done; does 'java' work?") from None
    return corpus, np.array(scores)


def _meteor_line(hypothesis: Sequence[str], captions: Captions) -> str:
    parts = [" ".join(caption).replace("|||", "") for caption in (*captions, hypothesis)]
    return f"SCORE ||| {' ||| '.join(parts)}\n"


def spice(hypotheses: Captions, references: Sequence[Captions]) -> tuple[float, np.ndarray]:
    """Return SPICE (Anderson et al., 2016) of the corpus and of each image, by the official tool.

    Raises:
        UnavailableError: Java or a jar is missing; the package doesn't carry Stanford's models.
    """
    try:
        require(*SPICE_JARS)
    except UnavailableError as error:
        if "stanford-corenlp-3.6.0" in str(error):
            raise UnavailableError(
                f"{error}; get it with: python -c 'from pycocoevalcap.spice."
                "get_stanford_models import get_stanford_models; get_stanford_models()'"
            ) from None
        raise
    from pycocoevalcap.spice.spice import Spice

    ids = range(len(hypotheses))
    corpus, parts = Spice().compute_score(
        {number: [" ".join(caption) for caption in references[number]] for number in ids},
        {number: [" ".join(hypotheses[number])] for number in ids},
    )
    return float(corpus), np.array([float(part["All"]["f"]) for part in parts])
