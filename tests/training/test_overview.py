"""What ``captioner runs`` and the plots tell of real runs: finished, stopped, running, damaged."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from training_runs import make_experiment, read_log, wait_for_steps

from captioner.commands import main
from captioner.errors import ConfigError
from captioner.experiment_file import load_config
from captioner.files import is_locked, locked
from captioner.training.overview import describe_run, duration, find_runs
from captioner.training.plots import draw_training
from captioner.training.run import train

STAGES = """\
[[stages]]
name = "first"
training.epochs = 1
[[stages]]
name = "second"
training.epochs = 1
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cnn_weights):
    """A run that has ended; not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    train(load_config(make_experiment(folder, cnn_weights)), folder / "run")
    return folder / "run"


@pytest.fixture
def finished(trained, tmp_path):
    """The same, to be changed."""
    return shutil.copytree(trained, tmp_path / "runs/finished")


def table(capsys, folder):
    """Return the rows of the table, by the runs' names."""
    assert main(["runs", str(folder)]) == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert lines[0].split()[:3] == ["run", "BLEU-4", "CIDEr-D"]
    return {line.split("  ")[0]: line for line in lines[1:]}


def test_a_finished_run_beside_one_that_was_cut_short(finished, tmp_path, capsys):
    stopped = shutil.copytree(finished, tmp_path / "runs/stopped")
    lines = (stopped / "log.jsonl").read_bytes().splitlines(keepends=True)
    epoch = [json.loads(line)["kind"] for line in lines].index("epoch")
    (stopped / "log.jsonl").write_bytes(b"".join(lines[: epoch + 3]) + b'{"kind": "st')
    config = json.loads((stopped / "last/config.json").read_text())
    steps = read_log(finished)[epoch]["step"]
    config["scores"] = {"epoch": 1, "step": steps}
    (stopped / "last/config.json").write_text(json.dumps(config))

    rows = table(capsys, tmp_path / "runs")
    best = json.loads((finished / "best/config.json").read_text())["scores"]
    row = rows[str(finished)]
    assert f"{best['BLEU-4']:.4f}  {best['CIDEr-D']:.4f}" in row
    assert "3/3" in row
    assert "finished" in row
    row = rows[str(stopped)]
    assert "1/3" in row
    assert f"stopped in epoch 2, step {steps + 2}" in row
    assert row.endswith(f"; --resume goes on from step {steps}")

    run = describe_run(finished, time.time())
    assert (run.epochs_done, run.epochs, run.best_epoch) == (3, 3, best["epoch"])
    assert run.scores == {k: v for k, v in best.items() if k not in ("epoch", "step")}
    rates = sorted(r["images_per_second"] for r in read_log(finished) if r["kind"] == "step")
    assert rates[0] <= run.images_per_second <= rates[-1]
    assert run.seconds_left is None


def test_stages_are_runs(experiment, tmp_path, capsys):
    experiment.write_text(experiment.read_text() + STAGES)
    out = tmp_path / "staged"
    assert main(["train", str(experiment), "--output-dir", str(out)]) == 0
    capsys.readouterr()
    rows = table(capsys, tmp_path)
    assert list(rows) == [str(out / "first"), str(out / "second")]
    assert all("1/1" in row and "finished" in row for row in rows.values())


def test_a_run_that_is_killed_is_running_until_then(experiment, server, tmp_path):
    out = tmp_path / "run"
    process = server.start(experiment, "training.epochs=200", "--output-dir", out)
    wait_for_steps(out, 9)
    os.kill(process, signal.SIGSTOP)  # it keeps its lock, and writes no more lines
    try:
        run = describe_run(out, time.time())
        assert run.state.startswith("running: epoch ")
        assert run.epochs == 200
        assert run.seconds_left > 0
    finally:
        os.kill(process, signal.SIGKILL)
        assert server.wait() == -signal.SIGKILL
    last = json.loads((out / "last/config.json").read_text())["scores"]
    now = os.stat(out / "log.jsonl").st_mtime + 7200
    stopped = describe_run(out, now)
    assert stopped.state.startswith("stopped ")
    assert stopped.state.endswith(f"2 h 0 min ago; --resume goes on from step {last['step']:,}")
    assert stopped.seconds_left is None


def test_the_time_left_is_at_the_pace_of_the_last_epoch(finished):
    """Of 5 epochs, when the third and half of the fourth are over."""
    rows = [row for row in read_log(finished) if row["step"] <= 12]  # two epochs of 6 steps
    rows[-1] |= {"train_seconds": 50.0, "validation_seconds": 10.0}
    rows += [{"kind": "step", "step": step, "epoch": 3} for step in (13, 14, 15)]
    (finished / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = json.loads((finished / "run.json").read_text())
    record["config"]["training"]["epochs"] = 5
    (finished / "run.json").write_text(json.dumps(record))
    with locked(finished / ".lock", "busy"):
        run = describe_run(finished, time.time())
    assert run.seconds_left == pytest.approx(2.5 * 60)

    rows = [{"kind": "step", "step": 3, "epoch": 1, "images_per_second": 2.0}]  # the first epoch
    (finished / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with locked(finished / ".lock", "busy"):
        run = describe_run(finished, time.time())
    assert run.seconds_left == pytest.approx((5 * 24 - 3 * 4) / 2)


@pytest.mark.parametrize("name", ["run.json", "split.json", "log.jsonl", "best/config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"7", b'{"config": 3, "scores": [1]}\n', b"\xff\xfe\n", b"[" * 100_000, None],
)
def test_damaged_files_are_no_traceback(finished, capsys, name, content):
    path = finished / name
    path.unlink()
    if content is None:
        path.mkdir()
        if name == "run.json":  # no file of that name: no run
            assert main(["runs", str(finished)]) == 1
            return
    else:
        path.write_bytes(content)
    with locked(finished / ".lock", "busy"):
        rows = table(capsys, finished)
    assert len(rows) == 1
    (row,) = rows.values()
    assert (f"{path}: " in row) == (name == "run.json")


@pytest.mark.parametrize("value", [None, "3", [], True, 1e400, -1, math.nan])
def test_strange_numbers_are_no_traceback(finished, capsys, value):
    record = json.loads((finished / "run.json").read_text())
    for name in ("epochs", "patience", "batch_size"):
        changed = {**record, "config": {"training": {**record["config"]["training"], name: value}}}
        (finished / "run.json").write_text(json.dumps(changed))
        table(capsys, finished)
    (finished / "run.json").write_text(json.dumps(record))
    row = {"kind": "epoch", "step": value, "epoch": value, "train_seconds": value}
    scores = {"scores": {"epoch": value, "step": value, "BLEU-4": value}}
    (finished / "log.jsonl").write_text(json.dumps(row) + "\n")
    for name in ("best", "last"):
        (finished / name / "config.json").write_text(json.dumps(scores))
    with locked(finished / ".lock", "busy"):
        table(capsys, finished)
    table(capsys, finished)


def test_names_are_escaped_and_nothing_found_is_one_line(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs/evil\x1b[2J\nname")
    assert f"{tmp_path}/runs/evil\\x1b[2J\\nname" in table(capsys, tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "no run in it"), ("missing", "no such folder")):
        assert main(["runs", str(tmp_path / folder)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / folder}: {message}")


def test_checkpoints_and_trackers_are_not_searched(finished):
    for name in ("best", "last", "wandb"):
        (finished / name).mkdir(exist_ok=True)
        (finished / name / "run.json").write_text("{}")
    assert find_runs(finished.parent) == [finished]


def test_asking_for_a_lock_keeps_nobody_out(tmp_path):
    """The lock can be taken at any moment while others ask, and they ask at once."""
    path = tmp_path / ".lock"
    assert not is_locked(path)
    assert not path.exists()
    script = "import sys\nfrom captioner.files import is_locked\nwhile True: is_locked(sys.argv[1])"
    path.touch()
    asking = [subprocess.Popen([sys.executable, "-c", script, str(path)]) for _ in range(2)]
    try:
        for _ in range(200):
            with locked(path, ConfigError("busy")):
                assert is_locked(path)
    finally:
        for process in asking:
            process.kill()
            process.wait()
    assert not is_locked(path)


def test_durations():
    seconds = (-5, 0, 99, 100, 5999, 6000, 7500, 172_799, 200_000)
    assert [duration(value) for value in seconds] == [
        *("0 s", "0 s", "99 s", "2 min", "1 h 40 min", "1 h 40 min", "2 h 5 min"),
        *("2 days 0 h", "2 days 7 h"),
    ]


# --- plots ------------------------------------------------------------------------------------


def test_a_plot_is_beside_the_run(finished):
    with Image.open(finished / "training.png") as picture:
        counts = picture.convert("RGB").getcolors(1 << 20)
    drawn = {colour for _, colour in counts}
    colours = {(31, 119, 180), (255, 127, 14), (44, 160, 44)}  # of BLEU-4, CIDEr-D and ROUGE-L
    assert colours <= drawn


def test_a_plot_that_fails_is_a_warning(finished, capsys):
    (finished / "training.png").unlink()
    (finished / "training.png").mkdir()
    draw_training(finished)
    draw_training(finished)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {finished}/training.png isn't drawn (IsADirectoryError")
