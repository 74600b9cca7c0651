"""The recurrent decoders: Show and Tell, and Show, Attend and Tell.

Shape letters: B images, K captions of each (in training) or beams (in search), N regions,
D width of the features, T tokens, E width of a word vector, H of the recurrent state, A of the
attention, V vocabulary.

Captions and beams lie in the same place, (B, K), so that what belongs to the image alone stays
(B, …): computed once per image, and never copied for its captions or beams.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from captioner.config import DecoderConfig
from captioner.data.vocabulary import EOS, PAD
from captioner.models.packed_linear import PackedLinear, round_rows
from captioner.models.recurrent import (
    RecurrentStack,
    StepCells,
    Stepper,
    gradient_norms,
    states_of,
    traced,
)

# What belongs to images, tensors of (B, …), and what belongs to hypotheses, tensors of (B, K, …).
Memory = tuple[Tensor, ...]
State = tuple[Tensor, ...]


@dataclass(frozen=True)
class TeacherForced:
    """What a decoder says when it is fed the true captions.

    Attributes:
        logits: One row for each true next token, PAD left out: (tokens, V).
        targets: Those tokens: (tokens,).
        attention: Attention summed over the steps of each caption, (captions, N); None without
            attention.
    """

    logits: Tensor
    targets: Tensor
    attention: Tensor | None = None


class Steps(ABC):
    """A decoder for search: without gradient and dropout, with all that can be done beforehand.

    What the first recurrent layer makes of a word is looked up instead of multiplied.
    """

    @abstractmethod
    def start(self, features: Tensor) -> tuple[Memory, State]:
        """Prepare for decoding.

        Args:
            features: (B, N, D).

        Returns:
            The memory of the images, and the state of one hypothesis each, (B, 1, …).
        """

    @abstractmethod
    def step(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """Take one step for all hypotheses.

        Args:
            token_ids: The last tokens, (B, K).
            state: As ``start`` or the last step gave it, (B, K, …).
            memory: As ``start`` gave it.

        Returns:
            Logits of the next tokens, (B, K, V), and the new state.
        """


class Decoder(nn.Module, ABC):
    """What both decoders share. ``teacher_forcing`` and ``for_search`` compute the same function.

    Args:
        config: The decoder's settings.
        vocabulary_size: V.
        feature_width: D.

    Attributes:
        pooled: Whether it takes the mean of the grid, (B, 1, D), in place of the grid (B, N, D).
    """

    pooled = False

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        nn.init.uniform_(self.embedding.weight[PAD + 1 :], -0.1, 0.1)
        self.dropout = nn.Dropout(config.dropout)

    @abstractmethod
    def for_search(self, dtype: torch.dtype) -> Steps:
        """Return the decoder as a search uses it: the same function, a step at a time.

        Args:
            dtype: In which it computes; weights are copied into it, once.
        """

    @property
    @abstractmethod
    def recurrent(self) -> RecurrentStack | StepCells:
        """The recurrent layers."""

    @abstractmethod
    def teacher_forcing(
        self, features: Tensor, token_ids: Tensor, bptt_window: int = 0
    ) -> TeacherForced:
        """Predict each token of the captions from those before it.

        Args:
            features: (B, N, D).
            token_ids: (B, K, T + 1), from BOS to EOS, then PAD.
            bptt_window: After so many tokens the state goes on and no gradient comes back; what
                the state begins with belongs to the first window. 0 cuts nowhere.
        """

    def gradient_flow(
        self, features: Tensor, token_ids: Tensor, bptt_window: int = 0
    ) -> dict[str, list[list[float]]]:
        """Measure how much gradient reaches h at each step, without dropout.

        Args:
            features: Of the image of each caption, (rows, N, D).
            token_ids: Captions of one length, from BOS to EOS: (rows, T + 1).
            bptt_window: As in ``teacher_forcing``.

        Returns:
            The norms of ``recurrent.gradient_norms``, for each layer from the last step back:
            ``loss`` of the loss of all tokens, and ``end`` of that of each caption's EOS alone,
            which has come all the way from there.
        """
        was_training = self.training
        self.eval()
        with traced(self.recurrent) as hidden:
            said = self.teacher_forcing(features, token_ids.unsqueeze(1), bptt_window)
        self.train(was_training)
        losses = nn.functional.cross_entropy(said.logits, said.targets, reduction="none")
        parts = {"loss": losses.sum(), "end": losses[said.targets == EOS].sum()}
        norms = {name: gradient_norms(part, hidden) for name, part in parts.items()}
        return {name: [layer[::-1] for layer in layers] for name, layers in norms.items()}

    def attention(self, features: Tensor, token_ids: Tensor) -> Tensor | None:
        """Say what is looked at after each token; None for a decoder without attention.

        Args:
            features: (B, N, D).
            token_ids: (B, K, T), from BOS.

        Returns:
            Weights of the regions for the token that follows each of these, (B, K, T, N).
        """
        return None


class ShowAndTell(Decoder):
    """The image is the first input of the recurrence (Vinyals et al. 2015, eq. 10-12)."""

    pooled = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        self.image = nn.Linear(feature_width, config.embedding_size)
        self.recurrence = RecurrentStack(
            config.cell,
            config.embedding_size,
            config.hidden_size,
            config.layers,
            config.dropout,
            return_sequences=True,
            return_state=True,
            initialisation=config.recurrent_initialisation,
            forget_bias=config.forget_bias,
        )
        self.output = nn.Linear(config.hidden_size, vocabulary_size)

    def for_search(self, dtype: torch.dtype) -> Steps:
        """See ``Decoder.for_search``."""
        return _ShowAndTellSteps(self, dtype)

    @property
    def recurrent(self) -> RecurrentStack:
        """See ``Decoder.recurrent``."""
        return self.recurrence

    def teacher_forcing(
        self, features: Tensor, token_ids: Tensor, bptt_window: int = 0
    ) -> TeacherForced:
        """See ``Decoder.teacher_forcing``: one fused call over the whole sequence."""
        inputs, targets = token_ids[..., :-1].flatten(0, 1), token_ids[..., 1:].flatten(0, 1)
        captions = token_ids.shape[1]
        _, state = self.recurrence(self.dropout(self.image(features.mean(1, keepdim=True))))
        # Each caption of an image gets the image's state: (L, B, H) -> (L, B * K, H).
        state = tuple(part.repeat_interleave(captions, 1) for part in state)
        words = self.dropout(self.embedding(inputs))  # (B * K, T, E)
        hidden, _ = self.recurrence(words, state, bptt_window=bptt_window)
        real = targets != PAD
        return TeacherForced(self.output(self.dropout(hidden[real])), targets[real])


class _ShowAndTellSteps(Steps):
    def __init__(self, decoder: ShowAndTell, dtype: torch.dtype) -> None:
        config = decoder.config
        self._image = PackedLinear.of(decoder.image, dtype)
        self._output = PackedLinear.of(decoder.output, dtype)
        self._cells = Stepper(decoder.recurrence, dtype)
        self._from_image = PackedLinear(self._cells.input_weight, self._cells.input_bias, dtype)
        self._from_word = _of_each_word(decoder, self._cells)
        self._per_layer = states_of(config.cell)
        self._state = (config.layers * self._per_layer, config.hidden_size)

    def start(self, features: Tensor) -> tuple[Memory, State]:
        """See ``Steps.start``: one step on the image; what it would say is not used."""
        pooled = features.mean(1, keepdim=True).to(self._output.dtype)
        image = self._image(pooled)  # (B, 1, E)
        from_image = self._from_image(image)
        zeros = image.new_zeros((len(image), 1, *self._state)).unbind(2)
        return (), self._cells.step(from_image, zeros)

    def step(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """See ``Steps.step``."""
        logits, *new = _of_live(self._recur, token_ids, state)
        return logits, tuple(new)

    def _recur(self, token_ids: Tensor, *state: Tensor) -> State:
        state = self._cells.step(embedding(token_ids, self._from_word), state)
        return self._output(state[-self._per_layer]), *state


class ShowAttendTell(Decoder):
    """Soft attention over the grid (Xu et al. 2015, section 3.1 and 4.2, eq. 1-8 and 13-14)."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        width, hidden = config.feature_size or feature_width, config.hidden_size
        self.feature = nn.Linear(feature_width, width) if config.feature_size else nn.Identity()
        self.initial = nn.Linear(width, hidden * config.layers * states_of(config.cell))
        self.key = nn.Linear(width, config.attention_size)
        self.query = nn.Linear(hidden, config.attention_size, bias=False)
        self.score = nn.Linear(config.attention_size, 1, bias=False)
        self.gate = nn.Linear(hidden, width)
        self.cells = StepCells(
            config.cell,
            config.embedding_size + width,
            hidden,
            config.layers,
            config.dropout,
            config.recurrent_initialisation,
            config.forget_bias,
        )
        self.hidden_output = nn.Linear(hidden, config.embedding_size)
        self.context_output = nn.Linear(width, config.embedding_size, bias=False)
        self.output = nn.Linear(config.embedding_size, vocabulary_size)

    def for_search(self, dtype: torch.dtype) -> Steps:
        """See ``Decoder.for_search``."""
        return _ShowAttendTellSteps(self, dtype)

    def start(self, features: Tensor) -> tuple[Memory, State]:
        """Return the features and their attention keys, and the state before the first word."""
        features = self.dropout(self.feature(features))
        initial = torch.tanh(self.initial(features.mean(1)))  # (B, S * L * H)
        state = initial.view(len(features), 1, -1, self.config.hidden_size)
        keys = self.key(features)
        # Under autocast keys are bfloat16; cast features with them, once and not at each step.
        return (features.to(keys.dtype), keys), tuple(state.unbind(2))

    def _recur(
        self, words: Tensor, state: State, memory: Memory
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """Attend and take one recurrent step.

        Args:
            words: (B, K, E).
            state: For each layer h, or h and c, each (B, K, H).
            memory: Features (B, N, D) and keys (B, N, A).

        Returns:
            The new h (B, K, H), context (B, K, D), attention (B, K, N) and state.
        """
        images, beams, _ = words.shape
        weights, context = self.attend(state[-states_of(self.config.cell)], memory)
        x = torch.cat([words, context], -1).flatten(0, 1)
        per_layer = states_of(self.config.cell)
        rows = [part.flatten(0, 1) for part in state]
        layers = [tuple(rows[i : i + per_layer]) for i in range(0, len(rows), per_layer)]
        hidden, layers = self.cells(x, layers)
        new = tuple(part.view(images, beams, -1) for layer in layers for part in layer)
        return hidden.view(images, beams, -1), context, weights, new

    def attend(self, hidden: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Weigh the regions (eq. 4-6) and gate their mean (section 4.2.1).

        Args:
            hidden: The last state of the top layer, (B, K, H).
            memory: Features (B, N, D) and keys (B, N, A).

        Returns:
            The weights (B, K, N), which sum to 1, and the context (B, K, D).
        """
        features, keys = memory
        query = self.query(hidden)
        scores = self.score(torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2))).squeeze(-1)
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, -1, dtype=precise)
        context = torch.bmm(weights.to(features.dtype), features)
        return weights, torch.sigmoid(self.gate(hidden)) * context

    def attention(self, features: Tensor, token_ids: Tensor) -> Tensor:
        """See ``Decoder.attention``."""
        memory, state = self.start(features)
        state = tuple(part.expand(-1, token_ids.shape[1], -1) for part in state)
        looked_at = []
        for words in self.embedding(token_ids).unbind(2):
            *_, weights, state = self._recur(words, state, memory)
            looked_at.append(weights)
        return torch.stack(looked_at, 2)

    def _logits(self, words: Tensor, hidden: Tensor, context: Tensor) -> Tensor:
        """Deep output (eq. 7)."""
        mixed = words + self.hidden_output(self.dropout(hidden)) + self.context_output(context)
        return self.output(self.dropout(mixed))

    @property
    def recurrent(self) -> StepCells:
        """See ``Decoder.recurrent``."""
        return self.cells

    def teacher_forcing(
        self, features: Tensor, token_ids: Tensor, bptt_window: int = 0
    ) -> TeacherForced:
        """See ``Decoder.teacher_forcing``; captions that have ended take no further steps."""
        inputs, targets = token_ids[..., :-1], token_ids[..., 1:]
        real = targets != PAD
        steps, order = _rectangles(real)
        order = order.to(inputs.device)
        words = self.dropout(self.embedding(inputs))  # (B, K, T, E)
        memory, state = self.start(features)
        state = tuple(part.expand(-1, inputs.shape[1], -1) for part in state)
        hiddens, contexts, attention = [], [], torch.zeros((), device=inputs.device)
        for t, (b, k) in enumerate(steps):
            memory = tuple(part[:b] for part in memory)
            state = tuple(part[:b, :k] for part in state)
            if bptt_window and t and t % bptt_window == 0:
                state = tuple(part.detach() for part in state)
            hidden, context, weights, state = self._recur(words[:b, :k, t], state, memory)
            hiddens.append(hidden.flatten(0, 1))
            contexts.append(context.flatten(0, 1))
            weights = weights * real[:b, :k, t].unsqueeze(-1)
            margin = (0, 0, 0, real.shape[1] - k, 0, real.shape[0] - b)
            attention = attention + nn.functional.pad(weights, margin)
        laid_out = torch.cat([words[:b, :k, t].flatten(0, 1) for t, (b, k) in enumerate(steps)])
        laid_targets = torch.cat(
            [targets[:b, :k, t].flatten(0, 1) for t, (b, k) in enumerate(steps)]
        )
        logits = self._logits(
            laid_out[order], torch.cat(hiddens)[order], torch.cat(contexts)[order]
        )
        return TeacherForced(logits, laid_targets[order], attention[real.any(-1)])


class _ShowAttendTellSteps(Steps):
    def __init__(self, decoder: ShowAttendTell, dtype: torch.dtype) -> None:
        config = decoder.config
        self._dtype, self._hidden = dtype, config.hidden_size
        feature = decoder.feature
        self._feature = PackedLinear.of(feature, dtype) if isinstance(feature, nn.Linear) else None
        self._initial = PackedLinear.of(decoder.initial, dtype)
        self._key = PackedLinear.of(decoder.key, dtype)
        # All that is made of the last h, in one product.
        query, gate = decoder.query.weight, decoder.gate
        bias = torch.cat([gate.bias.new_zeros(len(query)), gate.bias])
        self._looking = PackedLinear(torch.cat([query, gate.weight]), bias, dtype)
        self._widths = [len(query), len(gate.weight)]
        self._score = -2 * decoder.score.weight.detach().to(dtype)
        self._cells = Stepper(decoder.cells, dtype)
        self._per_layer = states_of(config.cell)
        self._from_word = _of_each_word(decoder, self._cells)
        self._from_context = PackedLinear(
            self._cells.input_weight[:, config.embedding_size :].contiguous(), None, dtype
        )
        seen = [decoder.hidden_output.weight, decoder.context_output.weight]
        self._mixing = PackedLinear(torch.cat(seen, 1), None, dtype)
        self._words = (decoder.embedding.weight + decoder.hidden_output.bias).detach().to(dtype)
        self._output = PackedLinear.of(decoder.output, dtype)

    def start(self, features: Tensor) -> tuple[Memory, State]:
        """See ``Steps.start``: memory is features, the keys' powers, and keys if those are far."""
        features = features.to(self._dtype)
        if self._feature:
            features = self._feature(features)
        initial = torch.tanh(self._initial(features.mean(1)))  # (B, S * L * H)
        state = initial.view(len(features), 1, -1, self._hidden)
        keys = self._key(features)
        powers = _power(keys)
        memory = (features, powers, keys) if (keys.abs() > FAR).any() else (features, powers)
        return memory, tuple(state.unbind(2))

    def step(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """See ``Steps.step``."""
        context = self._context(state[-self._per_layer], memory)
        logits, *new = _of_live(self._recur, token_ids, (context, *state))
        return logits, tuple(new)

    def _recur(self, token_ids: Tensor, context: Tensor, *state: Tensor) -> State:
        from_input = embedding(token_ids, self._from_word) + self._from_context(context)
        state = self._cells.step(from_input, state)
        seen = torch.cat([state[-self._per_layer], context], -1)
        mixed = embedding(token_ids, self._words) + self._mixing(seen)
        return self._output(mixed), *state

    def _context(self, hidden: Tensor, memory: Memory) -> Tensor:
        """Return ``ShowAttendTell.attend``'s context, by powers of e in place of each tanh.

        tanh(k + q) = 1 - 2 / (1 + e^2k e^2q), where the 1 adds the same to all scores and the
        softmax takes it out again. e^2k is computed once per image.
        """
        features, powers, *keys = memory
        looking = self._looking(hidden)
        query, gate = looking.split(self._widths, -1)
        if keys:
            scores = self._in_parts(self._scores, keys[0], query)
        else:
            scores = self._in_parts(self._scores_of_powers, powers, _power(query))
        precise = torch.promote_types(scores.dtype, torch.float32)
        weights = torch.softmax(scores, -1, dtype=precise)
        return torch.sigmoid(gate) * torch.bmm(weights.to(features.dtype), features)

    def _scores_of_powers(self, keys: Tensor, query: Tensor) -> Tensor:
        parts = torch.addcmul(keys.new_ones(()), keys.unsqueeze(1), query.unsqueeze(2))
        return linear(parts.reciprocal_(), self._score).squeeze(-1)

    def _scores(self, keys: Tensor, query: Tensor) -> Tensor:
        parts = torch.tanh(keys.unsqueeze(1) + query.unsqueeze(2)).mul_(-0.5)
        return linear(parts, self._score).squeeze(-1)

    def _in_parts(
        self, scores: Callable[[Tensor, Tensor], Tensor], keys: Tensor, query: Tensor
    ) -> Tensor:
        """Score (B, N, A) for (B, K, A), on a CPU so many images at a time as its caches hold."""
        if keys.device.type != "cpu":
            return scores(keys, query)
        at_once = max(1, IN_CACHE // (keys[0].numel() * query.shape[1]))
        parts = zip(keys.split(at_once), query.split(at_once), strict=True)
        return torch.cat([scores(*part) for part in parts])


# So many of attention's numbers, of all pairs of a region and a hypothesis, are made at a time.
IN_CACHE = 1 << 20

# Where keys are nearer to 0 than this, a query beyond 43 makes tanh(k + q) 1 in any precision, and
# can be taken for 43, so that e^2q doesn't overflow.
FAR = 20


def _power(x: Tensor) -> Tensor:
    return (2 * x.clamp(-43, 43)).exp()


def _of_live(
    recur: Callable[..., State], token_ids: Tensor, inputs: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Take the part of a step that each hypothesis takes for itself, for those that go on.

    On a GPU it is taken for all: to count them would be to wait for it.

    Args:
        recur: Takes tokens (R,) and inputs (R, …), and returns tensors of (R, …).
        token_ids: The last tokens, (B, K): PAD where a hypothesis has ended.
        inputs: Of (B, K, …).

    Returns:
        What it returns, as (B, K, …); of no meaning where a hypothesis has ended.
    """
    rows = [part.flatten(0, 1) for part in (token_ids, *inputs)]
    ended = rows[0] == PAD
    count = len(ended)
    if token_ids.device.type == "cpu":  # where some that have ended fill up the number of rows
        count = min(count, round_rows(count - int(ended.sum())))
    if count == len(ended):
        new = recur(*rows)
    else:
        going = torch.argsort(ended, stable=True)[:count]
        found = recur(*(part.index_select(0, going) for part in rows))
        new = tuple(
            part.new_zeros(len(ended), part.shape[1]).index_copy_(0, going, part) for part in found
        )
    return [part.unflatten(0, token_ids.shape) for part in new]


def _of_each_word(decoder: Decoder, cells: Stepper) -> Tensor:
    """Return what the first recurrent layer makes of each word, bias included: (V, gates * H)."""
    words = decoder.embedding.weight.detach().to(cells.input_weight.dtype)
    return linear(words, cells.input_weight[:, : words.shape[1]], cells.input_bias)


def _rectangles(real: Tensor) -> tuple[list[tuple[int, int]], Tensor]:
    """Say how much of a batch each step needs, when captions end at different steps.

    Args:
        real: Which tokens aren't padding, (B, K, T).

    Returns:
        For each step t the smallest (b, k) such that [:b, :k] holds all captions that last
        beyond it (small where the longest come first), up to the last real token; and the
        positions of the real tokens in the rows of all these rectangles, laid one after the other.
    """
    real = real.cpu()  # once per batch
    real = real[..., : int(real.any(0).any(0).sum())]
    alive = real.flip(2).cumsum(2).flip(2) > 0
    images, slots = alive.any(1).T, alive.any(0).T  # (T, B), (T, K)
    steps = [
        (int(images[t].nonzero().max()) + 1, int(slots[t].nonzero().max()) + 1)
        for t in range(real.shape[2])
    ]
    order = torch.cat([real[:b, :k, t].flatten() for t, (b, k) in enumerate(steps)]).nonzero()
    return steps, order.squeeze(1)


def make_decoder(config: DecoderConfig, vocabulary_size: int, feature_width: int) -> Decoder:
    """Return the decoder that ``config.kind`` names."""
    kind = {"show_and_tell": ShowAndTell, "show_attend_tell": ShowAttendTell}[config.kind]
    return kind(config, vocabulary_size, feature_width)
