"""Captions for image files from an exported captioner, without torch; see ``folder``."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from captioner.data.listing import ImageFile, batched
from captioner.data.preprocessing import DecodingMemory, count_cores, to_pixels
from captioner.errors import ImageError
from captioner.inference.records import Record, record_of
from captioner.runtime.captioner import OnnxCaptioner
from captioner.search.hypothesis import NO_PROBABILITIES
from captioner.search_config import SearchConfig

BATCH_SIZE = 32


def onnx_stream(
    captioner: OnnxCaptioner,
    images: Iterable[ImageFile],
    search: SearchConfig,
    batch_size: int = 0,
    workers: int = -1,
) -> Iterator[list[Record]]:
    """Caption image files, batch by batch, in order.

    Args:
        captioner: The captioner.
        images: What to caption.
        search: How.
        batch_size: Images encoded and decoded at a time; 0 takes 32, of the first batch one, so
            that its caption is there at once.
        workers: Threads that read images; -1 takes one a core.

    Yields:
        A record for each image of a batch: its captions, or why it couldn't be captioned.
    """
    memory = DecodingMemory(processes=False)

    def read(image: ImageFile) -> tuple[np.ndarray | None, tuple[int, int], str]:
        try:
            with memory.reader() as reserve:
                square, size = captioner.preprocessing.load_square(str(image.path), reserve)
            return to_pixels(square), size, ""
        except ImageError as error:
            return None, (0, 0), str(error)
        except MemoryError:
            return None, (0, 0), f"{image.path}: there is too little memory to read it"

    with ThreadPoolExecutor(count_cores() if workers < 0 else max(1, workers)) as threads:
        for batch in _batches(images, batch_size):
            loaded = list(threads.map(read, batch))
            pixels = [part for part, _, _ in loaded if part is not None]
            found = iter(captioner.captions(np.stack(pixels), search) if pixels else [])
            records = []
            for image, (part, size, error) in zip(batch, loaded, strict=True):
                captions = [] if part is None else next(found)
                if part is not None and not captions:
                    error = f"{image.path}: {NO_PROBABILITIES}"
                records.append(record_of(image, captions, size, error))
            yield records


def _batches(images: Iterable[ImageFile], batch_size: int) -> Iterator[list[ImageFile]]:
    left = iter(images)
    if not batch_size and (first := next(left, None)):
        yield [first]
    yield from batched(left, batch_size or BATCH_SIZE)
