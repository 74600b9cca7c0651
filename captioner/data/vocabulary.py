"""Words and their ids."""

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

from captioner.data.tokenizer import tokenize
from captioner.errors import CheckpointError

PAD, BOS, EOS, UNK = range(4)
SPECIAL_WORDS = ("<pad>", "<bos>", "<eos>", "<unk>")

# Words that a whole caption doesn't end with.
_FUNCTION_WORDS = """
    a an the this that these those his her its their my your some another of in on at to from by
    with without for into onto over under near beside behind between through and or but as is are
    was were be being been while who which
    """
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


class Vocabulary:
    """The words that a captioner knows; ids 0 to 3 are PAD, BOS, EOS and UNK.

    Args:
        words: All words in the order of their ids, the four special ones first.

    Raises:
        CheckpointError: The special words are not where they must be, or a word comes twice.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if self.words[:4] != SPECIAL_WORDS or len(set(self.words)) != len(self.words):
            raise CheckpointError(
                f"vocabulary: it must begin with {' '.join(SPECIAL_WORDS)} and hold no word twice"
            )
        # A caption that spells out a special word means none: it mustn't end there.
        self._ids = {
            word: number for number, word in enumerate(self.words) if number >= len(SPECIAL_WORDS)
        }

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 1) -> "Vocabulary":
        """Count the words of the training captions; the most frequent come first."""
        return cls.from_tokens(map(tokenize, captions), min_count)

    @classmethod
    def from_tokens(cls, captions: Iterable[Sequence[str]], min_count: int = 1) -> "Vocabulary":
        """Do what ``from_captions`` does with captions that are cut into words already."""
        counts = Counter(itertools.chain.from_iterable(captions))
        for special in SPECIAL_WORDS:
            counts.pop(special, None)
        kept = [word for word, count in counts.items() if count >= min_count]
        return cls([*SPECIAL_WORDS, *sorted(kept, key=lambda word: (-counts[word], word))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, caption: str) -> list[int]:
        """Return the ids of a caption's words, without BOS and EOS."""
        return self.encode_tokens(tokenize(caption))

    def encode_tokens(self, words: Iterable[str]) -> list[int]:
        """Return the ids of words."""
        return [self._ids.get(word, UNK) for word in words]

    def unknown_words(self, caption: str) -> list[str]:
        """Return the words of a caption that aren't in the vocabulary."""
        return [word for word in tokenize(caption) if word not in self._ids]

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the words up to the first EOS or PAD, joined by spaces."""
        words = []
        for token in token_ids:
            if token in (EOS, PAD):
                break
            words.append(self.words[token])
        return " ".join(words)
