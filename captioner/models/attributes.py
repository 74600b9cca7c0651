"""Attributes: words predicted from the image, as further input of a decoder."""

import math

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.data.vocabulary import SPECIAL_WORDS
from captioner.errors import ConfigError
from captioner.models.dropout import Dropout


class Attributes(nn.Module):
    """Predicts which of the most frequent words an image's captions hold, before any is written.

    Each region has a logit for each word; their smooth maximum s = log(1/N sum_i e^(s_i)) is the
    image's: one region is enough to see a dog (multiple instance learning; compare Fang et al.
    2015, section 3). What the decoder takes is a = tanh(W sigmoid(s) + b), as wide as a word vector
    (compare Wu et al. 2016, section 3.2, and Yao et al. 2017, LSTM-A).

    Args:
        config: The decoder's settings.
        vocabulary_size: V; after the special words the most frequent word comes first.
        feature_width: D.

    Raises:
        ConfigError: The vocabulary has fewer words than are to be predicted.
    """

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__()
        words = vocabulary_size - len(SPECIAL_WORDS)
        if config.attributes > words:
            raise ConfigError(
                f"decoder.attributes: at most {words} was expected, as many as the vocabulary has "
                f"words; found {config.attributes}"
            )
        self.predict = nn.Linear(feature_width, config.attributes)
        nn.init.constant_(self.predict.bias, -3.0)  # most words aren't in most captions
        self.embed = nn.Linear(config.attributes, config.embedding_size)
        self.dropout = Dropout(config.dropout)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits s of the words, (B, W), and a, (B, E), for features (B, N, D).

        The logits are computed in float32 at least.
        """
        of_regions = self.predict(features)
        precise = of_regions.to(torch.promote_types(of_regions.dtype, torch.float32))
        logits = torch.logsumexp(precise, 1) - math.log(features.shape[1])
        chances = torch.sigmoid(logits).to(of_regions.dtype)
        return logits, self.dropout(torch.tanh(self.embed(chances)))
