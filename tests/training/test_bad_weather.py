"""Disks that are full or read-only, folders of others, images that vanish, damaged checkpoints."""

import contextlib
import re
import shutil
import subprocess

import pytest
import safetensors.torch
import torch
from processes import Crew
from training_runs import assert_same_weights, read_log, weights_of

from captioner.experiment_file import load_config
from captioner.files import locked
from captioner.models.checkpoint import load_checkpoint
from captioner.training.checkpoints import keep_last
from captioner.training.run import train

TUNED = ["encoder.fine_tune_from=features.9", "encoder.learning_rate=1e-4"]
EVERY_STEP = ["training.epochs=2", "training.batch_size=4", "training.checkpoint_every=1"]


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crew = Crew(tmp_path_factory.mktemp("crew"))
    yield crew
    crew.close()


@pytest.fixture
def disk(tmp_path):
    """A function that mounts a disk of some size in a folder, or changes it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with contextlib.ExitStack() as stack:

        def mount(options):
            command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
            if "remount" not in options:
                if subprocess.run(command, capture_output=True).returncode:
                    pytest.skip("needs root, who alone can mount a small disk")
                stack.callback(subprocess.run, ["umount", folder], check=True)
            else:
                subprocess.run(["mount", "-o", options, folder], check=True)
            return folder

        yield mount


# --- disks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["700k", "9m"], ids=["the first checkpoint", "a later one"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_disk_that_fills_up_costs_no_more_than_a_checkpoint(
    experiment, tmp_path, crew, disk, size, count
):
    out = disk(f"size={size}") / "run"
    settings = [*EVERY_STEP, f"training.batch_size={4 // count}"]
    argv = [experiment, *settings, "--output-dir", out]
    assert crew.run(*argv, count=count) == [1] * count
    (line,) = crew.errors()
    assert line.startswith(f"error: {out}/last: can't be written (")
    assert "No space left on device" in line
    assert not [path for path in out.iterdir() if path.name.endswith(".tmp")]
    if size == "9m":
        load_checkpoint(out / "last")
    disk("remount,size=100m")
    assert crew.run(*argv, "--resume-or-start", count=count) == [0] * count
    whole = [experiment, *settings, "--output-dir", tmp_path / "whole"]
    assert crew.run(*whole, count=count) == [0] * count
    assert_same_weights(tmp_path / "whole/last", out / "last")
    steps = [row["step"] for row in read_log(out) if row["kind"] == "step"]
    assert steps == list(range(1, 13))


@pytest.mark.parametrize("count", [1, 2])
def test_a_folder_that_can_only_be_read_is_one_line(experiment, crew, disk, count):
    folder = disk("size=9m")
    (folder / "run").mkdir()
    disk("remount,ro")
    for out in (folder / "run", folder / "new"):
        assert crew.run(experiment, "--output-dir", out, count=count) == [1] * count
        (line,) = crew.errors()
        assert str(out) in line
        assert line.endswith("Read-only file system")


# --- runs ---------------------------------------------------------------------------------------


def test_two_runs_in_one_folder_are_one_too_many(experiment, tmp_path, crew):
    """What torchrun has left behind is waited for a while, and no longer."""
    out = tmp_path / "run"
    out.mkdir()
    patience = "import captioner.training.run as run; run.LOST_PROCESSES_SECONDS = 0.1"
    with locked(out / ".lock", "busy"):
        assert crew.run(experiment, "--output-dir", out, setup=patience) == [1, 1]
    (line,) = crew.errors()
    assert line.startswith(f"error: {out}: another process is training in this folder")
    assert [path.name for path in out.iterdir()] == [".lock"]


@pytest.mark.parametrize("name", ["training_state.pt", "model.safetensors"])
def test_a_checkpoint_that_was_cut_short_is_told_once(experiment, tmp_path, crew, name):
    argv = [experiment, "training.epochs=1", "--output-dir", tmp_path / "run"]
    assert crew.run(*argv) == [0, 0]
    path = tmp_path / "run/last" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert crew.run(*argv, "--resume") == [1, 1]
    (line,) = crew.errors()
    assert line.startswith(f"error: {path}: ")


def test_the_checkpoint_of_another_run_is_told_once(experiment, tmp_path, crew):
    argv = [experiment, "training.epochs=1", "--output-dir", tmp_path / "run"]
    assert crew.run(*argv) == [0, 0]
    assert crew.run(*argv, "training.seed=1", "--resume") == [1, 1]
    (line,) = crew.errors()
    assert "this run was started with training.seed = 0" in line


@pytest.mark.parametrize("count", [1, 2])
def test_images_that_vanish_are_left_out_and_told(experiment, tmp_path, crew, count):
    """One of two processes sees no file of them any more, and the other none either."""
    setup = f"""
import captioner.training.trainer as trainer, pathlib
original = trainer.Trainer._optimise
def vanishing(self, *args):
    original(self, *args)
    if self.state.step == 2 and {count - 1} == int(os.environ.get("RANK", 0)):
        for number in (1, 2, 3):
            pathlib.Path("{tmp_path}/images/00" + str(number) + ".png").unlink()
trainer.Trainer._optimise = vanishing
"""
    settings = [*TUNED, "training.epochs=2", "augmentation.crop=0.5"]
    argv = [experiment, *settings, "--output-dir", tmp_path / "run"]
    assert crew.run(*argv, setup=setup, count=count) == [0] * count
    told = [line for rank in range(count) for line in crew.output(rank).splitlines()]
    for number in (1, 2, 3):
        lines = [line for line in told if f"00{number}.png" in line]
        assert lines
        assert all(line.endswith("left out of this batch") for line in lines)
    assert [row["epoch"] for row in read_log(tmp_path / "run") if row["kind"] == "epoch"] == [1, 2]


# --- checkpoints --------------------------------------------------------------------------------


def test_the_latest_checkpoints_are_kept(experiment, tmp_path):
    out = tmp_path / "run"
    config = load_config(experiment, [*EVERY_STEP, "training.keep_last=3"])
    train(config, out)
    kept = sorted(path.name for path in out.glob("*last*"))
    assert kept == ["last", "last-10", "last-11", "last-12"]
    assert_same_weights(out / "last", out / "last-12")
    state = torch.load(out / "last-11/training_state.pt", weights_only=True)
    assert state["train_state"]["step"] == 11
    shutil.rmtree(out / "last")
    (out / "last-10").rename(out / "last")  # an earlier one goes on to the same end
    weights = weights_of(out / "last-12")
    shutil.rmtree(out / "last-12")
    train(config, out, resume=True)
    again = weights_of(out / "last-12")
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_what_a_killed_process_left_of_a_kept_checkpoint_is_removed(tmp_path):
    last = tmp_path / "last"
    last.mkdir()
    safetensors.torch.save_file({"x": torch.ones(2)}, last / "model.safetensors")
    for number in (3, 20, 100):
        keep_last(last, number, 2)
    (tmp_path / ".last-3.0123456789abcdef.tmp").mkdir()
    (tmp_path / "last-notes").mkdir()
    keep_last(last, 101, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["last", "last-100", "last-101", "last-notes"]
    keep_last(last, 102, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@pytest.mark.parametrize("count", [1, 2])
def test_checkpoints_come_by_minutes(experiment, tmp_path, crew, count):
    """A clock of the first process that goes half a minute a look; that of the second stands."""
    setup = """
import captioner.training.trainer as trainer, types, time, itertools
ticks = itertools.count() if int(os.environ.get("RANK", 0)) == 0 else itertools.repeat(0)
trainer.time = types.SimpleNamespace(monotonic=lambda: 30.0 * next(ticks))
write = trainer.Trainer._write
def watched(self, name, *args):
    trainer.log_line(f"written {name} {self.state.step}")
    write(self, name, *args)
trainer.Trainer._write = watched
"""
    settings = ["training.epochs=1", "training.checkpoint_minutes=2", "training.checkpoint_every=0"]
    argv = [experiment, *settings, "training.batch_size=2", "--output-dir", tmp_path / "run"]
    assert crew.run(*argv, setup=setup, count=count) == [0] * count, crew.output(0)
    written = re.findall(r"written last (\d+)", crew.output(0))
    steps = {1: 12, 2: 6}[count]
    in_epoch = [int(step) for step in written if int(step) < steps]
    assert in_epoch == list(range(in_epoch[0], steps, 4))[: len(in_epoch)]
    assert len(in_epoch) >= steps // 4 - 1
