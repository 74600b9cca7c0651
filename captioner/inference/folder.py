"""Captions for image files, however many, and whatever happens to single ones."""

import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch

from captioner.config import SearchConfig
from captioner.data.annotations import ImageId
from captioner.data.images import PixelBatch, stream_pixels
from captioner.data.listing import ImageFile, batched
from captioner.device import free_memory, is_out_of_memory
from captioner.errors import CaptionerError
from captioner.inference.captioner import Caption, Captioner
from captioner.inference.records import RankedCaption, Record, record_of
from captioner.progress import Progress, log_line
from captioner.search.hypothesis import NO_PROBABILITIES


def caption_files(
    captioner: Captioner,
    images: Sequence[ImageFile],
    search: SearchConfig,
    batch_size: int = 0,
    workers: int = -1,
) -> tuple[dict[ImageId, tuple[RankedCaption, ...]], dict[str, str]]:
    """Caption image files that fit into memory; see ``caption_stream``.

    Returns:
        The captions by image id, best first; and why, by name, images couldn't be captioned.
    """
    captions: dict[ImageId, tuple[RankedCaption, ...]] = {}
    failed: dict[str, str] = {}
    with Progress("captioning", len(images), "image") as bar:
        for records in caption_stream(captioner, images, search, batch_size, workers):
            for record in records:
                if record.error:
                    failed[record.name] = record.error
                    log_line(f"warning: {record.error}")
                else:
                    captions[record.image_id] = record.captions
            bar.update(len(records))
    return captions, failed


def caption_stream(
    captioner: Captioner,
    images: Iterable[ImageFile],
    search: SearchConfig,
    batch_size: int = 0,
    workers: int = -1,
) -> Iterator[list[Record]]:
    """Caption image files, batch by batch, in order.

    Args:
        captioner: The captioner.
        images: What to caption; walked through in the caller's thread, a few batches ahead.
        search: How. Samples of an image depend on its id, not on the images beside it.
        batch_size: Images encoded and decoded at a time; 0 takes what fits into memory. Where
            memory runs out all the same, batches are halved from there on.
        workers: Processes (GPU) or threads (CPU) that read images; -1 takes one a core.

    Yields:
        A record for each image of a batch: its captions, or why it couldn't be captioned.

    Raises:
        CaptionerError: Even a single image is too much.
    """
    at_once = batch_size or _fitting(captioner, search)
    waiting: deque[list[ImageFile]] = deque()  # batches that are being read

    def batches() -> Iterator[list[tuple[int, str]]]:
        for batch in batched(images, at_once):
            waiting.append(batch)
            yield [(index, str(image.path)) for index, image in enumerate(batch)]

    preprocessing = captioner.preprocessing
    for loaded in stream_pixels(batches(), preprocessing, captioner.device, workers):
        batch = waiting.popleft()
        readable = [batch[index] for index in loaded.indices]
        captions, at_once = _caption_batch(captioner, loaded.pixels, readable, search, at_once)
        yield _records(batch, loaded, captions)


def _records(
    batch: Sequence[ImageFile], loaded: PixelBatch, captions: Sequence[Sequence[Caption]]
) -> list[Record]:
    """Return a record for each image of a batch."""
    errors = dict(loaded.failures)
    found = dict(zip(loaded.indices, zip(captions, loaded.sizes, strict=True), strict=True))
    records = []
    for index, image in enumerate(batch):
        best, size = found.get(index, ((), (0, 0)))
        error = errors.get(index, "" if best else f"{image.path}: {NO_PROBABILITIES}")
        records.append(record_of(image, best, size, error))
    return records


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
