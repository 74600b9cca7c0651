"""Distillation: what teachers hold likely, and learning from it."""

import copy
from dataclasses import replace

import pytest
import torch
from training_runs import read_log

from captioner.data.dataset import pad
from captioner.data.vocabulary import Vocabulary
from captioner.errors import CheckpointError, ConfigError
from captioner.experiment_file import load_config
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import save_checkpoint
from captioner.training.distillation import Teachers
from captioner.training.losses import caption_loss
from captioner.training.run import train

TOKEN_IDS = pad([[[4, 5, 6], [5]], [[6, 6], [4, 4, 4, 5]], [[7]]])


def model_of(tiny_model, kind, stage="all"):
    """A random decoder of a kind over the tiny model's CNN, which is trained from a stage on."""
    torch.manual_seed(len(kind))
    config = replace(tiny_model.decoder.config, kind=kind, feature_size=0)
    encoder = copy.deepcopy(tiny_model.encoder)
    encoder.fine_tune_from(stage)
    return CaptioningModel(encoder, config, tiny_model.vocabulary, tiny_model.search).eval()


def saved(model, path):
    path.mkdir()
    save_checkpoint(model, path, {})
    return str(path)


@pytest.fixture
def pixels(drawn, tiny_model):
    load = tiny_model.encoder.preprocessing.load
    return torch.stack([load(path) for path in drawn.paths[:3]])


@pytest.mark.parametrize("stage", ["all", ""])
def test_teachers_of_any_kind_give_their_mean_at_the_students_words(
    tiny_model, pixels, tmp_path, stage
):
    """Decoders put the words of a batch into different orders."""
    kinds = (
        ("show_attend_tell", "up_down") if stage == "" else ("show_attend_tell", "show_and_tell")
    )
    teachers = [model_of(tiny_model, kind, stage) for kind in kinds]
    paths = [saved(teacher, tmp_path / str(i)) for i, teacher in enumerate(teachers)]
    student = model_of(tiny_model, kinds[1], stage)
    with torch.no_grad():
        x = pixels if stage else student.encoder(pixels)
        positions = student.decoder.teacher_forcing(
            student.features(x, torch.float32), TOKEN_IDS
        ).positions
        likely = Teachers(paths, student, torch.float32).probabilities(x, TOKEN_IDS, positions)
        expected = torch.zeros(*TOKEN_IDS[..., 1:].shape, len(tiny_model.vocabulary))
        for teacher in teachers:
            output = teacher.decoder.teacher_forcing(teacher.features(x, torch.float32), TOKEN_IDS)
            expected[tuple(output.positions.unbind(1))] += output.logits.softmax(-1) / 2
    torch.testing.assert_close(likely, expected[tuple(positions.unbind(1))], rtol=0, atol=1e-5)


def test_the_loss_is_a_mean_of_both_and_least_where_the_teacher_is_met(tiny_model, pixels):
    model = model_of(tiny_model, "show_attend_tell")
    with torch.no_grad():
        features = model.features(pixels, torch.float32)
        output = model.decoder.teacher_forcing(features, TOKEN_IDS)
    own = output.logits.softmax(-1)
    other = own.roll(1, -1)
    tokens = len(own)

    def loss(taught, share):
        return caption_loss(output, 0.1, 1.0, tokens, 5, taught, share).item()

    plain, taught = caption_loss(output, 0.1, 1.0, tokens, 5).item(), loss(other, 1.0)
    assert loss(other, 0.0) == pytest.approx(plain)
    assert loss(other, 0.25) == pytest.approx(0.75 * plain + 0.25 * taught)
    entropy = -(own * own.log()).sum().item() / tokens
    unevenness = plain - caption_loss(output, 0.1, 0.0, tokens, 5).item()
    assert loss(own, 1.0) == pytest.approx(entropy + unevenness, rel=1e-5)
    assert loss(own, 1.0) < taught


def test_a_student_comes_nearer_to_its_teacher(experiment, tmp_path):
    """Of people's captions alone it sees as many."""
    train(load_config(experiment, ["training.epochs=6"]), tmp_path / "teacher")
    teacher = f'distillation.teachers=["{tmp_path}/teacher/best"]'
    settings = ["training.seed=1", "training.epochs=3", "training.label_smoothing=0.0"]
    train(load_config(experiment, [*settings, teacher, "distillation.share=1"]), tmp_path / "one")
    losses = [row["loss"] for row in read_log(tmp_path / "one") if row["kind"] == "epoch"]
    assert losses[-1] < losses[0]
    again = [*settings, teacher, "distillation.share=0"]
    train(load_config(experiment, again), tmp_path / "two")
    train(load_config(experiment, settings), tmp_path / "plain")
    two, plain = ([r["loss"] for r in read_log(tmp_path / n)] for n in ("two", "plain"))
    assert two == pytest.approx(plain, rel=1e-5)
    assert losses != two


def test_a_teacher_that_cannot_be_asked_is_refused(tiny_model, tmp_path):
    frozen, tuned = model_of(tiny_model, "show_attend_tell", ""), model_of(tiny_model, "up_down")
    path = saved(frozen, tmp_path / "teacher")
    words = copy.deepcopy(tuned)
    words.vocabulary = Vocabulary.from_captions(["something else"])
    size = copy.deepcopy(tuned)
    size.encoder.preprocessing = replace(size.encoder.preprocessing, image_size=64)
    cnn = copy.deepcopy(frozen)
    next(cnn.encoder.cnn.parameters()).data.add_(1)
    pooled = model_of(tiny_model, "show_and_tell", "")
    for student, message in (
        (words, "its vocabulary is another"),
        (size, "its preprocessing is"),
        (cnn, "its CNN is another"),
        (pooled, "it takes all of the regions"),
    ):
        with pytest.raises(CheckpointError, match=f"distillation.teachers: {path}: {message}"):
            Teachers([path], student, torch.float32)
    with pytest.raises(CheckpointError, match="no such"):
        Teachers([str(tmp_path / "none")], frozen, torch.float32)


def test_a_share_is_at_most_1(experiment):
    with pytest.raises(ConfigError, match=r"distillation\.share"):
        load_config(experiment, ["distillation.share=1.5"])
