"""Checkpoints: a captioning model in a directory that needs nothing beside it.

    model.safetensors    weights of encoder and decoder
    config.json          CNN, preprocessing, decoder and search settings, scores
    vocabulary.json      the words in the order of their ids

Loading one reads tensors and JSON; it never runs code from it.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from captioner.config import DecoderConfig, SearchConfig
from captioner.data.images import Preprocessing
from captioner.data.vocabulary import Vocabulary
from captioner.errors import CheckpointError, ConfigError
from captioner.experiment_file import parse
from captioner.files import read_json, recover_directory, write_json
from captioner.models.captioning_model import CaptioningModel
from captioner.models.encoder import Encoder
from captioner.version import __version__

FORMAT = 2  # 1: other names of the decoders' weights


def save_checkpoint(model: CaptioningModel, directory: Path, scores: dict[str, Any]) -> None:
    """Write a checkpoint into an existing directory (see ``files.atomic_directory``)."""
    state = {key: tensor.detach().contiguous() for key, tensor in model.state_dict().items()}
    safetensors.torch.save_file(state, directory / "model.safetensors")
    write_json(directory / "vocabulary.json", list(model.vocabulary.words), indent=None)
    write_json(
        directory / "config.json",
        {
            "format": FORMAT,
            "captioner": __version__,
            "encoder": {
                "name": model.encoder.name,
                "last_stage": model.encoder.last_stage,
                "preprocessing": model.encoder.preprocessing.to_dict(),
            },
            "decoder": dataclasses.asdict(model.decoder.config),
            "search": dataclasses.asdict(model.search),
            "scores": scores,
        },
    )


def load_checkpoint(directory: str | Path, device: torch.device | str = "cpu") -> CaptioningModel:
    """Read a checkpoint, of this format or an earlier one.

    Raises:
        CheckpointError: A file is missing, damaged, or doesn't fit the others.
    """
    directory = Path(directory)
    recover_directory(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    config = _read_json(directory / "config.json", dict)
    if config.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{directory}/config.json: checkpoint format {FORMAT} or earlier was expected, found "
            f"{config.get('format')}; it was written by captioner {config.get('captioner')}"
        )
    vocabulary = _read_vocabulary(directory / "vocabulary.json")
    try:
        encoder = Encoder(
            config["encoder"]["name"],
            parse(Preprocessing, config["encoder"]["preprocessing"], "preprocessing"),
            str(config["encoder"]["last_stage"]),
        )
        model = CaptioningModel(
            encoder,
            parse(DecoderConfig, config["decoder"], "decoder"),
            vocabulary,
            parse(SearchConfig, config["search"], "search"),
        )
    except KeyError as error:
        raise CheckpointError(f"{directory}/config.json: {error} is missing") from None
    except (TypeError, ValueError, RuntimeError, ConfigError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{directory}/config.json: {reason}") from None
    _load_tensors(model, directory / "model.safetensors", config["format"])
    return model.to(device).eval()


def _load_tensors(model: CaptioningModel, path: Path, file_format: int) -> None:
    try:
        tensors = safetensors.torch.load_file(path)
        if file_format == 1:
            tensors = _upgrade_format_1(tensors, model.decoder.config.embedding_size)
        model.load_state_dict(tensors)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a checkpoint directory?") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut short ({error}); other formats are refused "
            "because they can run code"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: doesn't fit config.json ({reason})") from None


# What the decoders' weights were called in format 1, and what they are called now.
FORMAT_1_NAMES = (
    (r"recurrence\.(weight|bias)_", r"recurrence.fused.\1_"),
    (r"(key|query|score)\.", r"attention.\1."),
    (r"cells\.layers\.(\d+)\.(weight|bias)_hh", r"cells.from_hidden.\1.\2"),
    (r"cells\.layers\.0\.(weight|bias)_ih", r"word_projection.\1"),
)


def _upgrade_format_1(tensors: dict[str, Tensor], embedding_size: int) -> dict[str, Tensor]:
    """Give the weights of a checkpoint of format 1 the names and shapes of today."""
    upgraded: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for old, new in FORMAT_1_NAMES:
            name = re.sub(rf"^decoder\.{old}", rf"decoder.{new}", name)
        if layer := re.fullmatch(r"decoder\.cells\.layers\.(\d+)\.(weight|bias)_ih", name):
            name = f"decoder.cells.from_below.{int(layer[1]) - 1}.{layer[2]}"
        upgraded[name] = tensor
    words = upgraded.get("decoder.word_projection.weight")
    if words is not None:  # the word and the context were multiplied together
        upgraded["decoder.word_projection.weight"] = words[:, :embedding_size]
        upgraded["decoder.context_projection.weight"] = words[:, embedding_size:]
    if "decoder.hidden_output.weight" in upgraded:
        parts = [upgraded.pop(f"decoder.{part}_output.weight") for part in ("hidden", "context")]
        upgraded["decoder.deep_output.weight"] = torch.cat(parts, 1)
        upgraded["decoder.deep_output.bias"] = upgraded.pop("decoder.hidden_output.bias")
    return upgraded


def _read_vocabulary(path: Path) -> Vocabulary:
    words = _read_json(path, list)
    if not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path}: a list of words was expected")
    try:
        return Vocabulary(words)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_json(path: Path, kind: type) -> Any:
    content = read_json(path, CheckpointError, regular=True)
    if not isinstance(content, kind):
        raise CheckpointError(f"{path}: a JSON {kind.__name__} was expected")
    return content
