"""Checkpoints: a captioning model in a directory that needs nothing beside it.

    model.safetensors        weights of encoder and decoder
    config.json              CNN, preprocessing, decoder and search settings, scores
    vocabulary.json          the words in the order of their ids
    consensus.safetensors    what an image lets expect of its captions, if that was fitted
    SHA256SUMS               what these files were when they were saved (``captioner.checksums``)

Loading one reads tensors and JSON; it never runs code from it. It may come from a stranger: sizes
are checked before anything of theirs is allocated. Whoever edits config.json, say the settings of
the search, deletes its line from SHA256SUMS.
"""

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from captioner.checkpoint_directory import (
    CONFIG_FILE,
    CONSENSUS_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
)
from captioner.checksums import (
    CHECKSUMS_FILE,
    check_sha256,
    read_checksums,
    sha256_of,
    write_checksums,
)
from captioner.config import DecoderConfig, Padding, SearchConfig
from captioner.data.preprocessing import Preprocessing
from captioner.data.vocabulary import Vocabulary
from captioner.errors import CaptionerError, CheckpointError, ConfigError, name_some
from captioner.experiment_file import parse
from captioner.files import error_naming, open_together, parse_json, write_json
from captioner.models.captioning_model import CaptioningModel
from captioner.models.consensus import Consensus
from captioner.models.encoder import Encoder
from captioner.models.weights import Unallocated, fill
from captioner.version import __version__

LARGE_WEIGHT = 200_000  # numbers
FORMAT = 2  # 1: other names of the decoders' weights

# Far more than any captioner needs.
MOST_CONFIG_BYTES = 2**20
MOST_VOCABULARY_BYTES = 2**25
MOST_WORDS = 1_000_000
MOST_CONSENSUS_BYTES = 2**28


@dataclass(frozen=True)
class _EncoderContent:
    name: str
    last_stage: str
    preprocessing: Preprocessing
    padding: Padding = "torchvision"  # not in older checkpoints


@dataclass(frozen=True)
class _Content:
    """What config.json holds."""

    format: int
    captioner: str
    encoder: _EncoderContent
    decoder: DecoderConfig
    search: SearchConfig
    scores: dict[str, Any]


def save_checkpoint(
    model: CaptioningModel,
    directory: Path,
    scores: dict[str, Any],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a checkpoint into an existing directory (see ``files.atomic_directory``).

    Other files that are in the directory by then get their checksums too.

    Args:
        model: What is saved.
        directory: Where.
        scores: What the model has reached, as JSON takes it.
        dtype: What its large weights are rounded to, say torch.float16 for half the size. Small
            ones, the CNN's batch norm above all, change captions more than they take room.
    """
    state = {
        key: (tensor.to(dtype) if _is_large(tensor) else tensor).detach().contiguous()
        for key, tensor in model.state_dict().items()
    }
    write_tensors(directory / WEIGHTS_FILE, state)
    if model.consensus:
        write_tensors(directory / CONSENSUS_FILE, model.consensus.tensors())
    write_json(directory / VOCABULARY_FILE, list(model.vocabulary.words), indent=None)
    cnn = model.encoder
    encoder = _EncoderContent(cnn.name, cnn.last_stage, cnn.preprocessing, cnn.padding)
    content = _Content(FORMAT, __version__, encoder, model.decoder.config, model.search, scores)
    write_json(directory / CONFIG_FILE, dataclasses.asdict(content))
    write_checksums(directory)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file that those may read who may read the others beside it."""
    path.write_bytes(safetensors.torch.save(tensors))  # save_file lets nobody but the owner read


def _is_large(weight: torch.Tensor) -> bool:
    return weight.is_floating_point() and weight.numel() >= LARGE_WEIGHT


def load_checkpoint(directory: str | Path, device: torch.device | str = "cpu") -> CaptioningModel:
    """Read a checkpoint, of this format or an earlier one.

    Raises:
        CheckpointError: A file is missing, damaged, or doesn't fit the others.
    """
    directory = Path(directory)
    with _open_files(directory) as files, ThreadPoolExecutor(1) as hashing:
        sha256 = hashing.submit(sha256_of, files[WEIGHTS_FILE])
        checksums = read_checksums(files.get(CHECKSUMS_FILE), directory)
        content = _read_config(files[CONFIG_FILE], directory / CONFIG_FILE, checksums)
        vocabulary = _read_vocabulary(
            files[VOCABULARY_FILE], directory / VOCABULARY_FILE, checksums
        )
        path = directory / WEIGHTS_FILE
        check_sha256(sha256.result(), path, checksums)
        tensors = _read_tensors(files[WEIGHTS_FILE], path, content)
        model = _build_model(content, vocabulary, tensors, directory)
        model.consensus = _read_consensus(files.get(CONSENSUS_FILE), directory, model, checksums)
    return model.to(device).eval()


@contextlib.contextmanager
def _open_files(directory: Path) -> Iterator[dict[str, BinaryIO]]:
    names = (CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE)
    try:
        files = open_together(directory, names, [CHECKSUMS_FILE, CONSENSUS_FILE], CheckpointError)
    except CheckpointError:
        if os.path.isdir(directory):
            raise
        raise CheckpointError(f"{directory}: no such checkpoint directory") from None
    with contextlib.ExitStack() as opened:
        for file in files.values():
            opened.enter_context(file)
        yield files


def _read_config(file: BinaryIO, path: Path, checksums: dict[str, str]) -> _Content:
    content = _read_json(file, path, dict, MOST_CONFIG_BYTES, checksums)
    if content.get("format") not in range(1, FORMAT + 1):
        raise CheckpointError(
            f"{path}: checkpoint format {FORMAT} or earlier was expected, found "
            f"{content.get('format')!s:.20}; it was written by captioner "
            f"{content.get('captioner')!s:.20}"
        )
    try:
        return parse(_Content, content, path.name)
    except (CaptionerError, RecursionError) as error:
        reason = _shortened(error).removeprefix(f"{path.name}: ")
        raise CheckpointError(f"{path}: {reason}") from None


def _read_vocabulary(file: BinaryIO, path: Path, checksums: dict[str, str]) -> Vocabulary:
    words = _read_json(file, path, list, MOST_VOCABULARY_BYTES, checksums)
    if not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path}: a list of words was expected")
    if len(words) > MOST_WORDS:
        raise CheckpointError(
            f"{path}: at most {MOST_WORDS:,} words were expected, found {len(words):,}"
        )
    try:
        "".join(words).encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{path}: a word isn't valid Unicode, it can't be written") from None
    try:
        return Vocabulary(words)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_json(
    file: BinaryIO, path: Path, kind: type, most_bytes: int, checksums: dict[str, str]
) -> Any:
    with error_naming(path, CheckpointError):
        content = file.read(most_bytes + 1)
        if len(content) > most_bytes:
            raise CheckpointError(f"{path}: at most {most_bytes:,} bytes were expected")
        check_sha256(sha256_of(BytesIO(content)), path, checksums)
        text = content.decode("utf-8-sig")
    value = parse_json(text, str(path), CheckpointError)
    if not isinstance(value, kind):
        raise CheckpointError(f"{path}: a JSON {kind.__name__} was expected")
    return value


def _read_tensors(file: BinaryIO, path: Path, content: _Content) -> dict[str, Tensor]:
    """Return the tensors, which are mapped from the file: they take no memory yet."""
    opened = f"/dev/fd/{file.fileno()}"  # the file that was hashed, whatever has its name by now
    try:
        file.seek(0)
        tensors = safetensors.torch.load_file(opened if os.path.exists(opened) else path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file, or cut short ({_shortened(error)}); other formats "
            "are refused because they can run code"
        ) from None
    if content.format > 1:
        return tensors
    try:
        return _upgrade_format_1(tensors, content.decoder.embedding_size)
    except (KeyError, IndexError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: doesn't fit {CONFIG_FILE} (format 1: {_shortened(error)})"
        ) from None


def _build_model(
    content: _Content, vocabulary: Vocabulary, tensors: Mapping[str, Tensor], directory: Path
) -> CaptioningModel:
    by_part: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}}
    for name, tensor in tensors.items():
        part, _, name_in_part = name.partition(".")
        by_part.setdefault(part, {})[name_in_part] = tensor
    part = "encoder"
    try:
        encoder = Encoder(
            content.encoder.name,
            content.encoder.preprocessing,
            content.encoder.last_stage,
            by_part.pop(part),
            content.encoder.padding,
        )
        with Unallocated():
            model = CaptioningModel(encoder, content.decoder, vocabulary, content.search)
        part = "decoder"
        fill(model.decoder, by_part.pop(part))
        if by_part:
            raise CheckpointError(f"no part of a captioner is called {name_some(by_part)}")
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG_FILE}: {_shortened(error)}") from None
    except CheckpointError as error:
        raise CheckpointError(
            f"{directory / WEIGHTS_FILE}: doesn't fit {CONFIG_FILE} ({part}: {_shortened(error)})"
        ) from None
    return model


def _read_consensus(
    file: BinaryIO | None, directory: Path, model: CaptioningModel, checksums: dict[str, str]
) -> Consensus | None:
    path = directory / CONSENSUS_FILE
    if not file:
        if model.search.consensus:
            raise CheckpointError(
                f"{directory / CONFIG_FILE}: search.consensus needs {path.name}, which is missing; "
                "0 leaves it out"
            )
        return None
    with error_naming(path, CheckpointError):
        content = file.read(MOST_CONSENSUS_BYTES + 1)
    if len(content) > MOST_CONSENSUS_BYTES:
        raise CheckpointError(f"{path}: at most {MOST_CONSENSUS_BYTES:,} bytes were expected")
    check_sha256(sha256_of(BytesIO(content)), path, checksums)
    try:
        consensus = Consensus.of_tensors(safetensors.torch.load(content))
    except (SafetensorError, ValueError, TypeError, RuntimeError, CheckpointError) as error:
        raise CheckpointError(f"{path}: {_shortened(error)}; it has to be fitted again") from None
    width = model.encoder.grid_shape[1]
    if len(consensus.inner) != width:
        raise CheckpointError(
            f"{path}: {width} features were expected, found {len(consensus.inner)}"
        )
    return consensus


def _shortened(error: Exception) -> str:
    """Return an error's first line; a stranger's values may be of any length."""
    lines = str(error).splitlines()
    return lines[0][:300] if lines else type(error).__name__


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
