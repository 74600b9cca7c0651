"""One file over HTTP: a download that goes on where it stopped, and ends at the size expected."""

import http.client
import shutil
import time
import urllib.request
from pathlib import Path
from urllib.error import HTTPError, URLError

from captioner.errors import DataError
from captioner.progress import Progress, log_line
from captioner.version import __version__

RETRIES = 5  # tries without a new byte before giving up
FIRST_WAIT = 1.0  # seconds before the next try, doubled from one to the next
TIMEOUT = 30.0  # seconds without a byte before a connection counts as dropped
BLOCK = 1 << 20
# What may pass; other OSErrors, such as that of a full disk, don't.
NETWORK_ERRORS = (URLError, http.client.HTTPException, TimeoutError, ConnectionError)


def download(url: str, path: Path, size: int, exact: bool = True) -> None:
    """Fetch a file. What an earlier try left in ``path.part`` isn't fetched again.

    Dropped connections and servers in trouble are tried again after a pause.

    Args:
        url: An ``http`` or ``https`` address.
        path: Where the file will be, once it is whole.
        size: Its size in bytes; no more is ever received.
        exact: Accept no smaller file either.

    Raises:
        DataError: No network, no such file, another size or too little room.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, before = 0, _size(part)
    while not (exact and before == size):
        try:
            _fetch_rest(url, part, size, exact)
            break
        except NETWORK_ERRORS as error:
            failures = 1 if _size(part) > before else failures + 1
            reason = getattr(error, "reason", None) or error
            if failures > RETRIES:
                raise DataError(
                    f"{url}: given up after {failures} tries ({reason}); is there a network, or "
                    "is a proxy needed? Run this again: it goes on where it stopped"
                ) from None
            before = _size(part)
            wait = FIRST_WAIT * 2 ** (failures - 1)
            log_line(f"{path.name}: {reason}; next try in {wait:.0f} s")
            time.sleep(wait)
    part.replace(path)


def _fetch_rest(url: str, part: Path, size: int, exact: bool) -> None:
    """Append to ``part`` what it lacks; all of it where the server sends all."""
    have = _size(part)
    headers = {"User-Agent": f"captioner/{__version__}"}
    if have:
        headers["Range"] = f"bytes={have}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the file ends before what is here: it is another one
            part.unlink()
        elif error.code < 500 and error.code != 429:
            raise DataError(f"{url}: the server answered {error.code} {error.reason}") from None
        raise
    with response:
        start = have if response.status == 206 else 0
        total = None if response.length is None else start + response.length
        expected = f"{size:,} were expected" if exact else f"at most {size:,} were expected"
        if total is not None and (total > size or (exact and total < size)):
            raise DataError(f"{url}: the server's file has {total:,} bytes, {expected}")
        check_free_space(part.parent, (total or size) - start, f"the rest of {part.stem}")
        with (
            open(part, "ab" if start else "wb") as file,
            Progress(part.stem, total, "B", initial=start, scale=True) as progress,
        ):
            while (block := response.read1(BLOCK)) and file.tell() + len(block) <= size:
                file.write(block)
                progress.update(len(block))
            received = file.tell()
    if block:
        part.unlink()
        raise DataError(f"{url}: the server sends more bytes than the file has: {expected}")
    least = total or (size if exact else 0)
    if received < least:
        raise ConnectionError(f"the connection was dropped after {received:,} of {least:,} bytes")


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
