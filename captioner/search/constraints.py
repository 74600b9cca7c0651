"""What a caption may and must hold: rules over token ids, for any search.

``Rules.of`` turns the words of a ``SearchConfig`` into ids, once. ``Rules.forbid`` then says at
each step which tokens can't follow; ``ForcedPhrases`` keeps track of what must still come.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captioner.config import SearchConfig
from captioner.data.vocabulary import BOS, EOS, FUNCTION_WORDS, PAD, UNK, Vocabulary
from captioner.errors import ConfigError, name_some

NEVER_WRITTEN = (PAD, BOS, UNK)

Phrase = tuple[int, ...]


@dataclass(frozen=True)
class Rules:
    """What captions may and must hold, in token ids.

    Attributes:
        min_length: Fewest words.
        max_length: Most words.
        no_repeat_ngram: Length of the n-grams that don't come twice in a caption; 0 for none.
        no_repeat_word: Whether no word directly follows itself.
        endings: Words that no caption ends with.
        forbidden: Words and phrases that no caption holds.
        forced: Words and phrases that every caption holds.
    """

    min_length: int = 0
    max_length: int = 20
    no_repeat_ngram: int = 0
    no_repeat_word: bool = False
    endings: tuple[int, ...] = ()
    forbidden: tuple[Phrase, ...] = ()
    forced: tuple[Phrase, ...] = ()

    @classmethod
    def of(cls, settings: SearchConfig, vocabulary: Vocabulary) -> "Rules":
        """Translate settings into ids.

        Raises:
            ConfigError: A forced word isn't in the vocabulary, or no caption could meet the
                settings; the message names them.
        """
        forbidden = [_phrase(text, vocabulary, "forbidden") for text in settings.forbidden]
        forced = [_phrase(text, vocabulary, "forced") for text in settings.forced]
        rules = cls(
            settings.min_length,
            settings.max_length,
            settings.no_repeat_ngram,
            settings.no_repeat_word,
            tuple(_known(FUNCTION_WORDS, vocabulary)) if settings.no_dangling_end else (),
            tuple(phrase for phrase in forbidden if UNK not in phrase),  # never written anyway
            tuple(dict.fromkeys(forced)),
        )
        for text, phrase in zip(settings.forced, forced, strict=True):
            rules._refuse_impossible(text, phrase, vocabulary)
            if len(phrase) > settings.max_length:
                raise ConfigError(
                    f"search.forced: '{text}' has {len(phrase)} words, more than "
                    f"search.max_length = {settings.max_length}"
                )
        return rules

    def _refuse_impossible(self, text: str, phrase: Phrase, vocabulary: Vocabulary) -> None:
        if UNK in phrase:
            unknown = vocabulary.unknown_words(text)
            raise ConfigError(
                f"search.forced: '{text}' can't be written: {name_some(unknown)} isn't in the "
                "vocabulary"
            )
        logits = torch.zeros(1, 1, len(vocabulary))
        for position, token in enumerate(phrase):
            token_ids = torch.tensor(phrase[:position], dtype=torch.long).view(1, 1, -1)
            allowed = logits.clone()
            self._forbid_words(allowed, token_ids)
            if allowed[0, 0, token] == -torch.inf:
                raise ConfigError(
                    f"search.forced: '{text}' is ruled out by search.forbidden, "
                    "search.no_repeat_word or search.no_repeat_ngram"
                )

    def forbid(self, logits: Tensor, token_ids: Tensor) -> None:
        """Set to -inf, in place, what can't follow.

        Args:
            logits: Of the next tokens, (B, K, V).
            token_ids: The tokens so far, (B, K, t).
        """
        logits[..., NEVER_WRITTEN] = -torch.inf
        length = token_ids.shape[2]
        if length < self.min_length:
            logits[..., EOS] = -torch.inf
        if self.endings:
            if length == self.max_length - 1:  # nothing but the end can come after the next word
                logits[..., self.endings] = -torch.inf
            if length:
                endings = torch.tensor(self.endings, device=logits.device)
                dangling = torch.isin(token_ids[..., -1], endings)
                logits[..., EOS].masked_fill_(dangling, -torch.inf)
        self._forbid_words(logits, token_ids)

    def _forbid_words(self, logits: Tensor, token_ids: Tensor) -> None:
        length = token_ids.shape[2]
        for phrase in self.forbidden:
            *start, last = phrase
            if len(start) <= length:
                tail = token_ids[..., length - len(start) :]
                begun = (tail == torch.tensor(start, device=tail.device)).all(-1)
                logits[..., last].masked_fill_(begun, -torch.inf)
        if self.no_repeat_word and length:
            logits.scatter_(2, token_ids[..., -1:], -torch.inf)
        order = self.no_repeat_ngram
        if order and length >= order:
            windows = token_ids.unfold(2, order, 1)  # (B, K, t - n + 1, n)
            tail = token_ids[..., length - order + 1 :].unsqueeze(2)
            again = (windows[..., :-1] == tail).all(-1)
            # PAD is forbidden already: it stands for "nothing".
            logits.scatter_(2, torch.where(again, windows[..., -1], PAD), -torch.inf)


class ForcedPhrases:
    """How much of what must come has come: a small automaton for each phrase.

    It is in state i when the last i words are the phrase's first i, and stays in its last state
    once the phrase is complete (Knuth, Morris and Pratt, 1977).

    Attributes:
        words: How many words all phrases have together.
    """

    def __init__(
        self, phrases: Sequence[Phrase], vocabulary_size: int, device: torch.device
    ) -> None:
        self.words = sum(map(len, phrases))
        longest = max(map(len, phrases))
        table = torch.zeros((len(phrases), longest + 1, vocabulary_size), dtype=torch.long)
        for number, phrase in enumerate(phrases):
            for state in range(len(phrase)):
                for token in set(phrase):
                    written = [*phrase[:state], token]
                    table[number, state, token] = max(
                        size
                        for size in range(len(written) + 1)
                        if tuple(written[len(written) - size :]) == phrase[:size]
                    )
            table[number, len(phrase)] = len(phrase)
        self._table = table.to(device)
        self._lengths = torch.tensor([len(phrase) for phrase in phrases], device=device)
        self._numbers = torch.arange(len(phrases), device=device)

    def begin(self, images: int) -> Tensor:
        """Return the states of one hypothesis for each image before its first word, (B, 1, C)."""
        return torch.zeros(
            (images, 1, len(self._table)), dtype=torch.long, device=self._table.device
        )

    def after(self, states: Tensor, token_ids: Tensor) -> Tensor:
        """Return the states (B, K, C) after each hypothesis's next token (B, K)."""
        return self._table[self._numbers, states, token_ids.unsqueeze(2)]

    def met(self, states: Tensor) -> Tensor:
        """Return how many of the words have come: (B, K, C) -> (B, K).

        They are those of the complete phrases and of the one that has got furthest, not of all
        that have begun: one word may begin several, but goes on with one of them.
        """
        complete = states == self._lengths
        done = torch.where(complete, states, 0).sum(2)
        return done + states.masked_fill(complete, 0).amax(2)

    def met_after_each(self, states: Tensor) -> Tensor:
        """Return that for every possible next token: (B, K, C) -> (B, K, V)."""
        done = furthest = torch.zeros((), dtype=torch.long, device=states.device)
        for number, length in enumerate(self._lengths):
            after = self._table[number, states[..., number]]  # (B, K, V)
            complete = after == length
            done = done + torch.where(complete, after, 0)
            furthest = torch.maximum(furthest, after.masked_fill(complete, 0))
        return done + furthest


def _phrase(text: str, vocabulary: Vocabulary, field: str) -> Phrase:
    phrase = tuple(vocabulary.encode(text))
    if not phrase:
        raise ConfigError(f"search.{field}: a word or phrase was expected, found '{text}'")
    return phrase


def _known(words: Iterable[str], vocabulary: Vocabulary) -> list[int]:
    found = (vocabulary.encode(word) for word in sorted(words))
    return [ids[0] for ids in found if len(ids) == 1 and ids[0] != UNK]
