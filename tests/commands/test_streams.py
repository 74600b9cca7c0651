"""What commands print, in real processes: to odd terminals, to closed or full streams, escaped."""

import os
import pty
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from conftest import draw

from captioner.progress import printable

ROOT = Path(__file__).parents[2]
CAPTION = ROOT / "tools/caption_folder.py"
PRINTING = """
import sys
from captioner.cli import command
from captioner.errors import DataError
from captioner.progress import Progress, log_line, print_line

@command
def main(argv=None):
    {}
    return 0

sys.exit(main())
"""
HOSTILE = "a\x1b[2J\x9bm\nerror: forged\t\u202egpj\u2028\x00\r.jpg"
ESCAPED = r"a\x1b[2J\x9bm\nerror: forged\t\u202egpj\u2028\x00\r.jpg"


def shell(line: str, *words: object, **environment: str) -> subprocess.CompletedProcess:
    """Run a shell's line, in which "$@" is Python with the words."""
    return subprocess.run(
        ["bash", "-c", line, "bash", sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# --- escapes ----------------------------------------------------------------------------------


def test_ordinary_text_stays_readable():
    for text in ("a dog", "été 猫 😺 👩‍👩‍👧", "עברית العربية", r"C:\new", "می‌خواهم", "e\u0301", ""):
        assert printable(text) == text
    assert printable(HOSTILE) == ESCAPED
    assert printable("caf\udce9\x7f\x85\u2066\u200f") == r"caf\udce9\x7f\x85\u2066\u200f"


@pytest.mark.parametrize(
    ("body", "code", "shown"),
    [
        (f"raise DataError({HOSTILE!r})", 1, f"error: {ESCAPED}\n"),
        (f"raise OSError(28, 'No space', {HOSTILE!r})", 1, f"error: {ESCAPED}: No space\n"),
        (f"log_line({HOSTILE!r})", 0, f"{ESCAPED}\n"),
    ],
)
def test_messages_are_one_escaped_line(body, code, shown):
    done = shell('"$@"', "-c", PRINTING.format(body))
    assert (done.returncode, done.stdout, done.stderr) == (code, "", shown)


def test_results_are_escaped_fields():
    done = shell('"$@"', "-c", PRINTING.format(f"print_line({HOSTILE!r}, 'été')"))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{ESCAPED}\tété\n", "")


def test_arguments_are_escaped():
    done = shell('"$@"', CAPTION, "a", "b", "--\x1b[2J")
    assert done.returncode == 2
    assert done.stderr.endswith("error: unrecognized arguments: --\\x1b[2J\n")


def test_a_progress_bar_is_escaped():
    """On a real terminal, where the bar has escape sequences of its own."""
    body = f"bar = Progress({HOSTILE!r}, 1, 'image'); bar.update(1, {HOSTILE!r}); bar.close()"
    reading, writing = pty.openpty()
    termios.tcsetwinsize(writing, (24, 500))
    subprocess.run(
        [sys.executable, "-c", PRINTING.format(body)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=writing,
        check=True,
    )
    os.close(writing)
    shown = os.read(reading, 100_000).decode()
    os.close(reading)
    assert shown.count(ESCAPED) >= 2
    assert not {"\x9b", "\u202e", "\u2028", "\x00"} & set(shown)
    assert "\x1b[2J" not in shown
    assert shown.count("\n") == 1


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("redirection", "body", "code", "output", "error"),
    [
        (">&-", "print('lost')", 0, "", ""),
        (">&-", "raise DataError('bad')", 1, "", "error: bad\n"),
        ("2>&-", "raise DataError('bad')", 1, "", ""),
        ("2>&-", "log_line('lost'); print('kept')", 0, "kept\n", ""),
        ("2>&-", "Progress('x', 2, 'image').update(1); print('kept')", 0, "kept\n", ""),
        (">&- 2>&- <&-", "raise DataError('bad')", 1, "", ""),
        (">/dev/full", "print('x')", 1, "", "error: writing: No space left on device\n"),
        ("2>/dev/full", "raise DataError('bad')", 1, "", ""),
        ("2>/dev/full", "print('kept')", 0, "kept\n", ""),
    ],
)
def test_closed_and_full_streams(redirection, body, code, output, error):
    done = shell(f'"$@" {redirection}', "-c", PRINTING.format(body))
    assert (done.returncode, done.stdout, done.stderr) == (code, output, error)


def test_files_never_get_the_number_of_a_closed_stream(tmp_path):
    """Else what a library prints to descriptor 1 or 2 would land in them."""
    body = f"file = open({str(tmp_path / 'x')!r}, 'w'); print(file.fileno(), file=file)"
    shell('"$@" >&- 2>&- <&-', "-c", PRINTING.format(body))
    assert int((tmp_path / "x").read_text()) > 2


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_a_terminal_that_lacks_characters_shows_their_escapes(encoding):
    body = "print_line('猫'); print('猫 caf\\udce9'); raise DataError('猫')"
    done = shell('"$@"', "-c", PRINTING.format(body), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (1, "\\u732b\n\\u732b caf\\udce9\n")
    assert done.stderr == "error: \\u732b\n"


def test_captions_without_standard_output_are_refused_before_the_work():
    done = shell('"$@" >&-', CAPTION, "none", "none")
    assert done.returncode == 2
    assert done.stderr == "error: standard output is closed, and --output is missing\n"


def test_a_library_without_standard_error_prints_nothing_elsewhere():
    body = "Progress('x', 2, 'image').update(1); log_line('lost')"
    done = shell('"$@" 2>&-', "-c", f"from captioner.progress import *; {body}")
    assert (done.returncode, done.stdout) == (0, "")


def test_captioning_in_the_c_locale_without_standard_error(checkpoint, tmp_path):
    names = ["é猫.png", os.fsdecode(b"z\xe9.png")]
    for name in names:
        draw("blue", "square").save(tmp_path / name)
    words = [CAPTION, checkpoint, *(tmp_path / name for name in names), "--device", "cpu"]
    done = shell('"$@" 2>&- <&-', *words, LC_ALL="C", PYTHONIOENCODING="ascii")
    assert done.returncode == 0
    shown = [f"{tmp_path}/{name}\ta blue square\n" for name in (r"\xe9\u732b.png", r"z\udce9.png")]
    assert done.stdout == "".join(shown)
