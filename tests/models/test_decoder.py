"""Both decoders: teacher forcing equals stepping, padding is free, gradients are right."""

from itertools import product

import pytest
import torch
from torch import nn

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS, EOS, PAD
from captioner.models.decoder import Decoder, ShowAndTell, make_decoder
from captioner.models.recurrent import CELLS

KINDS = ("show_and_tell", "show_attend_tell")
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
    """Return the logits of ``step`` fed with the true captions: (B, K, T, V)."""
    search = decoder.for_search(features.dtype)
    memory, state = search.start(features)
    captions = token_ids.shape[1]
    state = tuple(part.expand(-1, captions, *part.shape[2:]) for part in state)
    steps = []
    for t in range(token_ids.shape[2] - 1):
        logits, state = search.step(token_ids[..., t], state, memory)
        steps.append(logits)
    return torch.stack(steps, 2)


def by_target(said) -> list[tuple[int, list[float]]]:
    """Return (target, logits) in an order that doesn't depend on how rows are laid out."""
    rows = zip(said.targets.tolist(), said.logits.tolist(), strict=True)
    return sorted((target, [round(value, 9) for value in row]) for target, row in rows)


@pytest.mark.parametrize(("kind", "cell", "layers"), list(product(KINDS, CELLS, [1, 2])))
def test_teacher_forcing_equals_stepping(kind, cell, layers):
    decoder = make(kind, cell, layers)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    said = decoder.teacher_forcing(features, token_ids)
    logits = stepped(decoder, features, token_ids)
    real = token_ids[..., 1:] != PAD
    assert len(said.targets) == int(real.sum())
    # Rows may come in any order: match each with the step that has its target and its logits.
    expected, targets = logits[real], token_ids[..., 1:][real]
    distance = (said.logits.unsqueeze(1) - expected).abs().amax(-1)
    distance = distance.masked_fill(said.targets.unsqueeze(1) != targets, torch.inf)
    nearest = distance.min(1)
    assert nearest.values.max() < 1e-10
    assert len(set(nearest.indices.tolist())) == len(targets)


@pytest.mark.parametrize("kind", KINDS)
def test_feature_size_and_the_cnns_own_width(kind):
    for feature_size in (0, 4):
        decoder = make(kind, feature_size=feature_size)
        features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
        said = decoder.teacher_forcing(features, token_ids)
        logits = stepped(decoder, features, token_ids)[token_ids[..., 1:] != PAD]
        torch.testing.assert_close(said.logits.sum(0), logits.sum(0), rtol=0, atol=1e-10)
    assert make("show_attend_tell", feature_size=4).gate.out_features == 4
    assert make("show_attend_tell", feature_size=0).gate.out_features == WIDTH


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
def test_batched_equals_one_image_at_a_time(kind, cell):
    decoder = make(kind, cell, 2)
    features = features_of(CAPTIONS)
    together = by_target(decoder.teacher_forcing(features, pad(CAPTIONS)))
    single = []
    for number, captions in enumerate(CAPTIONS):
        for caption in captions:
            said = decoder.teacher_forcing(features[number : number + 1], pad([[caption]]))
            single += by_target(said)
    for (target, row), (expected_target, expected) in zip(together, sorted(single), strict=True):
        assert target == expected_target
        assert row == pytest.approx(expected, abs=1e-8)


def loss_and_gradients(decoder, features, token_ids):
    decoder.zero_grad()
    said = decoder.teacher_forcing(features, token_ids)
    loss = nn.functional.cross_entropy(said.logits, said.targets, reduction="sum")
    if said.attention is not None:
        loss = loss + (1 - said.attention).square().sum()
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in decoder.parameters()]


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
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
        said = self.decoder.teacher_forcing(features, token_ids)
        total = nn.functional.cross_entropy(said.logits, said.targets)
        return total if said.attention is None else total + said.attention.square().sum()


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
def test_gradients_equal_finite_differences(kind, cell):
    loss = Loss(make(kind, cell, 2, embedding_size=3, hidden_size=2, attention_size=2))
    captions = [[[4, 5], [6]], [[7]]]
    features, token_ids = features_of(captions)[:, :2].requires_grad_(), pad(captions)
    names, values = zip(*loss.named_parameters(), strict=True)

    def of_parameters(features, *values):
        parameters = dict(zip(names, values, strict=True))
        return torch.func.functional_call(loss, parameters, (features, token_ids))

    values = [value.detach().clone().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(of_parameters, (features, *values), fast_mode=True)


@pytest.mark.parametrize(
    ("kind", "cell", "feature_size"), [(k, c, f) for k in KINDS for c in CELLS for f in (0, 4)]
)
def test_every_parameter_gets_a_gradient(kind, cell, feature_size):
    decoder = make(kind, cell, layers=2, feature_size=feature_size)
    loss_and_gradients(decoder, features_of(CAPTIONS), pad(CAPTIONS))
    for name, parameter in decoder.named_parameters():
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cell", CELLS)
def test_show_and_tell_is_a_plain_recurrence_over_image_bos_and_words(cell):
    decoder = make("show_and_tell", cell, 2)
    assert isinstance(decoder, ShowAndTell)
    features = features_of(CAPTIONS)
    said = []
    for image, captions in zip(features, CAPTIONS, strict=True):
        for caption in captions:
            words = decoder.embedding(torch.tensor([BOS, *caption]))
            first = image.mean(0) @ decoder.image.weight.T + decoder.image.bias
            hidden, _ = decoder.recurrence(torch.cat([first[None], words])[None])
            logits = decoder.output(hidden[0, 1:])  # what is said after the image alone is unused
            said += list(zip([*caption, EOS], logits.tolist(), strict=True))
    found = by_target(decoder.teacher_forcing(features, pad(CAPTIONS)))
    for (target, row), (expected_target, expected) in zip(found, sorted(said), strict=True):
        assert target == expected_target
        assert row == pytest.approx(expected, abs=1e-8)


def attention_by_the_paper(decoder, a: torch.Tensor, h: torch.Tensor):
    """Xu et al. 2015, eq. 4 to 6 and the gate of section 4.2.1, for one image and one state."""
    w, d = decoder.key.weight, len(a)
    e = torch.stack(
        [
            decoder.score.weight[0]
            @ torch.tanh(w @ a[i] + decoder.key.bias + decoder.query.weight @ h)
            for i in range(d)
        ]
    )
    alpha = e.exp() / e.exp().sum()
    beta = 1 / (1 + (-(decoder.gate.weight @ h + decoder.gate.bias)).exp())
    return alpha, beta * sum(alpha[i] * a[i] for i in range(d))


def test_attention_follows_the_papers_equations():
    decoder = make("show_attend_tell")
    features = features_of(CAPTIONS)
    memory, _ = decoder.start(features)
    hidden = torch.randn(len(CAPTIONS), 3, 9, dtype=torch.float64)
    weights, context = decoder.attend(hidden, memory)
    assert weights.shape == (len(CAPTIONS), 3, REGIONS)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    for b, k in product(range(len(CAPTIONS)), range(3)):
        alpha, z = attention_by_the_paper(decoder, features[b], hidden[b, k])
        torch.testing.assert_close(weights[b, k], alpha, rtol=0, atol=1e-12)
        torch.testing.assert_close(context[b, k], z, rtol=0, atol=1e-12)


def test_show_attend_tell_is_the_paper_step_by_step():
    """The whole decoder from its equations: initial state, LSTM, deep output (eq. 1-3, 7)."""
    decoder = make("show_attend_tell")
    image, caption = features_of(CAPTIONS)[0], CAPTIONS[0][0]
    cell = decoder.cells.layers[0]
    h, c = torch.tanh(decoder.initial.weight @ image.mean(0) + decoder.initial.bias).split(9)
    attended = torch.zeros(REGIONS, dtype=torch.float64)
    expected = []
    for token in [BOS, *caption]:
        word = decoder.embedding.weight[token]
        alpha, z = attention_by_the_paper(decoder, image, h)
        attended = attended + alpha
        x = torch.cat([word, z])
        gates = cell.weight_ih @ x + cell.bias_ih + cell.weight_hh @ h + cell.bias_hh
        i, f, g, o = gates.split(9)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        mixed = (
            word
            + decoder.hidden_output.weight @ h
            + decoder.hidden_output.bias
            + decoder.context_output.weight @ z
        )
        expected.append(decoder.output.weight @ mixed + decoder.output.bias)
    said = decoder.teacher_forcing(image[None], pad([[caption]]))
    torch.testing.assert_close(said.logits, torch.stack(expected), rtol=0, atol=1e-10)
    torch.testing.assert_close(said.attention[0], attended, rtol=0, atol=1e-10)


def test_attention_is_summed_over_the_steps_of_each_caption():
    decoder = make("show_attend_tell", layers=2)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    real = token_ids[..., 1:] != PAD
    search, (memory, _) = decoder.for_search(torch.float64), decoder.start(features)
    own_memory, state = search.start(features)
    state = tuple(part.expand(-1, 3, -1) for part in state)
    looked_at = decoder.attention(features, token_ids[..., :-1])
    summed = torch.zeros(len(CAPTIONS), 3, REGIONS, dtype=torch.float64)
    for t in range(real.shape[2]):
        weights, _ = decoder.attend(state[-2], memory)  # the top layer's h
        going = token_ids[..., t] != PAD  # a search leaves out those that have ended
        torch.testing.assert_close(looked_at[:, :, t][going], weights[going], rtol=0, atol=1e-10)
        summed += weights * real[..., t, None]
        _, state = search.step(token_ids[..., t], state, own_memory)
    said = decoder.teacher_forcing(features, token_ids)
    torch.testing.assert_close(said.attention, summed[real.any(-1)], rtol=0, atol=1e-10)
    lengths = torch.tensor([len(c) + 1 for per_image in CAPTIONS for c in per_image])
    torch.testing.assert_close(said.attention.sum(-1), lengths.double())


@pytest.mark.parametrize(("key", "query"), [(1, 300), (4, 30), (300, 1), (300, 300)])
def test_extreme_keys_and_queries(key, query):
    """Powers of e stand for tanh in search: they must neither overflow nor change a weight."""
    decoder = make("show_attend_tell")
    with torch.no_grad():
        decoder.key.weight.mul_(key)
        decoder.query.weight.mul_(query)
    features, token_ids = features_of(CAPTIONS), pad(CAPTIONS)
    real = token_ids[..., 1:] != PAD
    expected = decoder.teacher_forcing(features, token_ids).logits.sum(0)
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-2)):
        logits = stepped(decoder.to(dtype), features.to(dtype), token_ids)[real]
        assert logits.isfinite().all()
        torch.testing.assert_close(logits.sum(0).double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_acts_in_training_alone(kind):
    decoder = make(kind, layers=2, dropout=0.5)
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
        said = decoder.teacher_forcing(features, token_ids)
    assert said.logits.dtype == torch.bfloat16
    torch.testing.assert_close(said.logits.float(), expected.logits, rtol=0.1, atol=0.1)
    assert torch.equal(said.targets, expected.targets)


# --- remedies ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
def test_how_weights_begin_is_the_settings_choice(kind, cell):
    changes = {"recurrent_initialisation": "identity", "forget_bias": -2.0}
    config = DecoderConfig(kind=kind, cell=cell, layers=2, hidden_size=9, **changes)
    decoder = make_decoder(config, VOCABULARY, WIDTH)
    for number in range(2):
        names = {n: p for n, p in decoder.recurrent.named_parameters() if str(number) in n}
        weights = next(p for n, p in names.items() if "weight_hh" in n)
        assert all(torch.equal(gate, torch.eye(9)) for gate in weights.split(9))
        bias = sum(p for n, p in names.items() if "bias" in n)
        assert bias.tolist() == [
            -2.0 if cell == "lstm" and 9 <= i < 18 else 0.0 for i in range(len(bias))
        ]


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
def test_truncation_by_hand(kind, cell):
    """A decoder that is stepped by hand and cut every 2 tokens has the gradients of window 2."""
    decoder = make(kind, cell, 2)
    features, token_ids = features_of(CAPTIONS[:1]), pad([[CAPTIONS[0][0]]])

    def of_window(window: int) -> list[torch.Tensor]:
        said = decoder.teacher_forcing(features, token_ids, window)
        loss = nn.functional.cross_entropy(said.logits, said.targets, reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, list(decoder.parameters()))]

    def by_hand(window: int) -> list[torch.Tensor]:
        loss = torch.zeros((), dtype=torch.float64)
        words = decoder.embedding(token_ids[:, 0, :-1])
        if isinstance(decoder, ShowAndTell):
            _, state = decoder.recurrence.fused(decoder.image(features.mean(1, keepdim=True)))
        else:
            memory, state = decoder.start(features)
        for t, target in enumerate(token_ids[0, 0, 1:]):
            if t and t % window == 0:
                state = (
                    state.detach()
                    if isinstance(state, torch.Tensor)
                    else tuple(part.detach() for part in state)
                )
            if isinstance(decoder, ShowAndTell):
                hidden, state = decoder.recurrence.fused(words[:, t : t + 1], state)
                logits = decoder.output(hidden[0])
            else:
                word = words[:, t : t + 1]
                hidden, context, _, state = decoder._recur(word, state, memory)
                logits = decoder._logits(word, hidden, context)[0]
            loss = loss + nn.functional.cross_entropy(logits, target.view(1))
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


@pytest.mark.parametrize(("kind", "cell"), list(product(KINDS, CELLS)))
def test_gradient_flow_is_that_of_training_and_touches_nothing(kind, cell):
    decoder = make(kind, cell, 2, dropout=0.5).train()
    captions = [[4, 5, 6], [9, 10, 4]]
    features, token_ids = features_of(captions), pad([[c] for c in captions])[:, 0]
    random = torch.get_rng_state()
    flow = decoder.gradient_flow(features, token_ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert decoder.training
    assert all(parameter.grad is None for parameter in decoder.parameters())
    steps = 4 + (kind == "show_and_tell")  # BOS and three words, and the image before them
    assert {name: [len(layer) for layer in layers] for name, layers in flow.items()} == {
        "loss": [steps] * 2,
        "end": [steps] * 2,
    }
    # In the last step both are of EOS alone; further back, the loss has more parts.
    for whole, end in zip(flow["loss"], flow["end"], strict=True):
        assert whole[0] == pytest.approx(end[0])
        assert whole[2] != pytest.approx(end[2], rel=1e-3)
    cut = decoder.gradient_flow(features, token_ids, bptt_window=2)["end"]
    for whole, layer in zip(flow["end"], cut, strict=True):
        assert layer[:2] == pytest.approx(whole[:2])
        assert layer[1] > 0
        assert not any(layer[2:])
