"""Attributes: how they are predicted, where they enter each decoder, and what they learn from."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from decoder_settings import KINDS, KINDS_AND_CELLS, most_layers

from captioner.config import Config, DataConfig, DecoderConfig, SearchConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import SPECIAL_WORDS, UNK, Vocabulary
from captioner.errors import ConfigError
from captioner.models.captioning_model import CaptioningModel, make_decoder
from captioner.training.losses import attribute_loss
from captioner.training.objectives import Counts, CrossEntropy

VOCABULARY, WIDTH, REGIONS, WORDS = 12, 6, 5, 3
CAPTIONS = [[[4, 9, 4], [6]], [[UNK, 11]], [[5, 6, 7, 8]], [[7], [5, 5], []]]
TOKEN_IDS = pad(CAPTIONS)
# Of the three most frequent words, 4 to 6: which are in the captions of each image.
HAS_WORD = [[1, 0, 1], [0, 0, 0], [0, 1, 1], [0, 1, 0]]


def make(kind: str = "show_attend_tell", cell: str = "lstm", attributes: int = WORDS, **changes):
    """Return a random decoder that is far from where it begins, in float64."""
    torch.manual_seed(3)
    sizes = {"embedding_size": 8, "hidden_size": 9, "attention_size": 7, "dropout": 0.0}
    config = DecoderConfig(
        kind, cell, most_layers(kind), attributes=attributes, **(sizes | changes)
    )
    decoder = make_decoder(config, VOCABULARY, WIDTH).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder


def features() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(CAPTIONS), REGIONS, WIDTH, dtype=torch.float64, generator=generator)


def by_hand(decoder, regions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits and what the decoder takes of them, for the regions of one image."""
    predict, embed = decoder.attributes.predict, decoder.attributes.embed
    of_regions = [predict.weight @ region + predict.bias for region in regions]
    s = torch.log(sum(torch.exp(of_region) for of_region in of_regions) / len(regions))
    p = 1 / (1 + torch.exp(-s))
    return s, torch.tanh(embed.weight @ p + embed.bias)


# --- the equations ------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_words_are_predicted_from_all_regions(kind, norm):
    decoder, x = make(kind, feature_norm=norm), features()
    regions = x.mean(1, keepdim=True) if decoder.pooled else x
    regions = decoder.feature_norm(regions)
    expected = torch.stack([by_hand(decoder, image)[0] for image in regions])
    logits = decoder.teacher_forcing(x, TOKEN_IDS).attributes
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


def test_one_region_is_enough_to_see_a_thing_and_most_things_are_not_there():
    decoder = make_decoder(DecoderConfig(attributes=WORDS), VOCABULARY, WIDTH)
    nothing, _ = decoder.attributes(torch.zeros(1, 49, WIDTH))
    torch.testing.assert_close(nothing, torch.full((1, WORDS), -3.0))
    seen = torch.zeros(1, 49, WIDTH)
    seen[0, 17] = 100 * decoder.attributes.predict.weight[1].detach()
    chances = torch.sigmoid(decoder.attributes(seen)[0])[0]
    assert chances[1] > 0.99


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_they_enter_a_decoder_as_its_input(kind, cell):
    """For one image they are a constant: biases of a decoder without attributes can be the same."""
    decoder = make(kind, cell)
    for image, x in enumerate(features()):
        plain = make(kind, cell, attributes=0)
        own = plain.state_dict().keys()
        plain.load_state_dict({n: w for n, w in decoder.state_dict().items() if n in own})
        _, a = by_hand(decoder, x.mean(0, keepdim=True) if decoder.pooled else x)
        with torch.no_grad():
            if kind == "show_and_tell":
                plain.image.bias += a
            elif kind == "adaptive_attention":
                plain.word_projection.bias += decoder.image_projection.weight @ a
                plain.word_gate.bias += decoder.image_gate.weight @ a
            else:
                plain.word_projection.bias += decoder.attribute_projection.weight @ a
            if kind == "show_attend_tell":
                plain.initial.bias += decoder.attribute_initial.weight @ a
        token_ids = TOKEN_IDS[image : image + 1]
        output, expected = (d.teacher_forcing(x[None], token_ids) for d in (decoder, plain))
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-10)
        assert expected.attributes is None


def test_nothing_of_an_image_stays_in_the_decoder():
    decoder, x = make(), features()
    before = copy.deepcopy(decoder)
    first = decoder.teacher_forcing(x[:1], TOKEN_IDS[:1])
    decoder.teacher_forcing(x[1:], TOKEN_IDS[1:])
    again = copy.deepcopy(decoder).teacher_forcing(x[:1], TOKEN_IDS[:1])
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(first.attributes, again.attributes)
    assert vars(decoder).keys() == vars(before).keys()
    assert vars(decoder.attributes).keys() == vars(before.attributes).keys()


# --- what they learn from -----------------------------------------------------------------------


def test_the_loss_asks_of_each_word_whether_a_caption_has_it():
    output = make().teacher_forcing(features(), TOKEN_IDS)
    loss = attribute_loss(output.attributes, output, images=8)
    expected = 0.0
    for logits, has_word in zip(output.attributes.tolist(), HAS_WORD, strict=True):
        for s, there in zip(logits, has_word, strict=True):
            chance = 1 / (1 + math.exp(-s))
            expected -= math.log(chance if there else 1 - chance)
    assert float(loss.detach()) == pytest.approx(expected / 8, rel=1e-5)


def test_all_words_of_the_vocabulary_may_be_asked_for():
    words = VOCABULARY - len(SPECIAL_WORDS)
    decoder = make(attributes=words)
    output = decoder.teacher_forcing(features(), TOKEN_IDS)
    assert output.attributes.shape == (len(CAPTIONS), words)
    assert attribute_loss(output.attributes, output, images=4).isfinite()
    with pytest.raises(ConfigError) as caught:
        make(attributes=words + 1)
    assert str(caught.value) == (
        "decoder.attributes: at most 8 was expected, as many as the vocabulary has words; found 9"
    )


def test_the_loss_teaches_the_predictor_alone():
    decoder = make(feature_norm=True)
    output = decoder.teacher_forcing(features(), TOKEN_IDS)
    attribute_loss(output.attributes, output, images=4).backward()
    taught = {name for name, p in decoder.named_parameters() if p.grad is not None and p.grad.any()}
    norm = {"feature_norm.weight", "feature_norm.bias"}
    assert taught == norm | {"attributes.predict.weight", "attributes.predict.bias"}


@pytest.fixture
def objective(tiny_model):
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_size": 9, "attention_size": 7, "dropout": 0.0}
    config = Config(
        DataConfig(".", "", "", "", ""), decoder=DecoderConfig(**sizes, attributes=WORDS)
    )
    vocabulary = Vocabulary([*SPECIAL_WORDS, *"abcdefgh"])
    model = CaptioningModel(tiny_model.encoder, config.decoder, vocabulary, SearchConfig())
    return CrossEntropy(model, config, torch.float32)


def loss_and_gradients(objective, parts: list[slice]) -> list[torch.Tensor]:
    width = objective.model.encoder.grid_shape[1]
    x = torch.randn(len(CAPTIONS), REGIONS, width, generator=torch.Generator().manual_seed(2))
    counts = Counts(tokens=int((TOKEN_IDS[..., 1:] != 0).sum()), captions=7, images=len(CAPTIONS))
    decoder, total = objective.model.decoder, torch.zeros(())
    decoder.zero_grad()
    for part in parts:
        loss = objective.cross_entropy(x[part], TOKEN_IDS[part], counts)
        loss.backward()
        total += loss.detach()
    return [total, *(parameter.grad.clone() for parameter in decoder.parameters())]


def test_accumulated_batches_equal_one_large_batch(objective):
    whole = loss_and_gradients(objective, [slice(0, 4)])
    parts = loss_and_gradients(objective, [slice(0, 1), slice(1, 4)])
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_loss_has_its_weight_in_training(objective):
    """And the signature names it: losses with another weight can't be compared."""
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        decoder = replace(objective.config.decoder, attribute_weight=weight)
        objective.config = replace(objective.config, decoder=decoder)
        losses[weight] = float(loss_and_gradients(objective, [slice(0, 4)])[0])
        assert objective.signature.endswith(f", 3 attributes by {weight:g}")
    assert losses[1.0] - losses[0.0] > 0.1
    assert losses[3.0] - losses[0.0] == pytest.approx(3 * (losses[1.0] - losses[0.0]), rel=1e-4)
