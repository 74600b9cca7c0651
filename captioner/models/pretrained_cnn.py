"""torchvision's classification CNNs: built without their classifier, their weights read."""

import os
import warnings
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torchvision
from safetensors import SafetensorError
from torch import Tensor, nn

from captioner.data.preprocessing import Preprocessing
from captioner.errors import ConfigError, WeightsError, did_you_mean
from captioner.files import error_naming, open_regular
from captioner.models.weights import load_pickled, reason_of

# Top-level children of torchvision's CNNs that come after the last feature map, or beside it.
HEADS = {"avgpool", "classifier", "fc", "head", "dropout", "aux1", "aux2", "AuxLogits"}
# Children that hold the whole trunk; their own children are the stages.
TRUNKS = {"features", "layers"}


def _check_name(name: str) -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ConfigError(
            f"encoder.name: torchvision has no CNN '{name}'{did_you_mean(name, known)}"
        )


def build_cnn(name: str) -> nn.Module:
    """Return a torchvision CNN with random weights, or raise a ConfigError."""
    _check_name(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some announce how a later release will initialise
        return torchvision.models.get_model(name, weights=None)


def remove_head(model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """Remove the classifier; return the rest and the names of its stages in running order."""
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


def preprocessing_of_weights(name: str, weights: str) -> Preprocessing:
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


def read_weights(name: str, weights: str) -> tuple[str, dict[str, Tensor]]:
    """Return where weights come from, and the tensors by name.

    Args:
        name: The CNN.
        weights: A torchvision weights name, or the path of a file.

    Raises:
        WeightsError: They can't be found, downloaded or read.
    """
    path = os.path.expanduser(weights)
    if os.path.isfile(path):
        return weights, _read_state_dict(Path(path))
    kinds = torchvision.models.get_model_weights(name)
    if weights not in kinds.__members__:
        known = [*kinds.__members__, "none"]
        raise WeightsError(
            f"encoder.weights: '{weights}' is neither a file nor weights of {name}"
            f"{did_you_mean(weights, known)} (torchvision has {', '.join(known)})"
        )
    chosen = kinds[weights]
    file = Path(torch.hub.get_dir(), "checkpoints", Path(chosen.url).name)
    try:
        if file.exists():
            open_regular(file).close()
        state = chosen.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except Exception as error:  # see load_pickled
        if file.exists():
            raise WeightsError(
                f"{file}: not the weights of {chosen.url} ({reason_of(error)}); delete it, and it "
                "is downloaded again"
            ) from None
        raise WeightsError(
            f"encoder.weights: {chosen.url} can't be downloaded ({reason_of(error)}); with no "
            "network, copy the file here and give its path as encoder.weights"
        ) from None
    return chosen.url, state


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read tensors by name from a safetensors file or a state_dict, never running code from it."""
    with error_naming(path, WeightsError):
        file = open_regular(path)
    try:
        with file:
            safe = path.suffix == ".safetensors"
            state: Any = safetensors.torch.load_file(path) if safe else load_pickled(file)
    except (ValueError, OSError, SafetensorError) as error:
        reason = str(error) if isinstance(error, ValueError) else reason_of(error)
        raise WeightsError(
            f"{path}: not a plain state_dict of tensors ({reason}); files that need code to load "
            "are refused"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise WeightsError(f"{path}: a state_dict (tensors by name) was expected")
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}
