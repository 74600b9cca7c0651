"""Show, Attend and Tell with soft attention (Xu et al. 2015)."""

import torch
from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.models.attention import AdditiveAttention
from captioner.models.decoder import Decoder, Memory, State, StepOutput
from captioner.models.recurrent_cells import CellStack, states_per_layer


class ShowAttendTell(Decoder):
    """Soft attention over the grid (Xu et al. 2015, sections 3.1 and 4.2, eq. 1-8 and 13-14).

    Attributes are part of what the first state is made of, and of the input of each step.
    """

    takes_attributes = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        width, hidden = config.feature_size or feature_width, config.hidden_size
        self.per_layer = states_per_layer(config.cell)
        self.feature = nn.Linear(feature_width, width) if config.feature_size else nn.Identity()
        self.initial = nn.Linear(width, hidden * config.layers * self.per_layer)
        self.attention = AdditiveAttention(
            width, hidden, config.attention_size, config.attention_heads
        )
        self.gate = nn.Linear(hidden, width)
        self.cells = CellStack(
            config.cell,
            hidden,
            config.layers,
            config.dropout,
            config.recurrent_initialisation,
            config.forget_bias,
            config.recurrent_dropout,
        )
        sizes = [config.embedding_size, width]
        if self.attributes:
            sizes.append(config.embedding_size)
            self.attribute_initial = nn.Linear(sizes[-1], self.initial.out_features, bias=False)
        self.word_projection, self.context_projection, *of_attributes = (
            self.cells.input_projections(*sizes)
        )
        if of_attributes:
            (self.attribute_projection,) = of_attributes
        self.deep_output = nn.Linear(hidden + width, config.embedding_size)
        self.output = self.output_layer(config.embedding_size)

    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Return the first state (section 3.1.2) and what attention makes of the image."""
        features = self.feature_norm(features)
        regions = self.dropout(self.feature(features))
        initial = self.initial(regions.mean(1))  # (B, L * states * H)
        memory = self.attention.prepare(regions)
        if self.attributes:
            logits, attributes = self.attributes(features)
            initial = initial + self.attribute_initial(attributes)
            memory = (*memory, self.attribute_projection(attributes), logits)
        initial = torch.tanh(initial).unflatten(1, (1, -1, self.config.hidden_size))
        return initial.unbind(2), memory

    def word_inputs(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the words' part of W_x x + b, (…, gates * H), and the words, (…, E)."""
        words = self.dropout(self.embedding(token_ids))
        return self.word_projection(words), words

    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """Attend to the image by the last state (eq. 4-6), then advance."""
        projected, vectors = words
        if self.attributes:
            *regions, attributes, _ = memory
            projected, memory = projected + attributes.unsqueeze(1), tuple(regions)
        context, weights, _ = self.attention(state[-self.per_layer], memory)
        gated, *new_state = self.active_rows(self._advance, token_ids, projected, context, *state)
        hidden = new_state[-self.per_layer]
        return StepOutput((vectors, hidden, gated), tuple(new_state), weights)

    def _advance(self, _: Tensor, projected: Tensor, context: Tensor, *state: Tensor) -> State:
        context = torch.sigmoid(self.gate(state[-self.per_layer])) * context  # section 4.2.1
        return context, *self.cells.step(projected + self.context_projection(context), state)

    def logits(self, *output: Tensor) -> Tensor:
        """Return the deep output of word, hidden state and context (eq. 7)."""
        words, hidden, context = output
        hidden = self.dropout(self.output_norm(hidden))
        deep = words + self.deep_output(torch.cat([hidden, context], -1))
        logits: Tensor = self.output(self.dropout(deep))
        return logits
