"""How commands end, what --help costs and shows, and the one command that holds them all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from captioner.cli import command
from captioner.commands import COMMANDS, main
from captioner.errors import CaptionerError, DataError, UsageError

ROOT = Path(__file__).parents[2]
TOOLS = sorted(
    path.name for path in (ROOT / "tools").glob("*.py") if "__main__" in path.read_text()
)


def python(*words: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


# --- how a command ends -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"), [(DataError("a.json: no such file"), 1), (UsageError("no --x"), 2)]
)
def test_an_error_that_a_user_can_mend_is_one_line(error, code, capsys):
    @command
    def fail(argv: Sequence[str] | None = None) -> int:
        raise error

    assert fail([]) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_every_error_of_the_project_has_an_exit_code():
    kinds = CaptionerError.__subclasses__()
    assert len(kinds) > 5
    assert {kind.exit_code for kind in kinds} == {1, 2}
    assert [kind for kind in kinds if kind.exit_code == 2] == [UsageError]


def test_a_bug_keeps_its_traceback():
    @command
    def bug(argv: Sequence[str] | None = None) -> int:
        return {}["key"]

    with pytest.raises(KeyError):
        bug([])


FAILING = """
import sys
from captioner.cli import command

@command
def main(argv=None):
    print("line " * 10)
    {}
    return 0

sys.exit(main())
"""


def test_a_bug_shows_its_traceback_and_exits_with_1():
    done = python("-c", FAILING.format("1 / 0"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c():
    # In the background of a shell, where tests may run, SIGINT is ignored from the start.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    done = python("-c", FAILING.format(f"{heard}; signal.raise_signal(signal.SIGINT)"))
    assert done.returncode == 128 + signal.SIGINT
    assert done.stderr == "stopped by Ctrl-C\n"


def into_a_closed_pipe(*words: object) -> tuple[int, bytes]:
    """Return exit code and standard error of Python, when nobody reads what it prints."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as pipe:
        done = subprocess.run(
            [sys.executable, *map(str, words)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    return done.returncode, done.stderr


@pytest.mark.parametrize("lines", [1, 100_000])  # less and more than Python's buffer
def test_a_closed_pipe_ends_quietly(lines):
    body = f"[print('a line of text') for _ in range({lines})]"
    assert into_a_closed_pipe("-c", FAILING.format(body)) == (141, b"")


def test_help_into_a_closed_pipe_is_quiet():
    assert into_a_closed_pipe(ROOT / "tools/caption_folder.py", "--help") == (141, b"")


# --- the command of commands ------------------------------------------------------------------


def test_it_lists_its_commands(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown and purpose in shown for name, purpose in COMMANDS.items())
    assert main([]) == 2
    assert capsys.readouterr().out == shown


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("captioner 0.")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("trian", "no command 'trian'; did you mean 'train'?"),
        ("captoin", "no command 'captoin'; did you mean 'caption'?"),
        ("xyz", "no command 'xyz'; there are train, runs, caption"),
        ("--trian", "no command '--trian'"),
    ],
)
def test_an_unknown_command(word, expected, capsys):
    assert main([word, "--help"]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_a_command_gets_its_arguments_and_gives_its_exit_code(tmp_path, capsys):
    (tmp_path / "references.json").write_text(
        json.dumps(
            {
                "images": [{"id": 1, "file_name": "a.jpg"}],
                "annotations": [{"id": 1, "image_id": 1, "caption": "a dog on the beach"}],
            }
        )
    )
    (tmp_path / "results.json").write_text(
        json.dumps([{"image_id": 1, "caption": "a dog on the beach"}])
    )
    words = ["--references", tmp_path / "references.json", "--hypotheses"]
    assert main(["evaluate", *map(str, words), str(tmp_path / "results.json")]) == 0
    assert "BLEU-4  1.0000" in capsys.readouterr().out
    assert main(["evaluate", *map(str, words), str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'none.json'}: no such file\n"
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", "--reference-files", "x"])
    assert caught.value.code == 2


# --- --help -----------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
from captioner.commands import main
try:
    main([sys.argv[1], "--help"])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_needs_no_torch(name):
    """Torch takes seconds to import, in a container without a warm disk many."""
    done = python("-c", WITHOUT_TORCH, name)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "False\n"
    assert done.stdout.startswith("usage: ")
    assert "None" not in done.stdout  # an option without a default shows none


@pytest.mark.parametrize("name", COMMANDS)
def test_usage_is_what_can_be_typed(name, monkeypatch, capsys):
    """As ``captioner NAME`` and as ``python tools/….py``, in help and in errors."""
    module = f"from captioner.commands.{name} import main"
    ways = {"/usr/bin/captioner": f"captioner {name}"}
    for tool in TOOLS:  # one at most: not every command is a file too
        if module in (ROOT / "tools" / tool).read_text():
            ways |= {f"tools/{tool}": f"python tools/{tool}", tool: f"python {tool}"}
    for started, usage in ways.items():
        monkeypatch.setattr(sys, "argv", [started])
        for words in (["--help"], ["--no-such-option"]):
            with pytest.raises(SystemExit):
                main([name, *words])
            shown = capsys.readouterr()
            assert (shown.out or shown.err).startswith(f"usage: {usage} [-h]")


def test_a_setting_with_dashes_gets_its_right_form(tmp_path, capsys):
    for words, hint in (
        (["--training.epochs=1"], "training.epochs=1"),
        (["--training.epochs", "1"], "training.epochs=VALUE"),
    ):
        (tmp_path / "experiment.toml").write_text("")
        argv = ["train", str(tmp_path / "experiment.toml"), *words, "--output-dir", "run"]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert error.endswith(f"it is written without dashes: {hint}\n")
        assert error.count("\n") == 1


@pytest.mark.parametrize("name", TOOLS)
def test_help_of_every_tool(name, tmp_path):
    """From any working directory, as a file."""
    done = python(ROOT / "tools" / name, "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ")
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_help_shows_defaults():
    shown = " ".join(python(ROOT / "tools/caption_folder.py", "--help").stdout.split())
    for line in (
        "images at a time; 0 is what fits into memory (default: 0)",
        "The defaults are the checkpoint's own settings. --beam-size BEAM_SIZE Hypotheses kept;",
        "cuda:N or mps (default: auto)",
        "computes in it (default: auto)",
        "--no-repeat-word, --repeat-word No word directly follows itself. --repeat-word allows it.",
    ):
        assert line in shown
    assert "--no-no-" not in shown


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_usage_of_every_command_exits_with_2(name, capsys):
    with pytest.raises(SystemExit) as caught:
        main([name, "--no-such-option"])
    assert caught.value.code == 2
    assert "usage: " in capsys.readouterr().err
