"""Names of images that two files spell differently: what they differ in, for a message.

``Dog.JPG`` and ``dog.jpg``, ``val2014/7.jpg`` and ``7.jpg``, ``7`` and ``"7"`` mostly mean the same
image, but aren't equal.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable

from captioner.data.image_formats import IMAGE_SUFFIXES

Name = int | str

LONGEST_SHOWN = 80  # characters of a name in a message


def near_names_hint(names: Iterable[Name], known: Iterable[Name], place: str) -> str:
    """Return ``"; did you mean …?"`` where names are known ones, spelt differently.

    Args:
        names: Ids or file names that aren't known.
        known: Those that are.
        place: Where those are known from: "the references", say.

    Returns:
        One pair as an example, how many there are, and what they differ in; "" without any.
    """
    by_form: dict[str, Name | None] = {}
    for name in known:
        form = _normalise(name)
        by_form[form] = None if form in by_form else name  # two of one form: which is meant?
    pairs = [
        (name, meant) for name in names if (meant := by_form.get(_normalise(name))) is not None
    ]
    if not pairs:
        return ""
    kinds = dict.fromkeys(kind for pair in pairs for kind in _differences(*pair))
    name, meant = pairs[0]
    pair_count = "they" if len(pairs) == 1 else f"{len(pairs)} such pairs"
    return (
        f"; did you mean {show_name(meant)}, as in {place}, by {show_name(name)}? "
        f"{pair_count} differ only in {', '.join(kinds)}"
    )


def show_name(name: Name) -> str:
    """Return an id or file name for a message: in quotes where it is text, and not too long."""
    text = repr(name)
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]}…{text[-half:]}"


def _without_suffix(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    return stem if f".{suffix}" in IMAGE_SUFFIXES else name


# What names may differ in, and what makes them alike; in this order.
_KINDS: dict[str, Callable[[str], str]] = {
    "Unicode form": lambda name: unicodedata.normalize("NFC", name),
    "slashes": lambda name: name.replace("\\", "/"),
    "folder": lambda name: name.rpartition("/")[2],
    "upper and lower case": str.casefold,
    "suffix": _without_suffix,
    "COCO's prefix": lambda name: re.sub(r"coco_\w+?20\d\d_", "", name, flags=re.IGNORECASE),
    "leading zeros": lambda name: re.sub(r"(?<![^/])0+(?=\d)", "", name),
}


def _normalise(name: Name, but: str = "") -> str:
    """Return a name without what names may differ in, ``but`` for one of these kinds."""
    text = str(name)
    for kind, normalise in _KINDS.items():
        if kind != but:
            text = normalise(text)
    return text


def _differences(first: Name, second: Name) -> list[str]:
    """Return the kinds in which two names of one form differ."""
    kinds = [kind for kind in _KINDS if _normalise(first, kind) != _normalise(second, kind)]
    if isinstance(first, int) != isinstance(second, int):
        kinds.insert(0, "type (a number on one side, text on the other)")
    return kinds
