"""COCO 2017 from the web: archives fetched, checked, unpacked; the Karpathy split placed on it."""

import hashlib
import json
import os
import re
import shutil
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from captioner.data.download import BLOCK, check_free_space, download
from captioner.errors import DataError, name_some
from captioner.files import atomic_write, read_json, write_json
from captioner.progress import Progress, log_line

KARPATHY_IMAGES = 123_287


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what is wanted of it.

    Attributes:
        url: Where it is published.
        mirror_path: Where it lies below the base address of a mirror.
        members: Regular expression of the wanted members' whole names; its group is the name
            that the file gets in ``folder``.
        folder: Where the wanted members go, below the user's directory.
        unpacked: Bytes that the wanted members take at most; None accepts what the disk holds.
        size: Bytes of the published archive; None accepts any.
        sha256: SHA-256 of the published archive; None where no value is established.
        files: Number of wanted members; None accepts any above 0.
    """

    url: str
    mirror_path: str
    members: str
    folder: str
    unpacked: int | None = None
    size: int | None = None
    sha256: str | None = None
    files: int | None = None

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rpartition("/")[2]


# Sizes and SHA-256 as torchvision's, ParlAI's and others' loaders have them. Several sources agree
# on the size of caption_datasets.zip, but none is established for its SHA-256.
COCO_ARCHIVES = {
    "karpathy": Archive(
        url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        mirror_path="caption_datasets.zip",
        members=r"(?:[^/]+/)?(dataset_(?:coco|flickr8k|flickr30k)\.json)",
        folder="annotations",
        unpacked=400_000_000,
        size=36_745_453,
        files=3,
    ),
    "annotations": Archive(
        url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        mirror_path="annotations/annotations_trainval2017.zip",
        members=r"annotations/(captions_(?:train|val)2017\.json)",
        folder="annotations",
        unpacked=200_000_000,
        size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        files=2,
    ),
    "val2017": Archive(
        url="http://images.cocodataset.org/zips/val2017.zip",
        mirror_path="zips/val2017.zip",
        members=r"val2017/(\d{12}\.jpg)",
        folder="val2017",
        unpacked=900_000_000,
        size=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        files=5_000,
    ),
    "train2017": Archive(
        url="http://images.cocodataset.org/zips/train2017.zip",
        mirror_path="zips/train2017.zip",
        members=r"train2017/(\d{12}\.jpg)",
        folder="train2017",
        unpacked=20_000_000_000,
        size=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        files=118_287,
    ),
}


def obtain(archive: Archive, directory: Path, keep_archive: bool = False) -> bool:
    """Fetch an archive, check it and unpack what is wanted, as far as that isn't done yet.

    Args:
        archive: What to fetch; one that lies in ``directory/downloads`` already is used.
        directory: Where the files go.
        keep_archive: Leave the archive there when it is unpacked.

    Returns:
        Whether there was anything to do.

    Raises:
        DataError: It can't be fetched or isn't what was expected.
    """
    path = directory / "downloads" / archive.name
    contents = path.with_name(f"{path.name}.contents.json")
    if contents.exists():
        sizes = read_json(contents)
        if all(_has_size(directory / name, size) for name, size in sizes.items()):
            log_line(f"{archive.name}: its {len(sizes):,} files are already in {directory}")
            return False
    if not path.exists():
        needed = (archive.size or 0) + (archive.unpacked or 0)
        check_free_space(directory, needed, f"{archive.name} and what is in it")
        log_line(f"{archive.name}: fetching {archive.url}")
        download(archive.url, path, archive.size)
    _check_archive(archive, path)
    sizes = unpack(archive, path, directory)
    os.sync()  # the list of contents must not outlive the contents in a power cut
    write_json(contents, sizes, indent=None)
    if not keep_archive:
        path.unlink()
    return True


def _check_archive(archive: Archive, path: Path) -> None:
    size, digest = path.stat().st_size, hashlib.sha256()
    if archive.size not in (None, size):
        raise DataError(
            f"{path}: {size:,} bytes, the published one has {archive.size:,}; delete it and run "
            "this again"
        )
    if archive.sha256 is None:
        return
    with open(path, "rb") as file, Progress(f"checking {path.name}", size, "B", scale=True) as bar:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != archive.sha256:
        raise DataError(
            f"{path}: its SHA-256 is {digest.hexdigest()}, the published one's is "
            f"{archive.sha256}; delete it and run this again"
        )


def unpack(archive: Archive, path: Path, directory: Path) -> dict[str, int]:
    """Unpack the wanted members; files that are there with the right size stay.

    Each is written aside and checked by its CRC-32 before it gets its name.

    Args:
        archive: What is wanted.
        path: The archive on disk.
        directory: Where ``archive.folder`` is or will be.

    Returns:
        The size of each file, by its path below ``directory``.

    Raises:
        DataError: No zip archive, damaged, other or larger files than expected, or unsafe names.
    """
    try:
        with zipfile.ZipFile(path) as content:
            targets = _targets(archive, path, content)
            (directory / archive.folder).mkdir(parents=True, exist_ok=True)
            with Progress(f"unpacking {path.name}", len(targets), "file") as progress:
                for name, member in targets.items():
                    if not _has_size(directory / name, member.file_size):
                        _extract(content, member, directory / name)
                    progress.update()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{path}: not a whole zip archive ({error}); delete it and run this again"
        ) from None
    return {name: member.file_size for name, member in targets.items()}


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write a member aside, then rename it: without a wait for the disk for each of 100,000."""
    aside = path.with_name(f".{path.name}.part")
    with content.open(member) as source, open(aside, "wb") as file:
        shutil.copyfileobj(source, file, BLOCK)  # never more than the member's file_size
    aside.replace(path)


def _targets(archive: Archive, path: Path, content: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the wanted members by the path, below the user's directory, that each will have."""
    matches = [(re.fullmatch(archive.members, m.filename), m) for m in content.infolist()]
    targets = {f"{archive.folder}/{match[1]}": member for match, member in matches if match}
    unsafe = [
        name
        for name, member in targets.items()
        if ".." in Path(name).parts or stat.S_ISLNK(member.external_attr >> 16)
    ]
    if unsafe:
        raise DataError(f"{path}: {len(unsafe)} members are links or unsafe ({name_some(unsafe)})")
    if not targets or archive.files not in (None, len(targets)):
        raise DataError(
            f"{path}: {archive.files or 'some'} files named like {archive.members!r} were "
            f"expected in it, found {len(targets)}"
        )
    needed = sum(member.file_size for member in targets.values())
    if archive.unpacked is not None and needed > archive.unpacked:
        raise DataError(
            f"{path}: its files take {needed:,} bytes, at most {archive.unpacked:,} were expected"
        )
    missing = sum(m.file_size for n, m in targets.items() if not (path.parents[1] / n).exists())
    check_free_space(path.parents[1], missing, f"unpacking {path.name}")
    return targets


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def place_karpathy_images(directory: Path, images: int | None = KARPATHY_IMAGES) -> Path | None:
    """Write ``annotations/dataset_coco2017.json``: the Karpathy split with the paths of 2017.

    COCO's images were sorted anew in 2017: ``val2014/COCO_val2014_000000391895.jpg`` of the
    published file is ``train2017/000000391895.jpg`` or ``val2017/000000391895.jpg`` now, with the
    same ``cocoid``. Only ``filepath`` and ``filename`` change.

    Args:
        directory: Holds ``annotations/dataset_coco.json`` and both image folders.
        images: How many images the split must have; None accepts any number.

    Returns:
        The new file, or None (and a line that says why) where an image folder is missing.

    Raises:
        DataError: The split is malformed, or has images that are in neither folder.
    """
    source = directory / "annotations" / "dataset_coco.json"
    target = source.with_name("dataset_coco2017.json")
    folders = [directory / name for name in ("train2017", "val2017")]
    if not all(folder.is_dir() for folder in folders):
        log_line(f"{target} is not written: it takes the images of train2017 and of val2017")
        return None
    folder_of = {name: folder.name for folder in folders for name in os.listdir(folder)}
    content = read_json(source)
    try:
        names = [f"{entry['cocoid']:012}.jpg" for entry in content["images"]]
    except (KeyError, TypeError, ValueError):
        raise DataError(f"{source}: 'images' must list objects with an integer 'cocoid'") from None
    if images not in (None, len(names)):
        raise DataError(f"{source}: {images:,} images were expected, found {len(names):,}")
    unknown = [name for name in names if name not in folder_of]
    if unknown:
        raise DataError(
            f"{source}: {len(unknown)} of {len(names)} images are in neither train2017 nor "
            f"val2017 ({name_some(unknown)}); are both complete?"
        )
    for entry, name in zip(content["images"], names, strict=True):
        entry["filepath"], entry["filename"] = folder_of[name], name
    with atomic_write(target) as file:
        file.write(json.dumps(content, ensure_ascii=False))
    return target
