"""What a caption may and must contain, in token ids; without torch.

``Constraints.from_config`` translates the words of a ``SearchConfig``, once for each call.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from captioner.data.vocabulary import BOS, EOS, FUNCTION_WORDS, PAD, UNK, Vocabulary
from captioner.errors import ConfigError, name_some
from captioner.search_config import SearchConfig

Phrase = tuple[int, ...]  # token ids

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
        for position, token in enumerate(phrase):
            if token in self._excluded_words(phrase[:position]):
                raise ConfigError(
                    f"search.forced: '{text}' is ruled out by search.forbidden, "
                    "search.no_repeat_word or search.no_repeat_ngram"
                )
        if len(phrase) > self.max_length:
            raise ConfigError(
                f"search.forced: '{text}' has {len(phrase)} words, more than "
                f"search.max_length = {self.max_length}"
            )

    def excluded(self, token_ids: Phrase) -> set[int]:
        """Return the tokens that can't follow these: words, and EOS where it can't; not ``forced``.

        ``CompiledConstraints`` says the same of many hypotheses at once.
        """
        length = len(token_ids)
        excluded = self._excluded_words(token_ids)
        if length < self.min_length:
            excluded.add(EOS)
        if self.forbidden_endings:
            if length == self.max_length - 1:  # only EOS can come after the next word
                excluded.update(self.forbidden_endings)
            if length and token_ids[-1] in self.forbidden_endings:
                excluded.add(EOS)
        return excluded

    def _excluded_words(self, token_ids: Phrase) -> set[int]:
        length, order = len(token_ids), self.no_repeat_ngram
        excluded = set(TOKENS_NEVER_GENERATED)
        for *start, last in self.forbidden:
            if token_ids[length - len(start) :] == tuple(start) and len(start) <= length:
                excluded.add(last)
        if self.no_repeat_word and length:
            excluded.add(token_ids[-1])
        if order:
            tail = token_ids[length - order + 1 :] if length >= order else None
            for first in range(length - order + 1):
                *start, last = token_ids[first : first + order]
                if tuple(start) == tail:
                    excluded.add(last)
        return excluded


def _encode_phrase(text: str, vocabulary: Vocabulary, field: str) -> Phrase:
    phrase = tuple(vocabulary.encode(text))
    if not phrase:
        raise ConfigError(f"search.{field}: a word or phrase was expected, found '{text}'")
    return phrase


def _encode_known_words(words: Iterable[str], vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return the ids of the words that are one token of the vocabulary each."""
    encoded = (vocabulary.encode(word) for word in sorted(words))
    return tuple(ids[0] for ids in encoded if len(ids) == 1 and ids[0] != UNK)
