"""Batches of images, decoded and made the CNN's input by threads or processes."""

import dataclasses
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from captioner.data.augmentation import Augmentation
from captioner.data.image_files import Reserve, max_pixels
from captioner.data.preprocessing import DecodingMemory, Preprocessing, Size, count_cores
from captioner.errors import ImageError

Augment = Callable[[int], Augmentation]


@dataclass
class PixelBatch:
    """Some images of a list, decoded.

    Attributes:
        indices: Which images of the list these are, of length B.
        pixels: (B, 3, S, S), uint8.
        failures: (index, message) of those that couldn't be read.
        sizes: Of the B images in their files.
    """

    indices: list[int]
    pixels: torch.Tensor
    failures: list[tuple[int, str]]
    sizes: list[Size] = field(default_factory=list)

    def pin_memory(self) -> "PixelBatch":
        """Return it with its pixels in pinned memory; DataLoader calls this for a GPU."""
        return dataclasses.replace(self, pixels=self.pixels.pin_memory())


def load_pixels(
    paths: Sequence[str | Path],
    preprocessing: Preprocessing,
    batches: Sequence[Sequence[int]],
    device: torch.device,
    workers: int = -1,
    augment: Augment | None = None,
) -> Iterator[PixelBatch]:
    """Decode and preprocess images, batch by batch, in order.

    Args:
        paths: All image files.
        preprocessing: What is done to each.
        batches: Indices into ``paths``, a list for each batch.
        device: What computes with the pixels; see ``stream_pixels``.
        workers: Processes or threads; see ``stream_pixels``.
        augment: How an image of ``paths`` is changed in training, by its index.
    """
    named = ([(index, paths[index]) for index in batch] for batch in batches)
    workers = workers if len(batches) > 1 or device.type == "cpu" else 0
    return stream_pixels(named, preprocessing, device, workers, augment)


def stream_pixels(
    batches: Iterable[Sequence[tuple[int, str | Path]]],
    preprocessing: Preprocessing,
    device: torch.device,
    workers: int = -1,
    augment: Augment | None = None,
) -> Iterator[PixelBatch]:
    """Decode and preprocess images, batch by batch, in order, however many there are.

    For a GPU worker processes decode the next batches while it computes. On a CPU that computes
    itself they would only take its cores away at the wrong moment: there threads decode a batch
    when it is asked for, and end before the computing starts.

    Args:
        batches: An index and a path for each image of a batch. A batch is asked for in the
            caller's thread, not long before it is decoded.
        preprocessing: What is done to each.
        device: What computes with the pixels; they are not moved there.
        workers: Processes or threads; 0 decodes in this one, -1 takes one a core (16 at most).
            All together hold about 1 GiB of large images at a time (``DecodingMemory``). An image
            for which memory runs out is read again while no other large one is held; then it fails.
        augment: How an image is changed in training, by its index.
    """
    max_pixels()  # if it is set wrong, that is said here
    if workers < 0:
        workers = min(16, count_cores())
    in_threads = device.type == "cpu" and workers > 0
    files = _ImageFiles(preprocessing, DecodingMemory(processes=not in_threads), augment)
    if in_threads:
        return _load_in_threads(files, batches, workers)
    return iter(
        DataLoader(
            files,
            batch_sampler=batches,  # type: ignore[arg-type]
            collate_fn=_collate,
            num_workers=workers,
            generator=torch.Generator(),  # its own: dropout's random numbers stay as they are
            pin_memory=device.type == "cuda",
            worker_init_fn=_ignore_ctrl_c,
        )
    )


def _ignore_ctrl_c(worker: int) -> None:
    """A terminal sends Ctrl-C to all processes: what it ends is for the main one to say."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _load_in_threads(
    files: "_ImageFiles", batches: Iterable[Sequence[tuple[int, str | Path]]], workers: int
) -> Iterator[PixelBatch]:
    with ThreadPoolExecutor(workers) as threads:
        for batch in batches:
            yield _collate(list(threads.map(files.__getitem__, batch)))


def in_batches(count: int, batch_size: int) -> list[range]:
    """Return the indices 0 to ``count`` - 1 in batches."""
    return [range(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]


_Loaded = tuple[int, torch.Tensor | None, Size, str]


class _ImageFiles(Dataset):
    """Image files as DataLoader takes them; indexed by an index and a path."""

    def __init__(
        self, preprocessing: Preprocessing, memory: DecodingMemory, augment: Augment | None = None
    ) -> None:
        self.preprocessing, self.memory, self.augment = preprocessing, memory, augment

    def __getitem__(self, image: tuple[int, str | Path]) -> _Loaded:
        index, path = image
        for alone in (False, True):  # the memory that others hold may be what it lacks
            try:
                return index, *self._load(index, path, alone), ""
            except ImageError as error:
                return index, None, (0, 0), str(error)
            except MemoryError:
                pass  # what the failed try held is free again after this clause
        message = "there is too little memory to read it; free some, or scale the image down"
        return index, None, (0, 0), f"{path}: {message}"

    def _load(self, index: int, path: str | Path, alone: bool) -> tuple[torch.Tensor, Size]:
        with self.memory.reader() as reserve:
            if alone:
                reserve(self.memory.BLOCK_BYTES * self.memory.BLOCKS)
            augmentation = self.augment(index) if self.augment else None
            return self._pixels(path, reserve, augmentation)

    def _pixels(
        self, path: str | Path, reserve: Reserve, augmentation: Augmentation | None
    ) -> tuple[torch.Tensor, Size]:
        """Return the pixels and the size; the image itself is free again when this returns."""
        image = self.preprocessing.open(path, reserve, augmentation=augmentation)
        return self.preprocessing(image, augmentation), image.info["original_size"]


def _collate(items: list[_Loaded]) -> PixelBatch:
    good = [(index, pixels, size) for index, pixels, size, _ in items if pixels is not None]
    return PixelBatch(
        indices=[index for index, _, _ in good],
        pixels=torch.stack([pixels for _, pixels, _ in good]) if good else torch.empty(0),
        failures=[(index, message) for index, pixels, _, message in items if pixels is None],
        sizes=[size for _, _, size in good],
    )
