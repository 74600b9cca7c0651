"""What all recurrent decoders share: a decoder is ``init_state`` and ``step``.

Shape letters: B images, K captions of each (in training) or beams (in search), N regions,
D width of the features, T tokens, E width of a word vector, H of the recurrent state, O of what
the output layer reads, V vocabulary, W attributes.

Captions and beams lie in the same place, (B, K), so that what belongs to the image alone stays
(B, …): computed once per image, and never copied for its captions or beams.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.data.vocabulary import PAD
from captioner.errors import ConfigError
from captioner.models.attributes import Attributes
from captioner.models.dropout import Dropout
from captioner.models.recurrent_cells import states_per_layer

Memory = tuple[Tensor, ...]  # what belongs to images, (B, …) each
State = tuple[Tensor, ...]  # what belongs to captions, (B, K, …) each


class StepOutput(NamedTuple):
    """What a decoder gives at one step.

    Attributes:
        output: What ``logits`` takes, (B, K, …) each.
        state: The new state.
        attention: Weights of the regions, (B, K, N); None without attention.
    """

    output: tuple[Tensor, ...]
    state: State
    attention: Tensor | None = None


@dataclass(frozen=True)
class DecoderOutput:
    """What a decoder gives when it is fed captions: a row for each token that isn't PAD.

    Attributes:
        logits: Of each token, given those before it, (tokens, V).
        targets: Those tokens, (tokens,).
        positions: Image, caption and step of each, (tokens, 3): its place in (B, K, T).
        shape: (B, K, T).
        attention: Attention summed over the steps of each caption that has a token, (captions, N),
            in the order of (B, K); None without attention.
        attributes: Logits of the words that are predicted from each image, (B, W); None without
            ``decoder.attributes``.
    """

    logits: Tensor
    targets: Tensor
    positions: Tensor
    shape: tuple[int, int, int]
    attention: Tensor | None = None
    attributes: Tensor | None = None

    def log_probabilities(self) -> Tensor:
        """Return the log-probability of each token, (B, K, T), with gradient; 0 at PAD.

        Computed in float32 at least. Their sum over T is the log-probability of a caption.
        """
        precise = torch.promote_types(self.logits.dtype, torch.float32)
        log_probs = torch.log_softmax(self.logits, -1, dtype=precise)
        chosen = log_probs.gather(1, self.targets.unsqueeze(1)).squeeze(1)
        dense = chosen.new_zeros(self.shape)
        return dense.index_put(tuple(self.positions.unbind(1)), chosen)


class Decoder(nn.Module, ABC):
    """A recurrent decoder; training, search, attention maps and gradient flow all use its step.

    A subclass writes ``init_state`` and ``step``, and has an ``output`` layer from O to V, which
    ``output_layer`` makes. See ``show_and_tell`` for a short one.

    Args:
        config: The decoder's settings.
        vocabulary_size: V.
        feature_width: D.

    Raises:
        ConfigError: Attributes are asked for that it doesn't take, or more than there are words.

    Attributes:
        pooled: Whether it takes the mean of the grid, (B, 1, D), in place of the grid (B, N, D).
        takes_attributes: Whether ``init_state`` computes ``attributes`` where they are asked for.
        attributes: Words predicted from the image (``decoder.attributes``), or None.
        output: The last layer, to logits.
        feature_norm: For the features as they come in (``decoder.feature_norm``).
        output_norm: For the h that the output is computed from (``decoder.output_norm``).
    """

    pooled = False
    takes_attributes = False
    output: nn.Module

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size, padding_idx=PAD)
        scale = config.embedding_scale
        nn.init.uniform_(self.embedding.weight[PAD + 1 :], -scale, scale)
        self.dropout = Dropout(config.dropout)
        self.feature_norm = nn.LayerNorm(feature_width) if config.feature_norm else nn.Identity()
        self.output_norm = nn.LayerNorm(config.hidden_size) if config.output_norm else nn.Identity()
        self.attributes: Attributes | None = None
        if config.attributes:
            if not self.takes_attributes:
                raise ConfigError(
                    f"decoder.attributes: decoder.kind = {config.kind} takes none; 0 was expected, "
                    f"found {config.attributes}"
                )
            self.attributes = Attributes(config, vocabulary_size, feature_width)

    def output_layer(self, width: int) -> nn.Module:
        """Return the layer from (…, width) to logits, tied to the word vectors if so configured.

        Tied, logits are the products with all word vectors (Press and Wolf 2017), of the input or,
        where it isn't as wide as they are, of a projection of it.
        """
        size = self.config.embedding_size
        if not self.config.tie_output:
            return nn.Linear(width, self.embedding.num_embeddings)
        tied = TiedLinear(self.embedding)
        return tied if width == size else nn.Sequential(nn.Linear(width, size), tied)

    # --- what a decoder is ---

    @abstractmethod
    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Prepare for the first step.

        Args:
            features: (B, N, D).

        Returns:
            The state of one caption for each image, (B, 1, …) each: of each recurrent layer h, or
            h and c, the lowest layer first. And the memory of the images, (B, …) each, the last
            of them the attributes' logits where there are ``attributes``. Their number and shapes
            depend on the decoder alone, never on values.
        """

    @abstractmethod
    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """Take one step for all captions.

        Args:
            token_ids: The last tokens, (B, K).
            words: What ``word_inputs`` returns for them, (B, K, …) each.
            state: As ``init_state`` or the last step gave it, (B, K, …) each.
            memory: As ``init_state`` gave it.
        """

    def word_inputs(self, token_ids: Tensor) -> tuple[Tensor, ...]:
        """Return what a step takes of a word that depends on the word alone.

        Search looks it up in a table of all words, training computes it for all steps at once.

        Args:
            token_ids: (…).

        Returns:
            Tensors of (…, width).
        """
        return (self.dropout(self.embedding(token_ids)),)

    def logits(self, *output: Tensor) -> Tensor:
        """Return logits, (…, V), for the ``output`` of steps, (…, width) each.

        What needs neither the image nor goes into the next step belongs here: training computes it
        for all steps at once.
        """
        (hidden,) = output
        logits: Tensor = self.output(self.dropout(self.output_norm(hidden)))
        return logits

    def active_rows(
        self, function: Callable[..., State], token_ids: Tensor, *inputs: Tensor
    ) -> State:
        """Return ``function(token_ids, *inputs)``: what each caption computes for itself.

        The part of a step that needs no memory should go through this: search leaves out the
        hypotheses that have ended there.

        Args:
            function: Takes and returns tensors that begin with the same dimensions.
            token_ids: (B, K).
            inputs: (B, K, …).
        """
        return function(token_ids, *inputs)

    # --- what follows from it ---

    def next_logits(self, token_ids: Tensor, state: State, memory: Memory) -> tuple[Tensor, State]:
        """Take one step as search does.

        Returns:
            Logits of the next tokens, (B, K, V), and the new state.
        """
        output, state, _ = self.step(token_ids, self.word_inputs(token_ids), state, memory)
        (logits,) = self.active_rows(lambda _, *x: (self.logits(*x),), token_ids, *output)
        return logits, state

    def layer_states(self, state: State) -> list[State]:
        """Return the state of each recurrent layer, h or h and c, the lowest first."""
        size = states_per_layer(self.config.cell)
        return [state[i : i + size] for i in range(0, len(state), size)]

    def teacher_forcing(
        self,
        features: Tensor,
        token_ids: Tensor,
        bptt_window: int = 0,
        trace: list[State] | None = None,
        inputs: Tensor | None = None,
        run: Callable[..., Any] | None = None,
    ) -> DecoderOutput:
        """Predict each token of the captions from those before it.

        Args:
            features: (B, N, D).
            token_ids: (B, K, T + 1), from BOS to EOS, then PAD. On the CPU, whatever the device of
                the features: then nothing has to wait for the device.
            bptt_window: Truncated back-propagation: after so many tokens the state goes on and no
                gradient comes back; the first state belongs to the first window. 0 cuts nowhere.
            trace: Filled with the state before the first and after each step, as the graph holds
                them. Single steps are taken then.
            inputs: What is fed in place of all tokens but the last, (B, K, T).
            run: What runs over the captions, in place of ``run_sequence``.
        """
        real = (token_ids[..., 1:] != PAD).cpu()
        token_ids = token_ids.to(features.device, non_blocking=True)
        inputs = token_ids[..., :-1] if inputs is None else inputs
        targets = token_ids[..., 1:]
        state, memory = self.init_state(features)
        state = tuple(part.expand(-1, inputs.shape[1], *part.shape[2:]) for part in state)
        run = run or (self.run_steps if trace is not None else self.run_sequence)
        outputs, positions, attention = run(inputs, state, memory, real, bptt_window, trace)
        positions = positions.to(features.device, non_blocking=True)
        return DecoderOutput(
            self.logits(*outputs),
            targets[tuple(positions.unbind(1))],
            positions,
            (targets.shape[0], targets.shape[1], targets.shape[2]),
            attention,
            memory[-1] if self.attributes else None,
        )

    def run_sequence(
        self,
        inputs: Tensor,
        state: State,
        memory: Memory,
        real: Tensor,
        bptt_window: int,
        trace: list[State] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Run over whole captions; a decoder that has a fused module for it overrides this.

        Args:
            inputs: (B, K, T).
            state: Before the first step, (B, K, …) each.
            memory: As ``init_state`` gave it.
            real: Which steps' outputs are wanted, (B, K, T), on the CPU.
            bptt_window: As in ``teacher_forcing``.
            trace: As in ``teacher_forcing``.

        Returns:
            The outputs (tokens, …), the positions (tokens, 3) on the CPU, and the attention of each
            caption summed over its steps, (captions, N), or None.
        """
        return self.run_steps(inputs, state, memory, real, bptt_window, trace)

    def run_steps(
        self,
        inputs: Tensor,
        state: State,
        memory: Memory,
        real: Tensor,
        bptt_window: int,
        trace: list[State] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Run over captions step by step; see ``run_sequence``.

        Captions that have ended take no further steps where those after them have ended too.
        """
        sizes, rows, positions = _active_rectangles(real)
        is_real = real.to(inputs.device, non_blocking=True)
        if trace is not None:  # where the first state is a constant, its gradient shows too
            state = tuple(p if p.requires_grad else p.detach().requires_grad_() for p in state)
            trace.append(state)
        words = self._words_of_steps(inputs, sizes)
        outputs, attention = [], None
        for t, (b, k) in enumerate(sizes):
            memory = tuple(_first(part, b) for part in memory)
            state = tuple(_first(part, b, k) for part in state)
            if bptt_window and t and t % bptt_window == 0:
                state = tuple(part.detach() for part in state)
            output, state, weights = self.step(inputs[:b, :k, t], words[t], state, memory)
            outputs.append([part.flatten(0, 1) for part in output])
            if trace is not None:
                trace.append(state)
            if weights is not None:
                weights = weights * is_real[:b, :k, t].unsqueeze(-1)
                margin = (0, 0, 0, real.shape[1] - k, 0, real.shape[0] - b)
                weights = nn.functional.pad(weights, margin)
                attention = weights if attention is None else attention + weights
        if attention is not None:
            attention = chosen_rows(attention, real.any(-1))
        columns = zip(*outputs, strict=True)
        rows = rows.to(inputs.device, non_blocking=True)
        return tuple(torch.cat(parts)[rows] for parts in columns), positions, attention

    def _words_of_steps(
        self, inputs: Tensor, sizes: list[tuple[int, int]]
    ) -> list[tuple[Tensor, ...]]:
        """Return what each step takes of its words, (b, k, …) each, computed for all at once."""
        token_ids = [inputs[:b, :k, t].flatten() for t, (b, k) in enumerate(sizes)]
        whole = self.word_inputs(torch.cat(token_ids))
        parts = zip(*(part.split([b * k for b, k in sizes]) for part in whole), strict=True)
        return [
            tuple(part.unflatten(0, size) for part in step)
            for step, size in zip(parts, sizes, strict=True)
        ]

    def attention_maps(self, features: Tensor, token_ids: Tensor) -> Tensor | None:
        """Return what is attended to after each token; None for a decoder without attention.

        Args:
            features: (B, N, D).
            token_ids: (B, K, T), from BOS.

        Returns:
            Weights of the regions for the token that follows each of these, (B, K, T, N).
        """
        state, memory = self.init_state(features)
        state = tuple(part.expand(-1, token_ids.shape[1], *part.shape[2:]) for part in state)
        maps = []
        for tokens in token_ids.unbind(2):
            _, state, weights = self.step(tokens, self.word_inputs(tokens), state, memory)
            if weights is None:
                return None
            maps.append(weights)
        return torch.stack(maps, 2)


class TiedLinear(nn.Module):
    """Logits by the products with all word vectors, and a bias.

    Args:
        embedding: The word vectors; they stay its own, in parameters and checkpoints.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, where nn.Module doesn't take it for a child
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings))

    @property
    def weight(self) -> Tensor:
        """The word vectors, (V, E)."""
        return self._embedding[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """Return (…, V) for (…, E)."""
        return nn.functional.linear(x, self.weight, self.bias)


def chosen_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Return x[mask] of a mask on the CPU, without waiting for the device of x.

    Args:
        x: (…, D).
        mask: (…).
    """
    rows = mask.flatten().nonzero().squeeze(1).to(x.device, non_blocking=True)
    return x.flatten(0, -2)[rows]


def _first(x: Tensor, *sizes: int) -> Tensor:
    """Return x[:b] or x[:b, :k]; x itself where that is all: its gradient is copied less often."""
    return x if x.shape[: len(sizes)] == sizes else x[tuple(slice(size) for size in sizes)]


def _active_rectangles(real: Tensor) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Say how much of a batch each step needs, when captions end at different steps.

    Args:
        real: Which tokens aren't padding, (B, K, T), on the CPU.

    Returns:
        For each step t the smallest (b, k) such that [:b, :k] holds all captions that last
        beyond it (small where the longest come first), up to the last real token; the real tokens'
        rows among the rows of all these rectangles, one after the other, (tokens,); and their
        positions, (tokens, 3).
    """
    real = real[..., : int(real.any(0).any(0).sum())]
    lasting = real.flip(2).cumsum(2).flip(2) > 0
    images, captions = lasting.any(1).T, lasting.any(0).T  # (T, B), (T, K)
    sizes = [
        (int(images[t].nonzero().max()) + 1, int(captions[t].nonzero().max()) + 1)
        for t in range(real.shape[2])
    ]
    rows = torch.cat([real[:b, :k, t].flatten() for t, (b, k) in enumerate(sizes)]).nonzero()
    positions = real.permute(2, 0, 1).nonzero()[:, [1, 2, 0]]
    return sizes, rows.squeeze(1), positions
