"""A folder of hostile files, through the command: each is captioned rightly, or its reason told."""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hostile_files import HostileFile, hostile_files

from captioner.data.image_files import load_image
from captioner.errors import ImageError
from captioner.models.checkpoint import save_checkpoint
from captioner.progress import printable

MOST_MEMORY = 700  # MiB; about 370 is usual
# What else may be printed: by libtiff, which tells what it finds, and of a job of some seconds.
OTHER_LINES = r"(\w+Decode|TIFF\w+|tempfile\.tif|captioning): |\d+ images in \d+ s"
# The command, and what its process took at most: before it began, and in all.
COMMAND = """
import sys
from pathlib import Path
from captioner.commands import main
from captioner.inference import captioner, folder, job  # and all that they need, such as torch

def print_peak():
    if sys.platform == "linux":
        print("peak", Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

print_peak()
code = main(["caption", *sys.argv[1:]])
print_peak()
sys.exit(code)
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a folder.

    Attributes:
        exit_code: Of the command.
        captions: By name, what the output says of a captioned image.
        failures: By name, why an image couldn't be captioned.
        lines: Of standard error.
        memory: What the process took more than it had before it began, at most, in MiB; 0 where
            the system doesn't tell.
    """

    exit_code: int
    captions: dict[str, dict]
    failures: dict[str, str]
    lines: list[str]
    memory: float


def caption_folder(checkpoint: Path, folder: Path, output: Path) -> Outcome:
    """Run the command as a process of its own: what crashes a decoder must not end the tests."""
    words = [checkpoint, folder, "--output", output, "--device", "cpu", "--workers", "2"]
    words += ["--precision", "float32"]  # of a model this small, the same captions everywhere
    run = subprocess.run(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        capture_output=True,
        timeout=1800,
        encoding="utf-8",
    )
    captions = read_rows(output)
    failures = read_rows(output.with_name(f"{output.name}.failures.jsonl"))
    peaks = [int(kibibytes) for kibibytes in re.findall(r"^peak (\d+)$", run.stdout, re.MULTILINE)]
    assert run.returncode in (0, 3), run.stderr
    return Outcome(
        run.returncode,
        captions,
        {name: row["error"] for name, row in failures.items()},
        run.stderr.splitlines(),
        (peaks[-1] - peaks[0]) / 1024 if peaks else 0.0,
    )


def read_rows(path: Path) -> dict[str, dict]:
    rows = map(json.loads, path.read_bytes().splitlines())  # U+2028 ends no line of bytes
    return {row["file_name"]: row for row in rows}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, list[HostileFile]]:
    folder = tmp_path_factory.mktemp("hostile") / "images"
    made = hostile_files()
    for file in made:
        file.write(folder)
    return folder, made


@pytest.fixture(scope="module")
def outcome(files, tiny_model, tmp_path_factory) -> Outcome:
    folder = tmp_path_factory.mktemp("captioned")
    save_checkpoint(tiny_model, folder, {"BLEU-4": 1.0})
    return caption_folder(folder, files[0], folder / "out.jsonl")


def test_a_folder_of_hostile_files(files, outcome, drawn):
    """One test, so that the command runs once."""
    assert len(files[1]) >= 60
    assert outcome.exit_code == 3
    assert sorted(outcome.captions | outcome.failures) == sorted(file.name for file in files[1])
    assert not outcome.captions.keys() & outcome.failures.keys()
    problems = {file.name: problem(file, outcome, drawn.captions) for file in files[1]}
    assert not {name: text for name, text in problems.items() if text}
    check_lines(outcome, files[0])
    assert outcome.memory < MOST_MEMORY


def problem(file: HostileFile, outcome: Outcome, captions: Mapping[str, str]) -> str:
    """Return what is wrong with what became of a file; "" where nothing is."""
    if file.name in outcome.failures:
        error = outcome.failures[file.name]
        return "" if file.reason and re.search(file.reason, error) else error
    row = outcome.captions[file.name]
    if file.reason:
        return f"captioned: {row['caption']}"
    if file.image and (row["width"], row["height"]) != file.image.size:
        return f"{row['width']} x {row['height']}"
    by_drawing = {tuple(Path(name).stem.split("_")[1:]): text for name, text in captions.items()}
    return "" if file.shows is None or row["caption"] == by_drawing[file.shows] else row["caption"]


def check_lines(outcome: Outcome, folder: Path) -> None:
    """Each failure is a line, the first twenty are printed, and nothing else is."""
    *warnings, last = outcome.lines
    errors = {f"warning: {printable(error)}" for error in outcome.failures.values()}
    assert len(set(warnings) & errors) == 20
    others = [line for line in warnings if line not in errors and not re.match(OTHER_LINES, line)]
    assert len(others) == 1, others
    assert "further failures are in " in others[0]
    count = len(outcome.failures)
    assert last.startswith(f"{count} of {count + len(outcome.captions)} images could not be")
    for name, error in outcome.failures.items():
        assert error.startswith(f"{folder / name}: ")
        assert len(error.removeprefix(str(folder / name)).splitlines()) == 1


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_their_pixels(files):
    """Where a colour, its place or the turn is wrong, a caption may be right by chance."""
    folder, made = files
    differences = {}
    for file in made:
        if file.image is None:
            continue
        expected = np.asarray(file.image.convert("RGB")).astype(int)
        try:
            found = np.asarray(load_image(folder / file.name)).astype(int)
        except ImageError as error:
            differences[file.name] = str(error)
            continue
        if found.shape != expected.shape:
            differences[file.name] = found.shape
        elif (difference := np.abs(found - expected).mean()) > file.difference:
            differences[file.name] = difference
    assert not differences
