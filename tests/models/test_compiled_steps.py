"""Compiled steps give what single ones give."""

import pytest
import torch
from decoder_settings import ATTENDING_KINDS
from devices import CUDA

from captioner.config import DecoderConfig
from captioner.data.dataset import pad
from captioner.errors import ConfigError
from captioner.models.captioning_model import make_decoder
from captioner.models.compiled_steps import CompiledSteps
from captioner.training.losses import caption_loss

# torch.compile looks at the .grad of tensors that have none.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

WIDTH, REGIONS, WORDS = 6, 5, 12
ROWS = [[[1, 5, 6, 7, 8, 9, 2], [1, 4, 2]], [[1, 4, 5, 6, 2], [1, 8, 9, 4, 2]], [[1, 7, 2], []]]
# Inductor writes and compiles C++, which takes long; what it is given is all in the other.
BACKENDS = [
    *((kind, "aot_eager") for kind in ATTENDING_KINDS),
    ("show_attend_tell", "inductor"),
]


def make(kind, device="cpu", attributes=4):
    torch.manual_seed(0)
    config = DecoderConfig(
        kind, embedding_size=8, hidden_size=6, attention_size=7, attention_heads=2, dropout=0.0,
        attributes=attributes,
    )  # fmt: skip
    return make_decoder(config, WORDS, WIDTH).to(device).train()


def loss_and_gradients(decoder, features, token_ids, window, run=None):
    decoder.zero_grad()
    features = features.clone().requires_grad_()
    output = decoder.teacher_forcing(features, token_ids, window, run=run)
    loss = caption_loss(output, 0.1, 1.0, len(output.targets), 5)
    loss.backward()
    gradients = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return output, loss, gradients | {"features": features.grad}


@pytest.mark.parametrize(("kind", "backend"), BACKENDS)
@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_as_step_by_step(kind, backend, device):
    """Captions end at different steps, one image has a caption less, windows cut gradients."""
    decoder = make(kind, device)
    token_ids = pad(ROWS)
    features = torch.randn(3, REGIONS, WIDTH, device=device)
    steps = CompiledSteps(decoder, backend)
    for window in (0, 4):
        expected = loss_and_gradients(decoder, features, token_ids, window)
        expected = (*expected[:2], {name: g.clone() for name, g in expected[2].items()})
        for _ in range(2):
            output, loss, gradients = loss_and_gradients(
                decoder, features, token_ids, window, steps.run
            )
            assert torch.equal(output.positions, expected[0].positions)
            assert torch.equal(output.targets, expected[0].targets)
            torch.testing.assert_close(output.logits, expected[0].logits)
            torch.testing.assert_close(output.attention, expected[0].attention)
            torch.testing.assert_close(loss, expected[1])
            assert gradients.keys() == expected[2].keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, expected[2][name], atol=1e-5, rtol=1e-4)


def test_captions_of_all_lengths_take_one_program():
    """And batches of another shape take none."""
    compiled = []

    def counted(graph, _):
        compiled.append(graph)
        return graph.forward

    decoder = make("up_down")
    steps = CompiledSteps(decoder, counted)
    for length in (3, 4, 5, 9, 17):
        token_ids = torch.tensor([[[1, *[5] * (length - 1), 2]] * 2] * 3)
        for images in (3, 1):
            features = torch.randn(images, REGIONS, WIDTH)
            expected = decoder.teacher_forcing(features, token_ids[:images])
            output = decoder.teacher_forcing(features, token_ids[:images], run=steps.run)
            torch.testing.assert_close(output.logits, expected.logits)
    assert steps.shape == (3, 2)
    assert len(compiled) == 1


def test_without_a_compiler_it_is_one_line():
    def failing(*_):
        raise OSError("no compiler\nis here")

    steps = CompiledSteps(make("show_attend_tell"), failing)
    features = torch.randn(3, REGIONS, WIDTH)
    with pytest.raises(ConfigError, match=r"^training.compile: torch.compile failed: .*compiler"):
        steps._decoder.teacher_forcing(features, pad(ROWS), run=steps.run)
