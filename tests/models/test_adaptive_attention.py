"""Adaptive attention against its paper's equations, written out for one image and one caption."""

import pytest
import torch

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.data.vocabulary import BOS
from captioner.errors import ConfigError
from captioner.models.captioning_model import make_decoder
from captioner.models.inference_decoder import InferenceDecoder

H, WIDTH, REGIONS, CAPTION = 9, 6, 5, [4, 5, 6, 7]


def make(layers: int = 1):
    torch.manual_seed(0)
    config = DecoderConfig(
        "adaptive_attention",
        layers=layers,
        embedding_size=8,
        hidden_size=H,
        attention_size=7,
        dropout=0.0,
    )
    decoder = make_decoder(config, 12, WIDTH).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return decoder, torch.randn(REGIONS, WIDTH, dtype=torch.float64)


@pytest.mark.parametrize("layers", [1, 2])
def test_adaptive_attention_is_the_paper_step_by_step(layers):
    """Lu et al. 2017, eq. 6-13, with a softmax over the regions and the sentinel (eq. 12)."""
    decoder, a = make(layers)
    w = {name.removesuffix(".weight"): p.detach() for name, p in decoder.named_parameters()}
    v_global = torch.relu(w["image"] @ a.mean(0) + w["image.bias"])
    v = [torch.relu(w["feature"] @ region + w["feature.bias"]) for region in a]
    input_weight = torch.cat([w["word_projection"], w["image_projection"]], 1)
    gate_weight = torch.cat([w["word_gate"], w["image_gate"]], 1)
    zero = torch.zeros(H, dtype=torch.float64)
    h, m = [zero] * layers, [zero] * layers
    expected, attended, betas = [], torch.zeros(REGIONS, dtype=torch.float64), []
    for token in [BOS, *CAPTION]:
        x = torch.cat([w["embedding"][token], v_global])
        top_before = h[-1]
        below = input_weight @ x + w["word_projection.bias"]
        for layer in range(layers):
            if layer:
                below = w["cells.from_below.0"] @ h[0] + w["cells.from_below.0.bias"]
            gates = below + w[f"cells.from_hidden.{layer}"] @ h[layer]
            i, f, g, o = (gates + w[f"cells.from_hidden.{layer}.bias"]).split(H)
            m[layer] = f.sigmoid() * m[layer] + i.sigmoid() * g.tanh()
            h[layer] = o.sigmoid() * m[layer].tanh()
        gate = gate_weight @ x + w["word_gate.bias"] + w["hidden_gate"] @ top_before
        s = gate.sigmoid() * m[-1].tanh()  # eq. 9, 10
        from_hidden = w["attention.query"] @ h[-1]
        score = w["attention.score"][0]
        z = [
            score @ torch.tanh(w["attention.key"] @ r + w["attention.key.bias"] + from_hidden)
            for r in v
        ]  # eq. 6
        z_sentinel = score @ torch.tanh(w["sentinel_key"] @ s + from_hidden)
        alpha = torch.softmax(torch.stack(z), 0)  # eq. 7
        beta = torch.softmax(torch.stack([*z, z_sentinel]), 0)[-1]  # eq. 12
        c = sum(alpha[i] * v[i] for i in range(REGIONS))  # eq. 8
        c_hat = beta * s + (1 - beta) * c  # eq. 11
        expected.append(w["output"] @ (c_hat + h[-1]) + w["output.bias"])  # eq. 13
        attended = attended + alpha
        betas.append(float(beta))
    assert 0.05 < min(betas) < max(betas) < 0.95  # the sentinel matters, and so does the image
    output = decoder.teacher_forcing(a[None], pad([[CAPTION]]))
    torch.testing.assert_close(output.logits, torch.stack(expected), rtol=0, atol=1e-11)
    torch.testing.assert_close(output.attention[0], attended, rtol=0, atol=1e-11)


@pytest.mark.parametrize("key", [1, 50])
def test_the_sentinels_weight_in_search_with_near_and_far_keys(key):
    """Search leaves a constant out of the scores: of the regions' and the sentinel's alike."""
    decoder, a = make()
    with torch.no_grad():
        decoder.attention.key.weight.mul_(key)
    search = InferenceDecoder(decoder, torch.float64)
    state, memory = search.init_state(a[None])
    assert memory[-1].item() == (key > 1)  # whether there are far keys
    steps = []
    for token in [BOS, *CAPTION]:
        logits, state = search.step(torch.tensor([[token]]), state, memory)
        steps.append(logits[0, 0])
    output = decoder.teacher_forcing(a[None], pad([[CAPTION]]))
    torch.testing.assert_close(torch.stack(steps), output.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"cell": "gru"}, ("decoder.cell: ", "lstm was expected, found gru")),
        ({"cell": "rnn_relu"}, ("decoder.cell: ", "lstm was expected, found rnn_relu")),
        (
            {"hidden_size": 8, "feature_size": 4},
            ("decoder.feature_size: ", "decoder.hidden_size; 0 or 8 was expected, found 4"),
        ),
    ],
)
def test_what_its_equations_do_not_allow_is_refused(settings, parts):
    with pytest.raises(ConfigError) as caught:
        make_decoder(DecoderConfig("adaptive_attention", **settings), 12, WIDTH)
    message = str(caught.value)
    assert all(part in message for part in ("decoder.kind = adaptive_attention", *parts))
    assert "\n" not in message
