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

from captioner.data.download import BLOCK, download
from captioner.errors import DataError, name_some
from captioner.files import read_json, write_json
from captioner.progress import Progress, log_line


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what is wanted of it.

    Attributes:
        url: Where it is published; a mirror has another host.
        members: Regular expression of the wanted members' whole names; its group is the name
            that the file gets in ``folder``.
        folder: Where the wanted members go, below the user's directory.
        size: Bytes of the published archive.
        unpacked: Bytes that the wanted members take at most.
        sha256: SHA-256 of the published archive; "" where no value is established.
        published: It must be the published one. Otherwise size and SHA-256 may differ; how many
            bytes are received and unpacked is bounded all the same.
    """

    url: str
    members: str
    folder: str
    size: int
    unpacked: int
    sha256: str = ""
    published: bool = True


COCO, KARPATHY = "http://images.cocodataset.org", "https://cs.stanford.edu/people/karpathy"
# Sizes and SHA-256 as torchvision's, ParlAI's and others' loaders have them. Several sources agree
# on the size of caption_datasets.zip, but none is established for its SHA-256.
COCO_ARCHIVES = {
    "karpathy": Archive(
        f"{KARPATHY}/deepimagesent/caption_datasets.zip",
        r"(?:[^/]+/)?(dataset_(?:coco|flickr8k|flickr30k)\.json)",
        *("annotations", 36_745_453, 400_000_000),
    ),
    "annotations": Archive(
        f"{COCO}/annotations/annotations_trainval2017.zip",
        r"annotations/(captions_(?:train|val)2017\.json)",
        *("annotations", 252_907_541, 200_000_000),
        "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    ),
    "val2017": Archive(
        f"{COCO}/zips/val2017.zip",
        r"val2017/(\d{12}\.jpg)",
        *("val2017", 815_585_330, 900_000_000),
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
    ),
    "train2017": Archive(
        f"{COCO}/zips/train2017.zip",
        r"train2017/(\d{12}\.jpg)",
        *("train2017", 19_336_861_798, 20_000_000_000),
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
    ),
}


def fetch_archive(archive: Archive, directory: Path, keep_archive: bool = False) -> bool:
    """Fetch an archive, check it and unpack what is wanted, unless that is done already.

    Args:
        archive: What to fetch; one that lies in ``directory/downloads`` already is used.
        directory: Where the files go.
        keep_archive: Leave the archive there when it is unpacked.

    Returns:
        Whether there was anything to do.

    Raises:
        DataError: It can't be fetched or isn't what was expected.
    """
    path = directory / "downloads" / archive.url.rpartition("/")[2]
    done = path.with_name(f"{path.name}.done")
    if done.exists():
        log_line(f"{path.name}: unpacked already; delete {done} to have it fetched again")
        return False
    if not path.exists():
        log_line(f"{path.name}: fetching {archive.url}")
        # Another packing than the published one may compress less.
        most = archive.size if archive.published else max(archive.size, archive.unpacked)
        download(archive.url, path, most)
    if archive.published:
        _check_archive(archive, path)
    unpack(archive, path, directory)
    done.touch()
    if not keep_archive:
        path.unlink()
    return True


def _check_archive(archive: Archive, path: Path) -> None:
    """Raise a DataError unless an archive is the published one."""
    log_line(f"{path.name}: checking")
    with open(path, "rb") as file:
        found = (path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())
    published = (archive.size, archive.sha256 or found[1])
    if found != published:
        raise DataError(
            f"{path}: bytes and SHA-256 are {found}, those of the published archive {published}; "
            "delete it and run this again"
        )


def unpack(archive: Archive, path: Path, directory: Path) -> None:
    """Unpack the wanted members below ``directory``, each whole, its CRC-32 right, or not at all.

    Raises:
        DataError: No zip archive, damaged, none of the wanted files, or larger ones than expected.
    """
    folder = directory / archive.folder
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / ".part"
    try:
        with zipfile.ZipFile(path) as content:
            members = _wanted_members(archive, path, content)
            with Progress(f"unpacking {path.name}", len(members), "file") as progress:
                for name, member in members.items():
                    with content.open(member) as source, open(aside, "wb") as file:
                        shutil.copyfileobj(source, file, BLOCK)  # never more than its file_size
                    aside.replace(folder / name)
                    progress.update()
    # The last is what zipfile raises of an encrypted file or a compression that it doesn't know.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise DataError(
            f"{path}: not a whole zip archive ({error}); delete it and run this again"
        ) from None


def _wanted_members(
    archive: Archive, path: Path, content: zipfile.ZipFile
) -> dict[str, zipfile.ZipInfo]:
    """Return the wanted members by their names in the folder.

    No others are unpacked: no links, and nothing whose name leaves the folder.
    """
    members = {}
    for member in content.infolist():
        match = re.fullmatch(archive.members, member.filename)
        if match and stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG):
            members[match[1]] = member
    if not members:
        raise DataError(f"{path}: no file in it is named like {archive.members!r}")
    unpacked = sum(member.file_size for member in members.values())
    if unpacked > archive.unpacked:
        raise DataError(
            f"{path}: its files take {unpacked:,} bytes, at most {archive.unpacked:,} were expected"
        )
    return members


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
