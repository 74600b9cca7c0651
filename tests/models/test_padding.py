"""TensorFlow's padding: against its formula, worked by hand, and in whole CNNs."""

import pytest
import torch
from torch import nn

from captioner.config import PreprocessingConfig
from captioner.data.preprocessing import Preprocessing
from captioner.errors import ConfigError
from captioner.models.encoder import Encoder, make_encoder
from captioner.models.inference_encoder import FastCNN, InferenceEncoder
from captioner.models.padding import pad_as_tensorflow, same_padding


def by_hand(x, kernel, stride):
    """A strided convolution of one channel, as TensorFlow's "SAME" does it, in plain loops."""
    size, width = len(x), len(kernel)
    outputs = -(-size // stride)
    before = max((outputs - 1) * stride + width - size, 0) // 2
    output = torch.zeros(outputs, outputs)
    for row in range(outputs):
        for column in range(outputs):
            for i in range(width):
                for j in range(width):
                    y, z = row * stride - before + i, column * stride - before + j
                    if 0 <= y < size and 0 <= z < size:
                        output[row, column] += x[y, z] * kernel[i, j]
    return output


@pytest.mark.parametrize("size", [6, 7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (5, 2), (7, 2), (3, 3), (7, 4)])
def test_a_convolution_is_that_worked_by_hand(size, kernel, stride):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, size, size, generator=generator)
    layer = nn.Conv2d(1, 1, kernel, stride, kernel // 2, bias=False)
    shape = layer(x).shape
    layers = nn.Sequential(layer)
    pad_as_tensorflow(layers, "it")
    found = layers(x)
    assert found.shape == shape
    torch.testing.assert_close(found[0, 0], by_hand(x[0, 0], layer.weight[0, 0], stride))


def test_a_kernel_of_ones_over_four_rows():
    """Even: 1 + 2 + 3 and 3 + 4 (torchvision: 1 + 2 and 2 + 3 + 4). Odd: as torchvision."""
    layer = nn.Conv2d(1, 1, (1, 3), (1, 2), (0, 1), bias=False)
    layer.weight.data.fill_(1)
    row = torch.tensor([[[[1.0, 2, 3, 4, 5]]]])
    before = [layer(row[..., :4]).flatten().tolist(), layer(row).flatten().tolist()]
    assert before == [[3, 9], [3, 9, 9]]
    layers = nn.Sequential(layer)
    pad_as_tensorflow(layers, "it")
    after = [layers(row[..., :4]).flatten().tolist(), layers(row).flatten().tolist()]
    assert after == [[6, 7], [3, 9, 9]]


def test_the_formula_of_tensorflow():
    assert same_padding(224, 3, 2) == (0, 1)
    assert same_padding(7, 3, 2) == (1, 1)
    assert same_padding(224, 7, 2) == (2, 3)
    assert same_padding(224, 5, 2) == (1, 2)
    assert same_padding(8, 3, 2, dilation=2) == (1, 2)
    assert same_padding(4, 1, 2) == (0, 0)


def test_pooling_takes_no_maximum_of_what_was_padded():
    layers = nn.Sequential(nn.MaxPool2d(3, 2, 1))
    pad_as_tensorflow(layers, "it")
    x = -torch.arange(1.0, 17).view(1, 1, 4, 4)
    assert layers(x).flatten().tolist() == [-1, -3, -9, -11]


def encoders(name, size=64):
    """Return a CNN with each padding and the same weights, its batch norm that of some images."""
    torch.manual_seed(0)
    plain = Encoder(name, Preprocessing("squash", size))
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.train()
    with torch.no_grad():
        plain(random_pixels(8, size))
    padded = Encoder(name, plain.preprocessing, tensors=plain.state_dict(), padding="tensorflow")
    return plain.eval(), padded.eval()


def random_pixels(count, size=64):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def count_batch_norms(encoder):
    folded = FastCNN(encoder, torch.float32)._cnn
    return sum(isinstance(module, nn.BatchNorm2d) for module in folded.modules())


@pytest.mark.parametrize(
    ("name", "size"),
    [("mobilenet_v2", 64), ("mobilenet_v2", 75), ("resnet18", 64), ("efficientnet_b0", 64)],
)
def test_whole_cnns_in_use_with_batch_norm_folded(name, size):
    plain, padded = encoders(name, size)
    assert padded.grid_shape == plain.grid_shape
    pixels = random_pixels(2, size)
    with torch.no_grad():
        expected, other = padded(pixels), plain(pixels)
    assert (expected - other).abs().mean() > 0.1 * other.abs().mean()
    found = InferenceEncoder(padded, torch.float32)(pixels)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert count_batch_norms(padded) == count_batch_norms(plain)


def test_a_shifted_image_tells_the_paddings_apart():
    """One convolution of stride 2: TensorFlow's looks one pixel further right and down."""
    plain, padded = encoders("mobilenet_v2")
    pixels = random_pixels(1)
    shifted = pixels.roll((-1, -1), (2, 3))
    with torch.no_grad():
        first = [e.cnn.features[0](e.normalise(x)) for e, x in ((padded, pixels), (plain, shifted))]
    inner = [x[..., 1:-1, 1:-1] for x in first]
    torch.testing.assert_close(*inner)


def test_training_reaches_the_padded_layers():
    _, padded = encoders("mobilenet_v2")
    padded.fine_tune_from("all")
    padded.train()
    padded(random_pixels(2)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in padded.parameters())


def test_the_fingerprint_tells_and_that_of_old_caches_stays():
    plain, padded = encoders("resnet18")
    assert padded.fingerprint() == {**plain.fingerprint(), "padding": "tensorflow"}
    assert "padding" not in plain.fingerprint()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("squeezenet1_1", "no layer of it has both a stride and padding"),
        ("alexnet", r"its layer features\.0 \(Conv2d\(3, 64, kernel_size=\(11, 11\)"),
    ],
)
def test_cnns_for_which_it_makes_no_sense_are_refused(name, reason):
    message = rf"encoder\.padding=tensorflow can't be had with {name}: {reason}"
    with pytest.raises(ConfigError, match=message):
        make_encoder(name, "none", PreprocessingConfig(image_size=64), padding="tensorflow")
