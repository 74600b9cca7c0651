"""One file over HTTP: a download that goes on where it stopped."""

import http.client
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


def download(url: str, path: Path, most: int) -> None:
    """Fetch a file. What an earlier try left in ``path.part`` isn't fetched again.

    Dropped connections and servers in trouble are tried again after a pause.

    Args:
        url: An ``http`` or ``https`` address.
        path: Where the file will be, once it is whole.
        most: Bytes that it may have; no more is ever received.

    Raises:
        DataError: No network, no such file, or a larger one.
    """
    part = path.with_name(f"{path.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures, before = 0, _size(part)
    while True:
        try:
            _fetch_rest(url, part, most)
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


def _fetch_rest(url: str, part: Path, most: int) -> None:
    """Append to ``part`` what it lacks; all of it where the server sends all."""
    have = _size(part)
    headers = {"User-Agent": f"captioner/{__version__}"}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except HTTPError as error:
        if error.code == 416:  # the file ends before what is here, or with it: begin anew
            part.unlink()
        elif error.code < 500 and error.code != 429:
            raise DataError(f"{url}: the server answered {error.code} {error.reason}") from None
        raise
    with response:
        start = have if response.status == 206 else 0
        total = None if response.length is None else start + response.length
        with (
            open(part, "ab" if start else "wb") as file,
            Progress(part.stem, total, "B", initial=start, scale=True) as progress,
        ):
            while (received := file.tell()) <= most and (block := response.read1(BLOCK)):
                file.write(block[: most + 1 - received])
                progress.update(len(block))
    if received > most:
        part.unlink()
        raise DataError(f"{url}: the server sends more than the {most:,} bytes expected")
    if total and received < total:
        raise ConnectionError(f"the connection was dropped after {received:,} of {total:,} bytes")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
