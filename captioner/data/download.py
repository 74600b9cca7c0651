"""COCO from the web: downloads that go on where they stopped, checked archives, safe unpacking.

An archive passes through these stages; a killed run is taken up again at any of them:

    downloads/NAME.part            what has come so far; NAME.part.json says of which file
    downloads/NAME                 the whole archive
    train2017/…, annotations/…     its members, each written aside, checked, then renamed
    downloads/NAME.contents.json   unpacking is finished: every file with its size and CRC-32
"""

import contextlib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import stat
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captioner.data.annotations import read_json
from captioner.errors import DataError, name_some
from captioner.files import atomic_write, write_json
from captioner.progress import Progress, log_line
from captioner.version import __version__

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RETRIES = 10
TIMEOUT = 30.0  # seconds without a byte
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled from one to the next
BLOCK = 1 << 20
ZIP_START = b"PK\x03\x04"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError)

KARPATHY_IMAGES = 123_287
IMAGE_NAME = re.compile(r"\d{12}\.jpg")


@dataclass(frozen=True)
class Archive:
    """A zip archive on the web and what is wanted of it.

    Attributes:
        name: File name of the archive.
        url: Where it is published.
        mirror_path: Where it lies below the base address of a mirror.
        members: Regular expression of the wanted members' whole names; its group is the name
            that the file gets in ``folder``.
        folder: Where the wanted members go, below the user's directory.
        room: Bytes that the unpacked files take, roughly (for the check of the free space).
        size: Bytes of the published archive; None accepts any.
        sha256: SHA-256 of the published archive; None where no value is established.
        files: Number of wanted members; None accepts any above 0.
    """

    name: str
    url: str
    mirror_path: str
    members: str
    folder: str
    room: int = 0
    size: int | None = None
    sha256: str | None = None
    files: int | None = None


# Sizes and SHA-256 as torchvision's, ParlAI's and others' loaders have them. Several sources agree
# on the size of caption_datasets.zip, but none is established for its SHA-256.
COCO_ARCHIVES = {
    "karpathy": Archive(
        name="caption_datasets.zip",
        url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
        mirror_path="caption_datasets.zip",
        members=r"(?:[^/]+/)?(dataset_(?:coco|flickr8k|flickr30k)\.json)",
        folder="annotations",
        room=400_000_000,
        size=36_745_453,
        files=3,
    ),
    "annotations": Archive(
        name="annotations_trainval2017.zip",
        url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        mirror_path="annotations/annotations_trainval2017.zip",
        members=r"annotations/(captions_(?:train|val)2017\.json)",
        folder="annotations",
        room=100_000_000,
        size=252_907_541,
        sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
        files=2,
    ),
    "val2017": Archive(
        name="val2017.zip",
        url="http://images.cocodataset.org/zips/val2017.zip",
        mirror_path="zips/val2017.zip",
        members=r"val2017/(\d{12}\.jpg)",
        folder="val2017",
        room=830_000_000,
        size=815_585_330,
        sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        files=5_000,
    ),
    "train2017": Archive(
        name="train2017.zip",
        url="http://images.cocodataset.org/zips/train2017.zip",
        mirror_path="zips/train2017.zip",
        members=r"train2017/(\d{12}\.jpg)",
        folder="train2017",
        room=19_600_000_000,
        size=19_336_861_798,
        sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        files=118_287,
    ),
}


class DamagedArchiveError(DataError):
    """An archive isn't what it should be; fetching it again may help."""


def obtain(
    archive: Archive,
    directory: Path,
    keep_archive: bool = False,
    recheck: bool = False,
    retries: int = RETRIES,
) -> bool:
    """Fetch an archive, check it and unpack what is wanted, as far as that isn't done yet.

    A damaged archive that was fetched just now is fetched once more; one that lay there already
    is refused.

    Args:
        archive: What to fetch.
        directory: Where the files go.
        keep_archive: Leave the archive there when it is unpacked.
        recheck: Compare the CRC-32 of files unpacked earlier too, not their sizes alone.
        retries: Tries without a new byte before a download is given up.

    Returns:
        Whether there was anything to do.

    Raises:
        DataError: It can't be fetched or isn't what was expected.
    """
    path = directory / "downloads" / archive.name
    if _is_unpacked(archive, directory, recheck):
        if path.exists() and not keep_archive:
            log_line(f"{path}: everything in it is unpacked; it can be deleted")
        return False
    for again in (False, True):
        fetched = not path.exists()
        if fetched:
            log_line(f"{archive.name}: fetching {archive.url}")
            download(archive.url, path, archive.size, retries)
        try:
            _check_archive(path, archive)
            contents = unpack(archive, path, directory)
            break
        except DamagedArchiveError as error:
            if again or not fetched:
                raise DamagedArchiveError(f"{error}; delete it and run this again") from None
            log_line(f"{error}; fetching it once more")
            path.unlink()
    with _disk_errors(path):
        if hasattr(os, "sync"):
            os.sync()  # the list of contents must not outlive the contents in a power cut
        write_json(_contents_path(path), {"url": archive.url, "files": contents}, indent=None)
        if not keep_archive:
            path.unlink()
    return True


def room_needed(archives: Iterable[Archive], directory: Path, keep_archives: bool) -> int:
    """Return the bytes still needed on the disk when it is fullest, as far as sizes are known."""
    used = peak = 0
    for archive in archives:
        path = directory / "downloads" / archive.name
        if _contents_path(path).exists():
            continue
        size = archive.size or 0
        if not path.exists():
            used += max(0, size - _size(_part(path)))
        used += max(0, archive.room - _bytes_in(directory / archive.folder))
        peak = max(peak, used)
        used -= 0 if keep_archives else size
    return peak


def require_room(directory: Path, needed: int, purpose: str) -> None:
    """Refuse to start what the disk has no room for.

    Raises:
        DataError: Less than ``needed`` bytes are free where ``directory`` is or will be.
    """
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"{directory}: {_human(needed)} are needed ({purpose}), {_human(free)} are free"
        )


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Keep a second process out of ``directory`` for the duration of the block.

    Raises:
        DataError: Another process is at work there.
    """
    path = directory / "downloads" / ".lock"
    with contextlib.ExitStack() as stack:
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(path, "wb"))
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{directory}: another download into it is at work") from None
        except OSError:
            pass  # a file system without locks
        yield


# --- one file over HTTP ---------------------------------------------------------------------


class _InterruptedError(Exception):
    """A download failed in a way that may pass.

    Args:
        reason: What happened.
        wait: Seconds that the server asked to wait.
        unreachable: There was no connection to the server at all.
    """

    def __init__(self, reason: str, wait: float = 0.0, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.unreachable = unreachable


@dataclass(frozen=True)
class _Remote:
    """What a server says of a file, by which a changed file is recognised."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None

    @property
    def validator(self) -> str | None:
        """What If-Range takes: a strong ETag, else the date (RFC 9110, section 13.1.5)."""
        strong = self.etag and not self.etag.startswith("W/")
        return self.etag if strong else self.modified

    def may_be(self, other: "_Remote") -> bool:
        """Return whether nothing that both servers' answers tell is different."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return all(mine == theirs for mine, theirs in pairs if mine is not None is not theirs)


def download(
    url: str,
    path: Path,
    size: int | None = None,
    retries: int = RETRIES,
    timeout: float = TIMEOUT,
) -> None:
    """Fetch a zip archive; what an earlier try left in ``path.part`` isn't fetched again.

    Dropped connections and servers in trouble (5xx, 429) are tried again after a pause that
    grows up to a minute; the count of tries begins anew whenever new bytes have come.

    Args:
        url: An ``http`` or ``https`` address.
        path: Where the archive will be, once it is whole.
        size: Its published size in bytes; None accepts any.
        retries: Tries without a new byte before giving up.
        timeout: Seconds without a byte before a connection counts as dropped.

    Raises:
        DataError: No network, no such file, no zip archive, another size, or a full disk.
    """
    part = _part(path)
    began = furthest = _size(part)
    failures = 0
    while True:
        try:
            with _disk_errors(part):
                part.parent.mkdir(parents=True, exist_ok=True)
                _fetch_rest(url, part, size, timeout)
                os.replace(part, path)
                _state_path(part).unlink(missing_ok=True)
            return
        except _InterruptedError as error:
            reached = _size(part)
            failures = 0 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            if error.unreachable and furthest == began:
                raise DataError(
                    f"{url}: no connection ({error}); is there a network, or is a proxy needed "
                    "(environment variables http_proxy, https_proxy)?"
                ) from None
            if failures > retries:
                raise DataError(
                    f"{url}: given up after {failures} tries without a new byte ({error}); run "
                    f"this again later: it goes on after {_human(reached)}"
                ) from None
            wait = max(error.wait, min(FIRST_WAIT * 2 ** max(failures - 1, 0), LONGEST_WAIT))
            log_line(f"{path.name}: {error} after {_human(reached)}; next try in {wait:.0f} s")
            time.sleep(wait)


def _fetch_rest(url: str, part: Path, size: int | None, timeout: float) -> None:
    """Fetch what ``part`` lacks, all of it where the file isn't the same any more."""
    known = _read_state(part)
    have = _size(part) if known else 0
    if known and have and have == known.size:
        return
    with _open(url, _range_headers(known, have), timeout) as response:
        start, remote = _describe(response)
        if response.status == 200:
            if known and have:
                why = "the server can't continue it" if known.may_be(remote) else "it has changed"
                log_line(f"{part.stem}: {why}: starting again, {_human(have)} are lost")
            _receive(url, response, part, 0, remote, size)
            return
        if response.status == 206 and have == start and known and known.may_be(remote):
            log_line(f"{part.stem}: going on after {_human(have)}")
            _receive(url, response, part, have, remote, size)
            return
        if not have:
            raise DataError(f"{url}: the server answered {response.status}, 200 was expected")
    log_line(f"{part.stem}: it has changed on the server: starting again, {_human(have)} are lost")
    part.unlink()
    _fetch_rest(url, part, size, timeout)


def _receive(
    url: str, response: Any, part: Path, start: int, remote: _Remote, size: int | None
) -> None:
    """Write the body of a response to ``part``, from byte ``start`` on."""
    block = _read(response)
    if not start:
        while 0 < len(block) < len(ZIP_START) and (more := _read(response)):
            block += more
        _require_zip(url, response, block, remote)
    if None not in (size, remote.size) and remote.size != size:
        raise DataError(
            f"{url}: the file has {remote.size:,} bytes, the published one {size:,}; choose "
            "another mirror, or accept any content"
        )
    total = size if remote.size is None else remote.size
    if total is not None:
        require_room(part.parent, total - start, f"the rest of {part.stem}")
    with (
        open(part, "ab" if start else "wb") as file,
        Progress(part.stem, total, "B", initial=start, scale=True) as progress,
    ):
        if not start:
            write_json(_state_path(part), asdict(remote))
        while block:
            file.write(block)
            progress.update(len(block))
            block = _read(response)
        file.flush()
        os.fsync(file.fileno())
    if total is not None and _size(part) < total:
        raise _InterruptedError("the connection was dropped")


def _require_zip(url: str, response: Any, start: bytes, remote: _Remote) -> None:
    if start.startswith(ZIP_START) or (len(start) < len(ZIP_START) and len(start) != remote.size):
        return  # in the second case the connection was dropped, which shows in the length
    kind = response.headers.get("Content-Type", "no content type")
    text = re.sub(r"[^ -~]+", " ", start[:80].decode("latin-1"))
    raise DataError(
        f"{url}: not a zip archive but {kind}, beginning {text!r}; is it the page of a proxy or "
        "a login?"
    )


def _open(url: str, headers: Mapping[str, str], timeout: float) -> Any:
    """Send a request; the response is open, of any status that isn't an error, or 416."""
    headers = {"User-Agent": f"captioner/{__version__}", **headers}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code == 416:
            return error
        with error:
            answer = f"the server answered {error.code} {error.reason}"
            if error.code >= 500 or error.code in (408, 425, 429):
                after = error.headers.get("Retry-After", "")
                wait = min(float(after), 600.0) if after.isdecimal() else 0.0
                raise _InterruptedError(answer, wait) from None
        raise DataError(
            f"{url}: {answer}; choose another address, or put the file into the downloads folder "
            "yourself"
        ) from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise DataError(f"{url}: its certificate isn't trusted ({cause})") from None
        unreachable = isinstance(error, urllib.error.URLError)
        raise _InterruptedError(_reason(cause), unreachable=unreachable) from None


def _read(response: Any) -> bytes:
    try:
        block: bytes = response.read1(BLOCK)
        return block
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(_reason(error)) from None


def _reason(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _range_headers(known: _Remote | None, have: int) -> dict[str, str]:
    if not known or not have:
        return {}
    validator = {"If-Range": known.validator} if known.validator else {}
    return {"Range": f"bytes={have}-", **validator}


def _describe(response: Any) -> tuple[int, _Remote]:
    """Return the first byte that a response brings, and what it says of the whole file."""
    headers = response.headers
    start, size = 0, headers.get("Content-Length", "")
    if response.status != 200:
        found = re.match(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        start, size = (int(found[1]), found[2]) if found else (-1, "")
    return start, _Remote(
        size=int(size) if size.isdecimal() else None,
        etag=headers.get("ETag"),
        modified=headers.get("Last-Modified"),
    )


def _read_state(part: Path) -> _Remote | None:
    try:
        return _Remote(**json.loads(_state_path(part).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _state_path(part: Path) -> Path:
    return part.with_name(part.name + ".json")


# --- archives -------------------------------------------------------------------------------


def unpack(archive: Archive, path: Path, directory: Path) -> dict[str, tuple[int, int]]:
    """Unpack the wanted members; files that are there with the right size and CRC-32 stay.

    Args:
        archive: What is wanted.
        path: The archive on disk.
        directory: Where ``archive.folder`` is or will be.

    Returns:
        Size and CRC-32 of each file, by its path below ``directory``.

    Raises:
        DamagedArchiveError: It is no whole zip archive, or members don't match their CRC-32 (the
            others are unpacked).
        DataError: It holds other files than expected or unsafe names, or the disk is too small.
    """
    damaged = []
    with _disk_errors(path), _open_zip(path) as content:
        targets = _targets(archive, path, content)
        (directory / archive.folder).mkdir(parents=True, exist_ok=True)
        missing = sum(
            member.file_size
            for name, member in targets.items()
            if _size(directory / name) != member.file_size
        )
        require_room(directory, missing, f"unpacking {archive.name}")
        with Progress(f"unpacking {archive.name}", len(targets), "file") as progress:
            for name, member in targets.items():
                if not _is_whole(directory / name, member.file_size, member.CRC):
                    try:
                        _extract(content, member, directory / name)
                    except DAMAGE:
                        damaged.append(member.filename)
                    except (NotImplementedError, RuntimeError) as error:
                        raise DataError(f"{path}: {member.filename}: {error}") from None
                progress.update()
    if damaged:
        raise DamagedArchiveError(
            f"{path}: {len(damaged)} of {len(targets)} files in it are damaged "
            f"({name_some(damaged)})"
        )
    return {name: (member.file_size, member.CRC) for name, member in targets.items()}


def _check_archive(path: Path, archive: Archive) -> None:
    """Compare an archive with what is known of the published one.

    Raises:
        DamagedArchiveError: The size or the SHA-256 is another.
    """
    size = path.stat().st_size
    if archive.size not in (None, size):
        raise DamagedArchiveError(f"{path}: {size:,} bytes, the published has {archive.size:,}")
    if archive.sha256 is None:
        return
    digest = hashlib.sha256()
    with (
        _disk_errors(path),
        open(path, "rb") as file,
        Progress(f"checking {archive.name}", size, "B", scale=True) as progress,
    ):
        while block := file.read(BLOCK):
            digest.update(block)
            progress.update(len(block))
    if digest.hexdigest() != archive.sha256:
        raise DamagedArchiveError(
            f"{path}: its SHA-256 is {digest.hexdigest()}, the published archive's is "
            f"{archive.sha256}"
        )


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise DamagedArchiveError(f"{path}: not a whole zip archive ({error})") from None


def _targets(archive: Archive, path: Path, content: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the wanted members by the path, below the user's directory, that each will have."""
    members = content.infolist()
    unsafe = [member.orig_filename for member in members if _is_unsafe(member)]
    if unsafe:
        raise DataError(
            f"{path}: refused, nothing was unpacked: {len(unsafe)} names in it point outside its "
            f"folder or are links ({name_some(map(repr, unsafe))})"
        )
    found = [
        (f"{archive.folder}/{match[1]}", member)
        for member in members
        if (match := re.fullmatch(archive.members, member.filename))
    ]
    if not found or archive.files not in (None, len(found)):
        raise DataError(
            f"{path}: {archive.files or 'some'} files named like {archive.members!r} were "
            f"expected in it, found {len(found)}"
        )
    twice = [name for name, count in Counter(name for name, _ in found).items() if count > 1]
    if twice:
        raise DataError(f"{path}: {len(twice)} files are in it twice ({name_some(twice)})")
    return dict(found)


def _is_unsafe(member: zipfile.ZipInfo) -> bool:
    name = member.orig_filename.replace("\\", "/")
    return (
        name.startswith("/")
        or ".." in name.split("/")
        or re.match("[A-Za-z]:", name) is not None
        or any(ord(letter) < 32 for letter in name)
        or stat.S_ISLNK(member.external_attr >> 16)
    )


def _extract(content: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one member aside, then rename it; zipfile compares the CRC-32 at its end."""
    aside = path.with_name(f".{path.name}.part")
    try:
        with content.open(member) as source, open(aside, "wb") as file:
            shutil.copyfileobj(source, file, BLOCK)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def _is_unpacked(archive: Archive, directory: Path, recheck: bool) -> bool:
    """Return whether all that an earlier run unpacked is still there."""
    try:
        listed = json.loads(
            _contents_path(directory / "downloads" / archive.name).read_text(encoding="utf-8")
        )
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in listed["files"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return False
    lacking = []
    with (
        _disk_errors(directory),
        Progress(f"looking through {archive.folder}", len(files), "file") as progress,
    ):
        for name, (size, crc) in files.items():
            if not _is_whole(directory / name, size, crc if recheck else None):
                lacking.append(name)
            progress.update()
    if lacking:
        log_line(
            f"{archive.name}: {len(lacking)} of its {len(files):,} files are missing or changed "
            f"in {directory} ({name_some(lacking)})"
        )
        return False
    log_line(
        f"{archive.name}: its {len(files):,} files are already in {directory / archive.folder}"
    )
    return True


def _is_whole(path: Path, size: int, crc: int | None) -> bool:
    """Return whether a file has this size and, where it is given, this CRC-32."""
    if _size(path) != size or not path.is_file():
        return False
    if crc is None:
        return True
    found = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            found = zlib.crc32(block, found)
    return found == crc


def _contents_path(path: Path) -> Path:
    return path.with_name(path.name + ".contents.json")


# --- the Karpathy split with the images of 2017 -----------------------------------------------


def place_karpathy_images(directory: Path, images: int | None = KARPATHY_IMAGES) -> Path | None:
    """Write ``annotations/dataset_coco2017.json``: the Karpathy split with the paths of 2017.

    COCO's images were sorted anew in 2017: ``val2014/COCO_val2014_000000391895.jpg`` of the
    published file is ``train2017/000000391895.jpg`` or ``val2017/000000391895.jpg`` now, with the
    same ``cocoid``. Which of the two is told by the images in ``directory``, and for those that
    aren't there by the captions files of 2017. Only ``filepath`` and ``filename`` change.

    Args:
        directory: Holds ``annotations/dataset_coco.json`` and images, captions files or both.
        images: How many images the split must have; None accepts any number.

    Returns:
        The new file, or None (and a line that says why) where nothing tells where images lie.

    Raises:
        DataError: The split is malformed or incomplete, or has images that are in neither folder.
    """
    source = directory / "annotations" / "dataset_coco.json"
    target = source.with_name("dataset_coco2017.json")
    if target.exists() and target.stat().st_mtime_ns >= source.stat().st_mtime_ns:
        return target
    folders = _image_folders(directory)
    if folders is None:
        log_line(
            f"{target} is not written: it takes the images or the captions files of train2017 "
            "and of val2017 to tell which images lie where"
        )
        return None
    log_line(f"writing {target}")
    content = read_json(source)
    entries = content.get("images") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not all(_has_coco_id(entry) for entry in entries):
        raise DataError(f"{source}: 'images' must be a list of objects with an integer 'cocoid'")
    if images not in (None, len(entries)):
        raise DataError(f"{source}: {images:,} images were expected, found {len(entries):,}")
    strangers = [entry["cocoid"] for entry in entries if entry["cocoid"] not in folders]
    if strangers:
        raise DataError(
            f"{source}: {len(strangers)} of {len(entries)} images are in neither train2017 nor "
            f"val2017 (cocoid {name_some(strangers)}); are both complete?"
        )
    for entry in entries:
        entry["filepath"] = folders[entry["cocoid"]]
        entry["filename"] = f"{entry['cocoid']:012}.jpg"
    with _disk_errors(target), atomic_write(target) as file:
        file.write(json.dumps(content, ensure_ascii=False))
    return target


def _has_coco_id(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get("cocoid")) is int


def _image_folders(directory: Path) -> dict[int, str] | None:
    """Return the folder of each image by its COCO id; None where one folder is unknown."""
    listed: dict[int, str] = {}
    there: dict[int, str] = {}
    for folder in ("train2017", "val2017"):
        captions = directory / "annotations" / f"captions_{folder}.json"
        if not captions.exists() and not (directory / folder).is_dir():
            return None
        if captions.exists():
            listed |= dict.fromkeys(_ids(_listed_images(captions)), folder)
        if (directory / folder).is_dir():
            there |= dict.fromkeys(_ids(os.listdir(directory / folder)), folder)
    return listed | there


def _listed_images(captions: Path) -> list[str]:
    try:
        return [image["file_name"] for image in read_json(captions)["images"]]
    except (KeyError, TypeError):
        raise DataError(f"{captions}: 'images' with 'file_name' were expected") from None


def _ids(names: Iterable[str]) -> list[int]:
    return [int(name[:12]) for name in names if IMAGE_NAME.fullmatch(name)]


# --- files ----------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Turn what goes wrong with the disk into an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"{path}: the disk is full; make room and run this again: it goes on from here"
            ) from None
        named = error.filename or path
        raise DataError(f"{named}: can't be read or written ({error.strerror or error})") from None


def _size(path: Path) -> int:
    """Return a file's size, 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _bytes_in(folder: Path) -> int:
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat().st_size for entry in entries)
    except OSError:
        return 0


def _human(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000
    return f"{count:.1f} GB"
