"""Files and folders that appear whole or not at all."""

import json
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest

from captioner.errors import CacheError, ConfigError, DataError
from captioner.files import (
    _exchange,
    atomic_directory,
    atomic_write,
    locked,
    open_regular,
    open_together,
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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes (os.mkfifo)")
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


KILLED = """
import contextlib, os, random, signal, sys, time
from pathlib import Path
from captioner import files
from captioner.errors import DataError

path, exchange = Path(sys.argv[1]), sys.argv[2] == "True"
NAMES = ["a", "b", "c"]

files._sync = lambda _: None  # the faster they write, the more of them are killed while they rename
if not exchange:
    files._exchange = lambda *_: False
else:
    exchanged = files._exchange
    def exchange_or_fail(*paths):
        assert exchanged(*paths), "this file system can't exchange"
        return True
    files._exchange = exchange_or_fail

def write(version):
    with files.atomic_directory(path) as aside:
        for name in NAMES:
            (aside / name).write_text(f"{version}")

def read():
    opened = files.open_together(path, NAMES)
    with contextlib.ExitStack() as stack:
        return {stack.enter_context(file).read() for file in opened.values()}

write(0)
seen = set()
random.seed(0)
reads = interrupted = kill = 0
while kill < 25 or interrupted < 3:  # on a busy machine few kills meet a writer at work
    kill += 1
    writer = os.fork()
    if not writer:
        for version in range(1_000_000):
            write(f"{kill} {version}")
    wanted = len(seen) + random.randint(1, 3)
    while len(seen) < wanted:
        (version,) = read()
        seen.add(version)
        reads += 1
    time.sleep(random.uniform(0, 0.003))
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    interrupted += not path.exists() or len(os.listdir(path.parent)) > 1
    (version,) = read()
write("last")
assert read() == {b"last"}
assert os.listdir(path.parent) == ["last"]
print(reads, interrupted)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX, for SIGKILL")
@pytest.mark.parametrize("exchange", [True, False])
def test_readers_find_a_whole_directory_while_writers_are_killed(tmp_path, exchange):
    """Writers are killed at random moments; a reader reads all the time."""
    if exchange:
        for name in ("one", "other"):
            (tmp_path / name).mkdir()
        if not _exchange(tmp_path / "one", tmp_path / "other"):
            pytest.skip("needs a file system that can exchange directories")
        for name in ("one", "other"):
            (tmp_path / name).rmdir()
    command = [sys.executable, "-c", KILLED, str(tmp_path / "last"), str(exchange)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.stderr
    reads, interrupted = map(int, done.stdout.split())
    assert reads > 25
    assert interrupted >= 3  # these kills left something to tidy up


KILLED_AT = """
import os, signal, sys
from captioner import files
files._exchange = lambda *_: False
rename, left = os.rename, int(sys.argv[2])
def rename_or_die(*paths):
    global left
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    rename(*paths)
os.rename = rename_or_die
with files.atomic_directory(sys.argv[1]) as aside:
    (aside / "new").write_text("new")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX, for SIGKILL")
@pytest.mark.parametrize(("renames", "left"), [(0, "old"), (1, "old"), (2, "new")])
def test_without_exchange_a_kill_between_renames_leaves_one_version(tmp_path, renames, left):
    path = tmp_path / "last"
    fill(path, "old")
    command = [sys.executable, "-c", KILLED_AT, str(path), str(renames)]
    assert subprocess.run(command, check=False).returncode == -9
    assert path.exists() == (renames != 1)  # between the two it is out of the way
    before = sorted(os.listdir(tmp_path))
    with open_together(path, [left])[left] as file:
        assert file.read() == left.encode()
    assert sorted(os.listdir(tmp_path)) == before  # a reader moves nothing
    recover_directory(path)
    assert os.listdir(tmp_path) == ["last"]
    assert os.listdir(path) == [left]
    fill(path, "next")
    assert os.listdir(path) == ["next"]


def test_a_reader_leaves_a_slow_writer_alone(tmp_path, monkeypatch):
    """It stops between its two renames for as long as it likes."""
    path = tmp_path / "last"
    fill(path, "old")
    rename = os.rename

    def read_between(source, target):
        if target == path:
            assert not path.exists()
            time.sleep(0.3)
            with open_together(path, ["old"])["old"] as file:
                assert file.read() == b"old"
            assert not path.exists()
        rename(source, target)

    monkeypatch.setattr("captioner.files._exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", read_between)
    fill(path, "new")
    assert os.listdir(path) == ["new"]
    assert os.listdir(tmp_path) == ["last"]


def test_the_next_writer_removes_what_killed_writers_left_and_nothing_else(tmp_path):
    path = tmp_path / "best"
    fill(path, "a")
    for name in (".best.0123456789abcdef.tmp", ".best.k_8xq2.tmp", ".best.previous"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("")
    others = {".best.json.0123456789abcdef.tmp", ".best2.0123456789abcdef.tmp", ".last.previous"}
    for name in others:
        (tmp_path / name).mkdir()
    fill(path, "b")
    assert set(os.listdir(tmp_path)) == {"best", *others}
    assert os.listdir(path) == ["b"]


def test_everything_is_on_the_disk_before_the_old_directory_goes(tmp_path, monkeypatch):
    path = tmp_path / "last"
    fill(path, "old")
    synced = []

    def fsync(descriptor, fsync=os.fsync):
        synced.append((os.fstat(descriptor).st_ino, (path / "old").exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_directory(path) as aside:
        (aside / "deep").mkdir()
        for name in ("a", "deep/b"):
            (aside / name).write_text(name)
    expected = [path / name for name in ("a", "deep/b", "deep", "")]
    assert {file.stat().st_ino for file in expected} == {node for node, old in synced if old}
    assert synced[-1] == (tmp_path.stat().st_ino, False)
    assert len(synced) == 5


@pytest.mark.parametrize("exchange", [True, False])
def test_a_linked_directory_stays_a_link(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr("captioner.files._exchange", lambda *_: False)
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    fill(tmp_path / "disk/last", "old")
    link = tmp_path / "run/last"
    link.symlink_to(tmp_path / "disk/last")
    fill(link, "new")
    assert link.is_symlink()
    assert os.listdir(tmp_path / "disk/last") == ["new"]
    assert os.listdir(tmp_path / "disk") == ["last"]
    (tmp_path / "disk/last").rename(tmp_path / "disk/.last.previous")
    open_together(link, ["new"])["new"].close()


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path):
    (tmp_path / "last").write_text("mine")
    with pytest.raises(NotADirectoryError):
        fill(tmp_path / "last", "a")
    assert (tmp_path / "last").read_text() == "mine"
    assert os.listdir(tmp_path) == ["last"]


def test_the_umask_of_other_threads_is_left_alone(tmp_path, monkeypatch):
    def umask(_):
        raise AssertionError("it is changed for the whole process")

    monkeypatch.setattr(os, "umask", umask)
    write_json(tmp_path / "a.json", 1)
    fill(tmp_path / "d", "a")


def test_files_opened_together_are_all_there_or_one_is_named(tmp_path):
    fill(tmp_path / "last", "a", "b")
    files = open_together(tmp_path / "last", ["a"], ["b", "c"])
    assert {name: file.read() for name, file in files.items()} == {"a": b"a", "b": b"b"}
    for file in files.values():
        file.close()
    with pytest.raises(CacheError, match=r"last/c: no such file$"):
        open_together(tmp_path / "last", ["a", "c"], error=CacheError)
    (tmp_path / "last/d").mkdir()
    with pytest.raises(DataError, match="last/d: this is a folder"):
        open_together(tmp_path / "last", ["a"], ["d"])
    os.mkfifo(tmp_path / "last/pipe")
    with pytest.raises(DataError, match=r"last/pipe: .*not a regular file"):
        open_together(tmp_path / "last", ["pipe"])
    for name in ("none", "a" * 300, "nul\0"):
        with pytest.raises(DataError):
            open_together(tmp_path / name, ["a"])


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
