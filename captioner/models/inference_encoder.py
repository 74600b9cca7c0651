"""An encoder's CNN made fast for inference."""

import warnings

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from captioner.models.encoder import Encoder, to_regions
from captioner.models.padding import can_be_rotated, rotate

CPU_CHUNK = 8  # images at a time: a CPU's caches hold what lies between two layers for so many


class FastCNN(nn.Module):
    """An encoder's CNN for inference: the same function with less to do.

    Batch norm is folded into the convolutions before it, and weights are cast once.

    Args:
        encoder: Where the weights are copied from.
        dtype: In which the CNN computes.
    """

    @torch.no_grad()
    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype, self._normalise = dtype, encoder.normalise
        cnn = nn.Sequential(*(encoder.cnn.get_submodule(stage) for stage in encoder.stages))
        training = encoder.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's asserts while it is traced
            self._cnn = fuse(cnn.eval())
        self._rotated = can_be_rotated(cnn)
        if self._rotated:  # TensorFlow's padding, without padding
            rotate(self._cnn)
        encoder.train(training)
        for module in self._cnn.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):  # not folded: keep exact
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
        self._cnn.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S), uint8: (B, N, D), in the CNN's dtype."""
        x = self._normalise(pixels.flip(2, 3) if self._rotated else pixels).to(self._dtype)
        regions = to_regions(self._cnn(x))
        return regions.flip(1) if self._rotated else regions


class InferenceEncoder:
    """A ``FastCNN`` over any number of images, so many at a time as are fast.

    Args:
        encoder: As ``FastCNN`` takes it.
        dtype: Likewise.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        self.name, self.device = encoder.name, encoder.mean.device
        self._cnn = FastCNN(encoder, dtype)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S), uint8, from any device: (B, N, D), in the CNN's dtype."""
        chunk_size = len(pixels) if self.device.type == "cuda" else CPU_CHUNK
        chunks = pixels.split(chunk_size) if len(pixels) else [pixels]
        return torch.cat([self._cnn(c.to(self.device, non_blocking=True)) for c in chunks])
