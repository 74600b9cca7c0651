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

# Where keys are nearer to 0 than this, a query beyond 43 makes tanh(k + q) 1 in any precision, and
# can be taken for 43, so that e^2q doesn't overflow.
MAX_KEY = 20
MAX_EXPONENT = 43


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
        features, keys = features.to(keys.dtype), _to_tanh_dtype(keys)
        if keys.is_cpu and not torch.compiler.is_exporting():
            return features, keys, power(keys.detach())
        return features, keys

    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, ...], sentinel_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend to the regions.

        Args:
            hidden: (B, K, H).
            memory: Features (B, N, D) and keys k (B, N, A); on a CPU also e^2k.
            sentinel_key: See ``attend``: its key, (B, K, A).

        Returns:
            What ``attend`` returns.
        """
        features, keys, *powers = memory
        query = _to_tanh_dtype(self.query(hidden))
        if torch.compiler.is_compiling():  # it arranges the same sums and their gradient itself
            sums = torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2))
            scores = linear(sums, self.score.weight.to(sums.dtype))
        else:
            scores = _AdditiveScores.apply(keys, query, self.score.weight, *powers)
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
    again for the gradient: to write them to memory and read them back takes longer. There they are
    made from e^2k, if it is given, and e^2q: see ``_Sums``.
    """

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, query: Tensor, weight: Tensor, powers: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(keys, query, weight, powers)
        scores = keys.new_empty((*query.shape[:2], keys.shape[1], len(weight)))
        sums = _Sums(keys, query, powers)
        with without_autocast(keys.device):
            weight = weight.to(keys.dtype).T
            for key, part, out in sums.chunks(scores):
                torch.mm(sums.tanh(key, part).flatten(0, 2), weight, out=out.flatten(0, 2))
        return scores

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        keys, query, weight, powers = ctx.saved_tensors
        of_keys, of_query = torch.empty_like(keys), torch.empty_like(query)
        v = weight.to(keys.dtype)
        of_weight = torch.zeros_like(v)
        sums = _Sums(keys, query, powers)
        of_sums = torch.empty_like(sums.buffer)
        with without_autocast(keys.device):
            for key, part, of_scores, of_key, of_part in sums.chunks(gradient, of_keys, of_query):
                tanh, of_tanh = sums.tanh(key, part), of_sums[: len(key)]
                of_scores = of_scores.flatten(0, 2)
                of_weight.addmm_(of_scores.T, tanh.flatten(0, 2))
                torch.mm(of_scores, v, out=of_tanh.flatten(0, 2))
                of_tanh.addcmul_(of_tanh, tanh.square_(), value=-1)  # times 1 - tanh^2
                torch.sum(of_tanh, 1, out=of_key)
                torch.sum(of_tanh, 2, out=of_part)
        return of_keys, of_query, of_weight.to(weight.dtype), None


class _Sums:
    """The sums k + q of all pairs of a region and a caption, in chunks of images.

    By powers of e, tanh(k + q) = 1 - 2 / (1 + e^2k e^2q): for a CPU a fraction of the work of a
    tanh. Where a key lies beyond ``MAX_KEY``, which trained captioners hardly need, it is tanh.

    Args:
        keys: k, (B, N, A).
        query: q, (B, K, A).
        powers: e^2k, (B, N, A), or None.

    Attributes:
        buffer: Room for the numbers of a chunk, (images, K, N, A).
    """

    def __init__(self, keys: Tensor, query: Tensor, powers: Tensor | None) -> None:
        images, of_image = len(keys), (query.shape[1], *keys.shape[1:])
        if keys.is_cpu:
            images = min(images, max(1, TRAINING_CHUNK // max(1, math.prod(of_image))))
        self.buffer = keys.new_empty((images, *of_image))
        self._one = keys.new_ones(())
        self._by_powers = powers is not None and len(keys) > 0 and _are_near(keys)
        self._terms = (keys, query)
        if powers is not None and self._by_powers:
            self._terms = (powers, power(query))

    def chunks(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield for each chunk what ``tanh`` takes, and the parts of tensors (B, …) in it."""
        size = max(1, len(self.buffer))
        return zip(*(tensor.split(size) for tensor in (*self._terms, *tensors)), strict=True)

    def tanh(self, keys: Tensor, query: Tensor) -> Tensor:
        """Return the tanh of each sum, (images, K, N, A), in the first rows of the buffer."""
        sums, keys, query = self.buffer[: len(keys)], keys.unsqueeze(1), query.unsqueeze(2)
        if not self._by_powers:
            return torch.add(keys, query, out=sums).tanh_()
        torch.addcmul(self._one, keys, query, out=sums).reciprocal_()
        return torch.add(self._one, sums, alpha=-2, out=sums)


def power(x: Tensor) -> Tensor:
    """Return e^2x, as far as it matters beside a near key: see ``MAX_KEY``."""
    return (2 * x.clamp(-MAX_EXPONENT, MAX_EXPONENT)).exp()


def _are_near(keys: Tensor) -> bool:
    """Tell whether all keys lie within ``MAX_KEY``; none does that is NaN."""
    low, high = keys.aminmax()
    return bool((low >= -MAX_KEY) & (high <= MAX_KEY))


def _to_tanh_dtype(x: Tensor) -> Tensor:
    """Return float32 for bfloat16 on a CPU, which takes several times as long for tanh of it."""
    return x.float() if x.device.type == "cpu" and x.dtype == torch.bfloat16 else x
