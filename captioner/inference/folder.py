"""Captions for image files and folders of them."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from captioner.config import SearchConfig
from captioner.data.annotations import ImageId, read_annotations
from captioner.data.image_files import IMAGE_SUFFIXES
from captioner.data.images import in_batches, load_pixels
from captioner.device import free_memory, is_out_of_memory
from captioner.errors import CaptionerError, DataError, name_some
from captioner.inference.captioner import Caption, Captioner
from captioner.progress import Progress, log_line
from captioner.search import NO_PROBABILITIES


@dataclass(frozen=True)
class ImageFile:
    """An image to caption.

    Attributes:
        image_id: What the results call it.
        name: Its path below the folder, or as it was given; with ``/`` between the parts.
        path: Where it is.
    """

    image_id: ImageId
    name: str
    path: Path


def find_images(inputs: str | Path | Sequence[str | Path]) -> list[ImageFile]:
    """Return the images that files and folders name, in their order.

    A folder stands for the images in it and in the folders below it, by name. A file is taken for
    an image whatever its suffix.

    Ids are names. Of a single folder, an image's name is its path below the folder; of anything
    else it is the path as given: the file's own, or the folder's with the path below it. So no two
    images have the same id, and one that is given twice comes once.

    Raises:
        DataError: A file or folder is missing, or there is no image.
    """
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")
    images: dict[str, ImageFile] = {}
    for path in paths:
        for file in _files_below(path) if os.path.isdir(path) else [path]:
            below = len(paths) == 1 and file != path
            name = (file.relative_to(path) if below else file).as_posix()
            images.setdefault(name, ImageFile(name, name, file))
    if not images:
        raise DataError(f"{name_some(paths)}: no image to caption")
    return list(images.values())


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder whose names say that they are images, and report the others."""
    found, others = [], 0
    for parent, folders, names in os.walk(folder, onerror=_report):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(parent) / name
            if name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                others += 1
            else:
                found.append(path)
    if not found:
        log_line(f"warning: {folder}: no image files (of {others} none ends in .jpg, .png, …)")
    elif others:
        log_line(f"{folder}: {others} files are passed over: hidden, or no images by their suffix")
    return found


def _report(error: OSError) -> None:
    log_line(
        f"warning: {error.filename}: this folder can't be read ({error.strerror}); it is left out"
    )


def listed_images(
    folder: str | Path, annotations: str | Path, split: str | None = None
) -> list[ImageFile]:
    """Return the images that a captions file lists, with its ids.

    Raises:
        DataError: The folder is missing; the file can't be read, or lists no file names.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{folder}: no such folder")
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
    batch_size: int = 0,
    workers: int = -1,
) -> tuple[dict[ImageId, list[Caption]], dict[str, str]]:
    """Caption image files, whatever happens to single ones.

    Args:
        captioner: The captioner.
        images: What to caption.
        search: How. Samples of an image depend on its id, not on the images beside it.
        batch_size: Images encoded and decoded at a time; 0 takes what fits into memory. Where
            memory runs out all the same, batches are halved from there on.
        workers: Processes (GPU) or threads (CPU) that read images; -1 takes one a core.

    Returns:
        The captions by image id, best first; and why, by name, images couldn't be captioned.

    Raises:
        CaptionerError: Even a single image is too much.
    """
    captions: dict[ImageId, list[Caption]] = {}
    failed: dict[str, str] = {}
    at_once = batch_size or _fitting(captioner, search)
    preprocessing = captioner.model.encoder.preprocessing
    paths, batches = [image.path for image in images], in_batches(len(images), at_once)
    loaded = load_pixels(paths, preprocessing, batches, captioner.device, workers)
    with Progress("captioning", len(images), "image") as bar:
        for batch in loaded:
            readable = [images[index] for index in batch.indices]
            results, at_once = _caption_batch(captioner, batch.pixels, readable, search, at_once)
            failures = [(images[index], message) for index, message in batch.failures]
            for image, best in zip(readable, results, strict=True):
                if best:
                    captions[image.image_id] = best
                else:
                    failures.append((image, f"{image.path}: {NO_PROBABILITIES}"))
            for image, message in failures:
                failed[image.name] = message
                log_line(f"warning: {message}")
            bar.update(len(batch.indices) + len(batch.failures))
    return captions, failed


def _caption_batch(
    captioner: Captioner,
    pixels: torch.Tensor,
    images: Sequence[ImageFile],
    search: SearchConfig,
    at_once: int,
) -> tuple[list[list[Caption]], int]:
    """Caption the images of a batch, ``at_once`` at a time, or as many as fit into memory.

    Returns:
        The captions of each image, and how many images fitted at a time.
    """
    captions: list[list[Caption]] = []
    while len(captions) < len(images):
        chunk = slice(len(captions), len(captions) + at_once)
        results = _try_captions(captioner, pixels[chunk], images[chunk], search)
        if results is None:  # all that the failed try held is free again here
            at_once = _smaller(len(images[chunk]), captioner.device)
            continue
        captions += results
    return captions, at_once


def _try_captions(
    captioner: Captioner, pixels: torch.Tensor, images: Sequence[ImageFile], search: SearchConfig
) -> list[list[Caption]] | None:
    """Return captions of some images, or None where memory runs out."""
    keys = torch.tensor([_key(image.image_id) for image in images])
    try:
        return captioner.captions(pixels, search, keys)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _fitting(captioner: Captioner, search: SearchConfig) -> int:
    """Return how many images at a time should fit into memory, roughly."""
    model = captioner.model
    pixels = 3 * model.encoder.preprocessing.image_size**2
    regions, width = model.encoder.grid_shape
    forced = sum(len(model.vocabulary.encode(phrase)) for phrase in search.forced)
    beams = max(search.beam_size * (1 + forced), search.samples)
    # What a CNN's widest layers hold; scores of all words; what attention makes of the regions.
    each = 200 * pixels + beams * (16 * len(model.vocabulary) + 8 * regions * width)
    most = 256 if captioner.device.type == "cuda" else 128
    return max(1, min(most, free_memory(captioner.device) // (4 * each)))


def _smaller(at_once: int, device: torch.device) -> int:
    if at_once == 1:
        raise CaptionerError(f"{device} has too little memory for one image: take a smaller beam")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    log_line(
        f"warning: out of memory with {at_once} images at a time: going on with {at_once // 2}"
    )
    return at_once // 2


def _key(image_id: ImageId) -> int:
    """Return a number that is the image's own."""
    return zlib.crc32(str(image_id).encode("utf-8", "surrogatepass"))
