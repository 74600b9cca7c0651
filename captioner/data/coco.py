"""COCO 2017 from the web: archives fetched, checked, unpacked; the Karpathy split placed on it."""

import hashlib
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
from captioner.files import read_json, write_json
from captioner.progress import Progress, log_line


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what is wanted of it.

    Attributes:
        base: Where it is published; a mirror has another base.
        path: Where it lies below that.
        members: Regular expression of the wanted members' whole names; its group is the name
            that the file gets in ``folder``.
        folder: Where the wanted members go, below the user's directory.
        size: Bytes of the published archive.
        unpacked: Bytes that the wanted members take at most.
        files: Number of wanted members.
        sha256: SHA-256 of the published archive; "" where no value is established.
        published: It must be the published one. Otherwise size, SHA-256 and number of files may
            differ; how many bytes are received and unpacked is bounded all the same.
    """

    base: str
    path: str
    members: str
    folder: str
    size: int
    unpacked: int
    files: int
    sha256: str = ""
    published: bool = True

    @property
    def name(self) -> str:
        """Its file name."""
        return self.path.rpartition("/")[2]

    @property
    def largest(self) -> int:
        """Bytes that it may have: another packing than the published one may compress less."""
        return self.size if self.published else max(self.size, self.unpacked)


# Sizes and SHA-256 as torchvision's, ParlAI's and others' loaders have them. Several sources agree
# on the size of caption_datasets.zip, but none is established for its SHA-256.
COCO_ARCHIVES = {
    "karpathy": Archive(
        base="https://cs.stanford.edu/people/karpathy/deepimagesent",
        path="caption_datasets.zip",
        members=r"(?:[^/]+/)?(dataset_(?:coco|flickr8k|flickr30k)\.json)",
        folder="annotations",
        size=36_745_453,
        unpacked=400_000_000,
        files=3,
    ),
    "annotations": Archive(
        base="http://images.cocodataset.org",
        path="annotations/annotations_trainval2017.zip",
        members=r"annotations/(captions_(?:train|val)2017\.json)",
        folder="annotations",
        size=252_907_541,
        unpacked=200_000_000,
        files=2,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "val2017": Archive(
        base="http://images.cocodataset.org",
        path="zips/val2017.zip",
        members=r"val2017/(\d{12}\.jpg)",
        folder="val2017",
        size=815_585_330,
        unpacked=900_000_000,
        files=5_000,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    "train2017": Archive(
        base="http://images.cocodataset.org",
        path="zips/train2017.zip",
        members=r"train2017/(\d{12}\.jpg)",
        folder="train2017",
        size=19_336_861_798,
        unpacked=20_000_000_000,
        files=118_287,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
}


def fetch_archive(archive: Archive, directory: Path, keep_archive: bool = False) -> bool:
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
        if archive.published:
            needed = archive.size + archive.unpacked
            check_free_space(directory, needed, f"{archive.name} and what is in it")
        url = f"{archive.base}/{archive.path}"
        log_line(f"{archive.name}: fetching {url}")
        download(url, path, archive.largest, exact=archive.published)
    if archive.published:
        _check_archive(archive, path)
    sizes = unpack(archive, path, directory)
    os.sync()  # the list of contents must not outlive the contents in a power cut
    write_json(contents, sizes, indent=None)
    if not keep_archive:
        path.unlink()
    return True


def _check_archive(archive: Archive, path: Path) -> None:
    """Raise a DataError unless an archive is the published one."""
    size = path.stat().st_size
    problem = f"{size:,} bytes, the published one has {archive.size:,}"
    if size == archive.size:
        log_line(f"{path.name}: checking")
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 == archive.sha256 or not archive.sha256:
            return
        problem = f"its SHA-256 is {sha256}, the published one's is {archive.sha256}"
    raise DataError(f"{path}: {problem}; delete it and run this again")


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
        DataError: No zip archive, damaged, other or larger files than expected.
    """
    try:
        with zipfile.ZipFile(path) as content:
            members = _wanted_members(archive, path, content)
            (directory / archive.folder).mkdir(parents=True, exist_ok=True)
            with Progress(f"unpacking {path.name}", len(members), "file") as progress:
                for name, member in members.items():
                    if not _has_size(directory / name, member.file_size):
                        _extract(content, member, directory / name)
                    progress.update()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DataError(
            f"{path}: not a whole zip archive ({error}); delete it and run this again"
        ) from None
    return {name: member.file_size for name, member in members.items()}


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write a member aside, then rename it: without a wait for the disk for each of 100,000."""
    aside = path.with_name(f".{path.name}.part")
    with content.open(member) as source, open(aside, "wb") as file:
        shutil.copyfileobj(source, file, BLOCK)  # never more than the member's file_size
    aside.replace(path)


def _wanted_members(
    archive: Archive, path: Path, content: zipfile.ZipFile
) -> dict[str, zipfile.ZipInfo]:
    """Return the wanted members by the path, below the user's directory, that each will have.

    No others are unpacked: no links, and nothing whose name leaves the folder.
    """
    members = {}
    for member in content.infolist():
        match = re.fullmatch(archive.members, member.filename)
        if match and stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG):
            members[f"{archive.folder}/{match[1]}"] = member
    if not members or (archive.published and len(members) != archive.files):
        raise DataError(
            f"{path}: {archive.files if archive.published else 'some'} files named like "
            f"{archive.members!r} were expected in it, found {len(members)}"
        )
    unpacked = sum(member.file_size for member in members.values())
    if unpacked > archive.unpacked:
        raise DataError(
            f"{path}: its files take {unpacked:,} bytes, at most {archive.unpacked:,} were expected"
        )
    return members


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def place_karpathy_images(directory: Path) -> Path | None:
    """Write ``annotations/dataset_coco2017.json``: the Karpathy split with the paths of 2017.

    COCO's images were sorted anew in 2017: ``val2014/COCO_val2014_000000391895.jpg`` of the
    published file is ``train2017/000000391895.jpg`` or ``val2017/000000391895.jpg`` now, with the
    same ``cocoid``. Only ``filepath`` and ``filename`` change.

    Args:
        directory: Holds ``annotations/dataset_coco.json`` and both image folders.

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
    unknown = [name for name in names if name not in folder_of]
    if unknown:
        raise DataError(
            f"{source}: {len(unknown)} of {len(names)} images are in neither train2017 nor "
            f"val2017 ({name_some(unknown)}); are both complete?"
        )
    for entry, name in zip(content["images"], names, strict=True):
        entry["filepath"], entry["filename"] = folder_of[name], name
    write_json(target, content, indent=None)
    return target
