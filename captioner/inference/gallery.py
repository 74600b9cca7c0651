"""A page to look at captioned images: thumbnails, search, and what the decoder looked at.

The page works from the disk, without server or network. Beside it a folder, ``PAGE_files``, holds
the thumbnails and, for a decoder with attention, a small script for each image with its maps; both
are loaded as they come into view. What comes from outside goes into the page as JSON alone, and
from there into text nodes.
"""

import hashlib
import json
import os
import secrets
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from captioner.data.image_files import load_thumbnail
from captioner.data.listing import batched
from captioner.data.preprocessing import Preprocessing
from captioner.errors import CaptionerError, ImageError
from captioner.files import atomic_write
from captioner.inference.records import Record
from captioner.progress import Progress, log_line

if TYPE_CHECKING:
    from captioner.inference.captioner import Caption, Captioner
    from captioner.runtime import OnnxCaption, OnnxCaptioner

THUMBNAIL = 360  # pixels of its longer side
MANY_IMAGES = 50_000
BATCH = 32  # images whose attention is computed together


@dataclass(frozen=True)
class AttentionMaps:
    """What a decoder looked at for each word of an image's caption.

    Attributes:
        words: The caption's words, and ``END`` for its end.
        size: Rows and columns of a map.
        maps: For each word its map, row by row: from 0, its smallest value, to 255, its largest.
        cut: Side of the square in the image's middle that the maps lie over, as a part of the
            image's shorter side; 0 where they lie over the whole image.
    """

    words: list[str]
    size: tuple[int, int]
    maps: list[list[int]]
    cut: float

    END = "·"

    @classmethod
    def of(cls, caption: "Caption | OnnxCaption", cut: float) -> "AttentionMaps | None":
        """Return the maps of a caption that ``Captioner.describe`` gave with its attention."""
        if caption.attention is None:
            return None
        maps = np.asarray(caption.attention, dtype=np.float32)  # (T, H, W)
        least, most = maps.min((1, 2), keepdims=True), maps.max((1, 2), keepdims=True)
        scaled = 255 * (1 - (most - maps) / np.maximum(most - least, 1e-9))
        words = [*caption.text.split(), cls.END][: len(maps)]
        count, height, width = maps.shape
        numbers = scaled.reshape(count, -1).round().astype(int).tolist()
        return cls(words, (height, width), numbers, cut)


def cut_of(preprocessing: Preprocessing) -> float:
    """Return the ``cut`` of maps over images that were preprocessed so."""
    is_cut = preprocessing.resize == "crop"
    return preprocessing.image_size / preprocessing.resize_size if is_cut else 0.0


# Gives the maps of some images; None for one that has none.
Attention = Callable[[Sequence[Record]], Sequence[AttentionMaps | None]]


def attention_of(captioner: "Captioner | OnnxCaptioner", **settings: Any) -> Attention:
    """Return what computes the attention of images that this captioner has captioned.

    Args:
        captioner: The captioner.
        settings: Of the search, as the captions were found by.
    """
    cut = cut_of(captioner.preprocessing)

    def maps(records: Sequence[Record]) -> list[AttentionMaps | None]:
        paths = [record.path for record in records]
        try:
            found: Any = captioner.describe(paths, attention=True, **settings)
        except CaptionerError as error:  # an image that has changed since, say
            log_line(f"warning: no attention is shown for {len(records)} images: {error}")
            return [None] * len(records)
        # A caption that is found otherwise now has nothing to do with the one that is shown.
        return [
            AttentionMaps.of(best[0], cut) if best[0].text == record.captions[0].text else None
            for record, best in zip(records, found, strict=True)
        ]

    return maps


def write_gallery(
    page: str | Path,
    records: Iterable[Record],
    title: str = "Captions",
    attention: Attention | None = None,
    hidden: bool = False,
) -> int:
    """Write the page, whole or not at all, and the folder beside it.

    Thumbnails that are there and newer than their images are kept.

    Args:
        page: Its path; the folder is ``PAGE_files``.
        records: The captioned images, in the order that they have there, and those that failed.
            They are walked through once; of each some hundred bytes are held.
        title: What stands above it.
        attention: Gives what the decoder looked at; see ``attention_of``.
        hidden: Show no progress.

    Returns:
        How many images it shows.
    """
    page = Path(page)
    folder = page.with_name(f"{page.stem}_files")
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    failures: list[dict[str, str]] = []
    with Progress("gallery", None, "image", hidden=hidden) as bar:
        for batch in batched(records, BATCH):
            captioned = [record for record in batch if not record.error]
            failures += [{"name": r.name, "error": r.error} for r in batch if r.error]
            maps = attention(captioned) if attention and captioned else [None] * len(captioned)
            if captioned and not any(maps):  # a decoder without attention
                attention = None
            for record, found in zip(captioned, maps, strict=True):
                images.append(_entry(page, record, found is not None))
                if found:
                    _write_maps(folder, images[-1]["key"], found)
            _write_thumbnails(folder, captioned)
            bar.update(len(batch))
    if len(images) > MANY_IMAGES:
        log_line(f"warning: {page} shows {len(images)} images; browsers are slow with so many")
    data = {"images": images, "failures": failures, "folder": urllib.parse.quote(folder.name)}
    _write_page(page, title, data)
    return len(images)


def _write_page(page: Path, title: str, data: dict[str, Any]) -> None:
    text = _template().render(title=title, data=_json(data), nonce=secrets.token_hex(8))
    with atomic_write(page) as file:
        file.write(text)


def _entry(page: Path, record: Record, has_attention: bool) -> dict[str, Any]:
    """Return what the page holds of an image."""
    relative = os.path.relpath(record.path, page.parent).replace(os.sep, "/")
    scores = [round(caption.score, 3) for caption in record.captions]
    return {
        "key": _key(record),
        "name": record.name,
        "address": urllib.parse.quote(os.fsencode(relative)),
        "captions": [caption.text for caption in record.captions],
        "scores": [score if score > -1e9 else None for score in scores],
        "score": scores[0] if scores[0] > -1e9 else None,
        "width": record.width,
        "height": record.height,
        "attention": has_attention,
    }


def _key(record: Record) -> str:
    """Return the name of an image's files in the folder, without suffix."""
    return hashlib.sha256(os.fsencode(record.path)).hexdigest()[:16]


def _write_thumbnails(folder: Path, records: Sequence[Record]) -> None:
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        list(threads.map(lambda record: _write_thumbnail(folder, record), records))


def _write_thumbnail(folder: Path, record: Record) -> None:
    target = folder / f"{_key(record)}.jpg"
    try:
        if target.exists() and target.stat().st_mtime > os.stat(record.path).st_mtime:
            return
        thumbnail = load_thumbnail(record.path, THUMBNAIL)
    except (ImageError, OSError) as error:  # gone since it was captioned, say
        log_line(f"warning: no thumbnail: {error}")
        return
    with atomic_write(target, "wb") as file:
        thumbnail.save(file, "JPEG", quality=82)


def _write_maps(folder: Path, key: str, maps: AttentionMaps) -> None:
    content = _json(asdict(maps))
    with atomic_write(folder / f"{key}.js") as file:
        file.write(f'bringAttention("{key}", {content});\n')


def _json(value: object) -> str:
    """Return JSON, in ASCII, that can't end a script element or begin a comment in it."""
    text = json.dumps(value, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("captioner.inference", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("gallery.html.jinja")
