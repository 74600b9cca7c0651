"""What is known of an image after it was captioned, or why it couldn't be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from captioner.data.annotations import ImageId
from captioner.data.listing import ImageFile


@dataclass(frozen=True)
class RankedCaption:
    """One caption of an image.

    Attributes:
        text: The sentence.
        log_probability: The model's own, of its words and its end; -inf for a caption that no
            search found.
        score: What an image's captions are ranked by.
    """

    text: str
    log_probability: float
    score: float


@dataclass(frozen=True)
class Record:
    """What the outputs of a job hold of an image: its captions, or an error.

    Attributes:
        image_id: What the results call it.
        name: Its path below the folder, or as it was given, with ``/`` between the parts.
        path: Where it is.
        captions: Best first; none where it failed.
        width: Of the image as it is seen (turned as its EXIF says), in pixels; 0 where unknown.
        height: Likewise.
        sha256: Of the file, in hexadecimal digits, where that was asked for; else "".
        error: Why it couldn't be captioned, in a line; "" where it could.
    """

    image_id: ImageId
    name: str
    path: str
    captions: tuple[RankedCaption, ...] = ()
    width: int = 0
    height: int = 0
    sha256: str = ""
    error: str = ""


class _Caption(Protocol):
    """What is kept of a caption."""

    @property
    def text(self) -> str:
        """The sentence."""

    @property
    def log_probability(self) -> float:
        """The model's own."""

    @property
    def score(self) -> float:
        """What captions are ranked by."""


def record_of(
    image: ImageFile, captions: Sequence[_Caption], size: tuple[int, int], error: str = ""
) -> Record:
    """Return the record of an image.

    Args:
        image: The image.
        captions: Best first; none where it failed.
        size: Its width and height as it is seen, in pixels.
        error: Why it couldn't be captioned.
    """
    ranked = tuple(RankedCaption(each.text, each.log_probability, each.score) for each in captions)
    return Record(image.image_id, image.name, str(image.path), ranked, *size, error=error)
