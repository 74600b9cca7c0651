"""What a resumed run compares, keeps and says."""

import json

import pytest
import torch
from PIL import Image

from captioner.commands.train import main as train_main
from captioner.errors import CheckpointError, TrainingError
from captioner.experiment_file import load_config
from captioner.training.run import train
from captioner.training.trainer import Trainer


@pytest.fixture
def config(experiment):
    return load_config(experiment, ["training.epochs=1"])


@pytest.fixture
def run(config, tmp_path):
    """A run that is done."""
    train(config, tmp_path / "run")
    return tmp_path / "run"


def change_circumstances(run, change):
    path = run / "last/training_state.pt"
    state = torch.load(path, weights_only=True)
    change(state["circumstances"])
    torch.save(state, path)
    (run / "last/SHA256SUMS").unlink()


def test_image_files_that_have_changed_are_refused(config, run, tmp_path):
    Image.new("RGB", (300, 100), "white").save(tmp_path / "images/001.png")
    with pytest.raises(CheckpointError, match=f"{run}: image files have other sizes than when"):
        train(config, run, resume=True)


def test_another_device_torch_or_number_of_threads_is_told(config, run, capsys):
    train(config, run, resume=True)
    assert "differ a little" not in capsys.readouterr().err
    changes = {"device_name": "a GPU", "torch_version": "2.11.0", "threads": 99}
    change_circumstances(run, lambda saved: saved.update(changes))
    train(config, run, resume=True)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "differ a little" in x]
    assert "device a GPU before and cpu (" in line
    assert f"torch 2.11.0 before and {torch.__version__} now; CPU threads 99 before and" in line


def test_a_state_from_before_these_were_recorded_goes_on(config, run, capsys):
    def forget(saved):
        for name in ("files_sha256", "device_name", "torch_version", "threads"):
            del saved[name]

    change_circumstances(run, forget)
    train(config, run, resume=True)
    assert "differ a little" not in capsys.readouterr().err


def test_the_weights_of_the_cnn_are_needed_no_more(experiment, tmp_path, cnn_weights):
    """They are in the checkpoint: a file that has changed since doesn't change the run."""
    weights = tmp_path / "cnn.safetensors"
    weights.write_bytes(cnn_weights.read_bytes())
    config = load_config(experiment, [f"encoder.weights={weights}", "training.epochs=1"])
    train(config, tmp_path / "run")
    weights.write_text("damaged")
    train(config, tmp_path / "run", resume=True)


def test_where_there_is_no_run_it_is_refused_unless_asked(experiment, tmp_path, capsys):
    out = tmp_path / "no run"
    argv = [str(experiment), "training.epochs=1", "--output-dir", str(out)]
    assert train_main([*argv, "--resume"]) == 1
    assert f"error: {out}: there is no run to resume" in capsys.readouterr().err
    assert not out.exists()
    out.mkdir()
    assert train_main([*argv, "--resume"]) == 1
    assert train_main([*argv, "--resume-or-start"]) == 0
    assert train_main([*argv, "--resume-or-start"]) == 0
    assert len(json.loads((out / "run.json").read_text())["sessions"]) == 2
    (out / "last/training_state.pt").unlink()
    capsys.readouterr()
    assert train_main([*argv, "--resume-or-start"]) == 1  # what is there isn't overwritten
    assert "there is no run to resume" in capsys.readouterr().err


def test_last_always_holds_the_predictions_of_the_last_validation(
    experiment, tmp_path, monkeypatch
):
    """Within an epoch too, and in a run that was resumed."""
    config = load_config(experiment, ["training.checkpoint_every=1", "training.epochs=2"])
    out, saved = tmp_path / "run", []
    save = Trainer._save

    def watched_save(trainer, name, captions=None):
        save(trainer, name, captions)
        path = out / "last/val_predictions.json"
        saved.append((trainer.state.step, path.read_text() if path.exists() else None))
        if trainer.state.step == 8 and not resumed:
            raise TrainingError("stopped in the second epoch")

    monkeypatch.setattr(Trainer, "_save", watched_save)
    resumed = False
    with pytest.raises(TrainingError, match="stopped"):
        train(config, out)
    step, predictions = saved[-1]
    assert (step, saved[0]) == (8, (1, None))
    assert predictions
    resumed = True
    train(config, out, resume=True)
    in_epoch = [text for step, text in saved if 8 < step < 12]
    assert in_epoch == [predictions] * 3
