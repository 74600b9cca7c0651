"""Which images are meant: by files, folders, patterns, lists, captions files and shards.

A listing may name millions of files: it is walked through, never held. Walked through again it
gives the same images in the same order, as long as the folders stay the same.
"""

import hashlib
import heapq
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import BinaryIO, TypeVar

from captioner.data.annotations import ImageId, read_annotations
from captioner.data.image_files import is_remote
from captioner.data.image_formats import IMAGE_SUFFIXES
from captioner.errors import DataError, UsageError, name_some
from captioner.files import open_regular
from captioner.progress import log_line

NAMES_AT_ONCE = 50_000  # of a folder, that are sorted in memory; 5 MB or so
STANDARD_INPUT = "-"

T = TypeVar("T")


@dataclass(frozen=True)
class ImageFile:
    """An image to caption.

    Attributes:
        image_id: What the results call it.
        name: Its path below the folder, or as it was given; with ``/`` between the parts.
        path: Where it is; text for an address such as ``s3://bucket/dog.jpg``.
    """

    image_id: ImageId
    name: str
    path: Path | str


@dataclass(frozen=True)
class Selection:
    """What of a folder is taken.

    Attributes:
        include: Patterns, such as ``*.jpg`` or ``2024/*``; an image is taken if its path below the
            folder, or its last part, fits one of them. None takes all.
        exclude: Likewise what isn't taken: images, and folders with all that is in them.
        recursive: Whether folders in the folder are walked through.
        follow_links: Whether links to folders are. A link to a file always is.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    recursive: bool = True
    follow_links: bool = False

    def takes(self, name: str) -> bool:
        """Tell whether an image is taken, by its path below the folder."""
        return not self.leaves(name) and (not self.include or _fits(name, self.include))

    def leaves(self, name: str) -> bool:
        """Tell whether an image or a folder is left out, by its path below the folder."""
        return bool(self.exclude) and _fits(name, self.exclude)


def _fits(name: str, patterns: Sequence[str]) -> bool:
    last = name.rpartition("/")[2]
    return any(fnmatch(name, pattern) or fnmatch(last, pattern) for pattern in patterns)


EVERYTHING = Selection()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Walk through items in lists of ``size``; the last may be shorter."""
    left = iter(items)
    while batch := list(islice(left, size)):
        yield batch


@dataclass(frozen=True)
class Shard:
    """A part of a listing, by a hash of the images' names: the same for whoever asks.

    Attributes:
        number: Which part, from 1.
        count: How many parts there are.
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Return the shard that ``"2/8"`` means.

        Raises:
            ValueError: It means none.
        """
        number, slash, count = text.partition("/")
        shard = cls(int(number), int(count))
        if not slash or not 1 <= shard.number <= shard.count:
            raise ValueError(text)
        return shard

    def __contains__(self, name: str) -> bool:
        """Tell whether an image is in it, by its name."""
        digest = hashlib.sha256(os.fsencode(name)).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.number - 1

    def __str__(self) -> str:
        """Return it as it is given: ``"2/8"``."""
        return f"{self.number}/{self.count}"


def find_images(inputs: str | Path | Sequence[str | Path]) -> list[ImageFile]:
    """Return the images that files and folders name, see ``iterate_images``.

    Raises:
        DataError: A file or folder is missing, or there is no image.
    """
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    check_inputs(paths)
    images = list(iterate_images(paths))
    if not images:
        raise DataError(f"{name_some(paths)}: no image to caption")
    return images


def check_inputs(paths: Iterable[Path]) -> None:
    """Refuse files and folders that aren't there."""
    for path in paths:
        if not os.path.exists(path):
            raise DataError(f"{path}: no such file or folder")


def iterate_images(
    paths: Sequence[Path], selection: Selection = EVERYTHING, quiet: bool = False
) -> Iterator[ImageFile]:
    """Walk through the images that files and folders name, in their order.

    A folder stands for the images in it and in the folders below it, by name. A file is taken for
    an image whatever its suffix, and whatever the selection.

    Ids are names. Of a single folder, an image's name is its path below the folder; of anything
    else it is the path as given: the file's own, or the folder's with the path below it. So no two
    images have the same id, and one that is given twice comes once.

    Args:
        paths: Files and folders.
        selection: What of the folders is taken.
        quiet: Report neither files that are passed over nor folders that can't be read.
    """
    files: set[Path] = set()
    folders: list[Path] = []
    for path in paths:
        if not os.path.isdir(path):
            if path not in files and not any(path.is_relative_to(folder) for folder in folders):
                yield ImageFile(path.as_posix(), path.as_posix(), path)
            files.add(path)
            continue
        for below in _Walk(path, selection, quiet):
            file = path / below
            twice = any(file.is_relative_to(folder) for folder in folders)
            if not twice and file not in files:
                name = below if len(paths) == 1 else file.as_posix()
                yield ImageFile(name, name, file)
        folders.append(path)


class _Walk:
    """The names, below a folder, of the files in it that are images by their suffix."""

    def __init__(self, folder: Path, selection: Selection, quiet: bool) -> None:
        self.folder, self.selection = folder, selection
        self.report: Callable[[str], None] = (lambda message: None) if quiet else log_line
        self.found = self.others = 0

    def __iter__(self) -> Iterator[str]:
        yield from self._walk("", ())
        if not self.found:
            self.report(
                f"warning: {self.folder}: no image files (of {self.others} none ends in .jpg, "
                ".png, …)"
            )
        elif self.others:
            self.report(
                f"{self.folder}: {self.others} files are passed over: hidden, or no images by "
                "their suffix"
            )

    def _walk(self, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
        """Yield the names in a folder of the folder, then those in the folders in it."""
        folder = self.folder / below
        folders: list[str] = []
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in above:  # a link that leads back
                return
            for name in _sorted(self._files(folder, below, folders)):
                self.found += 1
                yield below + name
        except OSError as error:
            self.report(
                f"warning: {error.filename}: this folder can't be read ({error.strerror}); it is "
                "left out"
            )
        for name in sorted(folders):
            yield from self._walk(f"{below}{name}/", (*above, identity))

    def _files(self, folder: Path, below: str, folders: list[str]) -> Iterator[str]:
        """Yield the names of images in a folder, in no order, and add those of its folders."""
        with os.scandir(folder) as entries:
            for entry in entries:
                name, is_hidden = entry.name, entry.name.startswith(".")
                if _is_folder(entry):
                    follow = self.selection.follow_links or not entry.is_symlink()
                    if self.selection.recursive and follow and not is_hidden:
                        folders += [] if self.selection.leaves(below + name) else [name]
                elif is_hidden or os.path.splitext(name)[1].lower() not in IMAGE_SUFFIXES:
                    self.others += 1
                elif self.selection.takes(below + name):
                    yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _sorted(names: Iterator[str]) -> Iterator[str]:
    """Sort names; many of them in parts, that wait in temporary files."""
    with ExitStack() as stack:
        parts: list[Iterator[str]] = []
        while part := sorted(islice(names, NAMES_AT_ONCE)):
            if len(part) < NAMES_AT_ONCE and not parts:
                yield from part
                return
            file = stack.enter_context(tempfile.TemporaryFile())
            # No name holds a NUL, and so no line break that one stands for.
            file.writelines(os.fsencode(name).replace(b"\n", b"\0") + b"\n" for name in part)
            file.seek(0)
            parts.append(_read_names(file))
        yield from heapq.merge(*parts)


def _read_names(file: BinaryIO) -> Iterator[str]:
    for line in file:
        yield os.fsdecode(line[:-1].replace(b"\0", b"\n"))


# --- lists ------------------------------------------------------------------------------------


def read_list(source: str, ending: bytes = b"\n") -> Iterator[ImageFile]:
    r"""Walk through the images whose paths a file lists, one a line; empty lines are passed over.

    Addresses that fsspec knows (``s3://…``) are taken, too.

    Args:
        source: The file, or ``-`` for standard input.
        ending: What ends a path: ``b"\0"`` where names may hold line breaks.

    Raises:
        DataError: The file can't be read.
    """
    try:
        with sys.stdin.buffer if source == STANDARD_INPUT else open_regular(source) as file:
            for line in _lines(file, ending):
                name = os.fsdecode(line)
                if is_remote(name):
                    yield ImageFile(name, name, name)
                elif name:
                    path = Path(name)
                    yield ImageFile(path.as_posix(), path.as_posix(), path)
    except OSError as error:
        raise DataError(f"{source}: can't be read ({error.strerror})") from None


def _lines(file: BinaryIO, ending: bytes) -> Iterator[bytes]:
    if ending == b"\n":
        for line in file:
            yield line.rstrip(b"\r\n")
        return
    rest = b""
    while block := file.read(1 << 16):
        *whole, rest = (rest + block).split(ending)
        yield from whole
    yield rest


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


# --- listings ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The images of a job, to be walked through.

    Attributes:
        key: What they were asked for by; the same again for the same images.
        walk: Walks through them; its argument says whether to do so without reports.
        shard: The part of them that is meant.
        once: Whether they can be walked through just once, as standard input.
    """

    key: str
    walk: Callable[[bool], Iterable[ImageFile]]
    shard: Shard | None = None
    once: bool = False

    @classmethod
    def of_inputs(
        cls, paths: Sequence[Path], selection: Selection = EVERYTHING, shard: Shard | None = None
    ) -> "Listing":
        """Return the listing of files and folders.

        Raises:
            DataError: One isn't there.
        """
        check_inputs(paths)
        key = ", ".join(map(os.path.abspath, paths))
        key += f" {selection}" if selection != EVERYTHING else ""
        return cls(key, lambda quiet: iterate_images(paths, selection, quiet), shard)

    @classmethod
    def of_list(cls, source: str, zero: bool = False, shard: Shard | None = None) -> "Listing":
        """Return the listing of a file that holds paths, or of standard input (``-``)."""
        if source != STANDARD_INPUT and not os.path.isfile(source):
            raise UsageError(f"--from-file {source}: no such file")
        ending = b"\0" if zero else b"\n"
        once = source == STANDARD_INPUT
        key = source if once else os.path.abspath(source)
        return cls(f"paths in {key}", lambda quiet: read_list(source, ending), shard, once)

    @classmethod
    def of_annotations(
        cls, folder: Path, annotations: Path, split: str | None, shard: Shard | None = None
    ) -> "Listing":
        """Return the listing of the images of a folder that a captions file lists."""
        images = listed_images(folder, annotations, split)
        names = hashlib.sha256(repr(images).encode("utf-8", "surrogatepass")).hexdigest()[:16]
        key = f"{os.path.abspath(folder)} of {os.path.abspath(annotations)} ({names})"
        return cls(key, lambda quiet: images, shard)

    def images(self, quiet: bool = False) -> Iterator[ImageFile]:
        """Walk through the images."""
        for image in self.walk(quiet):
            if self.shard is None or image.name in self.shard:
                yield image


class Counter(threading.Thread):
    """Counts a listing's images beside other work, from ``begin`` to the end of a ``with`` block.

    Args:
        listing: What is counted; one that can be walked through once isn't.
        report: Called with the count.
    """

    def __init__(self, listing: Listing, report: Callable[[int], object]) -> None:
        super().__init__(daemon=True, name="counter")
        self.listing, self.report = listing, report
        self._stopped = threading.Event()
        self._has_begun = listing.once

    def __enter__(self) -> "Counter":
        return self

    def begin(self) -> None:
        """Begin to count, the first time that this is called."""
        if not self._has_begun:
            self._has_begun = True
            self.start()

    def __exit__(self, *error: object) -> None:
        self._stopped.set()

    def run(self) -> None:
        """Count; what can't be counted has no total."""
        count = 0
        try:
            for _ in self.listing.images(quiet=True):
                count += 1
                if self._stopped.is_set():
                    return
        except (OSError, DataError):
            return
        self.report(count)
