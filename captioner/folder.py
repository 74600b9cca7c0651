"""Captions for a folder of images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from captioner.annotations import ImageId, read_annotations
from captioner.captioner import Captioner
from captioner.config import SearchConfig
from captioner.errors import DataError, name_some
from captioner.images import in_batches, load_pixels
from captioner.progress import Progress, say

IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".webp", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico", ".tga"),
}


@dataclass(frozen=True)
class ImageFile:
    """An image to caption.

    Attributes:
        image_id: What the results call it.
        name: Its path below the folder, with ``/`` between the parts.
        path: Where it is.
    """

    image_id: ImageId
    name: str
    path: Path


def find_images(folder: str | Path) -> list[ImageFile]:
    """Return the images in a folder and the folders below it, by name.

    Raises:
        DataError: The folder is missing or holds no image.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    found, others = [], 0
    for parent, folders, names in os.walk(folder, onerror=_report):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                others += 1
            else:
                relative = path.relative_to(folder).as_posix()
                found.append(ImageFile(relative, relative, path))
    if not found:
        raise DataError(f"{folder}: no image files (of {others} files none ends in .jpg, .png, …)")
    if others:
        say(f"{folder}: {others} files are passed over: hidden, or no images by their suffix")
    return found


def _report(error: OSError) -> None:
    say(f"warning: {error.filename}: this folder can't be read ({error.strerror}); it is left out")


def listed_images(
    folder: str | Path, annotations: str | Path, split: str | None = None
) -> list[ImageFile]:
    """Return the images that a captions file lists, with its ids.

    Raises:
        DataError: The file can't be read, or lists no file names.
    """
    images = read_annotations(annotations, split).images
    nameless = [image.image_id for image in images if not image.file_name]
    if nameless:
        raise DataError(
            f"{annotations}: {len(nameless)} images have no 'file_name' (ids {name_some(nameless)})"
        )
    if not images:
        raise DataError(f"{annotations}: it lists no images")
    return [
        ImageFile(image.image_id, str(image.file_name), Path(folder) / str(image.file_name))
        for image in images
    ]


def caption_files(
    captioner: Captioner,
    images: Sequence[ImageFile],
    search: SearchConfig,
    batch_size: int = 32,
    workers: int = -1,
) -> tuple[dict[ImageId, str], dict[str, str]]:
    """Caption image files, whatever happens to single ones.

    Args:
        captioner: The captioner.
        images: What to caption.
        search: How.
        batch_size: Images encoded and decoded at a time.
        workers: Processes that read images; -1 takes one a core.

    Returns:
        The captions by image id, and for each image that couldn't be read its name and why.
    """
    captions: dict[ImageId, str] = {}
    failed: dict[str, str] = {}
    loaded = load_pixels(
        [image.path for image in images],
        captioner.model.encoder.preprocessing,
        in_batches(len(images), batch_size),
        workers,
        pin_memory=captioner.device.type == "cuda",
    )
    with Progress("captioning", len(images), "image") as bar:
        for batch in loaded:
            for index, message in batch.failures:
                failed[images[index].name] = message
                say(f"warning: {message}")
            if batch.indices:
                found = captioner.hypotheses(batch.pixels, search)
                words = captioner.model.words(found)
                captions |= zip((images[i].image_id for i in batch.indices), words, strict=True)
            bar.update(len(batch.indices) + len(batch.failures))
    return captions, failed
