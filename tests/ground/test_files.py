"""Files and folders that appear whole or not at all."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading

import pytest

from captioner.errors import CacheError, ConfigError, DataError
from captioner.files import (
    atomic_directory,
    atomic_write,
    locked,
    open_regular,
    parse_json,
    read_json,
    read_text,
    recover_directory,
    write_json,
)


def test_text_and_bytes_are_written_as_given(tmp_path):
    with atomic_write(tmp_path / "new" / "folder" / "a.txt") as file:
        file.write("é\r\n\n猫")
    assert (tmp_path / "new/folder/a.txt").read_bytes() == "é\r\n\n猫".encode()
    with atomic_write(tmp_path / "a.bin", "wb") as file:
        file.write(b"\x00\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\x00\xff"
    write_json(tmp_path / "a.json", {"é": [1]}, indent=None)
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{"é": [1]}\n'


def test_until_the_end_the_old_file_stays(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_write(path) as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def write_half(path, error):
    with atomic_write(path) as file:
        file.write("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error):
        write_half(path, error)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, [1])
    with pytest.raises(TypeError):
        write_json(path, [1, object()])
    assert json.loads(path.read_text()) == [1]
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("name", ["猫" * 84 + ".j", "a" * 255, "é.json", "with space"], ids=len)
def test_names_up_to_the_limit_of_the_file_system(tmp_path, name):
    write_json(tmp_path / name, 1)
    assert os.listdir(tmp_path) == [name]


def test_permissions_are_the_users_own(tmp_path):
    old = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
        with atomic_directory(tmp_path / "d") as aside:
            write_json(aside / "a.json", 1)
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "d").stat().st_mode) == 0o750
    assert os.umask(old) == old


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "a.json"
    target.write_text("old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_json(link, "new")
    assert link.is_symlink()
    assert json.loads(target.read_text()) == "new"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_json(pipe, {"a": 1}, indent=None)
    reader.join(10)
    assert read == ['{"a": 1}\n']
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_json(tmp_path / "a", 1)
    assert os.listdir(tmp_path) == ["a"]


def fill(path, *names):
    with atomic_directory(path) as aside:
        for name in names:
            (aside / name).write_text(name)


def test_a_directory_is_replaced_whole(tmp_path):
    path = tmp_path / "last"
    fill(path, "a", "b")
    fill(path, "c")
    assert os.listdir(path) == ["c"]
    assert os.listdir(tmp_path) == ["last"]


def fill_half(path, error):
    with atomic_directory(path) as aside:
        (aside / "b").write_text("b")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_old_directory_and_nothing_else(tmp_path, error):
    path = tmp_path / "last"
    fill(path, "a")
    with pytest.raises(error):
        fill_half(path, error)
    assert os.listdir(path) == ["a"]
    assert os.listdir(tmp_path) == ["last"]


KILLED_BETWEEN_RENAMES = """
import os, signal, sys
from captioner.files import atomic_directory
rename, calls = os.rename, []
def stop_at_second(*args):
    calls.append(args)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*args)
os.rename = stop_at_second
with atomic_directory(sys.argv[1]) as aside:
    (aside / "new").write_text("new")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL is POSIX's")
def test_a_directory_comes_back_after_a_kill_between_the_two_renames(tmp_path):
    path = tmp_path / "last"
    fill(path, "old")
    killed = subprocess.run([sys.executable, "-c", KILLED_BETWEEN_RENAMES, str(path)], check=False)
    assert killed.returncode == -9
    assert not path.exists()
    recover_directory(path)
    assert os.listdir(path) == ["old"]
    fill(path, "next")
    assert os.listdir(path) == ["next"]


def test_recovering_a_directory_that_is_there_changes_nothing(tmp_path):
    path = tmp_path / "last"
    fill(path, "a")
    (tmp_path / ".last.previous").mkdir()
    recover_directory(path)
    assert os.listdir(path) == ["a"]


# --- reading and locking ------------------------------------------------------------------------


def test_only_a_regular_file_is_opened(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    with open_regular(tmp_path / "a.txt") as file:
        assert file.read() == b"\xef\xbb\xbfa\r\n"
    (tmp_path / "link").symlink_to("a.txt")
    with open_regular(tmp_path / "link") as file:
        assert file.read(3) == b"\xef\xbb\xbf"
    os.mkfifo(tmp_path / "pipe.jpg")  # nobody writes into it: opening it would never return
    for path in (tmp_path / "pipe.jpg", "/dev/zero"):
        with pytest.raises(OSError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_text_is_read_or_refused_in_one_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\r\n")
    assert read_text(tmp_path / "a.txt") == "a\r\n"
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    os.mkfifo(tmp_path / "pipe")
    for name, reason in {
        "none": "no such file",
        ".": "this is a folder, a file was expected",
        "latin.txt": "not UTF-8 text (byte 3); it looks like Latin-1 or Windows-1252; convert it: "
        f"iconv -f WINDOWS-1252 -t UTF-8 {tmp_path / 'latin.txt'} > NEW_FILE",
        "pipe": "can't be read (a pipe, device or socket, not a regular file)",
        "nul\0": "can't be read (embedded null byte)",
    }.items():
        with pytest.raises(CacheError) as refused:
            read_text(tmp_path / name, CacheError, regular=True)
        assert str(refused.value) == f"{tmp_path / name}: {reason}"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a é".encode("utf-16"), "not UTF-8 text but UTF-16; convert it: iconv -f UTF-16"),
        (b"\xfe\xff" + "a é".encode("utf-16-be"), "not UTF-8 text but UTF-16; convert it"),
        ("a,b".encode("utf-16-le"), "not UTF-8 text but UTF-16; convert it"),
        ("a,b".encode("utf-16-be"), "not UTF-8 text but UTF-16; convert it"),
        ("café, là".encode("cp1252"), "not UTF-8 text (byte 3); it looks like Latin-1 or Windows"),
        (b"\x81\x81", "not UTF-8 text (byte 0); convert it to UTF-8"),
        ("café là".encode()[:-1], "not UTF-8 text (byte 7); it ends within a character"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "not UTF-8 text (byte 0); this is no text file"),
    ],
)
def test_other_encodings_are_named(tmp_path, content, reason):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError) as refused:
        read_text(tmp_path / "a.csv")
    assert str(refused.value).startswith(f"{tmp_path / 'a.csv'}: {reason}")


@pytest.mark.skipif(shutil.which("iconv") is None, reason="needs iconv")
def test_the_conversion_that_is_named_works(tmp_path):
    path = tmp_path / "a b.csv"
    for encoding in ("utf-16", "cp1252"):
        path.write_text("café", encoding=encoding)
        with pytest.raises(DataError) as refused:
            read_text(path)
        command = str(refused.value).partition("convert it: ")[2].removesuffix(" > NEW_FILE")
        assert subprocess.run(shlex.split(command), capture_output=True).stdout == "café".encode()


def test_json_of_names_that_are_not_utf8_is_written(tmp_path):
    value = {"caf\udce9.jpg": "é"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value


def test_json_is_read_or_refused_in_one_line(tmp_path):
    write_json(tmp_path / "a.json", {"é": [1]})
    assert read_json(tmp_path / "a.json") == {"é": [1]}
    with pytest.raises(DataError, match=r"x: not valid JSON at line 2, column 1 .* complete"):
        parse_json("[\n", "x")
    with pytest.raises(DataError, match="x: not usable JSON"):
        parse_json("[" * 100_000, "x")


LOCKER = """
import sys, time
from captioner.files import locked
with locked(sys.argv[1], "busy"):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_keeps_other_processes_out_until_its_own_dies(tmp_path, capfd):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", LOCKER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(ConfigError, match="in use"), locked(path, ConfigError("in use")):
            pass
        threading.Timer(0.3, other.kill).start()
        with locked(path, "waiting for the other"):
            pass
    assert capfd.readouterr().err == "waiting for the other\n"
