"""What a caption may and must contain: constraints over token ids, for any search.

``Constraints.from_config`` translates the words of a ``SearchConfig`` to token ids, once for each
call. ``CompiledConstraints`` holds the same as tensors on the device and says at each step which
tokens can't follow; ``ForcedPhrases`` tracks the phrases that a caption must still contain.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, FUNCTION_WORDS, PAD, UNK, Vocabulary
from captioner.errors import ConfigError, name_some
from captioner.search.forced_phrases import ForcedPhrases, Phrase

TOKENS_NEVER_GENERATED = (PAD, BOS, UNK)


@dataclass(frozen=True)
class Constraints:
    """What captions may and must contain, in token ids.

    Attributes:
        min_length: Fewest words.
        max_length: Most words.
        no_repeat_ngram: Length of the n-grams that don't occur twice in a caption; 0 for none.
        no_repeat_word: Whether no word directly follows itself.
        forbidden_endings: Words that no caption ends with.
        forbidden: Words and phrases that no caption contains.
        forced: Words and phrases that every caption contains.
    """

    min_length: int = 0
    max_length: int = 20
    no_repeat_ngram: int = 0
    no_repeat_word: bool = False
    forbidden_endings: tuple[int, ...] = ()
    forbidden: tuple[Phrase, ...] = ()
    forced: tuple[Phrase, ...] = ()

    @classmethod
    def from_config(cls, settings: SearchConfig, vocabulary: Vocabulary) -> "Constraints":
        """Translate settings to token ids.

        Raises:
            ConfigError: A forced word isn't in the vocabulary, or no caption could meet the
                settings; the message names them.
        """
        forbidden = [_encode_phrase(text, vocabulary, "forbidden") for text in settings.forbidden]
        forced = [_encode_phrase(text, vocabulary, "forced") for text in settings.forced]
        function_words = _encode_known_words(FUNCTION_WORDS, vocabulary)
        constraints = cls(
            min_length=settings.min_length,
            max_length=settings.max_length,
            no_repeat_ngram=settings.no_repeat_ngram,
            no_repeat_word=settings.no_repeat_word,
            forbidden_endings=function_words if settings.no_dangling_end else (),
            # UNK is never generated, so a phrase that contains it needs no constraint.
            forbidden=tuple(phrase for phrase in forbidden if UNK not in phrase),
            forced=tuple(dict.fromkeys(forced)),
        )
        for text, phrase in zip(settings.forced, forced, strict=True):
            constraints._check_forced(text, phrase, vocabulary)
        return constraints

    def _check_forced(self, text: str, phrase: Phrase, vocabulary: Vocabulary) -> None:
        """Raise ConfigError if no caption can contain the phrase."""
        if UNK in phrase:
            unknown = vocabulary.unknown_words(text)
            raise ConfigError(
                f"search.forced: '{text}' can't be written: {name_some(unknown)} isn't in the "
                "vocabulary"
            )
        compiled = CompiledConstraints(
            replace(self, forced=()), len(vocabulary), torch.device("cpu")
        )
        token_ids = torch.tensor(phrase).view(1, 1, -1)
        for position, token in enumerate(phrase):
            log_probs = torch.zeros(1, 1, len(vocabulary))
            compiled.forbid_words(log_probs, token_ids[..., :position])
            if log_probs[0, 0, token] == -torch.inf:
                raise ConfigError(
                    f"search.forced: '{text}' is ruled out by search.forbidden, "
                    "search.no_repeat_word or search.no_repeat_ngram"
                )
        if len(phrase) > self.max_length:
            raise ConfigError(
                f"search.forced: '{text}' has {len(phrase)} words, more than "
                f"search.max_length = {self.max_length}"
            )


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


def _encode_phrase(text: str, vocabulary: Vocabulary, field: str) -> Phrase:
    phrase = tuple(vocabulary.encode(text))
    if not phrase:
        raise ConfigError(f"search.{field}: a word or phrase was expected, found '{text}'")
    return phrase


def _encode_known_words(words: Iterable[str], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the ids of the words that are one token of the vocabulary each."""
    encoded = (vocabulary.encode(word) for word in sorted(words))
    return tuple(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != UNK)
