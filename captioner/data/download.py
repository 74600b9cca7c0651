"""One file over HTTP: a download that goes on where it stopped."""

import http.client
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from captioner.errors import DataError
from captioner.progress import Progress, log_line
from captioner.version import __version__

RETRIES = 5  # tries without a new byte before giving up
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between tries, doubled from one to the next
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dropped
BLOCK = 1 << 20


class _Interrupted(Exception):
    """A try failed in a way that may pass."""


def download(url: str, path: Path, size: int | None = None) -> None:
    """Fetch a file. What an earlier try left in ``path.part`` isn't fetched again.

    The server's ETag or date is kept beside it: a file that has changed is fetched from its start.
    Dropped connections and servers in trouble (5xx, 429) are tried again after a pause.

    Args:
        url: An ``http`` or ``https`` address.
        path: Where the file will be, once it is whole.
        size: Its published size in bytes; None accepts any.

    Raises:
        DataError: No network, no such file, another size or too little room.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            _fetch_rest(url, part, size)
            break
        except _Interrupted as error:
            failures = 1 if _size(part) > before else failures + 1
            if failures > RETRIES:
                raise DataError(
                    f"{url}: given up after {failures} tries ({error}); is there a network, or is "
                    "a proxy needed? Run this again: it goes on where it stopped"
                ) from None
            wait = min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT)
            log_line(f"{path.name}: {error}; next try in {wait:.0f} s")
            time.sleep(wait)
    if size not in (None, _size(part)):
        raise DataError(f"{part}: {_size(part):,} bytes came, the published file has {size:,}")
    part.replace(path)
    _version_path(part).unlink(missing_ok=True)


def _fetch_rest(url: str, part: Path, size: int | None) -> None:
    """Append to ``part`` what it lacks; all of it where the server's file is another one."""
    have, version = _size(part), _read(_version_path(part))
    headers = {"User-Agent": f"captioner/{__version__}"}
    if have and version:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            start = have if response.status == 206 else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else size
            check_free_space(part.parent, (total or 0) - start, f"the rest of {part.stem}")
            # A weak ETag says nothing about single bytes (RFC 9110, section 13.1.5).
            etag = response.headers.get("ETag", "")
            version = response.headers.get("Last-Modified", "") if etag[:2] in ("", "W/") else etag
            _version_path(part).write_text(version, encoding="utf-8")
            _receive(response, part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is left, or the file has become shorter
            if have != size:
                part.unlink()
                raise _Interrupted("it has changed on the server") from None
        elif error.code >= 500 or error.code == 429:
            raise _Interrupted(f"the server answered {error.code}") from None
        else:
            raise DataError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as e:
        raise _Interrupted(f"no connection ({getattr(e, 'reason', None) or e})") from None


def _receive(response: Any, part: Path, start: int, total: int | None) -> None:
    with (
        open(part, "ab" if start else "wb") as file,
        Progress(part.stem, total, "B", initial=start, scale=True) as progress,
    ):
        while block := response.read1(BLOCK):
            file.write(block)
            progress.update(len(block))
        received = file.tell()
    if total is not None and received < total:
        raise _Interrupted(f"the connection was dropped after {received:,} of {total:,} bytes")


def check_free_space(directory: Path, needed: int, purpose: str) -> None:
    """Raise a DataError unless ``needed`` bytes are free where ``directory`` is or will be."""
    while not directory.exists():
        directory = directory.parent
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DataError(
            f"{directory}: {needed / 1e9:.1f} GB are needed ({purpose}), {free / 1e9:.1f} GB are "
            "free"
        )


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _version_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.version")
