"""What a search finds; without torch."""

from dataclasses import dataclass

NO_PROBABILITIES = (
    "the model gives NaN instead of probabilities; its weights are damaged or its numbers "
    "overflow: try float32 precision or another checkpoint"
)
"""What to tell of an image without hypotheses."""


@dataclass(frozen=True)
class Hypothesis:
    """One caption that a search returns.

    Attributes:
        token_ids: Its words, without BOS and EOS.
        log_probability: The model's own, of the words, and of EOS if it ended; whatever the search
            preferred or forbade.
        ended: Whether EOS follows; False only where the model gives EOS no probability.
        agreement: See ``search.consensus``; 0 where it isn't asked for.
    """

    token_ids: list[int]
    log_probability: float
    ended: bool
    agreement: float = 0.0

    def score(self, length_penalty: float, consensus: float = 0.0) -> float:
        """Return what hypotheses are ranked by.

        It is log-probability / length ** ``length_penalty`` + ``consensus`` * agreement. The length
        counts the words, and EOS where it follows.
        """
        length = max(1, len(self.token_ids) + self.ended)
        return self.log_probability / length**length_penalty + consensus * self.agreement
