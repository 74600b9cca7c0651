"""What a run begins with: a new model, another run's checkpoint; and what can't be learnt."""

import hashlib
import json
import shutil

import pytest
from training_runs import assert_same_weights, make_experiment, read_log, weights_of

from captioner.data.predictions import read_predictions
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.experiment_file import load_config
from captioner.training.initial_model import make_model
from captioner.training.run import load_splits, train

FROZEN = ["training.epochs=6", "training.patience=0", "decoder.dropout=0.0"]
TUNED = ["encoder.fine_tune_from=features.12", "training.epochs=1", "training.learning_rate=1e-4"]


@pytest.fixture(scope="module")
def frozen_run(tmp_path_factory, cnn_weights):
    """A run with a frozen CNN that has learnt something; not to be changed."""
    folder = tmp_path_factory.mktemp("frozen")
    train(load_config(make_experiment(folder, cnn_weights), FROZEN), folder / "run")
    return folder / "run"


# --- training.init_from -----------------------------------------------------------------------


def test_fine_tuning_goes_on_from_a_frozen_phase(experiment, tmp_path, frozen_run):
    best = shutil.copytree(frozen_run / "best", tmp_path / "frozen")
    scores = json.loads((best / "config.json").read_text())["scores"]
    assert scores["BLEU-4"] > 0
    out, settings = tmp_path / "tuned", [*TUNED, f"training.init_from={best}"]
    train(load_config(experiment, settings), out)

    start = read_log(out)[0]
    assert (start["kind"], start["step"]) == ("start", 0)
    assert start["BLEU-4"] == pytest.approx(scores["BLEU-4"], abs=1e-12)
    sha256 = hashlib.sha256((best / "model.safetensors").read_bytes()).hexdigest()
    record = json.loads((out / "run.json").read_text())["init_from"]
    assert record == {"path": str(best.resolve()), "sha256": sha256}
    before, after = weights_of(best), weights_of(out / "last")
    changed = {key for key in before if not before[key].equal(after[key])}
    assert "decoder.output.weight" in changed
    assert {key.split(".")[3] for key in changed if key.startswith("encoder.")} == {"12"}

    # Resuming needs the first checkpoint no more, and keeps the record of it.
    shutil.rmtree(best)
    train(load_config(experiment, settings), out, resume=True)
    assert json.loads((out / "run.json").read_text())["init_from"] == record


def test_a_run_that_only_gets_worse_keeps_what_it_began_with(experiment, tmp_path, frozen_run):
    out = tmp_path / "worse"
    ruin = ["training.learning_rate=10", "training.epochs=1", "training.warmup_steps=0"]
    config = load_config(experiment, [*ruin, f"training.init_from={frozen_run / 'best'}"])
    train(config, out)
    assert_same_weights(frozen_run / "best", out / "best")
    predictions = [read_predictions(d / "best/val_predictions.json") for d in (frozen_run, out)]
    assert predictions[0] == predictions[1]


def test_a_checkpoint_that_does_not_fit_is_one_line_of_all_that_differs(
    experiment, tmp_path, frozen_run
):
    best = frozen_run / "best"
    settings = ["decoder.cell=gru", "decoder.hidden_size=8", "preprocessing.image_size=64"]
    config = load_config(experiment, [*settings, f"training.init_from={best}"])
    with pytest.raises(CheckpointError) as caught:
        train(config, tmp_path / "other")
    assert str(caught.value) == (
        f"training.init_from={best}: it doesn't fit the experiment: decoder.cell is 'lstm' there "
        "and 'gru' here; decoder.hidden_size is 24 there and 8 here; preprocessing.image_size is "
        "48 there and 64 here; preprocessing.resize_size is 55 there and 73 here"
    )
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        train(load_config(experiment, ["training.init_from=nowhere"]), tmp_path / "nowhere")


def test_another_padding_than_the_checkpoints_is_refused(experiment, tmp_path, frozen_run):
    settings = ["encoder.padding=tensorflow", f"training.init_from={frozen_run / 'best'}"]
    with pytest.raises(CheckpointError, match=r"encoder\.padding is 'torchvision' there and 'tens"):
        train(load_config(experiment, settings), tmp_path / "other")


def test_padding_and_batch_norm_are_those_of_the_experiment(experiment):
    settings = ["encoder.name=mobilenet_v2", "encoder.weights=none", "encoder.padding=tensorflow"]
    settings += ["encoder.fine_tune_from=features.18", "encoder.batch_norm=frozen"]
    config = load_config(experiment, settings)
    encoder = make_model(config, load_splits(config)[0], None).encoder.train()
    assert encoder.padding == "tensorflow"
    convolution, batch_norm, _ = encoder.cnn.features[18]
    assert (convolution.training, batch_norm.training) == (True, False)


def test_words_that_the_checkpoint_lacks_are_counted(experiment, tmp_path, frozen_run, capsys):
    path = tmp_path / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["caption"] = "a crimson crimson picture"
    path.write_text(json.dumps(content))
    settings = ["training.epochs=1", f"training.init_from={frozen_run / 'best'}"]
    train(load_config(experiment, settings), tmp_path / "run")
    assert "warning: 2 of 192 words of the training captions (1 different ones) aren't" in (
        capsys.readouterr().err
    )
    words = (tmp_path / "run/last/vocabulary.json").read_text()
    assert words == (frozen_run / "last/vocabulary.json").read_text()


# --- what can't be learnt, or not as it seems ---------------------------------------------------


def test_a_random_frozen_cnn_is_refused(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"encoder\.weights=none with a frozen CNN: .*DEFAULT"):
        train(load_config(experiment, ["encoder.weights=none"]), tmp_path / "run")


def test_captions_without_a_word_to_learn_are_refused(experiment, tmp_path):
    with pytest.raises(DataError, match=r"no word comes data\.min_word_count = 99 times in its 48"):
        train(load_config(experiment, ["data.min_word_count=99"]), tmp_path / "run")


def test_settings_of_the_cnn_without_effect_are_warned_of(experiment, tmp_path, capsys):
    train(load_config(experiment, ["encoder.learning_rate=1e-3", *TUNED[1:]]), tmp_path / "frozen")
    assert "warning: encoder.learning_rate=0.001 has no effect on a frozen CNN" in (
        capsys.readouterr().err
    )
    settings = [*TUNED, "encoder.learning_rate=1e-3", "encoder.weights=none"]
    train(load_config(experiment, settings), tmp_path / "tuned")
    errors = capsys.readouterr().err
    assert "no effect" not in errors
    assert "the stages before features.12 stay random" in errors


def test_the_number_of_words_is_that_of_words(experiment, tmp_path, capsys):
    train(load_config(experiment, ["training.epochs=1"]), tmp_path / "run")
    words = json.loads((tmp_path / "run/last/vocabulary.json").read_text())
    assert words[4:] == ["plain", "a", "is", "picture", "this", "blue", "green", "red", "yellow"]
    assert "24 training images, 48 captions, 9 words;" in capsys.readouterr().err
