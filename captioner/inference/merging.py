"""Outputs of several jobs, each over a part of the same images, joined into one."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.data.listing import Listing
from captioner.errors import DataError
from captioner.inference.outputs import (
    GROWING,
    Format,
    failures_output,
    failures_path,
    growing_output,
    output_suffix,
    read_rows,
    record_of_row,
    write_output,
)
from captioner.inference.records import Record


@dataclass
class Merged:
    """What became of the parts.

    Attributes:
        captioned: Images with a caption.
        failed: Images that couldn't be captioned.
        missing: Images of the listing that no part has.
        missing_names: The first few of them.
    """

    captioned: int = 0
    failed: int = 0
    missing: int = 0
    missing_names: list[str] = field(default_factory=list)


def merge_parts(parts: Sequence[Path], outputs: Sequence[Path], listing: Listing | None) -> Merged:
    """Join the ``.jsonl`` outputs of jobs, and what they say of failures.

    Args:
        parts: The outputs. Where two have the same image with the same caption, it comes once; an
            image that failed in one and has a caption in another is captioned.
        outputs: What is written, each whole or not at all: any of the formats of a job.
        listing: All the images that the parts should have, in the order that the outputs will;
            None keeps the parts' order and misses none.

    Raises:
        DataError: A part can't be read, or two have different captions of an image.
    """
    with closing(sqlite3.connect("")) as store:  # in memory while it is small, else on the disk
        store.execute(
            "CREATE TABLE images "
            "(position INTEGER PRIMARY KEY, key TEXT UNIQUE, failed INTEGER, row TEXT)"
        )
        columns: dict[str, None] = {}
        for part in parts:
            for place, row in read_rows(part):
                columns |= dict.fromkeys(row)
                _add(store, place, row)
            for place, row in read_rows(failures_path(part), of_failures=True):
                _add(store, place, {"image_id": row.get("file_name"), **row})
        merged = Merged()
        if listing:
            _order(store, listing, merged)
        form = Format(2 if "captions" in columns else 1, "sha256" in columns)
        merged.captioned = _count(store, "NOT failed")
        merged.failed = _count(store, "failed")
        for output in outputs:
            if output_suffix(output) in GROWING:
                growing_output(output, form).write(_records(store))
            else:
                write_output(output, _records(store), form)
        failures_output(outputs[0]).write(_records(store))
    return merged


def _add(store: sqlite3.Connection, place: str, row: dict[str, Any]) -> None:
    """Keep a row; a caption goes before a failure."""
    key, failed = json.dumps(row["image_id"]), "error" in row
    found = store.execute("SELECT row FROM images WHERE key = ?", (key,)).fetchone()
    values = failed, json.dumps(row), key
    if found is None:
        store.execute("INSERT INTO images (failed, row, key) VALUES (?, ?, ?)", values)
        return
    known = json.loads(found[0])
    if "error" in known:
        store.execute("UPDATE images SET failed = ?, row = ? WHERE key = ?", values)
    elif not failed and known["caption"] != row["caption"]:
        raise DataError(
            f"{place}: another part has {known['caption']!r} for image {row['image_id']!r}, here "
            f"it is {row['caption']!r}"
        )


def _order(store: sqlite3.Connection, listing: Listing, merged: Merged) -> None:
    """Give the images the listing's order, and note those of it that no part has."""
    behind_all = _count(store, "1") + 1
    for position, image in enumerate(listing.images(), behind_all):
        statement = "UPDATE images SET position = ? WHERE key = ?"
        if not store.execute(statement, (position, json.dumps(image.image_id))).rowcount:
            merged.missing += 1
            merged.missing_names += [image.name] if merged.missing <= 5 else []


def _count(store: sqlite3.Connection, condition: str) -> int:
    return int(store.execute(f"SELECT count(*) FROM images WHERE {condition}").fetchone()[0])


def _records(store: sqlite3.Connection) -> Iterator[Record]:
    for (text,) in store.execute("SELECT row FROM images ORDER BY position"):
        yield record_of_row(json.loads(text))
