"""The data set of rendered scenes: scenes dealt to splits, drawn and written with captions."""

import itertools
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter, ValidationError

from captioner.data.shape_captions import captions_of
from captioner.data.shapes import (
    COLOURS,
    HELD_OUT_SHARE,
    INVERSE,
    LEAST_IMAGE_SIZE,
    SHAPES,
    SIZES,
    SPLITS,
    Record,
    Scene,
    all_scenes,
    draw,
)
from captioner.errors import DataError, UsageError, did_you_mean, name_some
from captioner.files import atomic_directory, read_json, write_json
from captioner.progress import Progress


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
    remaining = [scenes[position] for position in rng.permutation(len(scenes))]
    pools = {}
    for split in ("test", "val"):
        size = min(counts[split], int(HELD_OUT_SHARE * len(scenes)))
        pools[split], remaining = remaining[:size], remaining[size:]
    pools["train"] = remaining
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

    ``images/SPLIT/`` gets the pictures, ``annotations/`` gets ``captions_SPLIT.json`` (COCO
    captions) and ``scenes_SPLIT.json``. The same arguments give the same bytes (with the same
    numpy and pillow).

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
    with (
        atomic_directory(directory) as aside,
        Progress("drawing", sum(counts.values()), "image") as progress,
        ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as workers,
    ):

        def draw_and_save(folder: Path, image_id: int, scene: Scene) -> Record:
            # Its own stream of random numbers, whichever thread draws it when.
            rng = np.random.default_rng([seed, image_id])
            record, image = draw(scene, image_id, image_size, rng)
            image.save(folder / record.file_name)
            return record

        for split in SPLITS:
            folder = aside / "images" / split
            folder.mkdir(parents=True)
            ids, scenes = zip(*dealt[split], strict=True)
            records = []
            for record in workers.map(draw_and_save, itertools.repeat(folder), ids, scenes):
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
    names = {entry.name for entry in directory.iterdir()}
    drawn = (directory / "annotations" / "scenes_train.json").is_file()
    if names and not (drawn and names == {"images", "annotations"}):
        raise DataError(
            f"{directory}: holds other files ({name_some(sorted(names))}); give a folder that is "
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
