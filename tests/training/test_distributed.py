"""Several processes train one model: real ones, on gloo."""

import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from processes import Crew, Torchrun
from torch.distributed import TCPStore
from training_runs import (
    AT,
    assert_last_is_of_the_last_step,
    assert_same_weights,
    make_experiment,
    read_log,
    wait_for_steps,
    weights_of,
)

from captioner.experiment_file import load_config
from captioner.training.feature_store import list_stores
from captioner.training.run import train

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="needs a torch with torch.distributed"
)

TUNED = ["encoder.fine_tune_from=features.9", "encoder.learning_rate=1e-4"]
CRITICAL = ["training.objective=self_critical", "self_critical.cross_entropy_share=0.2"]
NO_DROPOUT = "decoder.dropout=0"


@pytest.fixture(scope="module")
def crew(tmp_path_factory):
    crew = Crew(tmp_path_factory.mktemp("crew"), count=3)
    yield crew
    crew.close()


def losses(directory):
    return [(row["kind"], row["step"], row.get("loss")) for row in read_log(directory)]


def assert_nearly_the_same(one, other):
    """Equal but for rounding: the order of sums differs."""
    ours, theirs = losses(one), losses(other)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for mine, yours in zip(ours, theirs, strict=True):
        assert mine[2] == pytest.approx(yours[2], rel=1e-5)
    # Adam divides a gradient by its own size: where it is 0 but for rounding, weights differ more.
    a, b = weights_of(one / "last"), weights_of(other / "last")
    differences = torch.cat([(a[name] - b[name]).abs().flatten() for name in a])
    assert differences.quantile(0.99) < 1e-6
    assert differences.max() < 1e-3


# --- the same as one process --------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ["training.accumulation_steps=2"],
        [*TUNED, "augmentation.crop=0.5", "augmentation.flip=true"],
        [*CRITICAL, "training.average_decay=0.9", "decoder.kind=show_and_tell"],
        ["decoder.kind=up_down", "decoder.attention_regularisation=0", "training.bptt_window=2"],
        ["decoder.kind=adaptive_attention", "decoder.tie_output=true"],
    ],
    ids=["cross-entropy", "fine-tuned CNN", "self-critical", "up-down", "adaptive"],
)
def test_two_with_half_batches_equal_one(experiment, tmp_path, crew, settings):
    """24 images in batches of 10: the last one gives the second process two images."""
    settings = [*settings, NO_DROPOUT, "training.epochs=2"]
    two = [*settings, "training.batch_size=5", "--output-dir", tmp_path / "two"]
    assert crew.run(experiment, *two) == [0, 0], crew.output(0)
    train(load_config(experiment, [*settings, "training.batch_size=10"]), tmp_path / "one")
    assert_nearly_the_same(tmp_path / "one", tmp_path / "two")
    assert "epoch 2: loss" in crew.output(0)
    assert crew.output(1) == ""  # one process tells


@pytest.mark.parametrize("settings", [CRITICAL, TUNED], ids=["critical", "tuned"])
def test_processes_without_images_take_part(experiment, tmp_path, crew, settings):
    """The last batch of 24 images in batches of 23 is one image, for three processes."""
    settings = [*settings, NO_DROPOUT, "training.epochs=2", "training.batch_size=23"]
    first = [*settings, "training.checkpoint_every=1"]
    out, config = tmp_path / "three", load_config(experiment, settings)
    train(config, tmp_path / "one")
    # A run of one process goes on with three: the size of its batches stays.
    stop = AT.format(place="trainer.Trainer._optimise", when="True", signal="SIGTERM")
    assert crew.run(experiment, *first, "--output-dir", out, setup=stop, count=1) == [143]
    argv = [experiment, *settings, "--output-dir", out, "--resume"]
    assert crew.run(*argv, count=3) == [0, 0, 0], crew.output(0)
    assert "batches of 23 images, as when this run began, are divided among 3" in crew.output(0)
    assert_nearly_the_same(tmp_path / "one", out)


def test_the_cache_filled_by_two_is_that_filled_by_one(experiment, tmp_path, crew):
    views = ["augmentation.crop=0.5", "augmentation.views=2", "training.epochs=1"]
    encode = "import captioner.training.feature_encoder as e; e.ENCODE_BATCH_SIZE = 4"
    caches = [tmp_path / "of_two", tmp_path / "of_one"]
    for cache, count in zip(caches, (2, 1), strict=True):
        argv = [*views, f"data.cache_dir={cache}", "--output-dir", tmp_path / f"run{count}"]
        assert crew.run(experiment, *argv, setup=encode, count=count) == [0] * count
    stores = [{store.folder.name: store.folder for store in list_stores(c)} for c in caches]
    assert len(stores[0]) == 2
    assert stores[0].keys() == stores[1].keys()
    for name, of_two in stores[0].items():
        of_one = stores[1][name]
        assert (of_two / "features.f16").read_bytes() == (of_one / "features.f16").read_bytes()
        # The files' status is noted only of those that were written some time before.
        lines = [
            [json.loads(line)[:3] for line in (store / "index.jsonl").read_text().splitlines()]
            for store in (of_two, of_one)
        ]
        assert lines[0] == lines[1]


def test_one_process_tracks(experiment, tmp_path):
    out = tmp_path / "run"
    settings = ["training.epochs=1", "wandb.mode=offline", "training.gradient_flow_every=3"]
    torchrun = Torchrun(tmp_path / "output", experiment, *settings, "--output-dir", out)
    assert torchrun.wait() == 0, torchrun.output.read_text()
    assert len(list(out.glob("wandb/offline-run-*"))) == 1
    kinds = Counter(row["kind"] for row in read_log(out))
    assert kinds == {"step": 3, "gradient_flow": 1, "epoch": 1}
    assert (out / "gradient_flow.png").exists()
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 1


# --- stopped, killed, resumed -------------------------------------------------------------------

# In the first step, in the middle of an epoch, in validation, and while a checkpoint is written.
MOMENTS = [
    ("trainer.Trainer._optimise", "True"),
    ("trainer.Trainer._optimise", "args[0].state.step == 4 and rank == 1"),
    ("trainer.Trainer._optimise", "args[0].state.step == 5"),
    ("validation.generate", "rank == 1"),
    ("trainer.write_checkpoint", "args[0].name == 'last'"),
]
SETTINGS = ["training.batch_size=2", "training.checkpoint_every=2", "training.epochs=2"]


@pytest.fixture(scope="module")
def whole(crew, tmp_path_factory, cnn_weights):
    """An uninterrupted run of two processes: its experiment, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    experiment = make_experiment(folder, cnn_weights)
    assert crew.run(experiment, *SETTINGS, "--output-dir", folder / "run") == [0, 0]
    return experiment, folder / "run"


def assert_same_run(one, other):
    assert_same_weights(one / "last", other / "last")
    assert_same_weights(one / "best", other / "best")
    assert losses(one) == losses(other)


def test_killed_again_and_again_it_ends_as_if_it_never_was(whole, tmp_path, crew):
    experiment, uninterrupted = whole
    argv = [experiment, *SETTINGS, "--output-dir", tmp_path / "run", "--resume-or-start"]
    for place, when in MOMENTS:
        codes = crew.run(*argv, setup=AT.format(place=place, when=when, signal="SIGKILL"))
        assert -signal.SIGKILL in codes
        assert set(codes) <= {-signal.SIGKILL, 1}
        for line in crew.errors():
            assert line.startswith("error: another process of this run has ended")
    assert crew.run(*argv) == [0, 0]
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place", ["trainer.Trainer._optimise", "validation.generate"])
def test_a_signal_to_one_stops_all_at_the_same_step(whole, tmp_path, crew, place, rank):
    experiment, uninterrupted = whole
    argv = [experiment, *SETTINGS, "--output-dir", tmp_path / "run"]
    setup = AT.format(place=place, when=f"rank == {rank}", signal="SIGTERM")
    assert crew.run(*argv, setup=setup) == [143, 143], crew.output(0)
    assert "to go on:\n  the same torchrun command, with --resume-or-start" in crew.output(0)
    assert "to go on" not in crew.output(1)
    state = torch.load(tmp_path / "run/last/training_state.pt", weights_only=True)
    assert state["train_state"]["step"] == {"validation.generate": 6}.get(place, 1)
    assert crew.run(*argv, "--resume") == [0, 0]
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_signal_that_comes_twice_is_heard_once(whole, tmp_path, crew):
    """From SLURM and from torchrun, say."""
    experiment, uninterrupted = whole
    argv = [experiment, *SETTINGS, "--output-dir", tmp_path / "run"]
    setup = AT.format(place="trainer.Trainer._optimise", when="True", signal="SIGTERM")
    setup = setup.replace("if True:", "for _ in range(2):")
    assert crew.run(*argv, setup=setup) == [143, 143], crew.output(0)
    assert "a second signal" not in crew.output(0)
    assert crew.run(*argv, "--resume") == [0, 0]
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_run_goes_on_with_another_number_of_processes(whole, tmp_path, crew):
    """In the same order: with nothing dropped at random it ends nearly the same."""
    experiment, _ = whole
    settings = [*SETTINGS, NO_DROPOUT]
    assert crew.run(experiment, *settings, "--output-dir", tmp_path / "two") == [0, 0]
    argv = [experiment, *settings, "--output-dir", tmp_path / "run"]
    stop = AT.format(
        place="trainer.Trainer._optimise", when="args[0].state.step == 3", signal="SIGTERM"
    )
    assert crew.run(*argv, setup=stop) == [143, 143]
    assert crew.run(*argv, "--resume", count=1, setup=stop.replace("== 3", "== 7")) == [143]
    assert "processes 2 before and 1 now" in crew.output(0)
    assert "divided among 1 process: up to 4 images" in crew.output(0)
    assert crew.run(*argv, "--resume", count=3) == [0, 0, 0]
    assert_nearly_the_same(tmp_path / "two", tmp_path / "run")


def test_what_processes_that_died_left_in_torchruns_store_misleads_none(whole, tmp_path, crew):
    """torchrun starts all anew with the store in which the addresses of the last ones are."""
    experiment, uninterrupted = whole
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("here/1", "of a process that died before it was answered")
    argv = [experiment, *SETTINGS, "--output-dir", tmp_path / "run", "--resume-or-start"]
    kill = AT.format(place="trainer.Trainer._optimise", when="rank == 1", signal="SIGKILL")
    for _ in range(2):
        assert crew.run(*argv, setup=kill, store=store) == [1, -signal.SIGKILL]
    assert crew.run(*argv, store=store) == [0, 0]
    assert_same_run(uninterrupted, tmp_path / "run")


STAGES = """
[[stages]]
name = "first"
training.epochs = 1
[[stages]]
name = "tuned"
encoder.fine_tune_from = "features.12"
training.epochs = 1
"""
# At the end of the first stage, and in the second.
STAGE_MOMENTS = [
    ("stages.write_json", "args[0].name == 'finished.json'"),
    ("trainer.Trainer._optimise", "not args[0].model.encoder.frozen and rank == 1"),
]


def test_stages_that_are_killed_end_as_if_they_never_were(experiment, tmp_path, crew):
    experiment.write_text(experiment.read_text() + STAGES)
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert crew.run(experiment, "training.batch_size=2", "--output-dir", whole) == [0, 0]
    assert "tuned, best after 1 of 1 epochs:" in crew.output(0)
    argv = [experiment, "training.batch_size=2", "--output-dir", out, "--resume-or-start"]
    for place, when in STAGE_MOMENTS:
        setup = AT.format(place=place, when=when, signal="SIGKILL")
        codes = crew.run(*argv, setup=setup)
        assert sorted(codes) == [-signal.SIGKILL, 1]
    assert crew.run(*argv) == [0, 0]
    for stage in ("first", "tuned"):
        assert_same_run(whole / stage, out / stage)
    assert_same_weights(whole / "best", out / "best")
    assert crew.run(*argv) == [0, 0]
    assert "stage tuned: finished already" in crew.output(0)


# --- torchrun itself ----------------------------------------------------------------------------


def test_torchrun_restarts_from_the_last_checkpoint(whole, tmp_path):
    experiment, uninterrupted = whole
    out = tmp_path / "run"
    argv = [experiment, *SETTINGS, "--output-dir", out, "--resume-or-start"]
    torchrun = Torchrun(tmp_path / "output.txt", *argv, options=("--max-restarts=2",))
    wait_for_steps(out, 5)
    torchrun.kill_worker(1)
    assert torchrun.wait() == 0, torchrun.output.read_text()
    assert "resuming after step" in torchrun.output.read_text()
    assert_same_run(uninterrupted, out)


def test_sigterm_to_torchrun_writes_last_and_the_run_goes_on(whole, tmp_path, crew):
    experiment, uninterrupted = whole
    out = tmp_path / "run"
    argv = [experiment, *SETTINGS, "--output-dir", out]
    torchrun = Torchrun(tmp_path / "output.txt", *argv)
    wait_for_steps(out, 3)
    torchrun.process.send_signal(signal.SIGTERM)
    assert torchrun.wait() != 0
    assert "stopped by SIGTERM; to go on:" in torchrun.output.read_text()
    assert_last_is_of_the_last_step(out)
    assert crew.run(*argv, "--resume-or-start") == [0, 0]
    assert_same_run(uninterrupted, out)


def test_workers_whose_torchrun_was_killed_write_last_and_end(whole, tmp_path, crew):
    experiment, uninterrupted = whole
    out = tmp_path / "run"
    argv = [experiment, *SETTINGS, "--output-dir", out]
    torchrun = Torchrun(tmp_path / "output.txt", *argv)
    wait_for_steps(out, 3)
    workers = [torchrun.worker(rank) for rank in (0, 1)]
    torchrun.process.kill()
    torchrun.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert_last_is_of_the_last_step(out)
    assert crew.run(*argv, "--resume") == [0, 0]
    assert_same_run(uninterrupted, out)


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_nan_in_one_process_ends_all_with_one_line(experiment, tmp_path, crew, rank):
    setup = f"""
import captioner.training.objectives as objectives
original = objectives.caption_loss
def poisoned(*args):
    return original(*args) * (float("nan") if rank == {rank} else 1)
objectives.caption_loss = poisoned
"""
    argv = [experiment, "--output-dir", tmp_path / "run"]
    assert crew.run(*argv, setup=setup) == [1, 1]
    (line,) = crew.errors()
    assert line.startswith("error: step 1: the loss is nan and the gradient norm nan at a learning")
    assert not (tmp_path / "run/last").exists()


def test_an_error_in_one_process_ends_all_with_its_line(experiment, tmp_path, crew):
    for rank in (0, 1):
        setup = f"""
import captioner.training.feature_encoder as encoder
encoder.ENCODE_BATCH_SIZE = 4
from captioner.errors import ImageError
def failing(*args):
    raise ImageError("a disk that fails")
if rank == {rank}:
    encoder.load_pixels = failing
"""
        argv = [experiment, "--output-dir", tmp_path / "run"]
        assert crew.run(*argv, setup=setup) == [1, 1]
        assert crew.errors() == ["error: a disk that fails"]
        assert "error" in crew.output(rank)


def test_what_all_find_wrong_is_told_once(experiment, tmp_path, crew):
    out = tmp_path / "run"
    for setting, fault in {
        "decoder.kind=show": "decoder.kind: no decoder 'show'",
        "decoder.kin=x": "unknown key 'decoder.kin'",
        "data.val_annotations=train.json": "24 of its images are in",
        "training.init_from=nowhere": "nowhere",
    }.items():
        assert crew.run(experiment, setting, "--output-dir", out) == [1, 1]
        (line,) = crew.errors()
        assert fault in line
    assert crew.run(experiment, "--output-dir") == [2, 2]


def test_a_bug_in_one_process_ends_all_with_its_traceback(experiment, tmp_path, crew):
    setup = """
import captioner.training.trainer as trainer
if rank == 1:
    trainer.Trainer.caption = lambda *args: 1 / 0
"""
    assert crew.run(experiment, "--output-dir", tmp_path / "run", setup=setup) == [1, 1]
    assert "ZeroDivisionError" in crew.output(1)
    assert "Traceback" not in crew.output(0)
