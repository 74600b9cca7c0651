"""Phrases that a caption must contain: how much of them each hypothesis contains already."""

from collections.abc import Sequence

import torch
from torch import Tensor

from captioner.search.rules import Phrase


class ForcedPhrases:
    """A finite automaton for each phrase, compiled to one table on the device.

    A phrase's automaton is in state i when the last i tokens are the first i of the phrase, and
    stays in its last state once the phrase is complete (Knuth, Morris and Pratt, 1977). The states
    of a hypothesis are a tensor of (…, C), for C phrases.

    Args:
        phrases: Token ids of each phrase; at least one phrase.
        vocabulary_size: V.
        device: Where the search runs.

    Attributes:
        total_words: Number of words of all phrases together.
    """

    def __init__(
        self, phrases: Sequence[Phrase], vocabulary_size: int, device: torch.device
    ) -> None:
        self.total_words = sum(map(len, phrases))
        longest = max(map(len, phrases))
        transitions = torch.zeros((len(phrases), longest + 1, vocabulary_size), dtype=torch.long)
        for number, phrase in enumerate(phrases):
            for state in range(len(phrase)):
                for token in set(phrase):
                    transitions[number, state, token] = _next_state(phrase, state, token)
            transitions[number, len(phrase)] = len(phrase)
        self._transitions = transitions.to(device)  # (C, states, V)
        self._lengths = torch.tensor([len(phrase) for phrase in phrases], device=device)
        self._numbers = torch.arange(len(phrases), device=device)

    def init_state(self, images: int) -> Tensor:
        """Return the states of one hypothesis for each image before its first word, (B, 1, C)."""
        return torch.zeros(
            (images, 1, len(self._lengths)), dtype=torch.long, device=self._lengths.device
        )

    def advance(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the states (B, K, C) after the next token (B, K) of each hypothesis."""
        return self._transitions[self._numbers, states, token_ids.unsqueeze(2)]

    def words_met(self, states: Tensor) -> Tensor:
        """Return how many of the phrases' words a hypothesis contains: (B, K, C) -> (B, K).

        Counted are the words of the complete phrases, and of the incomplete phrase that has got
        furthest. The other incomplete phrases don't count: one word may begin several phrases, but
        the next words can continue only one of them.
        """
        complete = states == self._lengths
        in_complete = (states * complete).sum(2)
        return in_complete + states.masked_fill(complete, 0).amax(2)

    def is_unmet(self, states: Tensor) -> Tensor:
        """Tell which hypotheses lack at least one phrase: (B, K, C) -> (B, K)."""
        return self.words_met(states) < self.total_words

    def words_met_after(self, states: Tensor) -> Tensor:
        """Return ``words_met`` after each possible next token: (B, K, C) -> (B, K, V)."""
        in_complete = furthest = torch.zeros((), dtype=torch.long, device=states.device)
        for number, length in enumerate(self._lengths):
            next_states = self._transitions[number, states[..., number]]  # (B, K, V)
            complete = next_states == length
            in_complete = in_complete + next_states * complete
            furthest = torch.maximum(furthest, next_states.masked_fill(complete, 0))
        return in_complete + furthest


def _next_state(phrase: Phrase, state: int, token: int) -> int:
    """Return how many of a phrase's first tokens the text ends with after one more token."""
    text = (*phrase[:state], token)
    return max(size for size in range(len(text) + 1) if text[len(text) - size :] == phrase[:size])
