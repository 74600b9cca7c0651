"""Captions of rendered scenes: five wordings of a scene, and whether a caption is true of one."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from captioner.data.annotations import ImageId
from captioner.data.shapes import COLOURS, INVERSE, SHAPES, SIDES, SIZES, Record, Scene, Thing
from captioner.errors import DataError, name_some


def captions_of(scene: Scene) -> list[str]:
    """Return five wordings of a scene, each of which says all there is to say.

    The first words settle the wording and with it which object is named first: whoever writes on
    from there, a trained decoder say, has nothing left to choose, only the picture to look at.
    The longest wording is equally long for all scenes, so that batches of captions of like length
    don't become batches of like relations.
    """
    figure, ground, relation = scene.figure, scene.ground, scene.relation
    inverse = INVERSE[relation]
    return [
        f"A {figure} {_to_the(relation)} a {ground}.",
        f"A {figure} is {relation} a {ground}.",
        f"There is a {ground} {_to_the(inverse)} a {figure}.",
        f"{_to_the(inverse).capitalize()} a {figure} there is a {ground}.",
        f"The picture shows a {figure} {SIDES[relation]} and a {ground} {SIDES[inverse]}.",
    ]


def _to_the(relation: str) -> str:
    return f"to the {relation}" if relation.endswith(" of") else relation


# --- checking captions ----------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """What a caption says: the first object it names is ``relation`` the second.

    An object's size and colour are None where the caption doesn't name them.
    """

    first: Mapping[str, str | None]
    relation: str
    second: Mapping[str, str | None]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption are true of its picture, and whether it could be read at all."""

    readable: bool = False
    objects: bool = False
    colours: bool = False
    sizes: bool = False
    relation: bool = False

    @property
    def wholly_right(self) -> bool:
        """Whether all of it is true."""
        return self.objects and self.colours and self.sizes and self.relation


def _object(name: str) -> str:
    size, colour, shape = ("|".join(words) for words in (SIZES, COLOURS, SHAPES))
    return (
        rf"(?:an?|the) (?:(?P<{name}_size>{size}) )?(?:(?P<{name}_colour>{colour}) )?"
        rf"(?P<{name}_shape>{shape})"
    )


_WORD = re.compile(r"\w+")
_BESIDE = r"(?:(?:to|on|at) the )?(?P<beside>left|right)(?: side)? of"
_OVER = r"(?P<over>above|over|below|under|underneath|beneath)"
_IS = r"(?:is|lies|sits|stands)"
_OPENING = r"(?:there (?:is|are) |(?:the|this) (?:picture|image) shows |this is )?"
_SENTENCES = [
    re.compile(pattern)
    for pattern in (
        # A small red star (is) left of a large blue circle.
        rf"{_OPENING}{_object('first')} (?:(?:that |which )?{_IS} )?(?:{_BESIDE}|{_OVER}) "
        rf"{_object('second')}",
        # To the left of a small red star (there) is a large blue circle.
        rf"(?:{_BESIDE}|{_OVER}) {_object('second')} (?:there )?{_IS} {_object('first')}",
        # (There is) a small red star on the left and a large blue circle on the right.
        rf"{_OPENING}{_object('first')} (?:{_IS} )?(?:on|at|to|in) the "
        rf"(?:(?P<left>left)|(?P<right>right)|(?P<top>top)|(?P<bottom>bottom)) "
        rf"and {_object('second')} (?:{_IS} )?(?:on|at|to|in) the "
        r"(?(left)right|(?(right)left|(?(top)bottom|top)))",
    )
]
_RELATION_OF_WORD = {
    "left": "left of",
    "right": "right of",
    **dict.fromkeys(("above", "over", "top"), "above"),
    **dict.fromkeys(("below", "under", "underneath", "beneath", "bottom"), "below"),
}


def parse_caption(caption: str) -> Statement | None:
    """Read a caption with a small grammar; None if it is no sentence of it.

    Case and punctuation don't matter. The grammar is wider than ``captions_of``: its parts may be
    mixed, sizes and colours left out, and a few other words for the same are known.
    """
    text = " ".join(_WORD.findall(caption.lower()))
    match = next(filter(None, (sentence.fullmatch(text) for sentence in _SENTENCES)), None)
    if match is None:
        return None
    groups = match.groupdict()
    words = [groups.get(name) for name in ("beside", "over", "left", "right", "top", "bottom")]
    relation = next(_RELATION_OF_WORD[word] for word in words if word)
    first, second = (
        {part: groups[f"{name}_{part}"] for part in ("size", "colour", "shape")}
        for name in ("first", "second")
    )
    return Statement(first, relation, second)


def check_caption(caption: str, scene: Scene) -> Verdict:
    """Say which parts of a caption are true of a scene.

    Each object named is taken for one of the picture's, whichever way round makes most of the
    caption true. Objects, colours and sizes are right when both objects' are; the relation is
    right when it is true of the two objects that were named.
    """
    statement = parse_caption(caption)
    if statement is None:
        return Verdict()
    verdicts = (
        _compare(statement, scene.figure, scene.ground, scene.relation),
        _compare(statement, scene.ground, scene.figure, INVERSE[scene.relation]),
    )
    return max(verdicts, key=lambda verdict: verdict[0])[1]


def _compare(
    statement: Statement, first: Thing, second: Thing, relation: str
) -> tuple[tuple[int, bool], Verdict]:
    """Return a verdict for one way round, after the number of words that are true."""
    pairs = [(statement.first, asdict(first)), (statement.second, asdict(second))]
    true = {
        part: [described[part] == drawn[part] for described, drawn in pairs]
        for part in ("size", "colour", "shape")
    }
    verdict = Verdict(
        readable=True,
        objects=all(true["shape"]),
        colours=all(true["colour"]),
        sizes=all(true["size"]),
        relation=statement.relation == relation,
    )
    return (sum(map(sum, true.values())), verdict.relation), verdict


def check_captions(
    records: Sequence[Record], captions: Mapping[ImageId, str]
) -> tuple[dict[int, Verdict], dict[int, str]]:
    """Check a caption for each picture; a picture without one counts as wrong.

    Args:
        records: The pictures.
        captions: Captions by image id (an integer, or the same as text) or by file name.

    Returns:
        Verdicts and captions by image id, for all pictures in their order.

    Raises:
        DataError: A caption is of no picture here, or a picture has two.
    """
    names: dict[ImageId, int] = {}
    for record in records:
        for name in (record.image_id, str(record.image_id), record.file_name):
            names[name] = record.image_id
    unknown = [key for key in captions if key not in names]
    if unknown:
        raise DataError(
            f"{len(unknown)} captions are of images that the scenes don't have "
            f"({name_some(unknown)}); are they of another split?"
        )
    caption_by_id: dict[int, str] = {}
    for key, caption in captions.items():
        if names[key] in caption_by_id:
            raise DataError(f"image {names[key]} has two captions, under its id and its file name")
        caption_by_id[names[key]] = caption
    ordered = {record.image_id: caption_by_id.get(record.image_id, "") for record in records}
    verdicts = {
        record.image_id: check_caption(ordered[record.image_id], record.scene) for record in records
    }
    return verdicts, ordered


def shares(verdicts: Mapping[int, Verdict]) -> dict[str, float]:
    """Return the share of pictures (0 to 1) in which each part of the caption is right."""
    parts = ("objects", "colours", "sizes", "relation", "wholly_right", "readable")
    count = max(1, len(verdicts))
    return {
        part: sum(getattr(verdict, part) for verdict in verdicts.values()) / count for part in parts
    }
