"""Experiments with stages: what is in their folder, kills and signals, resuming, early checks."""

import json
import os
import shlex
import shutil
import signal

import pytest
from training_runs import AT, assert_same_weights, make_experiment, read_log, weights_of
from wandb_files import read_records, wait_for_exit

from captioner.commands.train import main as train_main
from captioner.config import WandbConfig
from captioner.errors import CaptionerError, CheckpointError, ConfigError
from captioner.experiment_file import load_stages
from captioner.files import locked
from captioner.inference.captioner import Captioner
from captioner.training.stages import train_stages
from captioner.training.tracking import Tracker
from captioner.training.trainer import Trainer

STAGES = """\
[[stages]]
name = "cross_entropy"
training.epochs = 1
[[stages]]
name = "fine_tune"
encoder.fine_tune_from = "features.12"
training.epochs = 2
"""


def with_stages(path, stages=STAGES):
    path.write_text(path.read_text() + stages)
    return path


@pytest.fixture
def experiment(experiment):
    return with_stages(experiment)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cnn_weights):
    """An experiment that was never interrupted; not to be changed."""
    folder = tmp_path_factory.mktemp("whole")
    path = with_stages(make_experiment(folder, cnn_weights))
    rows = train_stages(load_stages(path), folder / "run")
    assert rows[-1]["best_epoch"], "the second stage makes nothing better: it couldn't be told"
    return path, folder / "run", rows


@pytest.fixture
def finished(whole, tmp_path):
    """The same, to be changed: the experiment file and the folder."""
    return whole[0], shutil.copytree(whole[1], tmp_path / "moved")


def losses(folder):
    return [(row["kind"], row["step"], row.get("loss")) for row in read_log(folder)]


def assert_same_experiment(one, other):
    for checkpoint in ("cross_entropy/last", "cross_entropy/best", "fine_tune/last", "best"):
        assert_same_weights(one / checkpoint, other / checkpoint)
    for stage in ("cross_entropy", "fine_tune"):
        assert losses(one / stage) == losses(other / stage)


# --- what is there in the end -------------------------------------------------------------------


def test_each_stage_begins_with_the_best_checkpoint_of_the_one_before(whole):
    _, out, _ = whole
    first, second = (
        json.loads((out / stage / "run.json").read_text())
        for stage in ("cross_entropy", "fine_tune")
    )
    assert first["init_from"] is None
    assert second["init_from"]["path"] == str((out / "cross_entropy/best").resolve())
    start = read_log(out / "fine_tune")[0]
    scores = json.loads((out / "cross_entropy/best/config.json").read_text())["scores"]
    assert start["kind"] == "start"
    assert start["BLEU-4"] == pytest.approx(scores["BLEU-4"], abs=1e-12)
    before, after = weights_of(out / "cross_entropy/best"), weights_of(out / "fine_tune/last")
    changed = {key for key in before if not before[key].equal(after[key])}
    assert {key.split(".")[3] for key in changed if key.startswith("encoder.")} == {"12"}


def test_the_folder_shows_the_last_stage_and_what_each_has_reached(whole):
    _, out, rows = whole
    assert_same_weights(out / "best", out / "fine_tune/best")
    assert (out / "best/val_predictions.json").exists()
    assert json.loads((out / "stages.json").read_text()) == rows
    assert [(row["name"], row["epochs"]) for row in rows] == [
        ("cross_entropy", 1),
        ("fine_tune", 2),
    ]
    for row in rows:
        best = json.loads((out / row["name"] / "best/config.json").read_text())["scores"]
        assert row["best_epoch"] == best["epoch"]
        assert row["scores"] == {name: best[name] for name in row["scores"]}
        assert "BLEU-4" in row["scores"]
        log = read_log(out / row["name"])
        assert row["seconds"] >= sum(line.get("train_seconds", 0) for line in log) > 0
        assert row["git"] is None or len(row["git"]["commit"]) == 40
    assert not (out / "last").exists()


def test_its_folder_captions_as_that_of_a_run(whole, tmp_path):
    path, out, _ = whole
    image = path.parent / "images/001.png"
    best = Captioner.from_pretrained(out / "fine_tune/best", "cpu").caption(image)
    assert Captioner.from_pretrained(out, "cpu").caption(image) == best


def test_each_stage_is_a_run_of_one_group_in_wandb(whole):
    _, out, _ = whole
    for stage in ("cross_entropy", "fine_tune"):
        wandb = json.loads((out / stage / "run.json").read_text())["config"]["wandb"]
        assert (wandb["group"], wandb["name"]) == ("run", f"run/{stage}")


def test_the_group_reaches_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    Tracker(WandbConfig(mode="offline", group="run", name="run/first"), {}, tmp_path).finish()
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    wait_for_exit(path)
    (run,) = [r.run for r in read_records(path) if r.WhichOneof("record_type") == "run"]
    assert (run.run_group, run.display_name) == ("run", "run/first")


def test_one_command_trains_all_alone_in_the_folder(experiment, tmp_path, monkeypatch, capsys):
    out, tried = tmp_path / "run", []
    fit = Trainer.fit

    def watched_fit(trainer, *args):
        with pytest.raises(ConfigError, match="busy"), locked(out / ".lock", ConfigError("busy")):
            pass
        tried.append(trainer.output_dir.name)
        return fit(trainer, *args)

    monkeypatch.setattr(Trainer, "fit", watched_fit)
    argv = [str(experiment), "fine_tune.training.epochs=1", "--output-dir", str(out)]
    assert train_main(argv) == 0
    assert tried == ["cross_entropy", "fine_tune"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cross_entropy, best after 1 of 1 epochs:"
    assert lines[-1] == f"best checkpoint: {out / 'best'}"
    assert sum(line.startswith("BLEU-4: ") for line in lines) == 2


# --- kills and signals --------------------------------------------------------------------------

# One after the other: within a stage, at its end, between two, within the next, and when only the
# copy of its best checkpoint is missing.
MOMENTS = [
    ("trainer.Trainer._optimise", "args[0].state.step == 4"),
    ("stages.write_json", "args[0].name == 'finished.json'"),
    ("stages.shutil.copytree", "True"),
    ("trainer.Trainer._optimise", "args[0].state.step == 8"),
    ("stages.shutil.copytree", "True"),
]


def test_killed_again_and_again_it_ends_as_if_it_never_was(experiment, tmp_path, whole, server):
    out = tmp_path / "run"
    argv = [experiment, "training.checkpoint_every=3", "--output-dir", out]
    resume = []
    for place, when in MOMENTS:
        setup = AT.format(place=place, when=when, signal="SIGKILL")
        assert server.run(*argv, *resume, setup=setup) == -signal.SIGKILL, (place, when)
        resume = ["--resume"]
    assert server.run(*argv, "--resume") == 0, server.output.read_text()
    assert_same_experiment(whole[1], out)
    assert_same_weights(out / "best", out / "fine_tune/best")
    assert [row["name"] for row in json.loads((out / "stages.json").read_text())] == [
        "cross_entropy",
        "fine_tune",
    ]
    assert sorted(path.name for path in out.iterdir() if path.name != ".lock") == [
        "best",
        "cross_entropy",
        "fine_tune",
        "stages.json",
    ]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX's signals")
@pytest.mark.parametrize(
    ("place", "when", "begun"),
    [
        # When the first stage is over, so that it hears of the signal no more.
        ("trainer.Trainer._finish_run", "True", False),
        ("run.prepare_inputs", "args[2].encoder.fine_tune_from", False),
        ("trainer.Trainer._optimise", "not args[0].model.encoder.frozen", True),
    ],
    ids=["between stages", "before the second", "in the second"],
)
def test_ctrl_c_prints_a_line_that_goes_on(place, when, begun, experiment, tmp_path, whole, server):
    out = tmp_path / "run"
    argv = [experiment, "--output-dir", out]
    setup = AT.format(place=place, when=when, signal="SIGINT")
    assert server.run(*argv, setup=setup) == 128 + signal.SIGINT
    *_, notice, line = server.output.read_text().splitlines()
    assert notice == "stopped by Ctrl-C; to go on:"
    assert line.strip() == f"captioner train {shlex.join(map(str, [*argv, '--resume']))}"
    assert (out / "cross_entropy/finished.json").exists()
    assert (out / "fine_tune/last").exists() == begun
    train_stages(load_stages(experiment), out, resume=True)
    assert_same_experiment(whole[1], out)


# --- resuming, and some stages alone ------------------------------------------------------------


def test_what_is_finished_is_not_trained_again_wherever_its_folder_is(finished, capsys):
    path, out = finished
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    rows = train_stages(load_stages(path), out, resume=True)
    assert [row["name"] for row in rows] == ["cross_entropy", "fine_tune"]
    assert "stage fine_tune: finished already" in capsys.readouterr().err
    after = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert {f for f in after if f.name != ".lock" and after[f] != before.get(f)} == set()


def test_a_folder_that_was_moved_is_resumed(finished, whole):
    """The second stage has not ended, and its settings hold the old path of the first."""
    path, out = finished
    (out / "fine_tune/finished.json").unlink()
    train_stages(load_stages(path), out, resume=True)
    assert_same_experiment(whole[1], out)


def test_another_setting_of_a_finished_stage_is_refused(finished):
    path, out = finished
    stages = load_stages(path, ["cross_entropy.training.epochs=3"])
    with pytest.raises(CheckpointError) as caught:
        train_stages(stages, out, resume=True)
    assert str(caught.value) == (
        f"{out}/cross_entropy: this run was started with training.epochs = 1, and can't be resumed "
        "with 3"
    )


def test_a_stage_whose_beginning_has_changed_is_refused(finished):
    path, out = finished
    shutil.rmtree(out / "cross_entropy")
    overrides = ["cross_entropy.training.seed=1"]
    with pytest.raises(CheckpointError) as caught:
        train_stages(load_stages(path, overrides), out, resume=True)
    assert str(caught.value) == (
        f"{out}/fine_tune: this stage began with another checkpoint than {out}/cross_entropy/best "
        f"is now; remove {out}/fine_tune to train it anew"
    )


def test_a_stage_alone_needs_the_one_before(finished, whole):
    path, out = finished
    shutil.rmtree(out / "fine_tune")
    shutil.move(out / "cross_entropy", out / "away")
    argv = [str(path), "--output-dir", str(out), "--stages", "fine_tune"]
    with pytest.raises(CheckpointError) as caught:
        train_stages(load_stages(path), out, only=["fine_tune"])
    assert str(caught.value) == (
        f"{out}/cross_entropy/best: no such checkpoint; stage 'fine_tune' begins with it: train "
        "'cross_entropy' first, or set fine_tune.training.init_from"
    )
    shutil.move(out / "away", out / "cross_entropy")
    assert train_main([*argv, "training.log_every=1"]) == 0
    assert_same_experiment(whole[1], out)


def test_what_a_later_stage_alone_needs_is_told_before_the_first_starts(experiment, tmp_path):
    out, path = tmp_path / "run", with_stages(experiment, '[[stages]]\nname = "third"\n')
    with pytest.raises(CheckpointError, match="no such checkpoint; stage 'third' begins with it"):
        train_stages(load_stages(path), out, only=["cross_entropy", "third"])
    assert not (out / "cross_entropy").exists()


def test_stages_without_a_name_are_a_usage_error(experiment, tmp_path, capsys):
    argv = [str(experiment), "--output-dir", str(tmp_path / "run"), "--stages", "training.seed=1"]
    with pytest.raises(SystemExit) as caught:
        train_main(argv)
    assert caught.value.code == 2
    assert "--stages: expected at least one name" in capsys.readouterr().err


def test_a_record_that_is_none_is_one_line(finished):
    path, out = finished
    (out / "fine_tune/run.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fine_tune/run\.json: not the record of a run"):
        train_stages(load_stages(path), out, resume=True)


def test_the_first_stage_alone_is_the_best_there_is(experiment, tmp_path):
    out = tmp_path / "run"
    (row,) = train_stages(load_stages(experiment), out, only=["cross_entropy"])
    assert row["name"] == "cross_entropy"
    assert not (out / "fine_tune").exists()
    assert_same_weights(out / "best", out / "cross_entropy/best")


def test_a_run_that_is_there_is_refused_unless_resumed(finished, tmp_path, capsys):
    path, out = finished
    argv = [str(path), "--output-dir"]
    assert train_main([*argv, str(out)]) == 1
    message = f"error: {out}/cross_entropy: a run is there already; --resume continues it, another"
    assert capsys.readouterr().err.startswith(message)
    # Also of a later stage, before the first begins.
    shutil.rmtree(out / "cross_entropy")
    assert train_main([*argv, str(out)]) == 1
    assert f"error: {out}/fine_tune: a run is there already" in capsys.readouterr().err
    assert not (out / "cross_entropy").exists()
    assert train_main([*argv, str(out / "fine_tune"), "--resume"]) == 1
    assert "a run of an experiment without stages is there" in capsys.readouterr().err
    for folder in (tmp_path / "missing", tmp_path):
        assert train_main([*argv, str(folder), "--resume"]) == 1
        assert "there is no run to resume" in capsys.readouterr().err
    assert not (tmp_path / "missing").exists()


# --- what is checked before the first stage starts ----------------------------------------------


@pytest.mark.parametrize(
    ("setting", "fault"),
    [
        ("encoder.fine_tune_from=features.21", "encoder.fine_tune_from: squeezenet1_1 has no st"),
        ("encoder.name=squeezenet1_2", "encoder.name: torchvision has no CNN 'squeezenet1_2'"),
        ("decoder.cell=gru", "decoder.cell is 'lstm' there and 'gru' here"),
        ("decoder.kind=show_and_tel", "decoder.kind: no decoder 'show_and_tel'"),
        ("preprocessing.image_size=64", "preprocessing.image_size is 48 there and 64 here"),
        ("data.val_images=imgs", "no such file or folder"),
        ("training.init_from=nowhere", "training.init_from=nowhere: no such checkpoint directory"),
        ("training.device=tpu", "tpu"),
        (["training.init_from=", "encoder.weights=wrong"], "encoder.weights: 'wrong' is neither"),
        (["training.init_from=", "encoder.weights=none"], "encoder.weights=none with a frozen CNN"),
    ],
)
def test_what_is_wrong_with_the_last_stage_is_told_at_once(experiment, tmp_path, setting, fault):
    settings = ["encoder.fine_tune_from=", *([setting] if isinstance(setting, str) else setting)]
    out = tmp_path / "run"
    with pytest.raises(CaptionerError) as caught:
        train_stages(load_stages(experiment, [f"fine_tune.{each}" for each in settings]), out)
    assert str(caught.value).startswith(f"{experiment}: stage 'fine_tune': ")
    assert fault in str(caught.value)
    assert not out.exists()
