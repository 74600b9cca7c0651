"""The captioner as a model: encoder, decoder and vocabulary together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig, SearchConfig
from captioner.data.vocabulary import BOS, PAD, Vocabulary
from captioner.device import autocast
from captioner.errors import ConfigError, SearchError, did_you_mean
from captioner.models.adaptive_attention import AdaptiveAttention
from captioner.models.consensus import Consensus
from captioner.models.decoder import Decoder
from captioner.models.encoder import Encoder
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.show_and_tell import ShowAndTell
from captioner.models.show_attend_tell import ShowAttendTell
from captioner.models.up_down import UpDown
from captioner.search.decoding import decode
from captioner.search.ensemble import ensemble_step
from captioner.search.hypothesis import NO_PROBABILITIES, Hypothesis
from captioner.search.rules import Constraints

# What decoder.kind may be.
DECODERS: dict[str, type[Decoder]] = {
    "show_and_tell": ShowAndTell,
    "show_attend_tell": ShowAttendTell,
    "up_down": UpDown,
    "adaptive_attention": AdaptiveAttention,
}


def make_decoder(config: DecoderConfig, vocabulary_size: int, feature_width: int) -> Decoder:
    """Return a new decoder of the kind that ``config.kind`` names.

    Raises:
        ConfigError: There is no such kind.
    """
    check_decoder_kind(config.kind)
    return DECODERS[config.kind](config, vocabulary_size, feature_width)


def check_decoder_kind(kind: str) -> None:
    """Raise a ConfigError unless there is a decoder of this kind."""
    if kind not in DECODERS:
        hint = did_you_mean(kind, DECODERS) or f"; there are {', '.join(DECODERS)}"
        raise ConfigError(f"decoder.kind: no decoder '{kind}'{hint}")


class CaptioningModel(nn.Module):
    """An encoder, a decoder and the words they use.

    Args:
        encoder: The CNN with its preprocessing.
        decoder: Settings of the decoder.
        vocabulary: Its words.
        search: How captions are searched for unless told otherwise.
        consensus: What an image lets expect of its captions, if that was fitted.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: DecoderConfig,
        vocabulary: Vocabulary,
        search: SearchConfig,
        consensus: Consensus | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = make_decoder(decoder, len(vocabulary), encoder.grid_shape[1])
        self.vocabulary, self.search, self.consensus = vocabulary, search, consensus

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.embedding.weight.device

    def features(self, x: Tensor, precision: torch.dtype) -> Tensor:
        """Return the decoder's input, (B, N, D), on the model's device.

        Args:
            x: Cached features (B, N, D), or preprocessed pixels (B, 3, S, S), which are encoded.
            precision: torch.bfloat16 or torch.float32, for matrix products.
        """
        x = x.to(self.device, non_blocking=True)
        if x.dim() == 4:
            with autocast(self.device, precision):
                return self.encoder(x)
        return x.float() if precision == torch.float32 else x.to(precision)

    @torch.inference_mode()
    def attention_maps(
        self, features: Tensor, hypotheses: Sequence[Sequence[Hypothesis]], precision: torch.dtype
    ) -> list[list[Tensor]] | None:
        """Return what the decoder attends to for each word of captions.

        Args:
            features: (B, N, D).
            hypotheses: The captions of each image.
            precision: torch.bfloat16 or torch.float32, for matrix products.

        Returns:
            For each caption (T, N): for each of its words, and for its end, the weights of the
            regions, which sum to 1. None for a decoder without attention.
        """
        most = max([1, *map(len, hypotheses)])
        rows = [
            [torch.tensor([BOS, *hypothesis.token_ids]) for hypothesis in of_image]
            for of_image in hypotheses
        ]
        padding = torch.tensor([BOS])
        flat = [row for image in rows for row in image + [padding] * (most - len(image))]
        token_ids = nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=PAD)
        token_ids = token_ids.view(len(rows), most, -1).to(self.device)
        was_training = self.training
        self.eval()
        with autocast(self.device, precision):
            maps = self.decoder.attention_maps(features.to(self.device).float(), token_ids)
        self.train(was_training)
        if maps is None:
            return None
        maps = maps.float().cpu()
        return [
            [image_maps[place, : len(row)] for place, row in enumerate(image)]
            for image_maps, image in zip(maps, rows, strict=True)
        ]

    def best_captions(self, hypotheses: Sequence[Sequence[Hypothesis]]) -> list[str]:
        """Return the best caption of each image as text.

        Raises:
            SearchError: There is none for some image: the model gives NaN.
        """
        damaged = sum(not image for image in hypotheses)
        if damaged:
            raise SearchError(f"{damaged} of {len(hypotheses)} images: {NO_PROBABILITIES}")
        return [self.vocabulary.decode(image[0].token_ids) for image in hypotheses]


@torch.inference_mode()
def generate(
    decoders: Sequence[InferenceDecoder],
    features: Sequence[Tensor],
    search: SearchConfig,
    vocabulary: Vocabulary,
    image_keys: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Search for captions with one decoder, or with the mean of the probabilities of several.

    Args:
        decoders: On the same device.
        features: For each decoder those of the images, (B, N, D).
        search: How to search.
        vocabulary: The decoders' words.
        image_keys: See ``search.decode``.

    Returns:
        For each image its captions, best first; none where a decoder gives NaN: see
        ``search.decode``.

    Raises:
        ConfigError: No caption could meet the settings.
    """
    constraints = Constraints.from_config(search, vocabulary)
    pairs = zip(decoders, features, strict=True)
    states, memories = zip(*(decoder.init_state(x) for decoder, x in pairs), strict=True)
    steps = [decoder.step for decoder in decoders]
    step = steps[0] if len(steps) == 1 else ensemble_step(steps, states, memories)
    return decode(step, sum(states, ()), sum(memories, ()), search, constraints, image_keys)
