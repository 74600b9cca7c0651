"""``[[stages]]`` in an experiment file: what each stage gets, and what is refused, how."""

import pytest

from captioner.errors import CaptionerError, ConfigError, UsageError
from captioner.experiment_file import load_config, load_stages

SHARED = """\
[data]
train_annotations = "train.json"
val_annotations = "val.json"
train_images = "images"
val_images = "images"
[training]
epochs = 3
seed = 7
init_from = "before"
"""
STAGES = """\
[[stages]]
name = "cross_entropy"
training.epochs = 14
[[stages]]
name = "fine_tune"
encoder.fine_tune_from = "layer4"
encoder.learning_rate = 1e-4
[[stages]]
name = "other"
training.init_from = "elsewhere"
training.epochs = 2
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "experiment.toml"
    path.write_text(SHARED + STAGES)
    return path


def epochs(stages):
    return [stage.config.training.epochs for stage in stages]


def refusal(path, *overrides, kind=CaptionerError, only=()):
    with pytest.raises(kind) as caught:
        load_stages(path, overrides, only)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_stage_has_the_shared_settings_and_its_own(path):
    stages = load_stages(path)
    assert [stage.name for stage in stages] == ["cross_entropy", "fine_tune", "other"]
    assert epochs(stages) == [14, 3, 2]
    assert [stage.config.training.seed for stage in stages] == [7, 7, 7]
    assert [stage.config.encoder.fine_tune_from for stage in stages] == ["", "layer4", ""]
    # The shared one is where the first begins; the second follows it, the third says otherwise.
    assert [stage.config.training.init_from for stage in stages] == ["before", "", "elsewhere"]
    assert [stage.follows for stage in stages] == [False, True, False]


def test_a_file_without_stages_is_one_without_a_name(path):
    path.write_text(SHARED)
    (stage,) = load_stages(path, ["training.epochs=2"])
    assert (stage.name, stage.follows) == ("", False)
    assert stage.config == load_config(path, ["training.epochs=2"])


def test_overrides_are_of_what_is_shared_or_of_one_stage(path, capsys):
    assert epochs(load_stages(path, ["fine_tune.training.epochs=9"])) == [14, 9, 2]
    assert capsys.readouterr().err == ""
    assert epochs(load_stages(path, ["training.epochs=9", "training.seed=1"])) == [14, 9, 2]
    assert capsys.readouterr().err == (
        "warning: override training.epochs=9 has no effect on cross_entropy, other: it is set "
        "there too; cross_entropy.training.epochs=9 changes that\n"
    )
    stages = load_stages(path, ["training.init_from=x", "fine_tune.training.init_from=y"])
    assert [stage.config.training.init_from for stage in stages] == ["x", "y", "elsewhere"]
    assert [stage.follows for stage in stages] == [False, False, False]


def test_a_stage_may_have_the_name_of_a_section(path):
    path.write_text(f"{SHARED}[[stages]]\nname = 'first'\n[[stages]]\nname = 'search'\n")
    stages = load_stages(path, ["search.beam_size=2", "search.training.epochs=9"])
    assert epochs(stages) == [3, 9]
    assert [stage.config.search.beam_size for stage in stages] == [2, 2]
    stages = load_stages(path, ["search.search.beam_size=2"])
    assert [stage.config.search.beam_size for stage in stages] == [5, 2]


def test_overrides_of_stages_that_are_not_run_are_told(path, capsys):
    overrides = ["other.training.epochs=1", "training.epochs=9", "fine_tune.training.seed=2"]
    load_stages(path, overrides, only=["fine_tune"])
    assert capsys.readouterr().err == (
        "warning: override other.training.epochs=1 has no effect: --stages leaves 'other' out\n"
    )


@pytest.mark.parametrize(
    ("stage", "fault"),
    [
        ("training.epoch = 1", "unknown key 'training.epoch'; did you mean 'training.epochs'?"),
        ("trainig.epochs = 1", "unknown key 'trainig'; did you mean 'training'?"),
        ("training.epochs = 0", "training.epochs: at least 1 was expected, found 0"),
        ('training.epochs = "1"', "training.epochs: input should be a valid integer, found '1'"),
        ("training = 1", "training: "),
    ],
)
def test_a_fault_in_the_last_stage_names_file_stage_and_key(path, stage, fault):
    path.write_text(f"{SHARED}{STAGES}[[stages]]\nname = 'last_one'\n{stage}\n")
    assert refusal(path, kind=ConfigError).startswith(f"{path}: stage 'last_one': {fault}")


def test_a_fault_in_what_is_shared_names_no_stage(path):
    path.write_text(SHARED.replace("seed", "sed") + STAGES)
    assert refusal(path).startswith(f"{path}: unknown key 'training.sed'")


def test_a_fault_in_an_override_names_it(path):
    assert refusal(path, "fine_tune.training.epochs=0") == (
        "override fine_tune.training.epochs=0: training.epochs: at least 1 was expected, found 0"
    )
    # It is set in the first and third stage: the fault is of the second.
    assert refusal(path, "training.epochs=0").startswith("override training.epochs=0: training.ep")
    assert refusal(path, "fin_tune.training.epochs=1", kind=UsageError).endswith(
        "no stage is called 'fin_tune'; did you mean 'fine_tune'?"
    )
    assert refusal(path, "fine_tune.epochs=1", kind=UsageError).endswith(
        "did you mean 'fine_tune.training.epochs=1'?"
    )


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "two words", "1st", "é", "a" * 65])
def test_a_name_that_is_no_plain_word_is_refused(path, name):
    path.write_text(f"{SHARED}[[stages]]\nname = '{name}'\n")
    message = refusal(path, kind=ConfigError)
    assert message.startswith(f"{path}: stages: a name of letters, digits, _ and -")
    assert message.endswith(f"of stage 1, found {name!r}")


@pytest.mark.parametrize(
    ("stages", "fault"),
    [
        ("[[stages]]\nname = 'a'\n[[stages]]\nname = 'A'\n", "two are called 'A'"),
        ("[[stages]]\nname = 'best'\n", "'best' has another meaning"),
        ("[[stages]]\nname = 'Last'\n", "'Last' has another meaning"),
        ("[[stages]]\ntraining.epochs = 1\n", "the name of stage 1 is missing"),
        ("[[stages]]\nname = 1\n", "a name of letters"),
        ("[stages]\nname = 'a'\n", "a table [[stages]] for each stage was expected"),
        ("[stages.a]\ntraining.epochs = 1\n", "a table [[stages]] for each stage was expected"),
    ],
)
def test_stages_of_another_form_are_refused(path, stages, fault):
    path.write_text(SHARED + stages)
    assert refusal(path, kind=ConfigError).startswith(f"{path}: stages: {fault}")


def test_no_stages_at_all_are_refused(path):
    path.write_text("stages = []\n" + SHARED)
    assert "a table [[stages]] for each stage was expected" in refusal(path)


def test_the_stages_that_are_to_run_must_be_there(path):
    assert refusal(path, only=["fine_tun"], kind=UsageError) == (
        f"--stages: {path} has no stage 'fine_tun'; did you mean 'fine_tune'?"
    )
    path.write_text(SHARED)
    assert refusal(path, only=["fine_tune"], kind=UsageError) == (
        f"--stages fine_tune: {path} has no [[stages]]"
    )


def test_where_one_run_is_expected_stages_are_refused(path):
    with pytest.raises(ConfigError, match=r"without \[\[stages\]\] was expected, found cross_entr"):
        load_config(path)
