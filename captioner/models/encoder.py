"""The CNN: from pixels to a grid of region features."""

import hashlib
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

from captioner.config import PreprocessingConfig
from captioner.data.images import Preprocessing
from captioner.errors import ConfigError, WeightsError, did_you_mean, name_some

# Top-level children of torchvision's CNNs that come after the last feature map, or beside it.
HEADS = {"avgpool", "classifier", "fc", "head", "dropout", "aux1", "aux2", "AuxLogits"}
# Children that hold the whole trunk; their own children are the stages.
TRUNKS = {"features", "layers"}


class Encoder(nn.Module):
    """A torchvision classification CNN without its classifier.

    Its parameters keep torchvision's names, so that a state_dict fits both ways.

    Args:
        name: The CNN by its torchvision name.
        preprocessing: What is done to its images; mean and std are applied in here.
        last_stage: The stage whose output is taken as the features; those after it are left
            out. An earlier one has a finer grid. "" takes the last one there is.

    Attributes:
        stages: Names of the parts in running order, for fine-tuning ("layer3", "features.14").
        grid_shape: (N, D): regions and width of the features.

    Raises:
        ConfigError: No such CNN, or one that doesn't end in a feature map.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, preprocessing: Preprocessing, last_stage: str = "") -> None:
        super().__init__()
        self.name, self.preprocessing, self.last_stage = name, preprocessing, last_stage
        self.cnn, stages = _without_head(_build(name), name)
        self.stages = stages
        if last_stage:
            self._refuse_unknown_stage("last_stage", last_stage)
            self.stages = stages[: stages.index(last_stage) + 1]
        self._left_out = tuple(f"{stage}." for stage in stages[len(self.stages) :])
        for stage in stages[len(self.stages) :]:
            parent, _, child = stage.rpartition(".")
            delattr(self.cnn.get_submodule(parent), child)
        self.register_buffer("mean", _channels(preprocessing.mean), persistent=False)
        self.register_buffer("std", _channels(preprocessing.std), persistent=False)
        self._trained: list[str] = []
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
        for stage in self.stages:
            x = self.cnn.get_submodule(stage)(x)
        return _regions(x)

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return pixels as the CNN takes them: float, minus mean, by standard deviation."""
        x = (pixels.to(self.mean.dtype) / 255 - self.mean) / self.std
        return x.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def for_inference(self, dtype: torch.dtype) -> "FastEncoder":
        """Return a copy of the CNN as it is now that computes in ``dtype``, and only forwards."""
        return FastEncoder(self, dtype)

    def fine_tune_from(self, stage: str) -> None:
        """Train the CNN from ``stage`` on ("all": from the first); "" freezes it.

        Raises:
            ConfigError: No such stage; the message lists them.
        """
        if stage not in ("", "all"):
            self._refuse_unknown_stage("fine_tune_from", stage)
        start = {"": len(self.stages), "all": 0}.get(stage)
        start = self.stages.index(stage) if start is None else start
        self._trained = self.stages[start:]
        self.requires_grad_(False)
        for name in self._trained:
            self.cnn.get_submodule(name).requires_grad_(True)
        if stage and not any(parameter.requires_grad for parameter in self.parameters()):
            raise ConfigError(
                f"encoder.fine_tune_from: {self.name} has nothing to train from '{stage}' on"
            )
        self.train(self.training)

    def _refuse_unknown_stage(self, setting: str, stage: str) -> None:
        if stage not in self.stages:
            hint = did_you_mean(stage, self.stages) or f"; there are {', '.join(self.stages)}"
            raise ConfigError(f"encoder.{setting}: {self.name} has no stage '{stage}'{hint}")

    @property
    def frozen(self) -> bool:
        """Whether no part of the CNN is trained, so that features can be computed once."""
        return not self._trained

    def train(self, mode: bool = True) -> "Encoder":
        """Set training mode on the trained stages alone: frozen batch-norm statistics stay."""
        super().train(False)
        self.training = mode
        for name in self._trained:
            self.cnn.get_submodule(name).train(mode)
        return self

    def load_weights(self, weights: str) -> None:
        """Load torchvision's weights by name, or a state_dict file; "none" changes nothing.

        Raises:
            WeightsError: They can't be found, downloaded or read, or don't fit this CNN.
        """
        if weights != "none":
            source, state = _read_weights(self.name, weights)
            self._load(state, source)

    def _load(self, state: dict[str, Tensor], source: str) -> None:
        own = self.cnn.state_dict()
        missing = [key for key in own if key not in state and "num_batches_tracked" not in key]
        other = [key for key in own if key in state and state[key].shape != own[key].shape]
        # ResNet-50's tensors are all in ResNet-101, by name and shape.
        more = [key for key in state if key not in own and key.split(".")[0] not in HEADS]
        more = [key for key in more if not key.startswith(self._left_out)]
        for keys, what in ((missing, "missing"), (other, "of another shape"), (more, "too many")):
            if keys:
                raise WeightsError(
                    f"{source}: these are not the weights of {self.name}, which has {len(own)} "
                    f"tensors below its classifier: {len(keys)} are {what} ({name_some(keys)})"
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
        return {
            "encoder": self.name,
            "last_stage": self.last_stage,
            "weights_sha256": digest.hexdigest(),
            "preprocessing": self.preprocessing.to_dict(),
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


class FastEncoder:
    """An encoder's CNN for inference: the same function with less to do.

    Batch norm is folded into the convolutions before it, and weights are cast once.

    Args:
        encoder: Where the weights are copied from.
        dtype: In which the CNN computes.
    """

    def __init__(self, encoder: Encoder, dtype: torch.dtype) -> None:
        self.name, self.device, self._dtype = encoder.name, encoder.mean.device, dtype
        self._normalise = encoder.normalise
        cnn = nn.Sequential(*(encoder.cnn.get_submodule(stage) for stage in encoder.stages))
        training = encoder.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torchvision's asserts while it is traced
            self._cnn = fuse(cnn.eval())
        encoder.train(training)
        for module in self._cnn.modules():
            if not isinstance(module, nn.modules.batchnorm._BatchNorm):  # not folded: keep exact
                for tensor in (*module._parameters.values(), *module._buffers.values()):
                    if tensor is not None and tensor.is_floating_point():
                        tensor.data = tensor.data.to(dtype)
        self._cnn.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Encode pixels (B, 3, S, S), uint8, from any device: (B, N, D), in the CNN's dtype."""
        # A CPU's caches hold what lies between two layers for a few images, and no more.
        at_once = len(pixels) if self.device.type == "cuda" else 8
        parts = []
        for part in pixels.split(at_once) if len(pixels) else [pixels]:
            x = self._normalise(part.to(self.device, non_blocking=True)).to(self._dtype)
            parts.append(_regions(self._cnn(x)))
        return torch.cat(parts)


def _regions(grid: Tensor) -> Tensor:
    return grid.flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, N, D)


def make_encoder(
    name: str, weights: str, changes: PreprocessingConfig | None = None, last_stage: str = ""
) -> Encoder:
    """Build an encoder with its weights and the preprocessing that belongs to them.

    Args:
        name: A torchvision classification CNN.
        weights: A torchvision weights name, the path of a state_dict file, or "none".
        changes: What is to differ from the weights' own preprocessing.
        last_stage: See ``Encoder``.
    """
    preprocessing = _change(_preprocessing_of(name, weights), changes or PreprocessingConfig())
    encoder = Encoder(name, preprocessing, last_stage)
    encoder.load_weights(weights)
    return encoder


# --- torchvision ----------------------------------------------------------------------------


def _check_name(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"encoder.name: torchvision has no CNN '{name}'{did_you_mean(name, known)}"
        )


def _build(name: str) -> nn.Module:
    _check_name(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some announce how a later release will initialise
        return torchvision.models.get_model(name, weights=None)


def _without_head(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """Take the classifier off; return the rest and the names of its stages in running order."""
    stages = []
    for child, module in list(model.named_children()):
        if child in HEADS:
            delattr(model, child)
        elif child in TRUNKS and isinstance(module, nn.Sequential):
            stages += [f"{child}.{part}" for part, _ in module.named_children()]
        else:
            stages.append(child)
    if name.startswith("densenet"):  # its forward ends with a ReLU that is no module
        model.relu = nn.ReLU()
        stages.append("relu")
    return model, stages


def _preprocessing_of(name: str, weights: str) -> Preprocessing:
    """Return the preprocessing of torchvision's weights; of its default ones for a local file."""
    _check_name(name)
    kinds = torchvision.models.get_model_weights(name)
    known = kinds.__members__.get(weights) or kinds.DEFAULT
    own = known.transforms()
    if name in ("googlenet", "inception_v3"):
        # Their torchvision models turn ImageNet's mean and std into these before the first layer
        # (transform_input), in a step that is no module.
        own.mean = own.std = (0.5, 0.5, 0.5)
    return Preprocessing(
        image_size=own.crop_size[0],
        resize_size=own.resize_size[0],
        interpolation=own.interpolation.value,
        mean=tuple(own.mean),
        std=tuple(own.std),
    )


def _change(own: Preprocessing, changes: PreprocessingConfig) -> Preprocessing:
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


def _read_weights(name: str, weights: str) -> tuple[str, dict[str, Tensor]]:
    if Path(weights).expanduser().is_file():
        return weights, _read_state_dict(Path(weights).expanduser())
    kinds = torchvision.models.get_model_weights(name)
    if weights not in kinds.__members__:
        known = [*kinds.__members__, "none"]
        raise WeightsError(
            f"encoder.weights: '{weights}' is neither a file nor weights of {name}"
            f"{did_you_mean(weights, known)} (torchvision has {', '.join(known)})"
        )
    chosen = kinds[weights]
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # see _read_state_dict
        file = Path(torch.hub.get_dir(), "checkpoints", Path(chosen.url).name)
        if file.is_file():
            raise WeightsError(
                f"{file}: not the weights of {chosen.url} ({_reason(error)}); delete it, and it "
                "is downloaded again"
            ) from None
        raise WeightsError(
            f"encoder.weights: {chosen.url} can't be downloaded ({_reason(error)}); with no "
            "network, copy the file here and give its path as encoder.weights"
        ) from None
    return chosen.url, state


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a state_dict, never running code from it."""
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # guesses about what the file is
                state = torch.load(path, map_location="cpu", weights_only=True)
    # torch's reader raises almost anything on damaged files and on those that are something else.
    except Exception as error:
        raise WeightsError(
            f"{path}: not a plain state_dict of tensors ({_reason(error)}); files that need code "
            "to load are refused"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path}: a state_dict (tensors by name) was expected")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _reason(error: Exception) -> str:
    """Return in one line why a weights file can't be read."""
    if isinstance(error, pickle.UnpicklingError):
        # torch's own message advises to load the file in the way that runs code from it.
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        if wanted:
            return f"it calls {wanted[1]}"
    elif isinstance(error, OSError | RuntimeError | SafetensorError):
        return str(error).split("\n")[0]
    return "it is damaged or of another format"


def _channels(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values).view(1, 3, 1, 1)
