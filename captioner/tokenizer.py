"""Captions to words."""

import re

_WORD = re.compile(r"[a-z0-9]+(?:[-'][a-z0-9]+)*")


def tokenize(caption: str) -> list[str]:
    """Return the lower-cased words of a caption, without punctuation."""
    return _WORD.findall(caption.lower())
