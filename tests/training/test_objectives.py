"""Self-critical training: its gradient, its samples, whole runs; and the average of the weights."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from training_runs import COLOURS, assert_same_weights, read_log

from captioner.config import DecoderConfig, SelfCriticalConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS, EOS, PAD, SPECIAL_WORDS, Vocabulary
from captioner.errors import ConfigError
from captioner.experiment_file import load_config
from captioner.inference.captioner import Captioner
from captioner.metrics.reward import CaptionReward
from captioner.models.captioning_model import make_decoder
from captioner.models.checkpoint import load_checkpoint
from captioner.models.inference_decoder import InferenceDecoder
from captioner.training.averaging import make_average
from captioner.training.run import train
from captioner.training.scheduled_sampling import mix_inputs
from captioner.training.self_critical import sample_captions, self_critical_loss

VOCABULARY = Vocabulary([*SPECIAL_WORDS, "a", "dog", "runs"])
REFERENCES = [[[4, 5, 6], [4, 5]], [[5, 6]]]


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    sizes = {"embedding_size": 5, "hidden_size": 6, "attention_size": 4}
    config = DecoderConfig(**sizes, dropout=0.0)
    return make_decoder(config, len(VOCABULARY), 8).double()


@pytest.fixture
def features():
    return torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def every_caption(longest):
    words = range(len(SPECIAL_WORDS), len(VOCABULARY))
    return [
        list(c) for length in range(longest + 1) for c in itertools.product(words, repeat=length)
    ]


def test_the_gradient_is_that_of_the_expected_reward(decoder, features):
    """By all captions of up to two words, each weighted by its probability."""
    captions = every_caption(2)
    reward = CaptionReward(REFERENCES, len(VOCABULARY))
    token_ids = pad([captions] * 2)
    rewards = torch.from_numpy(reward(np.arange(2), token_ids[:, :, 1:].numpy()))
    output = decoder.teacher_forcing(features, token_ids)
    probabilities = output.log_probabilities().sum(-1).exp()
    expected = torch.autograd.grad((probabilities * rewards).sum(), decoder.parameters())

    output = decoder.teacher_forcing(features, token_ids)
    # The loss is a mean over samples: here all captions are there once, so their weights are given.
    weights = (probabilities * rewards).detach() * len(captions) * 2
    loss = self_critical_loss(output, weights, images=2)
    gradient = torch.autograd.grad(loss, decoder.parameters())
    for ours, theirs in zip(gradient, expected, strict=True):
        torch.testing.assert_close(ours, -theirs)


@pytest.mark.parametrize("baseline", ["mean", "greedy"])
def test_samples_come_with_what_they_are_better_than_expected(decoder, features, baseline):
    reward = CaptionReward(REFERENCES, len(VOCABULARY))
    fast = InferenceDecoder(decoder, torch.float64)
    arguments = (fast, features, VOCABULARY, reward, [1, 0], 6, 5, 7)
    samples = sample_captions(*arguments, baseline)
    assert samples.token_ids.shape[:2] == (2, 6)
    lengths = (samples.token_ids > EOS).sum(-1)
    assert (lengths[:, 1:] <= lengths[:, :-1]).all()  # the longest first, as is fastest
    assert lengths[0, 0] >= lengths[1, 0]
    images = np.array([1, 0])[samples.order.numpy()]
    rewards = reward(images, samples.token_ids[:, :, 1:].numpy())
    assert samples.reward == pytest.approx(rewards.mean())
    if baseline == "mean":
        others = (rewards.sum(1, keepdims=True) - rewards) / 5
    else:
        others = (rewards.mean() - samples.advantages.mean().item()) * np.ones(1)
        assert samples.baseline == pytest.approx(others[0], abs=1e-6)
        others = rewards - samples.advantages.numpy()
        assert np.ptp(others, axis=1).max() < 1e-6  # one greedy caption for each image
    np.testing.assert_allclose(samples.advantages, rewards - others, atol=1e-6)
    again = sample_captions(*arguments, baseline)
    assert torch.equal(again.token_ids, samples.token_ids)


CRITICAL = ["training.objective=self_critical", "training.learning_rate=0.003"]


def test_a_captioner_gets_better_by_its_own_captions(experiment, tmp_path):
    first = ["training.epochs=4", "training.patience=0", "validation.metric=CIDEr-D"]
    train(load_config(experiment, first), tmp_path / "first")
    second = [f"training.init_from={tmp_path}/first/last", "self_critical.bleu_weight=0.5"]
    second += ["self_critical.cross_entropy_share=0.1", "training.epochs=12"]
    train(load_config(experiment, [*first, *CRITICAL, *second]), tmp_path / "second")
    steps = [line for line in read_log(tmp_path / "second") if line["kind"] == "step"]
    rewards = [line["reward"] for line in steps]
    assert np.mean(rewards[-6:]) > 1.2 * np.mean(rewards[:6])
    assert all(np.isfinite(line["baseline"]) for line in steps)
    (start, *_, end) = [line for line in read_log(tmp_path / "second") if "CIDEr-D" in line]
    assert end["CIDEr-D"] >= start["CIDEr-D"]
    assert {"vocabulary", "ends_in_function_word", "repeats_ngram"} <= end.keys()


ATTRIBUTES = ["decoder.attributes=9"]  # all words there are


def test_attributes_are_learnt_with_the_captions(experiment, tmp_path):
    settings = [*ATTRIBUTES, "training.epochs=12", "training.patience=0"]
    train(load_config(experiment, settings), tmp_path / "run")
    captioner = Captioner.from_pretrained(tmp_path / "run/best", device="cpu")
    model = captioner.model
    for colour, rgb in COLOURS.items():
        image = Image.new("RGB", (60, 50), tuple(max(0, c - 3) for c in rgb))
        assert colour in captioner.caption(image).split()
        pixels = model.encoder.preprocessing(image)[None]
        output = model.decoder.teacher_forcing(model.features(pixels, torch.float32), pad([[[4]]]))
        chances = dict(zip(model.vocabulary.words[4:], output.attributes[0].sigmoid(), strict=True))
        assert chances["plain"] > 0.8
        assert max(COLOURS, key=chances.__getitem__) == colour


def test_more_attributes_than_words_are_refused(experiment, tmp_path):
    with pytest.raises(ConfigError, match=r"^decoder\.attributes: at most 9 was .* found 10$"):
        train(load_config(experiment, ["decoder.attributes=10"]), tmp_path / "run")


@pytest.mark.parametrize(
    "objective",
    [
        CRITICAL,
        ["training.scheduled_sampling=0.5"],
        ["decoder.recurrent_dropout=0.3"],
        [*CRITICAL, *ATTRIBUTES, "self_critical.cross_entropy_share=0.2"],
    ],
)
def test_runs_with_drawn_captions_and_an_average_resume_to_the_same_weights(
    experiment, tmp_path, monkeypatch, objective
):
    overrides = [*objective, "training.average_decay=0.9", "training.epochs=2"]
    overrides += ["training.checkpoint_every=4"]
    train(load_config(experiment, overrides), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("captioner.training.trainer.Trainer._log_step", _interrupt_at_step(8))
        with pytest.raises(KeyboardInterrupt):
            train(load_config(experiment, overrides), tmp_path / "cut")
    train(load_config(experiment, overrides), tmp_path / "cut", resume=True)
    for name in ("best", "last"):
        assert_same_weights(tmp_path / "whole" / name, tmp_path / "cut" / name)
    averaged, last = (load_checkpoint(tmp_path / "whole" / name) for name in ("best", "last"))
    assert not torch.equal(averaged.decoder.output.weight, last.decoder.output.weight)


def _interrupt_at_step(step):
    def log_step(trainer, norm, rate):
        if trainer.state.step == step:
            raise KeyboardInterrupt

    return log_step


def test_words_that_are_fed_are_replaced_by_drawn_ones(decoder, features):
    token_ids = pad([[[4, 5, 6, 4], [5]], [[6, 6], [4, 4, 4]]])
    output = decoder.teacher_forcing(features, token_ids)
    output.logits.data[:] = 0
    output.logits.data[:, [PAD, BOS, EOS]] = 50.0  # never fed, however likely
    output.logits.data[torch.arange(len(output.targets)), 4 + output.positions[:, 2] % 3] = 40.0
    gold = token_ids[..., :-1]
    assert torch.equal(mix_inputs(token_ids, output, 0.0), gold)
    mixed = mix_inputs(token_ids, output, 1 - 1e-12)
    said = 4 + torch.arange(gold.shape[-1] - 1) % 3  # at step t, fed at t + 1
    is_word = gold[..., 1:] >= len(SPECIAL_WORDS)
    assert torch.equal(mixed[..., 1:], torch.where(is_word, said, gold[..., 1:]))
    assert torch.equal(mixed[..., 0], gold[..., 0])
    share = torch.stack([mix_inputs(token_ids, output, 0.3) == mixed for _ in range(2000)])
    differ = mixed != gold
    assert 0.27 < share[:, differ].float().mean() < 0.33


def test_scheduled_sampling_grows_with_progress(experiment, tmp_path):
    """At the first step nothing is drawn: the loss is that of plain cross-entropy."""
    runs = {}
    for share in (0.0, 0.9):
        settings = [f"training.scheduled_sampling={share}", "training.log_every=1"]
        train(load_config(experiment, [*settings, "training.epochs=2"]), tmp_path / str(share))
        runs[share] = [r["loss"] for r in read_log(tmp_path / str(share)) if r["kind"] == "step"]
    assert runs[0.0][0] == runs[0.9][0]
    assert runs[0.0][-1] != runs[0.9][-1]


def test_the_average_forgets_how_it_began():
    model = torch.nn.Linear(2, 1)
    average = make_average(model, 0.9)
    expected = None
    for number in range(40):
        with torch.no_grad():
            model.weight.fill_(float(number))
        average.update_parameters(model)
        kept = min(0.9, (1 + number) / (10 + number))
        expected = number if expected is None else kept * expected + (1 - kept) * number
    torch.testing.assert_close(average.module.weight, torch.full((1, 2), expected))


def test_impossible_settings_are_refused():
    with pytest.raises(ConfigError, match=r"self_critical\.samples: at least 2"):
        SelfCriticalConfig(samples=1)
    assert SelfCriticalConfig(samples=1, baseline="greedy").samples == 1
    with pytest.raises(ConfigError, match="both 0"):
        SelfCriticalConfig(cider_weight=0)
