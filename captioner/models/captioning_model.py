"""The captioner as a model: encoder, decoder and vocabulary, in memory and in a checkpoint.

A checkpoint is a directory that needs nothing beside it:

    model.safetensors    weights of encoder and decoder
    config.json          CNN, preprocessing, decoder and search settings, scores
    vocabulary.json      the words in the order of their ids

Loading one reads tensors and JSON; it never runs code from it.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from captioner.config import DecoderConfig, SearchConfig, parse
from captioner.data.images import Preprocessing
from captioner.data.vocabulary import BOS, PAD, Vocabulary
from captioner.device import autocast
from captioner.errors import CheckpointError, ConfigError
from captioner.files import recover_directory, write_json
from captioner.models.decoder import Steps, make_decoder
from captioner.models.encoder import Encoder
from captioner.search import Constraints, Hypothesis, ensemble_step
from captioner.search import decode as search
from captioner.version import __version__

FORMAT = 1


class CaptionModel(nn.Module):
    """An encoder, a decoder and the words they speak.

    Args:
        encoder: The CNN with its preprocessing.
        decoder: Settings of the decoder.
        vocabulary: Its words.
        search: How captions are found unless told otherwise.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderConfig,
        vocabulary: Vocabulary,
        search: SearchConfig,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = make_decoder(decoder, len(vocabulary), encoder.grid_shape[1])
        self.vocabulary, self.search = vocabulary, search

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embedding.weight.device

    @torch.inference_mode()
    def attention(
        self, features: Tensor, found: Sequence[Sequence[Hypothesis]], precision: torch.dtype
    ) -> list[list[Tensor]] | None:
        """Return what the decoder looked at for each word of captions.

        Args:
            features: (B, N, D).
            found: The captions of each image.
            precision: torch.bfloat16 or torch.float32, for matrix products.

        Returns:
            For each caption (T, N): for each of its words, and for its end, the weights of the
            regions, which sum to 1. None for a decoder without attention.
        """
        most = max(len(captions) for captions in found)
        ids = [
            [torch.tensor([BOS, *caption.token_ids]) for caption in captions] for captions in found
        ]
        empty = torch.tensor([BOS])
        rows = [row for of_image in ids for row in of_image + [empty] * (most - len(of_image))]
        token_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
        token_ids = token_ids.view(len(found), most, -1).to(self.device)
        was_training = self.training
        self.eval()
        with autocast(self.device, precision):
            weights = self.decoder.attention(features.to(self.device).float(), token_ids)
        self.train(was_training)
        if weights is None:
            return None
        weights = weights.float().cpu()
        return [
            [of_image[place, : len(row)] for place, row in enumerate(of_ids)]
            for of_image, of_ids in zip(weights, ids, strict=True)
        ]

    def words(self, hypotheses: list[list[Hypothesis]]) -> list[str]:
        """Return the best caption of each image as text."""
        return [self.vocabulary.decode(best[0].token_ids) for best in hypotheses]


@torch.inference_mode()
def decode(
    decoders: Sequence[Steps],
    features: Sequence[Tensor],
    settings: SearchConfig,
    vocabulary: Vocabulary,
    keys: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Find captions with one decoder, or with the mean of the probabilities of several.

    Args:
        decoders: As ``Decoder.for_search`` gives them, on the same device.
        features: Each decoder's own of the images, (B, N, D).
        settings: How to search.
        vocabulary: The decoders'.
        keys: See ``search.decode``.

    Raises:
        ConfigError: No caption could meet the settings.
        SearchError: A decoder gives NaN.
    """
    constraints = Constraints.from_config(settings, vocabulary)
    begun = [decoder.start(own) for decoder, own in zip(decoders, features, strict=True)]
    memories, states = zip(*begun, strict=True)
    steps = [decoder.step for decoder in decoders]
    step = steps[0] if len(steps) == 1 else ensemble_step(steps, states, memories)
    return search(step, sum(states, ()), sum(memories, ()), settings, constraints, keys)


def save_checkpoint(model: CaptionModel, directory: Path, scores: dict[str, Any]) -> None:
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


def load_checkpoint(directory: str | Path, device: torch.device | str = "cpu") -> CaptionModel:
    """Read a checkpoint.

    Raises:
        CheckpointError: A file is missing, damaged, or doesn't fit the others.
    """
    directory = Path(directory)
    recover_directory(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such checkpoint directory")
    config = _read_json(directory / "config.json", dict)
    if config.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory}/config.json: checkpoint format {FORMAT} was expected, found "
            f"{config.get('format')}; it was written by captioner {config.get('captioner')}"
        )
    vocabulary = _read_vocabulary(directory / "vocabulary.json")
    try:
        encoder = Encoder(
            config["encoder"]["name"],
            parse(Preprocessing, config["encoder"]["preprocessing"], "preprocessing"),
            str(config["encoder"]["last_stage"]),
        )
        model = CaptionModel(
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
    _load_tensors(model, directory / "model.safetensors")
    return model.to(device).eval()


def _load_tensors(model: CaptionModel, path: Path) -> None:
    try:
        model.load_state_dict(safetensors.torch.load_file(path))
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


def _read_vocabulary(path: Path) -> Vocabulary:
    words = _read_json(path, list)
    if not all(isinstance(word, str) for word in words):
        raise CheckpointError(f"{path}: a list of words was expected")
    try:
        return Vocabulary(words)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _read_json(path: Path, kind: type) -> Any:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; is this a checkpoint directory?") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path}: can't be read ({error})") from None
    if not isinstance(content, kind):
        raise CheckpointError(f"{path}: a JSON {kind.__name__} was expected")
    return content
