"""Rendered scenes with captions: a small data set in COCO's layout that needs no download.

Each picture shows two objects on a light background. What a picture shows is a ``Scene``: two
``Thing``s (size, colour, shape) and where the first stands from the second. The first is the
*figure*, the second the *ground* that it is located by: the smaller object where their sizes
differ, else the left or upper one. People choose them much the same way (Talmy 1975, "Figure and
ground in complex sentences": the bicycle is beside the house, hardly the house beside it). It
makes the words of a scene a function of the picture, so that they can be learnt exactly.

``write_data_set`` draws the pictures and writes captions and records. ``check_caption`` reads a
caption back with a grammar of its own and says whether it is true of a record.

This module knows nothing of torch.
"""

import itertools
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from pydantic import TypeAdapter, ValidationError

from captioner.data.annotations import ImageId, read_json
from captioner.errors import DataError, UsageError, did_you_mean, name_some
from captioner.files import atomic_directory, write_json
from captioner.progress import Progress

SPLITS = ("train", "val", "test")
SIZES = ("small", "large")
COLOURS = {
    "red": (216, 36, 40),
    "orange": (246, 138, 22),
    "yellow": (240, 216, 44),
    "green": (44, 156, 68),
    "blue": (38, 92, 214),
    "purple": (136, 54, 168),
}
# Bounding radius of each shape over that of a circle that looks equally large.
SHAPES = {"circle": 1.0, "square": 1.25, "triangle": 1.3, "star": 1.3, "cross": 1.25}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SIDES = {
    "left of": "on the left",
    "right of": "on the right",
    "above": "at the top",
    "below": "at the bottom",
}
# Radius of the circle that looks equally large, over the image size: least and greatest.
RADII = {"small": (0.108, 0.120), "large": (0.162, 0.176)}

MARGIN = 0.015  # least distance to the border and half the least gap, over the image size
DRIFT = 0.35  # greatest offset across the relation's axis, over the distance along it
COLOUR_JITTER = 14  # levels of 255, as all below
NOISE = 3.0
SUPERSAMPLING = 4
LEAST_IMAGE_SIZE = 32
HELD_OUT_SHARE = 0.25  # at most this share of all scenes is kept for val, and for test


# --- what a picture shows -------------------------------------------------------------------


@dataclass(frozen=True)
class Thing:
    """What can be said of one object."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What can be said of one picture: the figure is ``relation`` (a key of INVERSE) the ground."""

    figure: Thing
    ground: Thing
    relation: str


def all_scenes() -> list[Scene]:
    """Return every scene once: its two objects differ in shape or colour."""
    things = [Thing(*words) for words in itertools.product(SIZES, COLOURS, SHAPES)]
    return [
        Scene(figure, ground, relation)
        for figure, ground in itertools.product(things, things)
        if (figure.colour, figure.shape) != (ground.colour, ground.shape)
        for relation in _relations(figure, ground)
    ]


def _relations(figure: Thing, ground: Thing) -> tuple[str, ...]:
    if figure.size == ground.size:
        return ("left of", "above")
    return tuple(INVERSE) if figure.size == "small" else ()


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


# --- drawing --------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlacedObject:
    """An object in a picture.

    Attributes:
        size: A word of SIZES.
        colour: A key of COLOURS.
        shape: A key of SHAPES.
        x: Its centre in pixels from the left border.
        y: Its centre in pixels from the upper border.
        radius: Radius of the circle around it, in pixels.
        rotation: Clockwise, in degrees.
        rgb: The colour it is drawn in.
    """

    size: str
    colour: str
    shape: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[int, int, int]

    @property
    def thing(self) -> Thing:
        """What can be said of it."""
        return Thing(self.size, self.colour, self.shape)


@dataclass(frozen=True)
class Record:
    """One picture of the data set: ``objects[0]`` is ``relation`` ``objects[1]``."""

    image_id: int
    file_name: str
    image_size: int
    relation: str
    objects: tuple[PlacedObject, PlacedObject]
    background: tuple[int, int, int]

    @property
    def scene(self) -> Scene:
        """What can be said of it."""
        return Scene(self.objects[0].thing, self.objects[1].thing, self.relation)


def draw(
    scene: Scene, image_id: int, image_size: int, rng: np.random.Generator
) -> tuple[Record, Image.Image]:
    """Draw a scene, varied in all that its caption doesn't speak of.

    Args:
        scene: What the picture shows.
        image_id: Its id; its file name is made of it.
        image_size: Width and height in pixels.
        rng: Decides place, exact size, rotation, exact colours and noise.

    Returns:
        The record of what was drawn where, and the picture (RGB).
    """
    record = _place(scene, image_id, image_size, rng)
    canvas = Image.new("RGB", (image_size * SUPERSAMPLING,) * 2, record.background)
    pen = ImageDraw.Draw(canvas)
    for placed in record.objects:
        pen.polygon(_outline(placed), fill=placed.rgb)
    smooth = np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32)
    noisy = smooth + NOISE * rng.standard_normal(smooth.shape, dtype=np.float32)
    return record, Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))


def _place(scene: Scene, image_id: int, image_size: int, rng: np.random.Generator) -> Record:
    things = (scene.figure, scene.ground)
    radii = [SHAPES[thing.shape] * rng.uniform(*RADII[thing.size]) for thing in things]
    first = 0 if scene.relation in ("left of", "above") else 1
    along = np.empty(2)
    along[first], along[1 - first] = _along_axis(radii[first], radii[1 - first], rng)
    across = _across_axis(radii, abs(along[0] - along[1]), rng)
    horizontal = scene.relation in ("left of", "right of")
    xs, ys = (along, across) if horizontal else (across, along)
    objects = [
        PlacedObject(
            **asdict(thing),
            x=round(x * image_size, 2),
            y=round(y * image_size, 2),
            radius=round(radius * image_size, 2),
            rotation=round(rng.uniform(-12, 12), 1),
            rgb=_jitter(COLOURS[thing.colour], rng),
        )
        for thing, radius, x, y in zip(things, radii, xs, ys, strict=True)
    ]
    background = _jitter((round(rng.uniform(205, 240)),) * 3, rng)
    return Record(
        image_id,
        file_name_of(image_id),
        image_size,
        scene.relation,
        (objects[0], objects[1]),
        background,
    )


def file_name_of(image_id: int) -> str:
    """Return the file name of an image of the data set."""
    return f"shapes_{image_id:06d}.png"


def _along_axis(first: float, second: float, rng: np.random.Generator) -> tuple[float, float]:
    """Return two centres along the relation's axis: the free space is shared out at random."""
    free = 1 - 2 * (first + second) - 4 * MARGIN
    start, end = np.sort(rng.uniform(0, free, 2)).tolist()
    return MARGIN + start + first, 3 * MARGIN + end + 2 * first + second


def _across_axis(radii: Sequence[float], distance: float, rng: np.random.Generator) -> np.ndarray:
    """Return two centres across the relation's axis, so close that no other relation seems true.

    The greater object comes first: wherever it is, the other has room beside it.
    """
    greater = int(radii[1] > radii[0])
    low, high = (np.array([MARGIN, 1 - MARGIN])[:, None] + np.outer([1, -1], radii)).tolist()
    centres = np.empty(2)
    centres[greater] = rng.uniform(low[greater], high[greater])
    other = 1 - greater
    centres[other] = rng.uniform(
        max(low[other], centres[greater] - DRIFT * distance),
        min(high[other], centres[greater] + DRIFT * distance),
    )
    return centres


def _jitter(rgb: Sequence[int], rng: np.random.Generator) -> tuple[int, int, int]:
    moved = np.clip(np.array(rgb) + rng.integers(-COLOUR_JITTER, COLOUR_JITTER + 1, 3), 0, 255)
    red, green, blue = moved.tolist()
    return red, green, blue


def _outline(placed: PlacedObject) -> list[tuple[float, float]]:
    """Return the corners of an object on the supersampled canvas."""
    return [
        (
            SUPERSAMPLING * (placed.x + placed.radius * reach * math.sin(angle)) - 0.5,
            SUPERSAMPLING * (placed.y - placed.radius * reach * math.cos(angle)) - 0.5,
        )
        for angle, reach in _corners(placed.shape, math.radians(placed.rotation))
    ]


def _corners(shape: str, turn: float) -> Iterator[tuple[float, float]]:
    """Yield each corner as its angle, clockwise from the top, and its distance from the centre.

    The distance is in units of the radius of the circle around the shape.
    """
    if shape == "cross":
        half_width = math.atan2(1, 3)  # arms a third as wide as the cross
        for arm in range(4):
            for angle, reach in ((-half_width, 1), (half_width, 1), (math.pi / 4, 0.2**0.5)):
                yield turn + arm * math.pi / 2 + angle, reach
        return
    count = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[shape]
    start = math.pi / 4 if shape == "square" else 0
    for corner in range(count):
        inner = shape == "star" and corner % 2
        yield turn + start + corner * math.tau / count, 0.45 if inner else 1


# --- the data set ---------------------------------------------------------------------------


def split_scenes(
    counts: Mapping[str, int], rng: np.random.Generator
) -> dict[str, list[tuple[int, Scene]]]:
    """Deal scenes to the splits so that no two splits share one.

    Test and val take as many different scenes as they have images, at most ``HELD_OUT_SHARE`` of
    all each; train takes from the rest. A split with more images than scenes shows them again,
    drawn differently. Each object and each relation occurs in train all the same: what is unseen
    in val and test is how they are put together.

    Args:
        counts: How many images each split has.
        rng: Shuffles.

    Returns:
        For each split, its image ids (unique over the splits) and their scenes.
    """
    scenes = all_scenes()
    left = [scenes[position] for position in rng.permutation(len(scenes))]
    pools = {}
    for split in ("test", "val"):
        size = min(counts[split], int(HELD_OUT_SHARE * len(scenes)))
        pools[split], left = left[:size], left[size:]
    pools["train"] = left
    ids = itertools.count(1)
    return {
        split: [
            (next(ids), scene)
            for scene in itertools.islice(itertools.cycle(pools[split]), counts[split])
        ]
        for split in SPLITS
    }


def write_data_set(
    directory: str | Path, counts: Mapping[str, int], image_size: int = 64, seed: int = 0
) -> None:
    """Draw a data set, whole or not at all.

    ``directory/images/SPLIT/`` gets the pictures, ``directory/annotations/`` gets
    ``captions_SPLIT.json`` (COCO captions) and ``scenes_SPLIT.json`` (the records). The same
    arguments give the same bytes under the same versions of numpy and pillow.

    Args:
        directory: Where; it is made, or replaced where it holds such a data set already.
        counts: How many images each of SPLITS has.
        image_size: Width and height in pixels.
        seed: Decides everything that is left to chance.

    Raises:
        UsageError: A count, the size or the seed is out of range.
        DataError: The directory holds something else.
    """
    directory = Path(directory).resolve()
    _check_request(counts, image_size, seed)
    _check_replaceable(directory)
    dealt = split_scenes(counts, np.random.default_rng(seed))
    total = sum(counts.values())
    with (
        atomic_directory(directory) as aside,
        Progress("drawing", total, "image") as progress,
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as workers,
    ):

        def draw_and_save(folder: Path, image_id: int, scene: Scene) -> Record:
            # Each image has its own stream of random numbers, whichever thread draws it when.
            rng = np.random.default_rng([seed, image_id])
            record, image = draw(scene, image_id, image_size, rng)
            image.save(folder / record.file_name)
            return record

        for split in SPLITS:
            folder = aside / "images" / split
            folder.mkdir(parents=True)
            records = []
            for record in workers.map(
                draw_and_save, itertools.repeat(folder), *zip(*dealt[split], strict=True)
            ):
                records.append(record)
                progress.update()
            _write_annotations(aside / "annotations", split, records)


def _check_request(counts: Mapping[str, int], image_size: int, seed: int) -> None:
    for split in SPLITS:
        if counts[split] < 1:
            raise UsageError(f"--{split} must be 1 image or more, found {counts[split]}")
    if image_size < LEAST_IMAGE_SIZE:
        raise UsageError(
            f"--image-size must be {LEAST_IMAGE_SIZE} pixels or more, found {image_size}: smaller "
            "stars and crosses can't be told apart"
        )
    if seed < 0:
        raise UsageError(f"--seed must be 0 or more, found {seed}")


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise DataError(f"{directory}: this is a file, a folder was expected")
    found = {entry.name for entry in directory.iterdir()}
    drawn = (directory / "annotations" / "scenes_train.json").is_file()
    if found and not (drawn and found == {"images", "annotations"}):
        raise DataError(
            f"{directory}: holds other files ({name_some(sorted(found))}); give a folder that is "
            "empty or isn't there yet"
        )
    if Path.cwd().is_relative_to(directory):
        raise DataError(f"{directory}: can't be replaced while it is the working directory")


def _write_annotations(folder: Path, split: str, records: Sequence[Record]) -> None:
    images = [
        {
            "id": record.image_id,
            "file_name": record.file_name,
            "width": record.image_size,
            "height": record.image_size,
        }
        for record in records
    ]
    captions = [
        {"id": 5 * record.image_id + number, "image_id": record.image_id, "caption": caption}
        for record in records
        for number, caption in enumerate(captions_of(record.scene))
    ]
    info = {"description": "rendered scenes", "split": split}
    write_json(
        folder / f"captions_{split}.json",
        {"info": info, "images": images, "annotations": captions},
        indent=None,
    )
    write_json(
        folder / f"scenes_{split}.json",
        {"info": info, "scenes": [asdict(record) for record in records]},
        indent=None,
    )


def read_records(path: str | Path) -> list[Record]:
    """Read the records of a split.

    Raises:
        DataError: It is no such file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("scenes"), list):
        raise DataError(f"{path}: not a file of scenes (scenes_SPLIT.json of the data set)")
    try:
        records = TypeAdapter(list[Record]).validate_python(content["scenes"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{path}: scenes.{place}: {first['msg'].lower()}") from None
    for position, record in enumerate(records):
        _check_word(path, position, record.relation, INVERSE)
        for placed in record.objects:
            _check_word(path, position, placed.size, SIZES)
            _check_word(path, position, placed.colour, COLOURS)
            _check_word(path, position, placed.shape, SHAPES)
    return records


def _check_word(path: str | Path, position: int, word: str, known: Collection[str]) -> None:
    if word not in known:
        raise DataError(
            f"{path}: scenes[{position}]: {word!r} is none of {', '.join(known)}"
            f"{did_you_mean(word, known)}"
        )


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
        part: [said[part] == seen[part] for said, seen in pairs]
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
    strangers = [key for key in captions if key not in names]
    if strangers:
        raise DataError(
            f"{len(strangers)} captions are of images that the scenes don't have "
            f"({name_some(strangers)}); are they of another split?"
        )
    given: dict[int, str] = {}
    for key, caption in captions.items():
        if names[key] in given:
            raise DataError(f"image {names[key]} has two captions, under its id and its file name")
        given[names[key]] = caption
    ordered = {record.image_id: given.get(record.image_id, "") for record in records}
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
