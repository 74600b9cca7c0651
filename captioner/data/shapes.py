"""Rendered scenes: what a picture can show, and how it is drawn.

What a picture shows is a ``Scene``: two ``Thing``s (size, colour, shape) and where the first lies
relative to the second. The first is the *figure*, the second the *ground* by which it is located:
the smaller object where their sizes differ, else the left or upper one, as people mostly choose
them (Talmy 1975, "Figure and ground in complex sentences": the bicycle is beside the house, hardly
the house beside it). So the words of a scene are a function of the picture, and can be learnt
exactly. ``shapes_dataset`` writes a data set of them, ``shape_captions`` its captions.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from PIL import Image, ImageDraw

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
