"""The settings of search: how captions are found."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from captioner.checks import (
    check_between,
    check_positive,
    default_of,
    expected_error,
)
from captioner.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class SearchConfig:
    """How captions are found when none are given.

    ``beam_size``, ``n_best``, ``groups`` and ``samples`` are at most 10,000.

    Attributes:
        beam_size: Hypotheses kept; 1 is greedy search.
        max_length: Most words in a caption, at most 1,000.
        length_penalty: Finished hypotheses are ranked by log-probability / length ** this; 0 is
            the plain log-probability, 1 its mean over the words; at most 100.
        n_best: How many captions are found of each image, best first.
        min_length: Fewest words in a caption.
        no_repeat_ngram: No n-gram of this many words comes twice in a caption; 0 allows all.
        no_repeat_word: No word directly follows itself.
        no_dangling_end: No caption ends in a function word, such as "with" or "a".
        forbidden: Words and phrases that no caption holds: at most 10,000, of 200 characters each.
        forced: Words and phrases that every caption holds; each of their words costs a beam more.
            At most 100, of 200 characters each.
        groups: Diverse beam search: the beam is divided into so many groups, each of which avoids
            the words that those before it took at the same step.
        diversity: By how much, in log-probability for each hypothesis that took the word; at most
            1e6.
        samples: Draw so many captions at random instead of searching; 0 searches.
        temperature: Of sampling: below 1 prefers likely words, above 1 levels them; 1e-6 to 1e6.
        top_k: Draw from the so many likeliest words, at most 1,000,000; 0 from all.
        top_p: Draw from the likeliest words that have this probability together; 1 from all.
        seed: Of sampling, below 2 ** 63. A caption depends on it and on its image's name or place
            alone.
        consensus: What a caption's agreement with what its image lets expect counts beside its
            score, when the ``beam_size`` or ``samples`` that were found are ranked; 0 leaves it
            out; at most 1000. It takes a captioner with a ``consensus``.
    """

    beam_size: int = 5
    max_length: int = 20
    length_penalty: float = 0.7
    n_best: int = 1
    min_length: int = 0
    no_repeat_ngram: int = 0
    no_repeat_word: bool = False
    no_dangling_end: bool = False
    forbidden: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    groups: int = 1
    diversity: float = 0.5
    samples: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    consensus: float = 0.0

    def __post_init__(self) -> None:
        """Refuse impossible values and combinations."""
        check_between(self, beam_size=(1, 10_000), n_best=(1, 10_000), groups=(1, 10_000))
        check_between(self, max_length=(1, 1000), min_length=(0, 1000), no_repeat_ngram=(0, 1000))
        check_between(self, samples=(0, 10_000), length_penalty=(0.0, 100.0), diversity=(0.0, 1e6))
        check_between(self, temperature=(1e-6, 1e6), top_k=(0, 1_000_000), seed=(0, 2**63 - 1))
        check_between(self, consensus=(0.0, 1000.0))
        check_positive(self, "top_p")
        for name, most in (("forbidden", 10_000), ("forced", 100)):
            phrases = getattr(self, name)
            if isinstance(phrases, str):
                raise expected_error(self, name, "a list of words and phrases")
            if len(phrases) > most:
                raise ConfigError(
                    f"search.{name}: at most {most} phrases were expected, found {len(phrases)}"
                )
            if any(len(phrase) > 200 for phrase in phrases):
                raise ConfigError(f"search.{name}: a phrase has more than 200 characters")
        if self.top_p > 1:
            raise expected_error(self, "top_p", "at most 1")
        if self.min_length > self.max_length:
            bound = f"at most search.max_length = {self.max_length}"
            raise expected_error(self, "min_length", bound)
        limit = ("samples", self.samples) if self.samples else ("beam_size", self.beam_size)
        if self.n_best > limit[1]:
            raise expected_error(self, "n_best", f"at most search.{limit[0]} = {limit[1]}")
        if self.beam_size % self.groups:
            raise expected_error(
                self, "groups", f"a divisor of search.beam_size = {self.beam_size}"
            )
        together = {"samples": self.samples, "groups": self.groups > 1, "forced": self.forced}
        used = [f"search.{name}" for name, value in together.items() if value]
        if len(used) > 1:
            raise ConfigError(f"{' and '.join(used)} can't be combined")
        for name, needed in (
            *((name, "samples") for name in ("temperature", "top_k", "top_p")),
            ("diversity", "groups"),
        ):
            if f"search.{needed}" not in used and getattr(self, name) != default_of(self, name):
                raise ConfigError(f"search.{name} has no effect without search.{needed}")


def changed_search(search: SearchConfig, settings: Mapping[str, Any]) -> SearchConfig:
    """Return search settings with those changed that aren't None.

    Raises:
        ConfigError: A setting is unknown or impossible.
    """
    known = [field.name for field in fields(SearchConfig)]
    for name in settings:
        if name not in known:
            hint = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise ConfigError(f"no search setting '{name}'{hint}")
    changes = {name: value for name, value in settings.items() if value is not None}
    changes |= {name: tuple(v) for name, v in changes.items() if isinstance(v, list)}
    return replace(search, **changes)
