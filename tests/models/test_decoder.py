"""All decoders: teacher forcing equals stepping, padding is free, gradients are right."""

from itertools import product

import pytest
import torch
from decoder_settings import KINDS, KINDS_AND_CELLS, KINDS_CELLS_AND_LAYERS, most_layers
from torch import nn

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS, PAD
from captioner.models.captioning_model import make_decoder
from captioner.models.decoder import Decoder
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.recurrent_cells import CELLS
from captioner.models.show_and_tell import ShowAndTell

VOCABULARY, WIDTH, REGIONS = 12, 6, 5

# Unequal lengths; images with fewer captions than K = 3; the longest first, as in training, and
# not; an empty caption.
CAPTIONS = [
    [[4, 5, 6, 7, 8], [9, 10], [11]],
    [[5]],
    [[6, 7], [4, 4, 4, 4], []],
    [[8, 9, 10, 11, 4, 5, 6], [7]],
]


def make(kind: str, cell: str = "lstm", layers: int = 1, **changes) -> Decoder:
    torch.manual_seed(3)
    settings = {"embedding_size": 8, "hidden_size": 9, "attention_size": 7, "dropout": 0.0}
    config = DecoderConfig(kind=kind, cell=cell, layers=layers, **(settings | changes))
    decoder = make_decoder(config, VOCABULARY, WIDTH).double()
    with torch.no_grad():  # away from the symmetric start, where mistakes can hide
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        decoder.embedding.weight[PAD].zero_()
    return decoder


def features_of(captions: list) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(captions), REGIONS, WIDTH, dtype=torch.float64, generator=generator)


def stepped(decoder: Decoder, features: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of search's steps fed with the true captions: (B, K, T, V)."""
    search = InferenceDecoder(decoder, features.dtype)
    state, memory = search.init_state(features)
    state = tuple(part.expand(-1, token_ids.shape[1], *part.shape[2:]) for part in state)
    steps = []
    for t in range(token_ids.shape[2] - 1):
        logits, state = search.step(token_ids[..., t], state, memory)
        steps.append(logits)
    return torch.stack(steps, 2)


def by_target(output) -> list[tuple[int, list[float]]]:
    """Return (target, logits) in an order that doesn't depend on how rows are laid out."""
    rows = zip(output.targets.tolist(), output.logits.tolist(), strict=True)
    return sorted((target, [round(value, 9) for value in row]) for target, row in rows)


@pytest.mark.parametrize(("kind", "cell", "layers"), KINDS_CELLS_AND_LAYERS)
def test_teacher_forcing_equals_stepping(kind, cell, layers):
    decoder = make(kind, cell, layers)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    output = decoder.teacher_forcing(features, token_ids)
    places = tuple(output.positions.unbind(1))
    assert output.shape == tuple(token_ids[..., 1:].shape)
    assert len(set(zip(*(part.tolist() for part in places), strict=True))) == len(output.targets)
    assert len(output.targets) == int((token_ids[..., 1:] != PAD).sum())
    assert torch.equal(output.targets, token_ids[..., 1:][places])
    logits = stepped(decoder, features, token_ids)
    torch.testing.assert_close(output.logits, logits[places], rtol=0, atol=1e-10)
    # The decoder's own steps, where teacher forcing takes one fused call.
    single = decoder.teacher_forcing(features, token_ids, trace=[])
    dense = torch.full((*output.shape, VOCABULARY), torch.nan, dtype=torch.float64)
    dense[places] = output.logits.detach()
    expected = dense[tuple(single.positions.unbind(1))]
    torch.testing.assert_close(single.logits.detach(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_those_of_whole_captions_with_gradient(kind):
    decoder = make(kind)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    log_probabilities = decoder.teacher_forcing(features, token_ids).log_probabilities()
    assert log_probabilities.shape == token_ids[..., 1:].shape
    assert not log_probabilities[token_ids[..., 1:] == PAD].any()
    for image, captions in enumerate(CAPTIONS):
        for place, caption in enumerate(captions):
            one = pad([[caption]])
            output = decoder.teacher_forcing(features[image : image + 1], one)
            loss = nn.functional.cross_entropy(output.logits, output.targets, reduction="sum")
            assert log_probabilities[image, place].sum().item() == pytest.approx(-loss.item())
    weights = torch.rand(log_probabilities.shape[:2], dtype=torch.float64)
    (log_probabilities.sum(-1) * weights).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_feature_size_and_the_cnns_own_width(kind):
    for feature_size in (0, 9):
        decoder = make(kind, feature_size=feature_size)
        features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
        output = decoder.teacher_forcing(features, token_ids)
        logits = stepped(decoder, features, token_ids)[token_ids[..., 1:] != PAD]
        torch.testing.assert_close(output.logits.sum(0), logits.sum(0), rtol=0, atol=1e-10)
    assert make("show_attend_tell", feature_size=4).gate.out_features == 4
    assert make("show_attend_tell", feature_size=0).gate.out_features == WIDTH


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_batched_equals_one_image_at_a_time(kind, cell):
    decoder = make(kind, cell, most_layers(kind))
    features = features_of(CAPTIONS)
    together = by_target(decoder.teacher_forcing(features, pad(CAPTIONS)))
    single = []
    for number, captions in enumerate(CAPTIONS):
        for caption in captions:
            output = decoder.teacher_forcing(features[number : number + 1], pad([[caption]]))
            single += by_target(output)
    for (target, row), (expected_target, expected) in zip(together, sorted(single), strict=True):
        assert target == expected_target
        assert row == pytest.approx(expected, abs=1e-8)


def loss_and_gradients(decoder, features, token_ids):
    decoder.zero_grad()
    output = decoder.teacher_forcing(features, token_ids)
    loss = nn.functional.cross_entropy(output.logits, output.targets, reduction="sum")
    if output.attention is not None:
        loss = loss + (1 - output.attention).square().sum()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in decoder.parameters()]


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_padding_never_changes_loss_or_gradients(kind, cell):
    decoder = make(kind, cell)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    loss, gradients = loss_and_gradients(decoder, features, token_ids)
    images, captions, length = token_ids.shape
    padded = torch.full((images, captions + 2, length + 3), PAD)
    padded[:, :captions, :length] = token_ids
    padded_loss, padded_gradients = loss_and_gradients(decoder, features, padded)
    assert padded_loss.item() == pytest.approx(loss.item(), abs=1e-10)
    for one, other in zip(padded_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert not decoder.embedding.weight.grad[PAD].any()


class Loss(nn.Module):
    """A decoder's loss as a module's forward, which torch can call with other parameters."""

    def __init__(self, decoder):
        super().__init__()
        self.decoder = decoder

    def forward(self, features, token_ids):
        output = self.decoder.teacher_forcing(features, token_ids)
        total = nn.functional.cross_entropy(output.logits, output.targets)
        return total if output.attention is None else total + output.attention.square().sum()


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_gradients_equal_finite_differences(kind, cell):
    sizes = {"embedding_size": 3, "hidden_size": 2, "attention_size": 2}
    loss = Loss(make(kind, cell, most_layers(kind), **sizes))
    captions = [[[4, 5], [6]], [[7]]]
    features, token_ids = features_of(captions)[:, :2].requires_grad_(), pad(captions)
    names, values = zip(*loss.named_parameters(), strict=True)

    def of_parameters(features, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, parameters, (features, token_ids))

    values = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(of_parameters, (features, *values), fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "cell", "feature_size"), [(*each, size) for each in KINDS_AND_CELLS for size in (0, 9)]
)
def test_every_parameter_gets_a_gradient(kind, cell, feature_size):
    decoder = make(kind, cell, most_layers(kind), feature_size=feature_size)
    loss_and_gradients(decoder, features_of(CAPTIONS), pad(CAPTIONS))
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cell", CELLS)
def test_show_and_tell_is_a_plain_recurrence_over_image_bos_and_words(cell):
    decoder = make("show_and_tell", cell, 2)
    assert isinstance(decoder, ShowAndTell)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    expected = torch.zeros(*token_ids[..., 1:].shape, VOCABULARY, dtype=torch.float64)
    for image, captions in enumerate(CAPTIONS):
        for place, caption in enumerate(captions):
            words = decoder.embedding(torch.tensor([BOS, *caption]))
            first = features[image].mean(0) @ decoder.image.weight.T + decoder.image.bias
            hidden, _ = decoder.recurrence.fused(torch.cat([first[None], words])[None])
            logits = decoder.output(hidden[0, 1:])  # what comes after the image alone is unused
            expected[image, place, : len(caption) + 1] = logits.detach()
    output = decoder.teacher_forcing(features, token_ids)
    places = tuple(output.positions.unbind(1))
    torch.testing.assert_close(output.logits.detach(), expected[places], rtol=0, atol=1e-10)


def attention_by_the_paper(decoder, a: torch.Tensor, h: torch.Tensor):
    """Xu et al. 2015, eq. 4 to 6 and the gate of section 4.2.1, for one image and one state."""
    layer = decoder.attention
    e = torch.stack(
        [
            layer.score.weight[0]
            @ torch.tanh(layer.key.weight @ region + layer.key.bias + layer.query.weight @ h)
            for region in a
        ]
    )
    alpha = e.exp() / e.exp().sum()
    beta = 1 / (1 + (-(decoder.gate.weight @ h + decoder.gate.bias)).exp())
    return alpha, beta, sum(alpha[i] * a[i] for i in range(len(a)))


def test_attention_follows_the_papers_equations():
    decoder = make("show_attend_tell")
    features = features_of(CAPTIONS)
    _, memory = decoder.init_state(features)
    hidden = torch.randn(len(CAPTIONS), 3, 9, dtype=torch.float64)
    context, weights, _ = decoder.attention(hidden, memory)
    assert weights.shape == (len(CAPTIONS), 3, REGIONS)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for b, k in product(range(len(CAPTIONS)), range(3)):
        alpha, _, z = attention_by_the_paper(decoder, features[b], hidden[b, k])
        torch.testing.assert_close(weights[b, k], alpha, rtol=0, atol=1e-12)
        torch.testing.assert_close(context[b, k], z, rtol=0, atol=1e-12)


def test_show_attend_tell_is_the_paper_step_by_step():
    """The whole decoder from its equations: initial state, LSTM, deep output (eq. 1-3, 7)."""
    decoder = make("show_attend_tell")
    image, caption = features_of(CAPTIONS)[0], CAPTIONS[0][0]
    word_part, context_part = decoder.word_projection, decoder.context_projection
    recurrent = decoder.cells.from_hidden[0]
    h, c = torch.tanh(decoder.initial.weight @ image.mean(0) + decoder.initial.bias).split(9)
    attended = torch.zeros(REGIONS, dtype=torch.float64)
    expected = []
    for token in [BOS, *caption]:
        word = decoder.embedding.weight[token]
        alpha, beta, z = attention_by_the_paper(decoder, image, h)
        z, attended = beta * z, attended + alpha
        gates = word_part.weight @ word + word_part.bias + context_part.weight @ z
        gates = gates + recurrent.weight @ h + recurrent.bias
        i, f, g, o = gates.split(9)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        mixed = word + decoder.deep_output.weight @ torch.cat([h, z]) + decoder.deep_output.bias
        expected.append(decoder.output.weight @ mixed + decoder.output.bias)
    output = decoder.teacher_forcing(image[None], pad([[caption]]))
    torch.testing.assert_close(output.logits, torch.stack(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(output.attention[0], attended, rtol=0, atol=1e-10)


def test_attention_is_summed_over_the_steps_of_each_caption():
    decoder = make("show_attend_tell", layers=2)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    real = token_ids[..., 1:] != PAD
    maps = decoder.attention_maps(features, token_ids[..., :-1])
    torch.testing.assert_close(maps.sum(-1), torch.ones_like(maps[..., 0]))
    summed = (maps * real.unsqueeze(-1)).sum(2)
    output = decoder.teacher_forcing(features, token_ids)
    torch.testing.assert_close(output.attention, summed[real.any(-1)], rtol=0, atol=1e-10)
    lengths = torch.tensor([len(c) + 1 for per_image in CAPTIONS for c in per_image])
    torch.testing.assert_close(output.attention.sum(-1), lengths.double())


@pytest.mark.parametrize(("key", "query"), [(1, 300), (4, 30), (300, 1), (300, 300)])
def test_extreme_keys_and_queries(key, query):
    """Powers of e stand for tanh in search: they must neither overflow nor change a weight."""
    decoder = make("show_attend_tell")
    with torch.no_grad():
        decoder.attention.key.weight.mul_(key)
        decoder.attention.query.weight.mul_(query)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    real = token_ids[..., 1:] != PAD
    expected = decoder.teacher_forcing(features, token_ids).logits.sum(0)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
        logits = stepped(decoder.to(dtype), features.to(dtype), token_ids)[real]
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.sum(0).double(), expected, rtol=0, atol=tolerance)


def test_one_image_with_far_keys_changes_nothing_for_the_others():
    decoder = make("show_attend_tell")
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    search = InferenceDecoder(decoder, torch.float64)
    near = stepped(decoder, features, token_ids)
    far = features.clone()
    far[1] *= 1000
    mixed = stepped(decoder, far, token_ids)
    others = [0, 2, 3]
    assert torch.equal(mixed[others], near[others])
    shapes = [[part.shape for part in search.init_state(x)[1]] for x in (features, far)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_alone(kind):
    decoder = make(kind, layers=most_layers(kind), dropout=0.5)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    one, other = (decoder.teacher_forcing(features, token_ids).logits for _ in range(2))
    assert not torch.equal(one, other)
    decoder.eval()
    one, other = (decoder.teacher_forcing(features, token_ids).logits for _ in range(2))
    assert torch.equal(one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_stays_near_float32(kind):
    decoder = make(kind).float()
    features, token_ids = features_of(CAPTIONS).float(), pad(CAPTIONS)
    expected = decoder.teacher_forcing(features, token_ids)
    with torch.autocast("cpu", torch.bfloat16):
        output = decoder.teacher_forcing(features, token_ids)
    assert output.logits.dtype == torch.bfloat16
    torch.testing.assert_close(output.logits.float(), expected.logits, rtol=0.1, atol=0.1)
    assert torch.equal(output.targets, expected.targets)


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_forcing_waits_for_no_device(kind):
    """On a device without values nothing can be read back: the token ids stay on the CPU."""
    decoder = make(kind).float().to("meta")
    output = decoder.teacher_forcing(features_of(CAPTIONS).float().to("meta"), pad(CAPTIONS))
    tokens = sum(len(caption) + 1 for per_image in CAPTIONS for caption in per_image)
    assert output.logits.shape == (tokens, VOCABULARY)
    assert {output.targets.device.type, output.positions.device.type} == {"meta"}


# --- remedies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_how_weights_begin_is_the_settings_choice(kind, cell):
    changes = {"recurrent_initialisation": "identity", "forget_bias": -2.0}
    config = DecoderConfig(kind=kind, cell=cell, layers=most_layers(kind), hidden_size=9, **changes)
    decoder = make_decoder(config, VOCABULARY, WIDTH)
    parameters = dict(decoder.named_parameters())
    recurrent = [
        n for n in parameters if "weight_hh" in n or ("from_hidden" in n and "weight" in n)
    ]
    assert len(recurrent) == 2
    for name in recurrent:
        assert all(torch.equal(gate, torch.eye(9)) for gate in parameters[name].split(9))
    for names in (
        ("recurrence.fused.bias_ih_l0", "word_projection.bias"),
        ("recurrence.fused.bias_ih_l1", "cells.from_below.0.bias", "hidden_projection.bias"),
    ):
        (bias,) = [parameters[name] for name in names if name in parameters]
        assert bias.tolist() == [
            -2.0 if cell == "lstm" and 9 <= i < 18 else 0.0 for i in range(len(bias))
        ]


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_truncation_by_hand(kind, cell):
    """A decoder that is stepped by hand and cut every 2 tokens has the gradients of window 2."""
    decoder = make(kind, cell, most_layers(kind))
    features, token_ids = features_of(CAPTIONS[:1]), pad([[CAPTIONS[0][0]]])

    def of_window(window: int) -> list[torch.Tensor]:
        output = decoder.teacher_forcing(features, token_ids, window)
        loss = nn.functional.cross_entropy(output.logits, output.targets, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]

    def by_hand(window: int) -> list[torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float64)
        state, memory = decoder.init_state(features)
        for t, target in enumerate(token_ids[0, 0, 1:]):
            if t and t % window == 0:
                state = tuple(part.detach() for part in state)
            logits, state = decoder.next_logits(token_ids[..., t], state, memory)
            loss = loss + nn.functional.cross_entropy(logits[0], target.view(1))
        return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]

    def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
        pairs = zip(one, other, strict=True)
        return all(torch.allclose(a, b, rtol=0, atol=1e-11) for a, b in pairs)

    full = of_window(0)
    assert same(full, of_window(6))
    assert same(full, by_hand(99))
    assert same(of_window(2), by_hand(2))
    assert torch.allclose(of_window(2)[0], full[0])  # the state is carried
    assert not same(of_window(2), full)
