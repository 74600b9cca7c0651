"""Knowing When to Look: attention that can turn to a visual sentinel (Lu et al. 2017)."""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.errors import ConfigError
from captioner.models.attention import AdditiveAttention
from captioner.models.decoder import Decoder, Memory, State, StepOutput
from captioner.models.recurrent_cells import CellStack


class AdaptiveAttention(Decoder):
    """Adaptive attention over the grid (Lu et al. 2017, eq. 4-13).

    With several recurrent layers the sentinel is that of the top one.

    The attention of a step is that over the regions (eq. 7), which sums to 1. How much of it enters
    the word, 1 - beta, is not in it: it tells where the decoder looks, not how much it looks.

    Attributes are added to the image's vector v^g.

    Raises:
        ConfigError: The cell has no memory to make a sentinel of, or the regions would not have
            the width of the hidden state, with which they are added up.
    """

    takes_attributes = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        hidden, words = config.hidden_size, config.embedding_size
        if config.cell != "lstm":
            raise ConfigError(
                "decoder.cell: decoder.kind = adaptive_attention makes its sentinel of the memory "
                f"cell; lstm was expected, found {config.cell}"
            )
        if config.feature_size not in (0, hidden):
            raise ConfigError(
                "decoder.feature_size: decoder.kind = adaptive_attention projects regions to "
                f"decoder.hidden_size; 0 or {hidden} was expected, found {config.feature_size}"
            )
        self.feature = nn.Linear(feature_width, hidden)
        self.image = nn.Linear(feature_width, words)
        self.cells = CellStack(
            config.cell,
            hidden,
            config.layers,
            config.dropout,
            config.recurrent_initialisation,
            config.forget_bias,
            config.recurrent_dropout,
        )
        self.word_projection, self.image_projection = self.cells.input_projections(words, words)
        self.word_gate, self.image_gate = (nn.Linear(words, hidden, bias=i == 0) for i in range(2))
        self.hidden_gate = nn.Linear(hidden, hidden, bias=False)
        self.attention = AdditiveAttention(
            hidden, hidden, config.attention_size, config.attention_heads
        )
        self.sentinel_key = nn.Linear(hidden, config.attention_size, bias=False)
        self.output = self.output_layer(hidden)

    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Begin with zeros; see ``Decoder.init_state``."""
        features = self.feature_norm(features)
        regions = self.dropout(torch.relu(self.feature(features)))  # V
        image = self.dropout(torch.relu(self.image(features.mean(1))))  # v^g
        zeros = image.new_zeros((image.shape[0], 1, self.config.hidden_size))
        memory = self.attention.prepare(regions)
        if self.attributes:
            logits, attributes = self.attributes(features)
            image, memory = image + attributes, (*memory, logits)
        memory = (self.image_projection(image), self.image_gate(image), *memory)
        return (zeros,) * (2 * self.config.layers), memory

    def word_inputs(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words' part of W_x x of the LSTM, (…, 4 * H), and of the gate, (…, H)."""
        words = self.dropout(self.embedding(token_ids))
        return self.word_projection(words), self.word_gate(words)

    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """Advance, then attend to the image and the sentinel by the new state."""
        image, image_gate, *regions = memory[:-1] if self.attributes else memory
        projected, gate = words[0] + image.unsqueeze(1), words[1] + image_gate.unsqueeze(1)
        sentinel, key, *new_state = self.active_rows(
            self._advance, token_ids, projected, gate, *state
        )
        hidden = new_state[-2]
        context, weights, beta = self.attention(hidden, tuple(regions), key)  # eq. 6-8 and 12
        context = beta * sentinel + (1 - beta) * context  # eq. 11
        return StepOutput((context, hidden), tuple(new_state), weights)

    def _advance(self, _: Tensor, projected: Tensor, gate: Tensor, *state: Tensor) -> State:
        gate = torch.sigmoid(gate + self.hidden_gate(state[-2]))  # eq. 9
        state = self.cells.step(projected, state)
        sentinel = gate * torch.tanh(state[-1])  # eq. 10
        return sentinel, self.sentinel_key(sentinel), *state

    def logits(self, *output: Tensor) -> Tensor:
        """Return W_p (context + h) (eq. 13)."""
        context, hidden = output
        logits: Tensor = self.output(self.dropout(context + self.output_norm(hidden)))
        return logits
