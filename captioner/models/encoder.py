"""The CNN: from pixels to a grid of region features."""

import contextlib
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import BatchNorm, Padding, PreprocessingConfig
from captioner.data.preprocessing import Preprocessing
from captioner.device import has_bfloat16_tiles, without_autocast
from captioner.errors import ConfigError, WeightsError, did_you_mean
from captioner.models.padding import pad_as_tensorflow
from captioner.models.pretrained_cnn import (
    HEADS,
    build_cnn,
    preprocessing_of_weights,
    read_weights,
    remove_head,
)
from captioner.models.training_cnn import TrainingCNN
from captioner.models.weights import Unallocated, fill, misfit


class Encoder(nn.Module):
    """A torchvision classification CNN without its classifier.

    Its parameters keep torchvision's names, so that a state_dict fits both ways.

    Args:
        name: The CNN by its torchvision name.
        preprocessing: What is done to its images; mean and std are applied in here.
        last_stage: The stage whose output is taken as the features; those after it are left
            out. An earlier one has a finer grid. "" takes the last one there is.
        tensors: Its weights, by the names of its ``state_dict``; None draws random ones.
        padding: How layers with a stride pad; "tensorflow" for weights that come from there.

    Attributes:
        stages: Names of the parts in running order, for fine-tuning ("layer3", "features.14").
        grid_shape: (N, D): regions and width of the features.

    Raises:
        ConfigError: No such CNN, or one that doesn't end in a feature map, or can't pad so.
        CheckpointError: The tensors don't fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        preprocessing: Preprocessing,
        last_stage: str = "",
        tensors: Mapping[str, Tensor] | None = None,
        padding: Padding = "torchvision",
    ) -> None:
        super().__init__()
        self.name, self.preprocessing, self.last_stage = name, preprocessing, last_stage
        self.padding: Padding = padding
        with contextlib.nullcontext() if tensors is None else Unallocated():
            self.cnn, stages = remove_head(build_cnn(name), name)
        self.stages = stages
        if last_stage:
            self._check_stage("last_stage", last_stage)
            self.stages = stages[: stages.index(last_stage) + 1]
        self._left_out = tuple(f"{stage}." for stage in stages[len(self.stages) :])
        for stage in stages[len(self.stages) :]:
            parent, _, child = stage.rpartition(".")
            delattr(self.cnn.get_submodule(parent), child)
        if padding == "tensorflow":
            pad_as_tensorflow(self.cnn, name)
        self.register_buffer("mean", _channels(preprocessing.mean), persistent=False)
        self.register_buffer("std", _channels(preprocessing.std), persistent=False)
        if tensors is not None:
            fill(self, tensors)
        self._trained: list[str] = []
        self._fast: tuple[nn.Module, ...] = ()  # in a tuple, so that its weights count once
        self._batch_norm: BatchNorm = "update"
        self.requires_grad_(False)
        self.to(memory_format=torch.channels_last)
        self.grid_shape = self._measure_grid()

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode images.

        Args:
            pixels: (B, 3, S, S), uint8.

        Returns:
            The grid of region features, row by row: (B, N, D).
        """
        x = self.normalise(pixels)
        if self.training and self._fast:
            with self._autocast_of_training(x.device):
                return to_regions(self._fast[0](x))
        for stage in self._modules_of_stages():
            x = stage(x)
        return to_regions(x)

    def _autocast_of_training(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Turn autocast off where the gradients of convolutions are slower in bfloat16.

        On a CPU that is so without AMX, and of grouped convolutions (MobileNet, ResNeXt, …).
        """
        convolutions = (module for module in self.modules() if isinstance(module, nn.Conv2d))
        if has_bfloat16_tiles(device) and (
            device.type != "cpu" or all(layer.groups == 1 for layer in convolutions)
        ):
            return contextlib.nullcontext()
        return without_autocast(device)

    def _modules_of_stages(self) -> list[nn.Module]:
        return [self.cnn.get_submodule(stage) for stage in self.stages]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as the CNN takes them: float, minus mean, by standard deviation."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    def fine_tune_from(self, stage: str, batch_norm: BatchNorm = "update") -> None:
        """Train the CNN from ``stage`` on ("all": from the first); "" freezes it.

        Args:
            stage: One of ``stages``, "all" or "".
            batch_norm: Statistics of its batch norm in training: see ``config.EncoderConfig``.

        Raises:
            ConfigError: No such stage; the message lists them.
        """
        if stage not in ("", "all"):
            self._check_stage("fine_tune_from", stage)
        start = {"": len(self.stages), "all": 0}.get(stage)
        start = self.stages.index(stage) if start is None else start
        self._trained, self._batch_norm = self.stages[start:], batch_norm
        self.requires_grad_(False)
        for name in self._trained:
            self.cnn.get_submodule(name).requires_grad_(True)
        if stage and not any(parameter.requires_grad for parameter in self.parameters()):
            raise ConfigError(
                f"encoder.fine_tune_from: {self.name} has nothing to train from '{stage}' on"
            )
        training = self.training
        self.train()
        self._fast = ()
        if self._trained:
            self._fast = (TrainingCNN(nn.Sequential(*self._modules_of_stages())),)
        self.train(training)

    def _check_stage(self, setting: str, stage: str) -> None:
        if stage not in self.stages:
            hint = did_you_mean(stage, self.stages) or f"; there are {', '.join(self.stages)}"
            raise ConfigError(f"encoder.{setting}: {self.name} has no stage '{stage}'{hint}")

    @property
    def frozen(self) -> bool:
        """Whether no part of the CNN is trained, so that features can be computed once."""
        return not self._trained

    @property
    def moving_statistics(self) -> list[Tensor]:
        """Means and variances of batch norm that training moves; (C,) each."""
        if self._batch_norm == "frozen":
            return []
        modules = [m for name in self._trained for m in self.cnn.get_submodule(name).modules()]
        return [
            buffer
            for module in modules
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode on the trained stages alone: frozen batch-norm statistics stay."""
        super().train(False)
        self.training = mode
        for name in self._trained:
            stage = self.cnn.get_submodule(name).train(mode)
            for module in stage.modules() if self._batch_norm == "frozen" else ():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def load_weights(self, weights: str) -> None:
        """Load torchvision's weights by name, or a state_dict file; "none" changes nothing.

        Raises:
            WeightsError: They can't be found, downloaded or read, or don't fit this CNN.
        """
        if weights != "none":
            source, state = read_weights(self.name, weights)
            self._load(state, source)

    def _load(self, state: dict[str, Tensor], source: str) -> None:
        own = self.cnn.state_dict()
        # ResNet-50's tensors are all in ResNet-101, by name and shape.
        left_out = (*(f"{head}." for head in HEADS), *self._left_out)
        given = {key: state[key] for key in state if key in own or not key.startswith(left_out)}
        if reason := misfit(own, given):
            raise WeightsError(
                f"{source}: these are not the weights of {self.name}, which has {len(own)} "
                f"tensors below its classifier: {reason}"
            )
        # Filled in place: torchvision's own state_dict carries versions that some CNNs ask for.
        own.update({key: state[key] for key in own if key in state})
        self.cnn.load_state_dict(own)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the features: CNN, preprocessing and the weights' SHA-256."""
        digest = hashlib.sha256()
        for key, tensor in sorted(self.cnn.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        # Without torchvision's padding, so that features that were cached before remain known.
        padding = {"padding": self.padding} if self.padding != "torchvision" else {}
        return {
            "encoder": self.name,
            "last_stage": self.last_stage,
            "weights_sha256": digest.hexdigest(),
            "preprocessing": self.preprocessing.to_dict(),
            **padding,
        }

    def _measure_grid(self) -> tuple[int, int]:
        size = self.preprocessing.image_size
        self.eval()
        try:
            with torch.no_grad():
                _, regions, width = self(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"encoder.name: '{self.name}' gives no feature map for {size} x {size} pixels "
                f"({reason}); expected a CNN such as resnet50, and an image size it can take"
            ) from None
        return regions, width


def to_regions(grid: Tensor) -> Tensor:
    """Return a grid row by row: (B, D, H, W) gives (B, N, D)."""
    return grid.flatten(2).transpose(1, 2)


def make_encoder(
    name: str,
    weights: str,
    changes: PreprocessingConfig | None = None,
    last_stage: str = "",
    padding: Padding = "torchvision",
) -> Encoder:
    """Build an encoder with its weights and the preprocessing that belongs to them.

    Args:
        name: A torchvision classification CNN.
        weights: A torchvision weights name, the path of a state_dict file, or "none".
        changes: What is to differ from the weights' own preprocessing.
        last_stage: See ``Encoder``.
        padding: See ``Encoder``.
    """
    preprocessing = make_preprocessing(name, weights, changes or PreprocessingConfig())
    encoder = Encoder(name, preprocessing, last_stage, padding=padding)
    encoder.load_weights(weights)
    return encoder


def make_preprocessing(name: str, weights: str, changes: PreprocessingConfig) -> Preprocessing:
    """Return the preprocessing of a CNN's weights with some changes."""
    own = preprocessing_of_weights(name, weights)
    image_size = changes.image_size or own.image_size
    # A new size keeps the share of the image that is cut away.
    scaled = round(own.resize_size * image_size / own.image_size)
    if 0 < changes.resize_size < image_size:
        raise ConfigError(
            f"preprocessing.resize_size ({changes.resize_size}) must be at least the image size "
            f"({image_size}); set preprocessing.image_size too, or leave it out"
        )
    return Preprocessing(
        resize=changes.resize,
        image_size=image_size,
        resize_size=max(changes.resize_size or scaled, image_size),
        interpolation=changes.interpolation or own.interpolation,
        mean=changes.mean or own.mean,
        std=changes.std or own.std,
    )


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
