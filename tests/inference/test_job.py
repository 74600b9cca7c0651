"""Jobs over folders: killed, stopped, changed, and gone on with; real processes, real kills."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from conftest import COLOURS, SHAPES, draw
from run_commands import run_caption

from captioner.commands import caption
from captioner.data.listing import ImageFile
from captioner.data.predictions import read_predictions
from captioner.inference.job import journal_path
from captioner.inference.journal import Journal

KILLS = int(os.environ.get("CAPTIONER_TEST_KILLS", "3"))


@pytest.fixture
def folder(drawn, tmp_path):
    """A folder of its own, to be changed."""
    return Path(shutil.copytree(drawn.images, tmp_path / "photos"))


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def captioned(path: Path) -> list[str]:
    return [row["file_name"] for row in rows(path)]


# --- killed and stopped -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """400 images, of which some can't be read."""
    folder = tmp_path_factory.mktemp("many") / "photos"
    for number in range(400):
        path = folder / f"{number % 7}" / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 50 == 3:
            path.write_bytes(b"no image")
        else:
            draw(COLOURS[number % 4], SHAPES[number % 2], 64 + number % 9).save(path)
    return folder


def command(checkpoint: Path, folder: Path, output: Path, *options: str) -> list[str]:
    outputs = [str(output.with_suffix(suffix)) for suffix in (".jsonl", ".csv", ".json")]
    code = "import sys; from captioner.commands.caption import main; sys.exit(main())"
    words = [sys.executable, "-c", code, str(checkpoint), str(folder), "--output", *outputs]
    return [*words, "--device", "cpu", "--batch-size", "4", "--workers", "0", *options]


def outputs(folder: Path) -> dict[str, bytes]:
    """Return what a job has left, but for its journal, whose bytes tell of its history."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".journal"}


def kill_at_random(words: list[str], watched: Path, seed: int) -> bool:
    """Start a job and kill it after a while of work; tell whether it was still at work."""
    chance = random.Random(seed)
    before = watched.stat().st_size if watched.exists() else 0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and (not watched.exists() or watched.stat().st_size == before):
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.08))
    process.kill()
    return process.wait() == -signal.SIGKILL


def test_killed_jobs_go_on_to_the_same_bytes(checkpoint, many, tmp_path):
    photos = [Path(shutil.copytree(many, tmp_path / name / "photos")) for name in ("one", "other")]
    expected, found = (path.parent / "out" for path in photos)
    whole = command(checkpoint, photos[0], expected / "c.jsonl", "--sidecars")
    assert subprocess.run(whole, capture_output=True).returncode == 3
    words = command(checkpoint, photos[1], found / "c.jsonl", "--sidecars")
    killed = 0
    for seed in range(KILLS):
        killed += kill_at_random(words, found / "c.jsonl", seed)
        text = (found / "c.jsonl").read_text()
        assert text.endswith("\n")
        assert len(set(captioned(found / "c.jsonl"))) == text.count("\n")
        if killed <= seed:  # it was finished: begin again
            shutil.rmtree(found)
            for path in photos[1].rglob("*.txt"):
                path.unlink()
    assert killed
    last = subprocess.run(words, capture_output=True, text=True)
    assert last.returncode == 3, last.stderr
    lines = outputs(expected)
    assert lines.keys() == {"c.jsonl", "c.csv", "c.json", "c.jsonl.failures.jsonl"}
    for name, content in outputs(found).items():
        own = content.replace(bytes(photos[1]), bytes(photos[0]))
        assert own == lines[name], name
    assert len(rows(found / "c.jsonl")) == 392
    for path in photos[0].rglob("*.txt"):
        assert path.read_text() == (photos[1] / path.relative_to(photos[0])).read_text()
    assert len(list(photos[1].rglob("*.txt"))) == 392


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIG")])
def test_signals_finish_the_batch_in_flight(checkpoint, many, tmp_path, number, cause):
    output = tmp_path / "out" / "c.jsonl"
    words = command(checkpoint, many, output)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not output.exists():
        time.sleep(0.001)
    process.send_signal(number)
    error = process.communicate()[1]
    assert process.returncode == 128 + number, error
    assert f"stopped by {cause}" in error
    assert "the same command goes on from here" in error
    done = captioned(output)
    assert 4 <= len(done) < 392
    again = subprocess.run(words, capture_output=True, text=True)
    assert again.returncode == 3, again.stderr
    assert f", {392 - len(done)} of them now\n" in again.stdout
    assert captioned(output)[: len(done)] == done
    assert len(captioned(output)) == 392
    assert not [path for path in output.parent.iterdir() if "wal" in path.name]


def test_a_full_disk_loses_nothing(checkpoint, many, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs root, who alone can mount a small disk")
    try:
        words = command(checkpoint, many, disk / "c.jsonl")
        full = subprocess.run(words, capture_output=True, text=True)
        assert full.returncode == 1
        assert "Traceback" not in full.stderr
        assert "full" in full.stderr or "No space left" in full.stderr
        for _ in range(KILLS):
            kill_at_random(words, disk / "c.jsonl", 0)
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        again = subprocess.run(words, capture_output=True, text=True)
        assert again.returncode == 3, again.stderr
        found = outputs(disk)
    finally:
        subprocess.run(["umount", disk], check=True)
    words = command(checkpoint, many, tmp_path / "c.jsonl")
    assert subprocess.run(words, capture_output=True).returncode == 3
    shutil.rmtree(disk)
    for path in (checkpoint,):
        shutil.rmtree(path)
    assert found == outputs(tmp_path)


def test_a_second_job_into_the_same_output_is_refused(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    assert run_caption(checkpoint, folder, output) == 0
    with Journal(tmp_path / "c.jsonl.journal"):
        code = "import sys; from captioner.commands.caption import main; sys.exit(main())"
        words = [checkpoint, folder, "--output", output, "--device", "cpu"]
        second = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True
        )
    assert second.returncode == 1
    assert second.stderr.startswith(f"error: {output}.journal: another process is writing these")
    assert run_caption(checkpoint, folder, output) == 0


# --- what is captioned again ------------------------------------------------------------------


def test_only_what_is_new_or_changed_is_captioned(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    options = ["--output", *(tmp_path / f"c.{kind}" for kind in ("jsonl", "csv", "json", "sqlite"))]
    assert run_caption(checkpoint, folder, output, *options) == 0
    assert run_caption(checkpoint, folder, output, *options) == 0
    assert f"8 captions in {output}, 0 of them now\n" in capsys.readouterr().out
    draw("blue", "square").save(folder / "00_red_disc.png")
    draw("red", "square").save(folder / "00 before.png")
    draw("yellow", "disc").save(folder / "03b.png")
    (folder / "07_yellow_square.png").unlink()
    assert run_caption(checkpoint, folder, output, *options) == 0
    assert f"10 captions in {output}, 3 of them now\n" in capsys.readouterr().out
    found = read_predictions(output)
    # In the order of the folder; what is gone was captioned all the same.
    assert [name for name in found if (folder / name).exists()] == sorted(os.listdir(folder))
    assert found["00_red_disc.png"] == "a blue square"
    assert found["00 before.png"] == "a red square"
    assert "07_yellow_square.png" in found
    assert read_predictions(tmp_path / "c.csv") == read_predictions(tmp_path / "c.json") == found
    with closing(sqlite3.connect(tmp_path / "c.sqlite")) as database:
        columns = "file_name, caption, width"
        cells = list(database.execute(f"SELECT {columns} FROM captions"))
    assert cells == [tuple(row[name] for name in columns.split(", ")) for row in rows(output)]


def test_changed_contents_are_told_by_their_hash(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    assert run_caption(checkpoint, folder, output, "--hash") == 0
    state = (folder / "00_red_disc.png").stat()
    shutil.copy(folder / "05_blue_square.png", folder / "00_red_disc.png")
    os.utime(folder / "00_red_disc.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    os.utime(folder / "02_lime_disc.png")
    assert run_caption(checkpoint, folder, output, "--hash") == 0
    assert ", 1 of them now\n" in capsys.readouterr().out
    assert rows(output)[0]["caption"] == "a blue square"
    assert rows(output)[0]["sha256"] == rows(output)[5]["sha256"]
    assert run_caption(checkpoint, folder, output) == 2
    assert "--hash was True and is False" in capsys.readouterr().err


def test_failures_have_a_file_and_another_try(checkpoint, folder, tmp_path, capsys):
    output, failures = tmp_path / "c.jsonl", tmp_path / "c.jsonl.failures.jsonl"
    good = (folder / "02_lime_disc.png").read_bytes()
    (folder / "02_lime_disc.png").write_bytes(b"<script>")
    assert run_caption(checkpoint, folder, output) == 3
    assert [row["file_name"] for row in rows(failures)] == ["02_lime_disc.png"]
    assert rows(failures)[0]["path"] == str(folder / "02_lime_disc.png")
    assert rows(failures)[0]["error"].endswith("not a readable image (no known format)")
    assert run_caption(checkpoint, folder, output) == 3  # nothing new
    state = (folder / "02_lime_disc.png").stat()
    (folder / "02_lime_disc.png").write_bytes(good[:8])  # as long, at the same time
    os.utime(folder / "02_lime_disc.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    assert run_caption(checkpoint, folder, output, "--retry") == 3
    (folder / "02_lime_disc.png").write_bytes(good)
    capsys.readouterr()
    assert run_caption(checkpoint, folder, output) == 0
    assert ", 1 of them now\n" in capsys.readouterr().out
    assert not failures.exists()
    assert captioned(output) == sorted(captioned(output))


# --- other checkpoints, settings, inputs, files -----------------------------------------------


def test_another_job_is_refused_unless_asked_for(checkpoint, folder, drawn, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    assert run_caption(checkpoint, folder, output, "--beam-size", 2) == 0
    capsys.readouterr()
    assert run_caption(checkpoint, folder, output, "--beam-size", 1) == 2
    error = capsys.readouterr().err
    assert "search.beam_size was 2 and is 1" in error
    assert "--redo begins anew, --append keeps" in error
    draw("red", "disc").save(folder / "new.png")
    options = ["--beam-size", 1, "--max-length", 2]
    assert run_caption(checkpoint, folder, output, *options, "--append") == 0
    assert rows(output)[0]["caption"] == "a red disc on white"
    assert rows(output)[-1]["caption"] == "a red"
    assert run_caption(checkpoint, folder, output, *options, "--redo") == 0
    assert {row["caption"].count(" ") for row in rows(output)} == {1}
    # Other inputs follow the first.
    assert run_caption(checkpoint, drawn.paths[3], output, *options) == 2
    assert "inputs was" in capsys.readouterr().err
    assert run_caption(checkpoint, drawn.paths[3], output, *options, "--append") == 0
    assert captioned(output)[-2:] == ["new.png", str(drawn.paths[3])]


def test_a_run_that_captions_nothing_keeps_what_it_found(checkpoint, folder, tmp_path, capsys):
    """The places of the images have changed, for one is gone; and the outputs are as they were."""
    output = tmp_path / "c.jsonl"
    assert run_caption(checkpoint, folder, output) == 0
    sorted(folder.iterdir())[0].unlink()
    assert run_caption(checkpoint, folder, output) == 0
    name = sorted(os.listdir(folder))[0]
    with Journal(journal_path(output)) as journal:
        status = output.stat()
        assert journal.fact("states") == {"c.jsonl": [status.st_size, status.st_mtime_ns]}
        assert journal.entry(ImageFile(name, name, folder / name)).position == 0
    with open(output, "a") as file:
        file.write("a line by hand\n")
    capsys.readouterr()
    assert run_caption(checkpoint, folder, output) == 2
    assert "was changed since this tool wrote it" in capsys.readouterr().err


def test_files_of_others_are_not_overwritten(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    output.write_text("mine\n")
    assert run_caption(checkpoint, folder, output) == 2
    assert "is there, and not from a job that can go on" in capsys.readouterr().err
    assert output.read_text() == "mine\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "checkpoint", "photos"]
    assert run_caption(checkpoint, folder, output, "--redo") == 0
    with open(output, "a") as file:
        file.write("a line by hand\n")
    assert run_caption(checkpoint, folder, output) == 2
    assert "was changed since this tool wrote it" in capsys.readouterr().err
    output.unlink()
    assert run_caption(checkpoint, folder, output) == 0
    assert len(rows(output)) == 8
    (tmp_path / "c.csv").write_text("mine")
    both = ["--output", output, tmp_path / "c.csv"]
    assert run_caption(checkpoint, folder, output, *both) == 2
    (tmp_path / "c.csv").unlink()
    assert run_caption(checkpoint, folder, output, *both) == 0
    assert len(read_predictions(tmp_path / "c.csv")) == 8
    (tmp_path / "x.jsonl").write_text("")
    (tmp_path / "x.jsonl.journal").write_text("hello, this is no database at all")
    assert run_caption(checkpoint, folder, tmp_path / "x.jsonl") == 1
    assert "no journal of captioner" in capsys.readouterr().err


def test_text_files_beside_images(checkpoint, folder, tmp_path, capsys):
    output, options = tmp_path / "c.jsonl", ["--sidecars"]
    by_hand = folder / "02_lime_disc.txt"
    by_hand.write_text("my own words")
    shutil.copy(folder / "03_lime_square.png", folder / "03_lime_square.PNG")
    assert run_caption(checkpoint, folder, output, *options) == 0
    assert by_hand.read_text() == "my own words"
    assert (folder / "00_red_disc.txt").read_text() == "a red disc on white\n"
    assert len(list(folder.glob("*.txt"))) == 8
    # One that people wrote, and that of two images of the same name.
    assert "2 text files were left as they were" in capsys.readouterr().err
    (folder / "04_blue_disc.txt").write_text("changed by hand")
    words = ["--max-length", 2, "--redo", *options]
    assert run_caption(checkpoint, folder, output, *words) == 0
    assert (folder / "00_red_disc.txt").read_text() == "a red\n"
    assert (folder / "04_blue_disc.txt").read_text() == "changed by hand"
    assert run_caption(checkpoint, folder, output, *words, "--overwrite") == 0
    assert by_hand.read_text() == "a bright\n"


def test_text_files_may_be_asked_for_later(checkpoint, folder, tmp_path):
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl") == 0
    assert run_caption(checkpoint, folder, tmp_path / "c.jsonl", "--sidecars") == 0
    assert len(list(folder.glob("*.txt"))) == 8


def test_lists_and_shards(checkpoint, folder, tmp_path, capsys):
    paths = [str(path) for path in sorted(folder.iterdir(), reverse=True)]
    (tmp_path / "list").write_text("\n".join([*paths, str(folder / "gone.png"), paths[0]]))
    words = [checkpoint, "--from-file", tmp_path / "list", "--output", tmp_path / "c.jsonl"]
    words = [str(word) for word in (*words, "--device", "cpu")]
    assert caption.main(words) == 3
    assert captioned(tmp_path / "c.jsonl") == paths
    assert rows(tmp_path / "c.jsonl.failures.jsonl")[0]["error"].endswith("gone.png: no such file")
    found = []
    for number in (1, 2):
        output = tmp_path / f"{number}.jsonl"
        assert run_caption(checkpoint, folder, output, "--shard", f"{number}/2") == 0
        found += captioned(output)
    assert sorted(found) == sorted(path.name for path in folder.iterdir())
    for wrong in ("0/2", "3/2", "half"):
        assert run_caption(checkpoint, folder, tmp_path / "w.jsonl", "--shard", wrong) == 2


def test_quiet_says_what_went_wrong_alone(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "c.jsonl"
    assert run_caption(checkpoint, folder, output, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    (folder / "bad.png").write_text("")
    assert run_caption(checkpoint, folder, output, "--quiet") == 3
    expected = (
        f"1 of 9 images could not be captioned: bad.png; reasons in {output}.failures.jsonl\n"
    )
    assert capsys.readouterr() == ("", expected)
