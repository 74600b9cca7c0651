"""Any decoder, made fast for search: the same steps with less to do.

``InferenceDecoder`` copies a decoder and changes the copy, not its equations:

- weights are cast once, and linear layers packed (``packed_linear``);
- what a step takes of a word alone is computed for all words, and looked up;
- what a hypothesis computes for itself is computed for those that go on alone;
- on a CPU, additive attention takes powers of e in place of each tanh.

Tests hold its steps against those of the decoder.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from captioner.data.vocabulary import PAD
from captioner.models.attention import MAX_KEY, AdditiveAttention, attend, power
from captioner.models.decoder import Decoder, Memory, State, TiedLinear
from captioner.models.packed_linear import PackedLinear, round_rows
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import KEEP_ALL, Layer, states_per_layer, step_layers


class InferenceDecoder:
    """A copy of a decoder for search, without gradient and dropout.

    Args:
        decoder: It is left as it is; later changes of its weights don't reach the copy.
        dtype: In which it computes.
    """

    @torch.no_grad()
    def __init__(self, decoder: Decoder, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._decoder = copy.deepcopy(decoder).eval().requires_grad_(False).to(dtype)
        words = decoder.embedding.weight
        tables = self._decoder.word_inputs(torch.arange(len(words), device=words.device))
        _replace_layers(self._decoder, dtype)

        def look_up(token_ids: Tensor) -> tuple[Tensor, ...]:
            return tuple(embedding(token_ids, table) for table in tables)

        self._decoder.word_inputs = look_up  # type: ignore[method-assign]
        self._decoder.active_rows = compute_active_rows  # type: ignore[method-assign]

    @torch.inference_mode()
    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Prepare for the first step: see ``Decoder.init_state``."""
        return self._decoder.init_state(features.to(self._dtype))

    @torch.inference_mode()
    def step(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """Take one step: see ``Decoder.next_logits``; PAD follows a hypothesis that has ended."""
        return self._decoder.next_logits(token_ids, state, memory)


def _replace_layers(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | TiedLinear):
            setattr(module, name, PackedLinear(child.weight, child.bias, dtype))
        elif isinstance(child, RecurrentStack):
            setattr(module, name, _PackedRecurrence(child, dtype))
        elif isinstance(child, AdditiveAttention):
            if child.key.weight.device.type == "cpu":
                setattr(module, name, _PowerAttention(child, dtype))
        else:
            _replace_layers(child, dtype)


def compute_active_rows(
    function: Callable[..., Sequence[Tensor]], token_ids: Tensor, *inputs: Tensor
) -> State:
    """Compute what each hypothesis computes for itself, for those that go on.

    On a GPU it is computed for all: to count the active ones would be to wait for it.

    Args:
        function: Takes token ids (R,) and inputs (R, …), and returns tensors of (R, …).
        token_ids: The last tokens, (B, K): PAD where a hypothesis has ended.
        inputs: (B, K, …).

    Returns:
        What it returns, as (B, K, …); of no meaning where a hypothesis has ended.
    """
    rows = [part.flatten(0, 1) for part in (token_ids, *inputs)]
    ended = rows[0] == PAD
    count = len(ended)
    if token_ids.device.type == "cpu":  # some that have ended fill up the number of rows
        count = min(count, round_rows(count - int(ended.sum())))
    if count == len(ended):
        results = function(*rows)
    else:
        active = torch.argsort(ended, stable=True)[:count]
        computed = function(*(part.index_select(0, active) for part in rows))
        results = [
            part.new_zeros(len(ended), part.shape[1]).index_copy_(0, active, part)
            for part in computed
        ]
    return tuple(part.unflatten(0, token_ids.shape) for part in results)


class _PackedRecurrence(nn.Module):
    """A ``RecurrentStack`` for single steps, its weights packed."""

    def __init__(self, stack: RecurrentStack, dtype: torch.dtype) -> None:
        super().__init__()
        self._cell, layers = stack.cell, stack.layer_weights()
        self._sizes = (len(layers) * states_per_layer(stack.cell), stack.hidden_size)
        self.project = PackedLinear(layers[0][0], layers[0][1], dtype)
        self._from_below = [PackedLinear(layer[0], layer[1], dtype) for layer in layers[1:]]
        self._from_hidden = [PackedLinear(layer[2], layer[3], dtype) for layer in layers]

    def zero_state(self, x: Tensor) -> State:
        return x.new_zeros((*x.shape[:-1], *self._sizes)).unbind(-2)

    def step(self, projected: Tensor, state: State, dropout: Layer = KEEP_ALL) -> State:
        return step_layers(
            self._cell, projected, state, self._from_hidden, self._from_below, KEEP_ALL, dropout
        )


# How many numbers of attention, for all pairs of a region and a hypothesis, are made at a time:
# what a CPU's caches hold.
ATTENTION_CHUNK = 1 << 20


class _PowerAttention(nn.Module):
    """``AdditiveAttention`` by powers of e in place of each tanh, on a CPU.

    tanh(k + q) = 1 - 2 / (1 + e^2k e^2q), where the 1 adds the same to all scores and the softmax
    takes it out again. e^2k is computed once per image. An image with a key beyond ``MAX_KEY`` is
    scored by tanh: its keys are computed again at each step, which trained captioners hardly need.
    """

    def __init__(self, attention: AdditiveAttention, dtype: torch.dtype) -> None:
        super().__init__()
        self.key = PackedLinear.from_layer(attention.key, dtype)
        self.query = PackedLinear.from_layer(attention.query, dtype)
        self.score_weight = -2 * attention.score.weight.detach().to(dtype)

    def prepare(self, features: Tensor) -> tuple[Tensor, ...]:
        """Return the features (B, N, D), the keys' powers (B, N, A), and which are far (B,)."""
        keys = self.key(features)
        return features, power(keys), (keys.abs() > MAX_KEY).flatten(1).any(1)

    def forward(
        self, hidden: Tensor, memory: tuple[Tensor, ...], sentinel_key: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``AdditiveAttention.forward``."""
        features, powers, far = memory
        query = self.query(hidden)
        scores = self._scores_of_powers(powers, power(query))
        if far.any():
            keys = self.key(features[far])
            scores[far] = self._scores_of_sums(keys.unsqueeze(1) + query[far].unsqueeze(2))
        sentinel = None if sentinel_key is None else self._scores_of_sums(sentinel_key + query)
        return attend(scores, features, sentinel)

    def _scores_of_sums(self, sums: Tensor) -> Tensor:
        """Return (…, M) for k + q (…, A), without powers."""
        return linear((1 - torch.tanh(sums)).mul_(0.5), self.score_weight)

    def _scores_of_powers(self, keys: Tensor, query: Tensor) -> Tensor:
        """Return scores (B, K, N, M) for keys (B, N, A) and queries (B, K, A)."""
        images = max(1, ATTENTION_CHUNK // (keys[0].numel() * query.shape[1]))
        chunks = []
        for key_chunk, query_chunk in zip(keys.split(images), query.split(images), strict=True):
            one, key, query = keys.new_ones(()), key_chunk.unsqueeze(1), query_chunk.unsqueeze(2)
            sums = torch.addcmul(one, key, query)
            chunks.append(linear(sums.reciprocal_(), self.score_weight))
        return torch.cat(chunks)
