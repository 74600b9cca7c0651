"""What makes training a CNN fast changes neither its output nor its gradients."""

import copy

import pytest
import torch
from torch import nn

from captioner.data.preprocessing import Preprocessing
from captioner.models.encoder import Encoder
from captioner.models.training_cnn import FoldedConv2d

PIXELS = torch.randint(
    0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def make_encoder(name, padding="torchvision"):
    """Return a CNN whose batch norm has the statistics of some images, and random scales."""
    torch.manual_seed(0)
    encoder = Encoder(name, Preprocessing("squash", 64), padding=padding)
    norms = [module for module in encoder.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        encoder(PIXELS)
        for norm in norms:
            norm.momentum = 0.1
            norm.weight.uniform_(0.8, 1.2)
            norm.bias.uniform_(-0.1, 0.1)
    return encoder


def train_step(encoder):
    """Return the features, the gradients by name, and the statistics of batch norm after it."""
    torch.manual_seed(1)  # of stochastic depth
    encoder.zero_grad()
    features = encoder.train()(PIXELS)
    features.square().mean().backward()
    gradients = {k: p.grad.clone() for k, p in encoder.named_parameters() if p.grad is not None}
    return features.detach(), gradients, {k: b.clone() for k, b in encoder.named_buffers()}


@pytest.mark.parametrize("batch_norm", ["update", "frozen"])
@pytest.mark.parametrize(
    ("name", "stage", "padding"),
    [
        ("mobilenet_v2", "features.14", "torchvision"),
        ("mobilenet_v2", "features.7", "tensorflow"),
        ("mobilenet_v2", "all", "tensorflow"),
        ("resnet18", "layer3", "torchvision"),
        ("resnet18", "layer3", "tensorflow"),
        ("efficientnet_b0", "features.5", "tensorflow"),
        ("googlenet", "inception4a", "torchvision"),
        ("squeezenet1_1", "features.9", "torchvision"),
    ],
)
def test_output_gradients_and_statistics_stay_the_same(name, stage, padding, batch_norm):
    encoder = make_encoder(name, padding).double()
    encoder.fine_tune_from(stage, batch_norm)
    plain = copy.deepcopy(encoder)
    plain._fast = ()
    (features, gradients, statistics), expected = train_step(encoder), train_step(plain)
    torch.testing.assert_close(features, expected[0], rtol=1e-6, atol=1e-8)
    trained = encoder.stages[0 if stage == "all" else encoder.stages.index(stage) :]
    wanted = {k for k, _ in encoder.named_parameters() if k.startswith(of_stages(trained))}
    assert gradients.keys() == expected[1].keys() == wanted
    size = max(gradient.abs().max() for gradient in expected[1].values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[1][key], rtol=1e-6, atol=1e-9 * float(size))
    torch.testing.assert_close(statistics, expected[2], rtol=1e-6, atol=1e-9)


def of_stages(stages):
    return tuple(f"cnn.{stage}." for stage in stages)


@pytest.mark.parametrize("batch_norm", ["update", "frozen"])
def test_statistics_of_batch_norm_are_kept_or_follow_the_batches(batch_norm):
    encoder = make_encoder("mobilenet_v2")
    encoder.fine_tune_from("features.14", batch_norm)
    before = {key: buffer.clone() for key, buffer in encoder.named_buffers()}
    _, gradients, after = train_step(encoder)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    moving = of_stages(encoder.stages[14:]) if batch_norm == "update" else ()
    assert changed == {key for key in before if key.startswith(moving) and "cnn." in key}
    assert gradients["cnn.features.14.conv.3.weight"].abs().sum() > 0  # scale and shift learn
    assert gradients["cnn.features.14.conv.3.bias"].abs().sum() > 0
    encoder.eval()
    assert not any(module.training for module in encoder.cnn.modules())


def test_what_is_folded_and_turned():
    def parts(name, padding, batch_norm):
        encoder = make_encoder(name, padding)
        encoder.fine_tune_from("all", batch_norm)
        (cnn,) = encoder._fast
        folded = [part for part in cnn.modules() if isinstance(part, FoldedConv2d)]
        return cnn.rotated, len(folded), sum(part.norm is not None for part in folded)

    assert parts("mobilenet_v2", "torchvision", "update") == (False, 0, 0)
    assert parts("mobilenet_v2", "torchvision", "frozen") == (False, 52, 52)
    assert parts("mobilenet_v2", "tensorflow", "update") == (True, 52, 0)
    assert parts("mobilenet_v2", "tensorflow", "frozen") == (True, 52, 52)
    # Its 1 x 1 convolutions of stride 2 take other pixels of an image that is turned; and the four
    # convolutions that pad do so themselves.
    assert parts("resnet18", "tensorflow", "frozen") == (False, 16, 16)


def test_weights_are_counted_and_saved_once():
    encoder = make_encoder("mobilenet_v2", "tensorflow")
    names, count = set(encoder.state_dict()), len(list(encoder.parameters()))
    encoder.fine_tune_from("features.14", "frozen")
    assert set(encoder.state_dict()) == names
    assert len(list(encoder.parameters())) == count


def test_weights_that_are_loaded_later_count():
    encoder = make_encoder("mobilenet_v2", "tensorflow").double()
    encoder.fine_tune_from("features.14", "frozen")
    other = {k: v + 0.01 * v.float().std(correction=0) for k, v in encoder.state_dict().items()}
    for assign in (False, True):
        before = encoder.train()(PIXELS)
        encoder.load_state_dict(other, assign=assign)
        other = {k: v * 1.01 for k, v in other.items()}
        after = encoder.train()(PIXELS)
        assert (after - before).abs().max() > 0.01
        torch.testing.assert_close(after, encoder.eval()(PIXELS), rtol=1e-9, atol=1e-9)


def test_on_a_cpu_it_trains_in_float32():
    encoder = make_encoder("mobilenet_v2")
    encoder.fine_tune_from("features.14")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained, used = encoder.train()(PIXELS), encoder.eval()(PIXELS)
    assert trained.dtype == torch.float32
    assert used.dtype == torch.bfloat16
    assert torch.equal(trained, encoder.train()(PIXELS))
