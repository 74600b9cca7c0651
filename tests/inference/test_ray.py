"""Captioning on a local Ray cluster, of whose two workers one is killed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import COLOURS, SHAPES, draw

pytest.importorskip("ray.data", reason="needs Ray: pip install 'captioner[ray]'")

COMMAND = "import sys; from captioner.commands.caption import main; sys.exit(main())"


def words(checkpoint: Path, inputs: list, output: Path) -> list[str]:
    options = ["--output", output, "--device", "cpu", "--batch-size", 16, "--precision", "float32"]
    return [str(word) for word in (sys.executable, "-c", COMMAND, checkpoint, *inputs, *options)]


def kill_a_worker(job: subprocess.Popen) -> bool:
    """Kill a process that holds a model, once there is one at work."""
    while job.poll() is None:
        for process in psutil.Process(job.pid).children(recursive=True):
            try:
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if name.startswith("ray::") and "_Worker" in name and "submit" in name:
                process.kill()
                return True
        time.sleep(0.02)
    return False


def test_every_image_comes_once_though_a_worker_dies(checkpoint, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(480):
        draw(COLOURS[number % 4], SHAPES[number % 2], 64 + number % 9).save(
            folder / f"{number:03}.png"
        )
    (folder / "100.png").write_text("no image")
    # A worker has a core: sums are rounded otherwise by several threads.
    environment = os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "OMP_NUM_THREADS": "1"}
    command = words(checkpoint, [folder], tmp_path / "alone.jsonl")
    alone = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert alone.returncode == 3, alone.stderr
    started = time.monotonic()
    with open(tmp_path / "log", "w") as log:
        job = subprocess.Popen(
            [*words(checkpoint, [folder], tmp_path / "spread.jsonl"), "--ray", "--workers", "2"],
            stdout=log,
            stderr=log,
            env=environment,
        )
        killed = kill_a_worker(job)
        code = job.wait()
    shown = (tmp_path / "log").read_text()
    print(shown, f"{time.monotonic() - started:.0f} s")
    assert code == 3, shown
    assert killed
    expected = (tmp_path / "alone.jsonl").read_text()
    assert (tmp_path / "spread.jsonl").read_text() == expected
    failures = json.loads((tmp_path / "spread.jsonl.failures.jsonl").read_text())
    assert failures["file_name"] == "100.png"


def test_the_captioner_of_the_package_is_found_by_each_worker(drawn, tmp_path):
    """By its name, from another folder than the workers'."""
    command = words(Path("mobilenet-flickr8k"), [drawn.images], tmp_path / "c.jsonl")
    done = subprocess.run(
        [*command, "--ray", "--workers", "1"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "c.jsonl").read_text().splitlines()) == len(drawn.paths)


def test_addresses_are_read_by_fsspec(checkpoint, drawn, tmp_path):
    addresses = [f"file://{path}" for path in drawn.paths]
    (tmp_path / "list").write_text("\n".join([*addresses, "file:///nowhere/a.png"]))
    done = subprocess.run(
        words(checkpoint, ["--from-file", tmp_path / "list"], tmp_path / "c.jsonl"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 3, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [row["image_id"] for row in rows] == addresses
    assert [row["caption"] for row in rows] == list(drawn.captions.values())
    assert "file:///nowhere/a.png: no such file" in done.stderr
