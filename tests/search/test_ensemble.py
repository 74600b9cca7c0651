"""Ensembles average probabilities; and what a captioner tells beside the words: attention."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from run_commands import run_caption
from step_models import HistoryModel, same

from captioner.config import SearchConfig
from captioner.data.predictions import read_predictions
from captioner.data.vocabulary import BOS, EOS, Vocabulary
from captioner.errors import CheckpointError, UsageError
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import save_checkpoint
from captioner.models.encoder import Encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.search.decoding import decode
from captioner.search.ensemble import ensemble_step
from captioner.search.hypothesis import Hypothesis


def together(models: list[HistoryModel], settings: SearchConfig) -> list[list[Hypothesis]]:
    states, memories = [model.state for model in models], [model.memory for model in models]
    step = ensemble_step([model.step for model in models], states, memories)
    return decode(step, sum(states, ()), sum(memories, ()), settings)


def mean_log_probability(models: list[HistoryModel], token_ids: list[int]) -> float:
    """Return that of a caption of the first image, word by word."""
    states, total = [model.state for model in models], 0.0
    for last, token in itertools.pairwise([BOS, *token_ids, EOS]):
        chances = []
        for number, model in enumerate(models):
            logits, states[number] = model.step(
                torch.tensor([[last]]), states[number], model.memory
            )
            chances.append(logits[0, 0].softmax(-1)[token].item())
        total += math.log(sum(chances) / len(chances))
    return total


@pytest.mark.parametrize("count", [2, 3])
def test_the_mean_of_probabilities_equals_all_captions_scored_by_hand(count):
    models = [HistoryModel(7, images=2, seed=seed, eos=-seed) for seed in range(count)]
    every = [list(c) for n in range(4) for c in itertools.product([4, 5, 6], repeat=n)]
    settings = SearchConfig(len(every), 3, 0.0, n_best=len(every))
    for image, captions in enumerate(together(models, settings)):
        alone = [model.only(image) for model in models]
        expected = [Hypothesis(c, mean_log_probability(alone, c), True) for c in every]
        expected.sort(key=lambda caption: -caption.log_probability)
        assert len(captions) == len(expected)
        assert all(map(same, captions, expected))


@pytest.mark.parametrize("settings", [{}, {"groups": 2}, {"samples": 4}], ids=str)
def test_a_model_with_itself_is_that_model(settings):
    model = HistoryModel(12, images=8, seed=0)
    search = SearchConfig(4, 9, n_best=4, **settings)
    twice = together([model, model], search)
    assert len({len(best[0].token_ids) for best in twice}) > 2  # images leave at different steps
    for captions, alone in zip(
        twice, decode(model.step, model.state, model.memory, search), strict=True
    ):
        assert all(map(same, captions, alone))


# --- checkpoints ------------------------------------------------------------------------------


def another(
    model: CaptioningModel, kind: str, seed: int, sharpness: float = 3, **parts
) -> CaptioningModel:
    """Return a random model of the same words, far from uniform."""
    torch.manual_seed(seed)
    encoder = parts.get("encoder") or Encoder("squeezenet1_1", model.encoder.preprocessing)
    config = replace(model.decoder.config, kind=kind, hidden_size=20, layers=2)
    other = CaptioningModel(
        encoder, config, parts.get("vocabulary", model.vocabulary), SearchConfig()
    )
    other.requires_grad_(False)
    for parameter in other.decoder.parameters():
        parameter.mul_(4)
    other.decoder.output.weight.mul_(sharpness)
    return other.eval()


@pytest.fixture(scope="module")
def models(tiny_model) -> list[CaptioningModel]:
    """One that has learnt, one of the other kind with its CNN, and one with its own CNN."""
    return [
        tiny_model,
        another(tiny_model, "show_and_tell", 1, encoder=tiny_model.encoder),
        another(tiny_model, "show_attend_tell", 2),
    ]


def chances(model: CaptioningModel, features: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    """Return the probability of each word of one image's caption, and of its end."""
    row = torch.tensor([[[BOS, *token_ids, EOS]]])
    return model.decoder.teacher_forcing(features, row).log_probabilities().double().exp()[0, 0]


@pytest.mark.parametrize("chosen", [(0, 1), (1, 2), (2, 0, 1)])
@pytest.mark.parametrize("settings", [{}, {"samples": 3, "temperature": 2.0}], ids=str)
def test_captions_have_the_mean_probability_of_the_models(models, drawn, chosen, settings):
    members = [models[number] for number in chosen]
    captioner = Captioner(members, "cpu", "float32")
    cnns = [InferenceEncoder(model.encoder, torch.float32) for model in members]
    settings = {"beam_size": 3, "max_length": 8, "n_best": 3, **settings}
    found = captioner.describe(drawn.paths, **settings)
    for path, captions in zip(drawn.paths, found, strict=True):
        pixels = models[0].encoder.preprocessing(Image.open(path)).unsqueeze(0)
        seen = [cnn(pixels).clone() for cnn in cnns]
        for caption in captions:
            words = models[0].vocabulary.encode(caption.text)
            each = [chances(m, own, words) for m, own in zip(members, seen, strict=True)]
            mean = torch.stack(each).mean(0).log().sum().item()
            assert caption.log_probability == pytest.approx(mean, abs=1e-3, rel=2e-4)
    alone = Captioner(members[0], "cpu", "float32").describe(drawn.paths, **settings)
    assert [[c.text for c in best] for best in alone] != [[c.text for c in b] for b in found]


def test_models_share_the_cnn_that_they_have_in_common(models, drawn):
    captioner = Captioner(models, "cpu", "float32")
    pixels = models[0].encoder.preprocessing(Image.open(drawn.paths[0])).unsqueeze(0)
    first, second, third = captioner.features(pixels)
    assert first is second
    assert not torch.allclose(first, third)


def test_the_command_averages_checkpoints(models, checkpoint, drawn, tmp_path):
    further = []
    for number in (1, 2):
        further.append(tmp_path / f"other{number}")
        further[-1].mkdir()
        save_checkpoint(models[number], further[-1], {})
    output = tmp_path / "captions.json"
    options = ("--precision", "float32", "--redo", "--ensemble")
    assert run_caption(checkpoint, drawn.images, output, *options, checkpoint) == 0
    assert read_predictions(output) == drawn.captions
    assert run_caption(checkpoint, drawn.images, output, *options, *further) == 0
    expected = Captioner(models, "cpu", "float32").caption(drawn.paths)
    assert list(read_predictions(output).values()) == expected != list(drawn.captions.values())
    loaded = Captioner.from_pretrained([checkpoint, *further], "cpu", "float32")
    assert loaded.caption(drawn.paths) == expected


def test_models_of_other_words_or_preprocessing_are_refused(
    tiny_model, checkpoint, drawn, tmp_path, capsys
):
    words = tiny_model.vocabulary.words
    fewer = another(tiny_model, "show_and_tell", 1, vocabulary=Vocabulary(words[:-1]))
    expected = f"one vocabulary, found one of {len(words)} words and another of {len(words) - 1}"
    with pytest.raises(CheckpointError, match=expected):
        Captioner([tiny_model, fewer], "cpu")
    moved = another(
        tiny_model, "show_and_tell", 1, vocabulary=Vocabulary([*words[:4], *words[:3:-1]])
    )
    with pytest.raises(CheckpointError, match="an ensemble needs one vocabulary"):
        Captioner([tiny_model, tiny_model, moved], "cpu")
    larger = replace(tiny_model.encoder.preprocessing, image_size=64, resize_size=64)
    other = another(tiny_model, "show_and_tell", 1, encoder=Encoder("squeezenet1_1", larger))
    with pytest.raises(CheckpointError, match=r"one preprocessing, found .*48.* and .*64"):
        Captioner([tiny_model, other], "cpu")
    (tmp_path / "fewer").mkdir()
    save_checkpoint(fewer, tmp_path / "fewer", {})
    output = tmp_path / "captions.json"
    assert run_caption(checkpoint, drawn.images, output, "--ensemble", tmp_path / "fewer") == 1
    assert expected in capsys.readouterr().err
    assert not output.exists()


# --- attention --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"samples": 3, "temperature": 2.0}], ids=str)
def test_attention_maps_are_those_of_each_captions_words(models, drawn, settings):
    model = another(models[0], "show_attend_tell", 2, sharpness=1)
    cnn = InferenceEncoder(model.encoder, torch.float32)
    captioner = Captioner(model, "cpu", "float32")
    side = math.isqrt(model.encoder.grid_shape[0])
    settings = {"max_length": 8, "n_best": 3, **settings}
    found = captioner.describe(drawn.paths, attention=True, batch_size=3, **settings)
    lengths = set()
    for path, captions in zip(drawn.paths, found, strict=True):
        pixels = model.encoder.preprocessing(Image.open(path)).unsqueeze(0)
        features = cnn(pixels).clone()
        for caption in captions:
            words = model.vocabulary.encode(caption.text)
            lengths.add(len(words))
            assert caption.attention.shape == (len(words) + 1, side, side)
            sums = caption.attention.sum((1, 2))
            assert torch.allclose(sums, torch.ones(len(words) + 1), atol=1e-5)
            alone = model.decoder.attention_maps(features, torch.tensor([[[BOS, *words]]]))
            expected = alone[0, 0].unflatten(1, (side, side))
            assert torch.allclose(caption.attention, expected, atol=1e-3)
            if words:
                assert expected.std(0).max() > 1e-3  # words look at different things
    assert len(lengths) > 2


def test_attention_is_told_of_one_model_that_has_it_and_when_asked(models, drawn):
    paths = drawn.paths[:2]
    without = Captioner(models[1], "cpu", "float32").describe(paths, attention=True, n_best=2)
    assert [[caption.attention for caption in best] for best in without] == [[None] * 2] * 2
    unasked = Captioner(models[0], "cpu", "float32").describe(paths)
    assert [best[0].attention for best in unasked] == [None, None]
    several = Captioner(models, "cpu", "float32")
    with pytest.raises(UsageError, match="ensemble look at different things"):
        several.describe(paths, attention=True)
    assert len(several.describe(paths, n_best=2)[0]) == 2


def test_a_caption_that_cannot_be_has_the_map_of_its_end_alone(models, drawn):
    settings = {"forced": ("a red", "a blue"), "no_repeat_ngram": 1, "attention": True}
    captioner = Captioner(models[0], "cpu", "float32")
    for (caption,) in captioner.describe(drawn.paths[:2], **settings):
        assert (caption.text, caption.log_probability) == ("", -math.inf)
        assert len(caption.attention) == 1
