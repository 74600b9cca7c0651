"""What a job over many images has done, kept on the disk: an SQLite file beside its first output.

A batch's records, and how far the growing outputs had come with them, are committed together and
reach the disk together: after a crash at any moment the journal tells of whole batches, and the
outputs are cut back to where they stood then. Nothing that grows with the number of images is held
in memory.
"""

import json
import math
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from captioner.data.annotations import ImageId
from captioner.data.listing import ImageFile
from captioner.errors import CaptionerError, DataError
from captioner.inference.records import RankedCaption, Record

# Positions of images that were added by another listing follow all those before.
POSITIONS_OF_LISTING = 1 << 40
SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    number INTEGER PRIMARY KEY,
    key TEXT UNIQUE NOT NULL,     -- the id, as JSON
    position INTEGER NOT NULL,    -- in the listing
    size INTEGER, time INTEGER,   -- of the file, in bytes and ns, when it was captioned
    turn INTEGER,                 -- when it was captioned, counted in images
    failed INTEGER,
    sidecar INTEGER,              -- whether its text file is written, or left as it was
    described INTEGER,            -- likewise its metadata
    record TEXT                   -- none while it waits to be captioned (again)
);
CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS sidecars (path TEXT PRIMARY KEY, key TEXT NOT NULL, sha256 TEXT);
"""


@dataclass(frozen=True)
class FileState:
    """What tells that a file is the one that was captioned.

    Attributes:
        size: In bytes; -1 where there is no file.
        time: Of its last change, in ns.
    """

    size: int
    time: int

    @classmethod
    def of(cls, path: str | Path) -> "FileState":
        """Return the state of a file now."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return cls(-1, 0)
        return cls(status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Entry:
    """What the journal knows of an image.

    Attributes:
        position: Its place in the listing.
        state: Of its file when it was captioned.
        turn: When that was, counted in images.
        failed: Whether it couldn't be.
        sha256: Of its file, where that was asked for; else "".
    """

    position: int
    state: FileState
    turn: int
    failed: bool
    sha256: str


class Journal:
    """A job's journal; one process has it at a time, any of its threads may use it.

    Args:
        path: The file; made if it isn't there.

    Raises:
        CaptionerError: Another process has it, or it is no journal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # whoever holds it may begin a transaction
        self._connection = sqlite3.connect(
            path, timeout=0, isolation_level=None, check_same_thread=False
        )
        try:
            self._connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute("BEGIN IMMEDIATE")  # takes the lock, and keeps it
            for statement in SCHEMA.split(";"):
                self._connection.execute(statement)
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            self._connection.close()
            raise self._error(error) from None
        self._states: dict[str, tuple[FileState, int]] = {}  # of images that are being captioned

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        try:
            if self._connection.in_transaction:  # since the last image that ``move`` was given
                self._run("COMMIT")
        finally:
            self._connection.close()

    def _error(self, error: sqlite3.Error) -> CaptionerError:
        if "locked" in str(error):
            return CaptionerError(
                f"{self.path}: another process is writing these outputs; wait for it, or name "
                "others"
            )
        if isinstance(error, sqlite3.OperationalError):  # a full disk, say
            return CaptionerError(f"{self.path}: {error}; the same command goes on from here")
        return DataError(f"{self.path}: no journal of captioner ({error})")

    def _run(self, statement: str, *values: Any) -> sqlite3.Cursor:
        try:
            return self._connection.execute(statement, values)
        except sqlite3.Error as error:
            raise self._error(error) from None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Have all that is kept inside, and what ``move`` left before, on the disk at its end.

        Nothing of both is kept where an error comes out of it.
        """
        with self._lock:
            self._begin()
            try:
                yield
                self._run("COMMIT")
            except BaseException:
                self._connection.rollback()
                raise

    def _begin(self) -> None:
        if not self._connection.in_transaction:
            self._run("BEGIN")

    # --- facts --------------------------------------------------------------------------------

    def fact(self, key: str, default: Any = None) -> Any:
        """Return a fact about the job, as ``set_fact`` has left it."""
        row = self._run("SELECT value FROM facts WHERE key = ?", key).fetchone()
        return json.loads(row[0]) if row else default

    def set_fact(self, key: str, value: Any) -> None:
        """Keep a fact about the job: a value that JSON knows."""
        self._run("INSERT OR REPLACE INTO facts VALUES (?, ?)", key, json.dumps(value))

    # --- images -------------------------------------------------------------------------------

    def counts(self) -> tuple[int, int]:
        """Return how many images are captioned, and how many couldn't be."""
        row = self._run(
            "SELECT count(*) - total(failed), total(failed) FROM images WHERE record NOT NULL"
        ).fetchone()
        return int(row[0]), int(row[1])

    def failed_names(self, count: int = 5) -> list[str]:
        """Return the names of the first few images that couldn't be captioned."""
        rows = self._run(
            "SELECT record FROM images WHERE failed ORDER BY position, number LIMIT ?", count
        )
        return [record_from_json(text).name for (text,) in rows]

    def entry(self, image: ImageFile) -> Entry | None:
        """Return what is known of an image, or None while it isn't captioned."""
        row = self._run(
            "SELECT position, size, time, turn, failed, record FROM images WHERE key = ?",
            key_of(image.image_id),
        ).fetchone()
        if row is None or row[5] is None:
            return None
        position, size, time, turn, failed, record = row
        sha256 = json.loads(record).get("sha256", "")
        return Entry(position, FileState(size, time), turn, bool(failed), sha256)

    def move(self, image: ImageFile, position: int) -> None:
        """Give an image another position; kept with the next ``transaction``, or at the end."""
        with self._lock:
            self._begin()
            key = key_of(image.image_id)
            self._run("UPDATE images SET position = ? WHERE key = ?", position, key)

    def begin(self, image: ImageFile, position: int, state: FileState) -> None:
        """Note that an image is being captioned."""
        self._states[key_of(image.image_id)] = state, position

    def is_begun(self, image: ImageFile) -> bool:
        """Return whether an image is being captioned; if not, ``entry`` knows one that was."""
        return key_of(image.image_id) in self._states

    def commit(self, records: Iterable[Record], ends: dict[str, int]) -> None:
        """Keep a batch's records, and how long the growing outputs are with them, in bytes.

        The journal is on the disk after it.
        """
        with self.transaction():
            turn = self.fact("turn", 0)
            for record in records:
                turn += 1
                key = key_of(record.image_id)
                state, position = self._states[key]
                self._run(
                    "INSERT INTO images (key, position, size, time, turn, failed, record) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (key) DO UPDATE SET "
                    "position = excluded.position, size = excluded.size, time = excluded.time, "
                    "turn = excluded.turn, failed = excluded.failed, record = excluded.record, "
                    "sidecar = NULL, described = NULL",
                    *(key, position, state.size, state.time, turn, bool(record.error)),
                    record_to_json(record),
                )
                del self._states[key]  # now that ``entry`` knows it, in other threads too
            self.set_fact("turn", turn)
            self.set_fact("ends", ends)

    def records(self) -> Iterator[Record]:
        """Walk through all records, in the order of the listing."""
        rows = self._run(
            "SELECT record FROM images WHERE record NOT NULL ORDER BY position, number"
        )
        return (record_from_json(text) for (text,) in rows)

    def forget_records(self) -> None:
        """Have all images captioned again, and the outputs begin anew."""
        with self.transaction():
            self._run(
                "UPDATE images SET record = NULL, failed = NULL, turn = NULL, sidecar = NULL, "
                "described = NULL"
            )
            self._run("DELETE FROM facts")

    def first_position(self, listing: str) -> int:
        """Return the position of a listing's first image: behind all of the other listings'."""
        listings = self.fact("listings", [])
        if listing not in listings:
            listings.append(listing)
            self.set_fact("listings", listings)
        return listings.index(listing) * POSITIONS_OF_LISTING

    # --- text files beside the images, and their metadata -------------------------------------

    def records_without(self, what: str, count: int = 1000) -> list[Record]:
        """Return some of the captioned images whose "sidecar" isn't written; or "described"."""
        rows = self._run(
            f"SELECT record FROM images WHERE record NOT NULL AND NOT failed AND {what} IS NULL "
            "ORDER BY position, number LIMIT ?",
            count,
        )
        return [record_from_json(text) for (text,) in rows]

    def keep_described(self, records: Iterable[Record], described: Iterable[Record]) -> None:
        """Note images whose metadata was dealt with, and the state of those that have it now."""
        with self.transaction():
            for record in records:
                statement = "UPDATE images SET described = 0 WHERE key = ?"
                self._run(statement, key_of(record.image_id))
            for record in described:
                state = FileState.of(record.path)
                statement = "UPDATE images SET described = 1, size = ?, time = ? WHERE key = ?"
                self._run(statement, state.size, state.time, key_of(record.image_id))

    def sidecar(self, path: str) -> tuple[str, str] | None:
        """Return what is known of a text file: its image's key, and the SHA-256 of its content."""
        row = self._run("SELECT key, sha256 FROM sidecars WHERE path = ?", json.dumps(path))
        return row.fetchone()

    def keep_sidecars(self, written: Iterable[tuple[Record, str, str]]) -> None:
        """Note text files that are written: their record, path, and SHA-256; "" for one left."""
        with self.transaction():
            for record, path, sha256 in written:
                key = key_of(record.image_id)
                if sha256:
                    values = json.dumps(path), key, sha256
                    self._run("INSERT OR REPLACE INTO sidecars VALUES (?, ?, ?)", *values)
                self._run("UPDATE images SET sidecar = ? WHERE key = ?", bool(sha256), key)


def key_of(image_id: ImageId) -> str:
    """Return what an image is called in the journal."""
    return json.dumps(image_id)  # of any text: names that aren't UTF-8 become escapes


def record_to_json(record: Record) -> str:
    """Return a record as JSON, in ASCII."""
    content = asdict(record)
    for caption in content["captions"]:
        for name in ("log_probability", "score"):
            caption[name] = caption[name] if math.isfinite(caption[name]) else None
    return json.dumps(content)


def record_from_json(text: str) -> Record:
    """Return the record that ``record_to_json`` was given."""
    content = json.loads(text)
    captions = []
    for caption in content.pop("captions"):
        for name in ("log_probability", "score"):
            caption[name] = -math.inf if caption[name] is None else caption[name]
        captions.append(RankedCaption(**caption))
    return Record(captions=tuple(captions), **content)
