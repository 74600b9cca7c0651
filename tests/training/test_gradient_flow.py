"""Gradient flow: against finite differences, and the same run as training's."""

from itertools import product

import pytest
import torch
from decoder_settings import KINDS_AND_CELLS, most_layers

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.models.captioning_model import make_decoder
from captioner.models.recurrent import RecurrentStack
from captioner.training.gradient_flow import gradient_norms, measure_gradient_flow


def make(kind: str, cell: str, layers: int, dropout: float):
    torch.manual_seed(3)
    config = DecoderConfig(
        kind=kind,
        cell=cell,
        layers=layers,
        embedding_size=8,
        hidden_size=9,
        attention_size=7,
        dropout=dropout,
    )
    return make_decoder(config, 12, 6).double()


def test_gradient_norms_by_hand():
    """h(t) = w h(t-1), one unit: dL/dh(t) is w for each step to the end; nothing beyond a cut."""
    stack = RecurrentStack("rnn_relu", 1, 1).double()
    with torch.no_grad():
        stack.fused.weight_ih_l0.fill_(1.0)
        stack.fused.weight_hh_l0.fill_(0.5)
    x = torch.zeros(2, 5, 1, dtype=torch.float64)
    x[:, 0] = torch.tensor([[1.0], [3.0]])
    seen = stack.unroll(x)
    norms = gradient_norms(2 * seen.outputs[:, -1].sum(), seen.states)
    assert norms == [{"state": pytest.approx([2 * 0.5**back for back in (4, 3, 2, 1, 0)])}]
    cut = stack.unroll(x, bptt_window=2)  # cut after steps 2 and 4
    norms = gradient_norms(2 * cut.outputs[:, -1].sum(), cut.states)
    assert norms == [{"state": pytest.approx([0, 0, 0, 0, 2])}]
    assert all(parameter.grad is None for parameter in stack.parameters())


def test_gradient_norms_are_finite_differences():
    """By h with c held, by c with h moving along, and by both as inputs of the next step."""
    torch.manual_seed(0)
    stack = RecurrentStack("lstm", 5, 7, return_sequences=True, return_state=True).double()
    x = torch.randn(3, 6, 5, dtype=torch.float64)
    seen = stack.unroll(x)
    (found,) = gradient_norms(seen.outputs[:, -1].square().sum(), seen.states)
    gate = seen.gates[0]["output"][:, 2]

    def loss(h, c):
        """Go on from the state after step 3, given there."""
        outputs, _ = stack(x[:, 3:], (h, c))
        return outputs[:, -1].square().sum()

    shifted = {
        "h": lambda h, c, shift: (h + shift, c),
        "c given": lambda h, c, shift: (h, c + shift),
        "c": lambda h, c, shift: (gate * torch.tanh(c + shift), c + shift),
    }
    with torch.no_grad():
        _, state = stack(x[:, :3])
        numeric = {name: torch.zeros(3, 7, dtype=torch.float64) for name in shifted}
        for (name, move), row, unit in product(shifted.items(), range(3), range(7)):
            shift = torch.zeros_like(state[0])
            shift[0, row, unit] = 1e-6
            change = loss(*move(*state, shift)) - loss(*move(*state, -shift))
            numeric[name][row, unit] = change / 2e-6
    numeric["state"] = torch.cat([numeric["h"], numeric["c given"]], 1)
    for name in ("h", "c", "state"):
        expected = float(numeric[name].norm(dim=1).mean())
        assert found[name][2] == pytest.approx(expected, rel=1e-6)


def test_small_gradients_are_no_zeros():
    """Their squares are, in float32."""
    stack = RecurrentStack("rnn_relu", 1, 1)
    with torch.no_grad():
        stack.fused.weight_ih_l0.fill_(1.0)
        stack.fused.weight_hh_l0.fill_(1e-3)
    seen = stack.unroll(torch.ones(1, 12, 1))
    (found,) = gradient_norms(seen.outputs[:, -1].sum(), seen.states)
    assert found["state"] == pytest.approx([1e-3**back for back in range(11, -1, -1)], rel=1e-4)


@pytest.mark.parametrize(("kind", "cell"), KINDS_AND_CELLS)
def test_gradient_flow_is_that_of_training_and_touches_nothing(kind, cell):
    decoder = make(kind, cell, most_layers(kind), dropout=0.5).train()
    captions = [[4, 5, 6], [9, 10, 4]]
    features, token_ids = (
        torch.randn(2, 5, 6, dtype=torch.float64),
        pad([[c] for c in captions])[:, 0],
    )
    random = torch.get_rng_state()
    flow = measure_gradient_flow(decoder, features, token_ids)
    assert torch.equal(torch.get_rng_state(), random)
    assert decoder.training
    assert all(parameter.grad is None for parameter in decoder.parameters())
    steps = 5  # BOS and three words, and the first state
    parts = ("state", "h", "c") if cell == "lstm" else ("state",)
    assert list(flow) == ["loss", "end"]
    for layers in flow.values():
        assert [list(layer) for layer in layers] == [list(parts)] * 2
        assert {len(norms) for layer in layers for norms in layer.values()} == {steps}
    flow = {name: [layer["state"] for layer in layers] for name, layers in flow.items()}
    # In the last step both are of EOS alone; further back, the loss has more parts.
    for whole, end in zip(flow["loss"], flow["end"], strict=True):
        assert whole[0] == pytest.approx(end[0])
        assert whole[2] != pytest.approx(end[2], rel=1e-3)
    cut = measure_gradient_flow(decoder, features, token_ids, bptt_window=2)["end"]
    for whole, layer in zip(flow["end"], (layer["state"] for layer in cut), strict=True):
        assert layer[:2] == pytest.approx(whole[:2])
        assert layer[1] > 0
        assert not any(layer[2:])
