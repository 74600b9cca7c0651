"""Settings that all decoders take: off unless asked for, and each does what it says."""

import math

import pytest
import torch
from decoder_settings import ATTENDING_KINDS, KINDS
from torch import nn

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS, PAD
from captioner.errors import ConfigError
from captioner.models.captioning_model import make_decoder
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.recurrent_cells import CellStack, states_per_layer

VOCABULARY, WIDTH, REGIONS = 12, 6, 5
OPTIONS = {
    "attention_heads": {"attention_heads": 2, "feature_size": 8},
    "tie_output": {"tie_output": True},
    "feature_norm": {"feature_norm": True},
    "output_norm": {"output_norm": True},
    "attributes": {"attributes": 5},
}
CASES = [
    (kind, name)
    for kind in KINDS
    for name in OPTIONS
    if name != "attention_heads" or kind in ATTENDING_KINDS
]


def make(kind: str, **changes):
    torch.manual_seed(3)
    settings = {"embedding_size": 8, "hidden_size": 8, "attention_size": 7, "dropout": 0.0}
    return make_decoder(DecoderConfig(kind, **(settings | changes)), VOCABULARY, WIDTH).double()


def features(images: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, REGIONS, WIDTH, dtype=torch.float64, generator=generator)


TOKEN_IDS = pad([[[4, 5, 6], [7]], [[8, 9]]])


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_option_is_off_by_default_and_changes_what_is_computed(kind, name):
    plain = make(kind, **OPTIONS[name] | {name: getattr(DecoderConfig(), name)})
    changed = make(kind, **OPTIONS[name])
    assert not any("norm" in weight or "attribute" in weight for weight in plain.state_dict())
    outputs = []
    for decoder in (plain, changed):
        decoder.load_state_dict(shared_weights(plain, decoder), strict=False)
        outputs.append(decoder.teacher_forcing(features(), TOKEN_IDS).logits)
    assert not torch.allclose(*outputs, atol=1e-3)


def shared_weights(plain, decoder) -> dict[str, torch.Tensor]:
    """Return the weights of one decoder that another has too, in the same shape."""
    shapes = {name: weight.shape for name, weight in decoder.state_dict().items()}
    return {
        name: weight
        for name, weight in plain.state_dict().items()
        if shapes.get(name) == weight.shape
    }


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_search_computes_what_training_does(kind, name):
    decoder = make(kind, **OPTIONS[name])
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    search = InferenceDecoder(decoder, torch.float64)
    state, memory = search.init_state(features())
    state = tuple(part.expand(-1, TOKEN_IDS.shape[1], *part.shape[2:]) for part in state)
    steps = []
    for tokens in TOKEN_IDS[..., :-1].unbind(2):
        logits, state = search.step(tokens, state, memory)
        steps.append(logits)
    output = decoder.teacher_forcing(features(), TOKEN_IDS)
    expected = torch.stack(steps, 2)[tuple(output.positions.unbind(1))]
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_every_parameter_gets_a_gradient(kind, name):
    decoder = make(kind, **OPTIONS[name])
    output = decoder.teacher_forcing(features(), TOKEN_IDS)
    nn.functional.cross_entropy(output.logits, output.targets).backward()
    for parameter_name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [8, 5])
def test_tied_logits_are_products_with_the_word_vectors(kind, width):
    """A projection comes between where widths differ; show_attend_tell's output never differs."""
    decoder = make(kind, tie_output=True, embedding_size=width)
    projects = width != 8 and kind != "show_attend_tell"
    reads = 8 if projects else width
    x = torch.randn(3, reads, dtype=torch.float64)
    projected = decoder.output[0](x) if projects else x
    tied = decoder.output[1] if projects else decoder.output
    expected = projected @ decoder.embedding.weight.T + tied.bias
    torch.testing.assert_close(decoder.output(x), expected, rtol=0, atol=1e-12)
    names = [name for name in decoder.state_dict() if name.startswith("output")]
    projection = ["output.0.weight", "output.0.bias", "output.1.bias"]
    assert names == (projection if projects else ["output.bias"])


@pytest.mark.parametrize("kind", KINDS)
def test_feature_norm_makes_the_scale_of_features_irrelevant(kind):
    """Each region's features are brought to mean 0 and variance 1 where they come in."""
    for norm in (True, False):
        decoder = make(kind, feature_norm=norm)
        x = features()
        x = x.mean(1, keepdim=True) if decoder.pooled else x
        one, other = (
            decoder.teacher_forcing(scale * x + shift, TOKEN_IDS).logits
            for scale, shift in ((1, 0), (50, 3))
        )
        assert torch.allclose(one, other, atol=1e-3) == norm


@pytest.mark.parametrize("kind", KINDS)
def test_output_norm_is_of_the_state_that_words_are_predicted_from(kind):
    decoder = make(kind, output_norm=True, cell="lstm")
    seen = []
    decoder.output_norm.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    decoder.teacher_forcing(features(), TOKEN_IDS)
    states = []
    decoder.teacher_forcing(features(), TOKEN_IDS, trace=states)
    hidden = torch.cat([state[-2].flatten(0, -2) for state in states[1:]])
    for before, after in seen:
        mean, std = after.mean(-1), after.std(-1, unbiased=False)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-6)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0.05, atol=0)
        distances = torch.cdist(before.flatten(0, -2), hidden).min(1).values
        assert float(distances.detach().max()) < 1e-9


@pytest.mark.parametrize("scale", [0.05, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_embedding_scale_is_the_range_of_word_vectors(kind, scale):
    weight = make(kind, embedding_scale=scale, embedding_size=64).embedding.weight.detach()
    assert not weight[PAD].any()
    assert weight[BOS:].abs().max() <= scale
    assert float(weight[BOS:].std()) == pytest.approx(scale / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_heads": 0}, "decoder.attention_heads: at least 1 was expected, found 0"),
        ({"embedding_scale": 0.0}, "decoder.embedding_scale: a number above 0 was expected"),
        ({"attributes": -1}, "decoder.attributes: at least 0 was expected, found -1"),
        ({"attributes": 32_769}, "decoder.attributes: at most 32768 was expected, found 32769"),
        ({"attribute_weight": -0.1}, "decoder.attribute_weight: at least 0.0 was expected"),
        ({"attribute_weight": math.nan}, "decoder.attribute_weight: at least 0.0 was expected"),
    ],
)
def test_impossible_values_are_refused(settings, message):
    with pytest.raises(ConfigError) as caught:
        DecoderConfig(**settings)
    assert str(caught.value).startswith(message)


def test_heads_without_attention_are_refused():
    with pytest.raises(ConfigError, match=r"^decoder.attention_heads: .*show_and_tell.* found 2"):
        make("show_and_tell", attention_heads=2)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_dropout_is_for_training_alone(kind):
    plain, dropping = make(kind), make(kind, recurrent_dropout=0.5)
    dropping.load_state_dict(plain.state_dict())
    expected = plain.train().teacher_forcing(features(), TOKEN_IDS)
    first, second = (dropping.train().teacher_forcing(features(), TOKEN_IDS) for _ in range(2))
    assert not torch.allclose(first.logits, second.logits)
    output = dropping.eval().teacher_forcing(features(), TOKEN_IDS)
    places = {tuple(place): row for row, place in enumerate(output.positions.tolist())}
    rows = [places[tuple(place)] for place in expected.positions.tolist()]
    torch.testing.assert_close(output.logits[rows], expected.logits)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_recurrent_dropout_forgets_nothing(cell):
    """What a gate keeps stays whole, however much of h(t-1) is dropped before W_h."""
    cells = CellStack(cell, 6, recurrent_dropout=0.9).double()
    keeping = torch.zeros(1, 1, 24 if cell == "lstm" else 18, dtype=torch.float64)
    keeping[..., :6] = -100.0  # the LSTM's input gate, the GRU's reset gate
    keeping[..., 6:12] = 100.0  # the forget gate, the update gate
    state = tuple(torch.randn(1, 1, 6, dtype=torch.float64) for _ in range(states_per_layer(cell)))
    torch.testing.assert_close(cells.step(keeping, state)[-1], state[-1])
