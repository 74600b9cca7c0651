"""Attention over the regions of an image."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from captioner.device import without_autocast
from captioner.errors import ConfigError

# How many numbers of attention, for all pairs of a region and a caption, a CPU makes at a time in
# training: they stay in its caches, with their gradient.
TRAINING_CHUNK = 1 << 17


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

    On a CPU the (B, K, N, A) numbers within are made in chunks that stay in its caches, and made
    again for the gradient: to write them to memory and read them back takes longer.
    """

    @staticmethod
    def forward(ctx: Any, keys: Tensor, query: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(keys, query, weight)
        scores = keys.new_empty((*query.shape[:2], keys.shape[1], len(weight)))
        sums = _chunk_buffer(keys, query)
        with without_autocast(keys.device):
            weight = weight.to(keys.dtype).T
            for key, part, out in _chunks(sums, keys, query, scores):
                torch.mm(_tanh(key, part, sums).flatten(0, 2), weight, out=out.flatten(0, 2))
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        keys, query, weight = ctx.saved_tensors
        of_keys, of_query = torch.empty_like(keys), torch.empty_like(query)
        v = weight.to(keys.dtype)
        of_weight = torch.zeros_like(v)
        sums, of_sums = _chunk_buffer(keys, query), _chunk_buffer(keys, query)
        with without_autocast(keys.device):
            chunks = _chunks(sums, keys, query, gradient, of_keys, of_query)
            for key, part, of_scores, of_key, of_part in chunks:
                tanh, of_tanh = _tanh(key, part, sums), of_sums[: len(key)]
                of_scores = of_scores.flatten(0, 2)
                of_weight.addmm_(of_scores.T, tanh.flatten(0, 2))
                torch.mm(of_scores, v, out=of_tanh.flatten(0, 2))
                of_tanh.addcmul_(of_tanh, tanh.square_(), value=-1)  # times 1 - tanh^2
                torch.sum(of_tanh, 1, out=of_key)
                torch.sum(of_tanh, 2, out=of_part)
        return of_keys, of_query, of_weight.to(weight.dtype)


def _chunk_buffer(keys: Tensor, query: Tensor) -> Tensor:
    """Return room for k + q of all pairs of as many images as make a chunk, (images, K, N, A)."""
    images, of_image = len(keys), (query.shape[1], *keys.shape[1:])
    if keys.device.type == "cpu":
        images = min(images, max(1, TRAINING_CHUNK // max(1, math.prod(of_image))))
    return keys.new_empty((images, *of_image))


def _chunks(buffer: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut tensors of all images, (B, …) each, into those of as many images as a buffer has."""
    return zip(*(tensor.split(max(1, len(buffer))) for tensor in tensors), strict=True)


def _tanh(keys: Tensor, query: Tensor, buffer: Tensor) -> Tensor:
    """Compute tanh(k + q) of each pair, (B, K, N, A), in the first rows of a buffer."""
    sums = torch.add(keys.unsqueeze(1), query.unsqueeze(2), out=buffer[: len(keys)])
    return sums.tanh_()


def _to_tanh_dtype(x: Tensor) -> Tensor:
    """Return float32 for bfloat16 on a CPU, which takes several times as long for tanh of it."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x
