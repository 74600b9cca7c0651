"""TensorFlow's padding in torchvision's CNNs, for weights that were trained with it.

Where a layer with a kernel of 3 and a stride of 2 sees an even number of rows, torchvision puts a
row of zeros on top, TensorFlow ("SAME") one at the bottom: it looks one pixel further down. The
size of the output is the same.
"""

from typing import Any

from torch import Tensor, nn

from captioner.errors import ConfigError


def pad_as_tensorflow(cnn: nn.Module, name: str) -> None:
    """Have a CNN pad its strided convolutions and max-pooling layers as TensorFlow does.

    The layers keep their types and names: a state_dict fits as before, and batch norm can be
    folded into them.

    Args:
        cnn: Any; it is changed.
        name: What messages call it.

    Raises:
        ConfigError: It has no such layer, or one whose padding isn't like TensorFlow's "SAME".
    """
    padded = []
    for layer_name, layer in cnn.named_modules():
        if not isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
            continue
        # With a stride of 1 both pad alike; a layer that doesn't pad is "VALID" in TensorFlow.
        if max(_pair(layer.stride)) == 1 or not any(_pair(layer.padding)):
            continue
        if isinstance(layer, nn.AvgPool2d) or not _keeps_size(layer):
            raise _refusal(
                f"its layer {layer_name} ({layer}) pads in a way that TensorFlow doesn't have", name
            )
        padded.append(layer)
    if not padded:
        raise _refusal("no layer of it has both a stride and padding", name)
    for layer in padded:
        layer.padding = (0, 0)
        layer.register_forward_pre_hook(_pad_input)


def same_padding(size: int, kernel: int, stride: int, dilation: int = 1) -> tuple[int, int]:
    """Return how many rows TensorFlow's "SAME" puts before and behind ``size`` rows.

    Formula: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def can_be_rotated(cnn: nn.Module) -> bool:
    """Return whether a CNN pads as TensorFlow does in a way that needs no padding.

    Padding copies a whole feature map. But where the stride is 2, TensorFlow pads as torchvision
    does on the image turned by 180 degrees: at even sizes torchvision's layers don't reach the
    padding behind. So a CNN all of whose strided layers are such convolutions gives the same with
    its kernels and the image turned, and the output turned back.
    """
    strided = [
        layer
        for layer in cnn.modules()
        if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d)
        and max(_pair(layer.stride)) > 1
    ]
    return bool(strided) and all(
        is_padded(layer) and isinstance(layer, nn.Conv2d) and set(layer.stride) == {2}
        for layer in strided
    )


def rotate(cnn: nn.Module) -> None:
    """Turn the kernels of a CNN that can be rotated, and give it torchvision's padding back."""
    for layer in cnn.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data = rotated_kernel(layer.weight.data)
            layer.padding = rotated_padding(layer)
            layer._forward_pre_hooks.clear()


def rotated_kernel(weight: Tensor) -> Tensor:
    """Return the kernels of a convolution turned by 180 degrees: (D, C, H, W)."""
    return weight.flip(2, 3) if weight.shape[2:] != (1, 1) else weight


def rotated_padding(layer: nn.Conv2d) -> Any:
    """Return the padding of a convolution in a CNN that is rotated."""
    if not is_padded(layer):
        return layer.padding
    pairs = zip(layer.kernel_size, layer.dilation, strict=True)
    return tuple(dilation * (kernel - 1) // 2 for kernel, dilation in pairs)


def is_padded(layer: nn.Module) -> bool:
    """Return whether ``pad_as_tensorflow`` changed a layer."""
    return _pad_input in layer._forward_pre_hooks.values()


def _pad_input(layer: Any, inputs: tuple[Tensor]) -> Tensor:
    """Pad what a convolution (by zeros) or a max-pooling layer (by the least number) is given."""
    (x,) = inputs
    settings = zip(
        x.shape[2:],
        _pair(layer.kernel_size),
        _pair(layer.stride),
        _pair(layer.dilation),
        strict=True,
    )
    (top, bottom), (left, right) = (same_padding(*of_side) for of_side in settings)
    value = 0.0 if isinstance(layer, nn.Conv2d) else -float("inf")
    return nn.functional.pad(x, (left, right, top, bottom), value=value)


def _keeps_size(layer: nn.Conv2d | nn.MaxPool2d) -> bool:
    """Tell whether a layer with a stride of 1 would give an output as large as its input."""
    settings = zip(
        _pair(layer.padding), _pair(layer.kernel_size), _pair(layer.dilation), strict=True
    )
    return all(2 * padding == dilation * (kernel - 1) for padding, kernel, dilation in settings)


def _pair(value: Any) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def _refusal(reason: str, name: str) -> ConfigError:
    return ConfigError(
        f"encoder.padding=tensorflow can't be had with {name}: {reason}; use padding=torchvision, "
        "or a CNN such as mobilenet_v2"
    )
