"""Bottom-Up and Top-Down: one recurrent layer attends, another speaks (Anderson et al. 2018)."""

from functools import partial

from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.errors import ConfigError
from captioner.models.attention import AdditiveAttention
from captioner.models.decoder import Decoder, Memory, State, StepOutput
from captioner.models.recurrent_cells import CellStack, states_per_layer


class UpDown(Decoder):
    """The top-down attention model over the grid (Anderson et al. 2018, section 3.2, eq. 2-6).

    The state is that of the attention layer, then that of the language layer. Attributes are part
    of the attention layer's input, as the mean of the grid is.

    Raises:
        ConfigError: More than one layer is asked for: the model has its two.
    """

    takes_attributes = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        if config.layers != 1:
            raise ConfigError(
                "decoder.layers: decoder.kind = up_down has one attention and one language layer; "
                f"1 was expected, found {config.layers}"
            )
        width, hidden = config.feature_size or feature_width, config.hidden_size
        self.per_layer = states_per_layer(config.cell)
        self.feature = nn.Linear(feature_width, width) if config.feature_size else nn.Identity()
        make_cell = partial(
            CellStack,
            config.cell,
            hidden,
            initialisation=config.recurrent_initialisation,
            forget_bias=config.forget_bias,
            recurrent_dropout=config.recurrent_dropout,
        )
        self.attention_cell, self.language_cell = make_cell(), make_cell()
        sizes = [config.embedding_size, width, hidden]
        if self.attributes:
            sizes.append(config.embedding_size)
        self.word_projection, self.image_projection, self.language_projection, *of_attributes = (
            self.attention_cell.input_projections(*sizes)
        )
        if of_attributes:
            (self.attribute_projection,) = of_attributes
        self.hidden_projection, self.context_projection = self.language_cell.input_projections(
            hidden, width
        )
        self.attention = AdditiveAttention(
            width, hidden, config.attention_size, config.attention_heads
        )
        self.output = self.output_layer(hidden)

    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Begin with zeros; see ``Decoder.init_state``."""
        features = self.feature_norm(features)
        regions = self.dropout(self.feature(features))
        image = self.image_projection(regions.mean(1))  # W_x of the mean-pooled image
        memory = self.attention.prepare(regions)
        if self.attributes:
            logits, attributes = self.attributes(features)
            image, memory = image + self.attribute_projection(attributes), (*memory, logits)
        zeros = image.new_zeros((image.shape[0], 1, self.config.hidden_size))
        return (zeros,) * (2 * self.per_layer), (image, *memory)

    def word_inputs(self, token_ids: Tensor) -> tuple[Tensor]:
        """Return the words' part of W_x x + b of the attention layer, (…, gates * H)."""
        return (self.word_projection(self.dropout(self.embedding(token_ids))),)

    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """Advance the attention layer, attend by it, advance the language layer."""
        image, *regions = memory[:-1] if self.attributes else memory
        projected = words[0] + image.unsqueeze(1)
        attending = self.active_rows(self._advance_attention, token_ids, projected, *state)
        context, weights, _ = self.attention(attending[0], tuple(regions))  # eq. 3-5
        speaking = self.active_rows(
            self._advance_language, token_ids, attending[0], context, *state[self.per_layer :]
        )
        return StepOutput((speaking[0],), (*attending, *speaking), weights)

    def _advance_attention(self, _: Tensor, projected: Tensor, *state: Tensor) -> State:
        below, above = state[: self.per_layer], state[self.per_layer :]
        return self.attention_cell.step(projected + self.language_projection(above[0]), below)

    def _advance_language(
        self, _: Tensor, hidden: Tensor, context: Tensor, *state: Tensor
    ) -> State:
        projected = self.hidden_projection(hidden) + self.context_projection(context)
        return self.language_cell.step(projected, state)
