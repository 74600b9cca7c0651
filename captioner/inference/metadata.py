"""Captions in the images' own metadata: the description of XMP and of IPTC.

Through pyexiv2 (``pip install 'captioner[metadata]'``): JPEG, PNG, TIFF, WebP and JPEG 2000. The
pixels stay as they are, bit by bit. A description that somebody else wrote stays, too, unless told
otherwise; ours is known by its writer, a field of both standards.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from captioner.errors import UsageError
from captioner.inference.records import Record
from captioner.progress import log_line

WRITER = "captioner"
LONGEST_CAPTION = 2000  # bytes, of IPTC's
UTF8 = "\x1b%G"
FULL = {errno.ENOSPC, errno.EDQUOT}  # of disks


class Metadata:
    """Writes captions into images, or into copies of them.

    Args:
        copies: The folder of the copies, which have the images' names there; None changes the
            images themselves.
        overwrite: Whether descriptions of others are overwritten.

    Attributes:
        left: How many images were left without.

    Raises:
        UsageError: pyexiv2 is missing.
    """

    def __init__(self, copies: Path | None, overwrite: bool = False) -> None:
        self._copies, self._overwrite = copies, overwrite
        self._pyexiv2 = load_pyexiv2()
        self.left = 0

    def write(self, records: Sequence[Record]) -> list[Record]:
        """Describe captioned images; return those that now are."""
        described = [record for record in records if self._describe(record)]
        self.left += len(records) - len(described)
        return described

    def _describe(self, record: Record) -> bool:
        source = Path(record.path)
        target = source if self._copies is None else self._copies / _below(record.name)
        aside = target.with_name(f".{secrets.token_hex(8)}{source.suffix}")
        try:
            if not self._overwrite and self._is_described_by_others(target):
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, aside)
            os.utime(aside)
            self._write(aside, record.captions[0].text)
            _sync(aside)
            os.replace(aside, os.path.realpath(target))
        except (RuntimeError, OSError, UnicodeError) as error:  # RuntimeError: pyexiv2's own
            if getattr(error, "errno", None) in FULL:
                raise
            reason = str(error).splitlines()[0]
            log_line(f"warning: {target}: its description isn't written ({reason})")
            return False
        finally:
            aside.unlink(missing_ok=True)
        return True

    def _is_described_by_others(self, path: Path) -> bool:
        if not path.exists():
            return False
        with self._pyexiv2.Image(str(path)) as image:
            xmp, iptc = image.read_xmp(), image.read_iptc()
        text = xmp.get("Xmp.dc.description") or iptc.get("Iptc.Application2.Caption")
        writers = xmp.get("Xmp.photoshop.CaptionWriter"), iptc.get("Iptc.Application2.Writer")
        return bool(text) and not any(WRITER in (each, *(each or [])) for each in writers)

    def _write(self, path: Path, caption: str) -> None:
        short = caption.encode()[:LONGEST_CAPTION].decode("utf-8", "ignore")
        with self._pyexiv2.Image(str(path)) as image:
            image.modify_xmp(
                {
                    "Xmp.dc.description": {'lang="x-default"': caption},
                    "Xmp.photoshop.CaptionWriter": WRITER,
                }
            )
            image.modify_iptc(
                {
                    "Iptc.Envelope.CharacterSet": UTF8,
                    "Iptc.Application2.Caption": short,
                    "Iptc.Application2.Writer": [WRITER],
                }
            )


def load_pyexiv2() -> ModuleType:
    """Return the library that writes metadata, or say how to get it."""
    try:
        import pyexiv2  # type: ignore[import-untyped]
    except (ImportError, OSError):
        raise UsageError(
            "captions in images' metadata need pyexiv2: pip install 'captioner[metadata]'"
        ) from None
    pyexiv2.set_log_level(4)  # errors are raised
    return pyexiv2


def _below(name: str) -> Path:
    """Return an image's name as a path that stays below any folder."""
    return Path(*(part for part in Path(name).parts if part not in ("/", "..")))


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
