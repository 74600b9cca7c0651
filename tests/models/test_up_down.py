"""Up-Down against its paper's equations, written out for one image and one caption."""

import pytest
import torch

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS
from captioner.errors import ConfigError
from captioner.models.captioning_model import make_decoder
from captioner.models.recurrent_cells import CELL_STEPS, CELLS, states_per_layer

H, WIDTH, REGIONS, CAPTION = 9, 6, 5, [4, 5, 6, 7]


@pytest.mark.parametrize("cell", CELLS)
def test_up_down_is_the_paper_step_by_step(cell):
    """Anderson et al. 2018, eq. 1-6: both recurrent layers get their whole input at once here."""
    torch.manual_seed(0)
    config = DecoderConfig(
        "up_down", cell, embedding_size=8, hidden_size=H, attention_size=7, dropout=0.0
    )
    decoder = make_decoder(config, 12, WIDTH).double()
    v = torch.randn(REGIONS, WIDTH, dtype=torch.float64)
    p = {name: parameter.detach() for name, parameter in decoder.named_parameters()}
    attention_w = torch.cat(
        [p[f"{part}_projection.weight"] for part in ("language", "image", "word")], 1
    )
    language_w = torch.cat([p["context_projection.weight"], p["hidden_projection.weight"]], 1)

    def advance(layer, weight, bias, x, state):
        recurrent = p[f"{layer}_cell.from_hidden.0.weight"] @ state[0]
        recurrent = recurrent + p[f"{layer}_cell.from_hidden.0.bias"]
        return CELL_STEPS[cell](weight @ x + p[bias], recurrent, state, None)

    state1 = state2 = (torch.zeros(H, dtype=torch.float64),) * states_per_layer(cell)
    expected, attended = [], torch.zeros(REGIONS, dtype=torch.float64)
    for token in [BOS, *CAPTION]:
        x1 = torch.cat([state2[0], v.mean(0), p["embedding.weight"][token]])  # eq. 2
        state1 = advance("attention", attention_w, "word_projection.bias", x1, state1)
        a = torch.stack(
            [
                p["attention.score.weight"][0]
                @ torch.tanh(
                    p["attention.key.weight"] @ v_i
                    + p["attention.key.bias"]
                    + p["attention.query.weight"] @ state1[0]
                )
                for v_i in v
            ]
        )  # eq. 3
        alpha = a.exp() / a.exp().sum()  # eq. 4
        v_hat = sum(alpha[i] * v[i] for i in range(REGIONS))  # eq. 5
        x2 = torch.cat([v_hat, state1[0]])  # eq. 6
        state2 = advance("language", language_w, "hidden_projection.bias", x2, state2)
        expected.append(p["output.weight"] @ state2[0] + p["output.bias"])  # eq. 7, its logits
        attended = attended + alpha
    output = decoder.teacher_forcing(v[None], pad([[CAPTION]]))
    torch.testing.assert_close(output.logits, torch.stack(expected), rtol=0, atol=1e-11)
    torch.testing.assert_close(output.attention[0], attended, rtol=0, atol=1e-11)


def test_more_layers_are_refused():
    with pytest.raises(ConfigError) as caught:
        make_decoder(DecoderConfig("up_down", layers=2), 12, WIDTH)
    message = str(caught.value)
    assert message.startswith("decoder.layers: decoder.kind = up_down has one")
    assert message.endswith("1 was expected, found 2")
