"""Experiment files: what is refused, how, and what comes out the same."""

import json
import re
from pathlib import Path

import pytest

from captioner.config import Config
from captioner.errors import CaptionerError, ConfigError, UsageError
from captioner.experiment_file import load_config, load_stages, parse

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.name for path in (ROOT / "experiments").glob("*.toml"))
DATA = """\
[data]
train_annotations = "train.json"
val_annotations = "val.json"
train_images = "images"
val_images = "images"
"""


@pytest.fixture
def experiment(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(DATA)
    return path


def refusal(path, *overrides, kind=CaptionerError):
    with pytest.raises(kind) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_there_are_experiments():
    assert EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_loads_and_survives_json(name):
    for stage in load_stages(ROOT / "experiments" / name):
        text = json.dumps(stage.config.to_dict(), allow_nan=False)
        assert parse(Config, json.loads(text), "again") == stage.config


def test_missing_sections_take_the_defaults(experiment):
    config = load_config(experiment)
    assert config.data.path("train_images") == Path("images")
    assert (config.search.beam_size, config.decoder.cell, config.training.seed) == (5, "lstm", 0)


@pytest.mark.parametrize(
    ("override", "named", "hint"),
    [
        ("training.epoch=3", "training.epoch", "training.epochs"),
        ("decoder.hiden_size=3", "decoder.hiden_size", "decoder.hidden_size"),
        ("serch.beam_size=3", "serch", "search"),
        # Nearer by its letters is training.batch_size, but the key itself is in another section.
        ("training.beam_size=3", "training.beam_size", "search.beam_size"),
        ("data.batch_size=3", "data.batch_size", "training.batch_size' or 'validation.batch_size"),
    ],
)
def test_an_unknown_key_gets_the_nearest_right_one(experiment, override, named, hint):
    message = refusal(experiment, override, kind=ConfigError)
    assert f"'{named}'" in message
    assert f"did you mean '{hint}'?" in message


def test_an_unknown_key_like_no_other_gets_the_keys_that_there_are(experiment):
    message = refusal(experiment, "search.zzz=1")
    assert "known are search.beam_size, search.max_length, search.length_penalty" in message


def test_an_unknown_key_in_the_file_is_refused_with_the_file(experiment):
    experiment.write_text(DATA + "[training]\nlerning_rate = 1.0\n")
    message = refusal(experiment)
    assert message.startswith(f"{experiment}: ")
    assert "training.learning_rate" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ('training.epochs="3"', "training.epochs: input should be a valid integer, found '3'"),
        ("training.epochs=2.5", "training.epochs: input should be a valid integer, found 2.5"),
        ("training.epochs=true", "training.epochs: input should be a valid integer, found True"),
        ("training.learning_rate=fast", "training.learning_rate: input should be a valid number"),
        ("data.root=[1]", "data.root: input should be a valid string, found [1]"),
        ("wandb.tags=[1]", "wandb.tags.0: input should be a valid string, found 1"),
        ("wandb.log_checkpoint=1", "wandb.log_checkpoint: input should be a valid boolean"),
        ("decoder.cell=LSTM", "decoder.cell: input should be 'lstm', 'gru', 'rnn_tanh' or"),
        # Names must come out as they are to be written.
        ("validation.metric=BLEU4", "input should be 'BLEU-1', 'BLEU-2', 'BLEU-3', 'BLEU-4'"),
    ],
)
def test_a_wrong_type_names_the_key_and_the_value(experiment, override, expected):
    assert expected in refusal(experiment, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("search.consensus=1", "search.consensus: it is fitted to a trained captioner"),
        ("training.epochs=0", "training.epochs: at least 1 was expected, found 0"),
        ("training.learning_rate=0", "training.learning_rate: a number above 0 was expected"),
        ("training.learning_rate=nan", "found nan"),
        ("training.learning_rate=inf", "found inf"),
        ("training.weight_decay=inf", "training.weight_decay: at least 0.0 was expected"),
        ("training.weight_decay=-1", "found -1"),
        ("training.label_smoothing=1", "at least 0 and below 1 was expected, found 1"),
        ("decoder.dropout=1.5", "decoder.dropout"),
        ("decoder.attention_regularisation=nan", "decoder.attention_regularisation"),
        ("decoder.forget_bias=nan", "decoder.forget_bias: a finite number was expected"),
        ("training.bptt_window=-1", "training.bptt_window: at least 0 was expected, found -1"),
        ("training.gradient_clip_value=-1", "training.gradient_clip_value"),
        ("training.gradient_flow_every=-1", "training.gradient_flow_every"),
        ("search.length_penalty=-0.1", "search.length_penalty"),
        ("data.workers=-2", "data.workers: at least -1 was expected, found -2"),
        ("encoder.learning_rate=-1", "encoder.learning_rate"),
        ("preprocessing.mean=[0.5]", "preprocessing.mean: three numbers"),
        ("preprocessing.mean=[0, 0, nan]", "preprocessing.mean: three finite numbers"),
        ("preprocessing.std=[1, 0, 1]", "preprocessing.std: three numbers above 0"),
        ("wandb.sample_images=-1", "wandb.sample_images"),
    ],
)
def test_an_impossible_value_names_the_field_and_the_value(experiment, override, expected):
    message = refusal(experiment, override, kind=ConfigError)
    assert message.startswith("override ")
    assert expected in message


def test_two_fields_that_exclude_each_other_are_both_named(experiment):
    message = refusal(experiment, "preprocessing.image_size=300", "preprocessing.resize_size=256")
    assert "preprocessing.resize_size (256)" in message
    assert "preprocessing.image_size (300)" in message


def test_a_missing_key_is_named(experiment):
    experiment.write_text('[data]\ntrain_annotations = "a.json"\n')
    assert f"{experiment}: data.val_annotations: field required" in refusal(experiment)


def test_a_section_that_is_none_is_refused(experiment):
    experiment.write_text(DATA + "[training]\nepochs = 1\n[search]\n")
    message = refusal(experiment, "training.epochs.more=3")
    assert "'epochs' is no section" in message
    experiment.write_text("data = 3\n")
    assert f"{experiment}: data: " in refusal(experiment)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.epochs=3", "training", "epochs", 3),
        ("training.epochs = 3", "training", "epochs", 3),
        ("training.learning_rate=1", "training", "learning_rate", 1.0),
        ("training.learning_rate=2e-4", "training", "learning_rate", 2e-4),
        ("encoder.name=resnet18", "encoder", "name", "resnet18"),
        ('encoder.name="resnet18"', "encoder", "name", "resnet18"),
        ("encoder.fine_tune_from=", "encoder", "fine_tune_from", ""),
        ("data.root=my data/a=b", "data", "root", "my data/a=b"),
        ("data.root=C:\\data\\new", "data", "root", "C:\\data\\new"),
        ("data.root=2024-01-01", "data", "root", "2024-01-01"),
        ("wandb.log_checkpoint=false", "wandb", "log_checkpoint", False),
        ("wandb.log_checkpoint=True", "wandb", "log_checkpoint", True),
        ('wandb.tags=["a", "b"]', "wandb", "tags", ("a", "b")),
        ("wandb.tags=a,b", "wandb", "tags", ("a", "b")),
        ("wandb.tags=a", "wandb", "tags", ("a",)),
        ('wandb.tags="a,b"', "wandb", "tags", ("a,b",)),
        ('wandb.tags="a", "b"', "wandb", "tags", ("a", "b")),
        ("wandb.tags=1,2", "wandb", "tags", ("1", "2")),
        ("wandb.tags=", "wandb", "tags", ()),
        ("search.forbidden=man, group of", "search", "forbidden", ("man", "group of")),
        ("preprocessing.mean=0.5, 0.5, 0.25", "preprocessing", "mean", (0.5, 0.5, 0.25)),
        ("preprocessing.std=[1, 1, 0.5]", "preprocessing", "std", (1.0, 1.0, 0.5)),
    ],
)
def test_overrides(experiment, override, section, key, value):
    found = getattr(getattr(load_config(experiment, [override]), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_override_wins(experiment):
    config = load_config(experiment, ["training.seed=1", "training.seed=2"])
    assert config.training.seed == 2


def test_what_is_at_fault_is_named_the_file_or_the_override(experiment):
    """Also where both are faulty, and where a fault lies between the two."""
    experiment.write_text(DATA + "[training]\nepochs = 0\n[preprocessing]\nimage_size = 300\n")
    assert refusal(experiment, "training.seed=1").startswith(f"{experiment}: training.epochs")
    assert refusal(experiment, "training.epochs=-1") == (
        "override training.epochs=-1: training.epochs: at least 1 was expected, found -1"
    )
    message = refusal(
        experiment, "training.epochs=1", "wandb.name=a b", "preprocessing.resize_size=256"
    )
    assert message.startswith("override preprocessing.resize_size=256: preprocessing.resize_size")
    assert refusal(experiment, "wandb.tag=a b").startswith("override 'wandb.tag=a b': unknown key")


def test_an_override_can_mend_the_file(experiment):
    experiment.write_text(DATA + "[training]\nepochs = 0\n")
    assert load_config(experiment, ["training.epochs=2"]).training.epochs == 2


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("epochs=2", "did you mean 'training.epochs=2'?"),
        ("epoch=2", "did you mean 'training.epochs=2'?"),
        ("batch_size=2", "did you mean 'training.batch_size=2' or 'validation.batch_size=2'?"),
        ("cell", "did you mean 'decoder.cell=VALUE'?"),
        ("--training.epochs=2", "it is written without dashes: training.epochs=2"),
        ("--training.epochs", "it is written without dashes: training.epochs=VALUE"),
    ],
)
def test_the_right_form_of_an_override_is_shown(experiment, override, hint):
    assert refusal(experiment, override, kind=UsageError).endswith(hint)


@pytest.mark.parametrize("override", ["training.epochs", "epochs=3", "=3", "--", ""])
def test_an_override_of_another_form_is_a_usage_error(experiment, override):
    assert "'section.key=value' was expected" in refusal(experiment, override, kind=UsageError)


def test_files_that_cannot_be_read(tmp_path):
    missing = tmp_path / "none.toml"
    assert refusal(missing) == f"{missing}: no such file"
    assert "this is a folder" in refusal(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    assert re.match(rf"{re.escape(str(broken))}: not valid TOML: .*line 1", refusal(broken))
    broken.write_bytes(b"\xff\xfe[data]")
    assert "not UTF-8 text" in refusal(broken)


def test_byte_order_mark_and_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "windows.toml"
    path.write_bytes(b"\xef\xbb\xbf" + DATA.replace("\n", "\r\n").encode())
    assert load_config(path).data.val_annotations == "val.json"
