"""Attention over the regions of an image."""

import torch
from torch import Tensor, nn


class AdditiveAttention(nn.Module):
    """Soft attention with additive scores (Bahdanau et al. 2015; Xu et al. 2015, eq. 4-6).

    score(i) = v tanh(W_k a(i) + b + W_q h), weights = softmax(score), context = sum of
    weights(i) a(i).

    Args:
        feature_size: D, width of the features a.
        hidden_size: H, width of the state h.
        attention_size: A, width in which the scores are computed.
    """

    def __init__(self, feature_size: int, hidden_size: int, attention_size: int) -> None:
        super().__init__()
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size, bias=False)
        self.score = nn.Linear(attention_size, 1, bias=False)

    def prepare(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return what depends on the image alone: the memory that ``forward`` takes.

        Args:
            features: (B, N, D).
        """
        keys = self.key(features)
        # Under autocast keys are bfloat16; features are cast with them, once and not at each step.
        return features.to(keys.dtype), keys

    def forward(self, hidden: Tensor, memory: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Attend to the regions.

        Args:
            hidden: (B, K, H).
            memory: Features (B, N, D) and keys (B, N, A).

        Returns:
            The context (B, K, D), and the weights (B, K, N), which sum to 1.
        """
        features, keys = memory
        query = self.query(hidden)
        scores = self.score(torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2))).squeeze(-1)
        return attend(scores, features)


def attend(scores: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return context (B, K, D) and weights (B, K, N) for scores (B, K, N), features (B, N, D).

    The softmax is computed in float32 at least.
    """
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, -1, dtype=precise)
    return torch.bmm(weights.to(features.dtype), features), weights
