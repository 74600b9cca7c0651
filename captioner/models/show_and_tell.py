"""Show and Tell: the image is the first input of the recurrence (Vinyals et al. 2015)."""

from torch import Tensor, nn

from captioner.config import DecoderConfig
from captioner.errors import ConfigError
from captioner.models.decoder import Decoder, Memory, State, StepOutput, chosen_rows
from captioner.models.dropout import Dropout
from captioner.models.recurrent import RecurrentStack
from captioner.models.recurrent_cells import states_per_layer


class ShowAndTell(Decoder):
    """Vinyals et al. 2015, eq. 10-12; teacher forcing is one fused call over the sequence.

    Attributes are added to the image, the first input.

    Raises:
        ConfigError: Attention heads are asked for.
    """

    pooled = True
    takes_attributes = True

    def __init__(self, config: DecoderConfig, vocabulary_size: int, feature_width: int) -> None:
        super().__init__(config, vocabulary_size, feature_width)
        if config.attention_heads != 1:
            raise ConfigError(
                "decoder.attention_heads: decoder.kind = show_and_tell has no attention; 1 was "
                f"expected, found {config.attention_heads}"
            )
        self.image = nn.Linear(feature_width, config.embedding_size)
        self.recurrence = RecurrentStack(
            config.cell,
            config.embedding_size,
            config.hidden_size,
            config.layers,
            config.dropout,
            return_sequences=True,
            initialisation=config.recurrent_initialisation,
            forget_bias=config.forget_bias,
        )
        self.recurrent_dropout = Dropout(config.recurrent_dropout)
        self.output = self.output_layer(config.hidden_size)

    def init_state(self, features: Tensor) -> tuple[State, Memory]:
        """Take the image as the first input, x(-1); see ``Decoder.init_state``."""
        features = self.feature_norm(features.mean(1, keepdim=True))
        image = self.dropout(self.image(features))  # (B, 1, E)
        memory: Memory = ()
        if self.attributes:
            logits, attributes = self.attributes(features)
            image, memory = image + attributes.unsqueeze(1), (logits,)
        zeros = self.recurrence.zero_state(image)
        return self.recurrence.step(self.recurrence.project(image), zeros), memory

    def word_inputs(self, token_ids: Tensor) -> tuple[Tensor]:
        """Return W_x x + b of each word, (…, gates * H)."""
        return (self.recurrence.project(self.dropout(self.embedding(token_ids))),)

    def step(
        self, token_ids: Tensor, words: tuple[Tensor, ...], state: State, memory: Memory
    ) -> StepOutput:
        """See ``Decoder.step``."""
        state = self.active_rows(self._advance, token_ids, *words, *state)
        return StepOutput((state[-states_per_layer(self.config.cell)],), state)

    def _advance(self, _: Tensor, projected: Tensor, *state: Tensor) -> State:
        return self.recurrence.step(projected, state, self.recurrent_dropout)

    def run_sequence(
        self,
        inputs: Tensor,
        state: State,
        memory: Memory,
        real: Tensor,
        bptt_window: int,
        trace: list[State] | None = None,
    ) -> tuple[tuple[Tensor, ...], Tensor, None]:
        """Run all steps in one fused call; see ``Decoder.run_sequence``.

        Recurrent dropout, which no fused module has, takes single steps.
        """
        if self.training and self.config.recurrent_dropout:
            outputs, positions, _ = self.run_steps(inputs, state, memory, real, bptt_window)
            return outputs, positions, None
        words = self.dropout(self.embedding(inputs.flatten(0, 1)))  # (B * K, T, E)
        hidden = self.recurrence(words, self.recurrence.stack_state(state), bptt_window=bptt_window)
        return (chosen_rows(hidden, real.flatten(0, 1)),), real.nonzero(), None
