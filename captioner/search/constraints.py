"""Constraints as tensors: what a caption may and must contain, for a search on any device.

``ForcedPhrases`` tracks the phrases that a caption must still contain.
"""

import torch
from torch import Tensor

from captioner.data.vocabulary import EOS, PAD
from captioner.search.forced_phrases import ForcedPhrases
from captioner.search.rules import TOKENS_NEVER_GENERATED, Constraints


class CompiledConstraints:
    """Constraints as tensors on the device of a search, so that its steps copy nothing to it.

    Args:
        constraints: What captions may and must contain.
        vocabulary_size: V.
        device: Where the search runs.

    Attributes:
        vocabulary_size: As given.
        forced: The automata of the forced phrases; None without such phrases.
    """

    def __init__(
        self, constraints: Constraints, vocabulary_size: int, device: torch.device
    ) -> None:
        self._constraints, self.vocabulary_size = constraints, vocabulary_size
        words = [phrase[0] for phrase in constraints.forbidden if len(phrase) == 1]
        phrases = [phrase for phrase in constraints.forbidden if len(phrase) > 1]
        self._never_generated = torch.tensor([*TOKENS_NEVER_GENERATED, *words], device=device)
        self._forbidden_phrases = [
            (torch.tensor(phrase[:-1], device=device), phrase[-1]) for phrase in phrases
        ]
        self._endings = torch.tensor(constraints.forbidden_endings, dtype=torch.long, device=device)
        self._is_ending = torch.zeros(vocabulary_size, dtype=torch.bool, device=device)
        self._is_ending.index_fill_(0, self._endings, True)
        self.forced = (
            ForcedPhrases(constraints.forced, vocabulary_size, device)
            if constraints.forced
            else None
        )

    def init_state(self, images: int) -> Tensor:
        """Return the phrase states before the first word, (B, 1, C); C is 0 without phrases."""
        if self.forced is None:
            return torch.empty((images, 1, 0), dtype=torch.long, device=self._endings.device)
        return self.forced.init_state(images)

    def advance(self, phrase_states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the phrase states (B, K, C) after the next token (B, K) of each hypothesis."""
        if self.forced is None:
            return phrase_states
        return self.forced.advance(phrase_states, token_ids)

    def forbid(self, log_probs: Tensor, token_ids: Tensor, phrase_states: Tensor) -> None:
        """Set to -inf, in place, the tokens that can't follow.

        Args:
            log_probs: Of the next tokens, (B, K, V).
            token_ids: The tokens so far, (B, K, t).
            phrase_states: The states of the forced phrases, (B, K, C).
        """
        constraints, length = self._constraints, token_ids.shape[2]
        self.forbid_words(log_probs, token_ids)
        if length < constraints.min_length:
            log_probs[..., EOS].fill_(-torch.inf)
        if constraints.forbidden_endings:
            if length == constraints.max_length - 1:  # only EOS can come after the next word
                log_probs.index_fill_(2, self._endings, -torch.inf)
            if length:
                dangling = self._is_ending[token_ids[..., -1]]
                log_probs[..., EOS].masked_fill_(dangling, -torch.inf)
        if self.forced is not None:
            unmet = self.forced.is_unmet(phrase_states)
            log_probs[..., EOS].masked_fill_(unmet, -torch.inf)

    def forbid_words(self, log_probs: Tensor, token_ids: Tensor) -> None:
        """Do the part of ``forbid`` that never concerns EOS: forbidden and repeated words."""
        length = token_ids.shape[2]
        log_probs.index_fill_(2, self._never_generated, -torch.inf)
        for start, last in self._forbidden_phrases:
            if len(start) <= length:
                begun = (token_ids[..., length - len(start) :] == start).all(-1)
                log_probs[..., last].masked_fill_(begun, -torch.inf)
        if self._constraints.no_repeat_word and length:
            log_probs.scatter_(2, token_ids[..., -1:], -torch.inf)
        order = self._constraints.no_repeat_ngram
        if order and length >= order:
            ngrams = token_ids.unfold(2, order, 1)  # (B, K, t - n + 1, n)
            tail = token_ids[..., length - order + 1 :].unsqueeze(2)
            differs = (ngrams[..., :-1] != tail).any(-1)
            # PAD stands for "no word": it is forbidden already.
            log_probs.scatter_(2, ngrams[..., -1].masked_fill(differs, PAD), -torch.inf)
