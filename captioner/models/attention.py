"""Attention over the regions of an image."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from captioner.errors import ConfigError

# How many numbers of attention, for all pairs of a region and a caption, a CPU makes at a time in
# training: they stay in its caches, with their gradient.
TRAINING_CHUNK = 1 << 18


class AdditiveAttention(nn.Module):
    """Soft attention with additive scores (Bahdanau et al. 2015; Xu et al. 2015, eq. 4-6).

    score(i) = v tanh(W_k a(i) + b + W_q h), weights = softmax(score), context = sum of
    weights(i) a(i). Of several heads each has a v of its own, and attends for its share of the
    context's numbers.

    Args:
        feature_size: D, width of the features a.
        hidden_size: H, width of the state h.
        attention_size: A, width in which the scores are computed.
        heads: M, a divisor of D.

    Raises:
        ConfigError: It isn't one.
    """

    def __init__(
        self, feature_size: int, hidden_size: int, attention_size: int, heads: int = 1
    ) -> None:
        super().__init__()
        if feature_size % heads:
            raise ConfigError(
                f"decoder.attention_heads: a divisor of the regions' width {feature_size} was "
                f"expected, found {heads}"
            )
        self.key = nn.Linear(feature_size, attention_size)
        self.query = nn.Linear(hidden_size, attention_size, bias=False)
        self.score = nn.Linear(attention_size, heads, bias=False)

    def prepare(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return what depends on the image alone: the memory that ``forward`` takes.

        Args:
            features: (B, N, D).
        """
        keys = self.key(features)
        # Under autocast keys are bfloat16; features are cast with them, once and not at each step.
        return features.to(keys.dtype), _to_tanh_dtype(keys)

    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, ...], sentinel_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend to the regions.

        Args:
            hidden: (B, K, H).
            memory: Features (B, N, D) and keys (B, N, A).
            sentinel_key: See ``attend``: its key, (B, K, A).

        Returns:
            What ``attend`` returns.
        """
        features, keys = memory
        query = _to_tanh_dtype(self.query(hidden))
        scores = _AdditiveScores.apply(keys, query, self.score.weight)
        sentinel = None
        if sentinel_key is not None:
            sentinel = linear(torch.tanh(sentinel_key + query), self.score.weight)
        return attend(scores, features, sentinel)


def attend(
    scores: Tensor, features: Tensor, sentinel: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what is attended to by these scores.

    The softmax is computed in float32 at least.

    Args:
        scores: Of the regions, (B, K, N, M).
        features: (B, N, D).
        sentinel: Score of what each caption can attend to in place of all regions, (B, K, M).

    Returns:
        The context of the regions (B, K, D); their weights, mean over the heads, which sum to 1,
        (B, K, N); and the weight of the sentinel beside them, for each number of the context,
        (B, K, D), or None.
    """
    precise = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.movedim(-1, 1).to(precise)  # (B, M, K, N)
    heads = scores.shape[1]
    weights = torch.softmax(scores, -1)
    shares = features.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, M, N, D / M)
    context = (weights.to(features.dtype) @ shares).transpose(1, 2).flatten(2)
    weight = None
    if sentinel is not None:  # softmax over the regions and the sentinel, the sentinel's part
        rest = torch.logsumexp(scores, -1).transpose(1, 2)
        weight = torch.sigmoid(sentinel - rest).to(features.dtype)
        weight = weight.repeat_interleave(features.shape[-1] // heads, -1)
    return context, weights.mean(1), weight


class _AdditiveScores(torch.autograd.Function):
    """Scores v tanh(k + q): (B, K, N, M) for k (B, N, A), q (B, K, A) and v (M, A).

    On a CPU the (B, K, N, A) numbers within are made in chunks that fit its caches, and made again
    for the gradient: to write them to memory and read them back takes longer.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        with torch.autocast(keys.device.type, enabled=False):
            chunks = _chunks(keys, query)
            weight = weight.to(keys.dtype)
            return torch.cat([linear(_tanh(key, part), weight) for key, part in chunks])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, weight = ctx.saved_tensors
        of_keys, of_query, of_weight = [], [], torch.zeros_like(weight)
        with torch.autocast(keys.device.type, enabled=False):
            chunks = _chunks(keys, query)
            parts = gradient.split([len(key) for key, _ in chunks])
            for (key, part), of_scores in zip(chunks, parts, strict=True):
                tanh = _tanh(key, part)
                of_weight += of_scores.flatten(0, 2).T @ tanh.flatten(0, 2)
                of_tanh = of_scores @ weight.to(tanh.dtype)
                of_sums = torch.ops.aten.tanh_backward(of_tanh, tanh)  # times 1 - tanh^2
                of_keys.append(of_sums.sum(1))
                of_query.append(of_sums.sum(2))
        return torch.cat(of_keys), torch.cat(of_query), of_weight


def _tanh(keys: Tensor, query: Tensor) -> Tensor:
    """Return tanh(k + q) of each pair, (B, K, N, A)."""
    return (keys.unsqueeze(1) + query.unsqueeze(2)).tanh_()


def _chunks(keys: Tensor, query: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cut keys and queries into chunks of images; a GPU takes all at a time."""
    images = len(keys)
    if keys.device.type == "cpu":
        images = max(1, TRAINING_CHUNK // max(1, keys[0].numel() * query.shape[1]))
    return list(zip(keys.split(images), query.split(images), strict=True))


def _to_tanh_dtype(x: Tensor) -> Tensor:
    """Return float32 for bfloat16 on a CPU, which takes several times as long for tanh of it."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x
