"""What adding a decoder takes: one class, one line in ``DECODERS``; it then works everywhere."""

import pytest
import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig, SearchConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import EOS, Vocabulary
from captioner.errors import ConfigError
from captioner.inference.captioner import Captioner
from captioner.models.captioning_model import DECODERS, CaptioningModel, generate
from captioner.models.checkpoint import load_checkpoint, save_checkpoint
from captioner.models.decoder import Decoder, Memory, State, StepOutput
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.recurrent_cells import CellStack, states_per_layer
from captioner.training.gradient_flow import measure_gradient_flow
from captioner.training.losses import caption_loss

# --- the whole of it --------------------------------------------------------------------------


class LanguageModel(Decoder):
    """A decoder that ignores the image."""

    pooled = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        self.cells = CellStack(config.cell, config.hidden_size, config.layers)
        (self.project,) = self.cells.input_projections(config.embedding_size)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)

    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Begin with zeros."""
        zeros = features.new_zeros((len(features), 1, self.config.hidden_size))
        return (zeros,) * (self.config.layers * states_per_layer(self.config.cell)), ()

    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """Take one recurrent step on the word."""
        state = self.cells.step(self.project(words[0]), state)
        return StepOutput((state[-states_per_layer(self.config.cell)],), state)


@pytest.fixture(autouse=True)
def one_line(monkeypatch):
    monkeypatch.setitem(DECODERS, "language_model", LanguageModel)


# --- it works everywhere ----------------------------------------------------------------------

CAPTIONS = ["a dog runs", "a dog runs on the grass", "a cat"]


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.from_captions(CAPTIONS)


@pytest.fixture(scope="module")
def encoder(tiny_model):
    return tiny_model.encoder


@pytest.fixture(params=["lstm", "rnn_tanh"])
def model(request, encoder, vocabulary):
    torch.manual_seed(0)
    config = DecoderConfig(
        kind="language_model",
        cell=request.param,
        layers=2,
        embedding_size=8,
        hidden_size=16,
        dropout=0.0,
    )
    model = CaptioningModel(encoder, config, vocabulary, SearchConfig(beam_size=3, max_length=8))
    features = torch.zeros(1, 1, encoder.grid_shape[1])
    token_ids = pad([[vocabulary.encode(caption) for caption in CAPTIONS]])
    optimizer = torch.optim.Adam(model.decoder.parameters(), lr=0.02)
    for _ in range(400):
        output = model.decoder.teacher_forcing(features, token_ids)
        optimizer.zero_grad()
        caption_loss(output, 0.0, 1.0, len(output.targets), 3).backward()
        optimizer.step()
    return model.eval()


def features_of(model, images=2):
    return torch.randn(images, 1, model.encoder.grid_shape[1])


def test_training_finds_the_distribution_of_the_captions(model, vocabulary):
    """The best that can be said without the image: each caption with a probability of 1/3."""
    token_ids = pad([[vocabulary.encode(caption) for caption in CAPTIONS]])
    output = model.decoder.teacher_forcing(features_of(model, 1), token_ids)
    chances = output.log_probabilities().sum(-1).exp()
    torch.testing.assert_close(chances, torch.full((1, 3), 1 / 3), rtol=0, atol=0.02)


def test_beam_search_finds_the_captions_and_their_probabilities(model, vocabulary):
    search = SearchConfig(beam_size=10, n_best=3, max_length=8, length_penalty=0.0)
    decoder = InferenceDecoder(model.decoder, torch.float32)
    for hypotheses in generate([decoder], [features_of(model)], search, vocabulary):
        texts = [vocabulary.decode(hypothesis.token_ids) for hypothesis in hypotheses]
        assert sorted(texts) == sorted(CAPTIONS)
        token_ids = pad([[hypothesis.token_ids for hypothesis in hypotheses]])
        output = model.decoder.teacher_forcing(features_of(model, 1), token_ids)
        expected = [hypothesis.log_probability for hypothesis in hypotheses]
        assert output.log_probabilities().sum(-1)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_there_are_no_attention_maps(model):
    captioner = Captioner(model, "cpu", "float32")
    pixels = torch.zeros(2, 3, 48, 48, dtype=torch.uint8)
    for captions in captioner.captions(pixels, model.search, attention=True):
        assert captions[0].attention is None


def test_gradient_flow_reaches_the_first_state(model, vocabulary):
    token_ids = pad([[vocabulary.encode(CAPTIONS[0])]])[:, 0]
    flow = measure_gradient_flow(model.decoder, features_of(model, 1), token_ids)
    assert token_ids[0, -1] == EOS
    for layers in flow.values():
        norms = [layer["state"] for layer in layers]
        assert [len(layer) for layer in norms] == [5, 5]  # the first state and four steps
        assert all(norm > 0 for layer in norms for norm in layer[:4])


def test_checkpoint_brings_it_back(model, tmp_path):
    save_checkpoint(model, tmp_path, {})
    loaded = load_checkpoint(tmp_path)
    token_ids = pad([[[4, 5, 6]]])
    features = features_of(model, 1)
    one, other = (m.decoder.teacher_forcing(features, token_ids).logits for m in (model, loaded))
    assert torch.equal(one, other)


def test_attributes_that_it_does_not_take_are_refused(encoder, vocabulary):
    config = DecoderConfig(kind="language_model", attributes=2)
    with pytest.raises(ConfigError) as caught:
        CaptioningModel(encoder, config, vocabulary, SearchConfig())
    expected = "decoder.kind = language_model takes none; 0 was expected, found 2"
    assert str(caught.value) == f"decoder.attributes: {expected}"


def test_a_kind_that_is_not_there_is_named(encoder, vocabulary):
    with pytest.raises(ConfigError, match="no decoder 'languagemodel'; did you mean 'language_mo"):
        CaptioningModel(encoder, DecoderConfig(kind="languagemodel"), vocabulary, SearchConfig())
