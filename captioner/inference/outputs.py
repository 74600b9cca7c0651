"""The files that a job's records are written to, growing as they come or whole at its end."""

import csv
import io
import json
import math
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from captioner.data.annotations import ImageId
from captioner.data.predictions import FORMULA_STARTS, to_cell, to_json
from captioner.errors import DataError, UsageError
from captioner.files import atomic_write, open_regular, parse_json
from captioner.inference.records import RankedCaption, Record

GROWING, WHOLE = (".jsonl", ".csv"), (".json", ".sqlite")
FAILURES = ".failures.jsonl"

Row = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """What the rows of a job's outputs hold.

    Attributes:
        n_best: More than 1 adds all captions of an image, and their scores.
        has_hash: Whether there is the SHA-256 of the image's file.
        csv_safe: Whether cells of a CSV that a spreadsheet takes for formulas begin with ``'``.
    """

    n_best: int = 1
    has_hash: bool = False
    csv_safe: bool = False

    @property
    def columns(self) -> list[str]:
        """The names of a row's values."""
        names = ["image_id", "file_name", "caption", "log_probability", "width", "height"]
        names += ["captions", "log_probabilities", "scores"] if self.n_best > 1 else []
        return names + (["sha256"] if self.has_hash else [])

    def row(self, record: Record) -> Row:
        """Return the row of a captioned image."""
        row: Row = {
            "image_id": record.image_id,
            "file_name": record.name,
            "caption": record.captions[0].text,
            "log_probability": _finite(record.captions[0].log_probability),
            "width": record.width,
            "height": record.height,
        }
        if self.n_best > 1:
            row["captions"] = [caption.text for caption in record.captions]
            row["log_probabilities"] = [_finite(each.log_probability) for each in record.captions]
            row["scores"] = [_finite(caption.score) for caption in record.captions]
        if self.has_hash:
            row["sha256"] = record.sha256
        return row


def _finite(number: float) -> float | None:
    return round(number, 6) if math.isfinite(number) else None


def failures_path(output: Path) -> Path:
    """Return the file that says why images couldn't be captioned, beside an output."""
    return output.with_name(output.name + FAILURES)


def output_suffix(path: Path) -> str:
    """Return the suffix that names an output's format, or raise a ``UsageError``."""
    suffix = path.suffix.lower()
    if suffix not in (*GROWING, *WHOLE):
        raise UsageError(
            f"{path}: an output's name must end in .json, .jsonl, .csv or .sqlite, found "
            f"'{suffix or path.name}'"
        )
    return suffix


# --- growing ----------------------------------------------------------------------------------


class GrowingOutput:
    """A file that gets its lines as they come: whole lines alone, on the disk after ``sync``.

    Args:
        path: The file; it is made with its first line.
        lines: Makes the lines of a record, "" of one that isn't for this file.
        header: What the file begins with.
    """

    def __init__(self, path: Path, lines: Callable[[Record], str], header: str = "") -> None:
        self.path, self._lines, self._header = path, lines, header
        self.end = 0

    def cut(self, end: int) -> bool:
        """Have the file end after so many bytes; False where it is shorter, or isn't there."""
        self.end = end
        if not end:
            self.path.unlink(missing_ok=True)
            return True
        try:
            is_long_enough = self.path.stat().st_size >= end
        except FileNotFoundError:
            return False
        if is_long_enough:
            os.truncate(self.path, end)
        return is_long_enough

    def append(self, records: Iterable[Record]) -> None:
        """Add the lines of some records."""
        content = "".join(map(self._lines, records)).encode("utf-8")
        if not content:
            return
        with open(self.path, "ab") as file:
            file.write(content if self.end else self._header.encode() + content)
            file.flush()
            os.fsync(file.fileno())
            self.end = file.tell()

    def write(self, records: Iterable[Record]) -> None:
        """Write all lines anew, whole or not at all; without any there is no file."""
        lines = (line for record in records if (line := self._lines(record)))
        first = next(lines, "")
        if not first:
            self.cut(0)
            return
        with atomic_write(self.path, "wb") as file:
            file.write((self._header + first).encode())
            file.writelines(line.encode() for line in lines)
            self.end = file.tell()


def growing_output(path: Path, form: Format) -> GrowingOutput:
    """Return the output of a ``.jsonl`` or ``.csv``."""
    if output_suffix(path) == ".jsonl":
        return GrowingOutput(
            path, lambda record: "" if record.error else to_json(form.row(record)) + "\n"
        )
    before_formula = "'" if form.csv_safe else ""

    def line(record: Record) -> str:
        if record.error:
            return ""
        cells = [to_cell(value) for value in form.row(record).values()]
        return _csv_line(
            before_formula + cell if cell.startswith(FORMULA_STARTS) else cell for cell in cells
        )

    return GrowingOutput(path, line, _csv_line(form.columns))


def _csv_line(cells: Iterable[str]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow(list(cells))
    return text.getvalue()


def failures_output(output: Path) -> GrowingOutput:
    """Return the file of images that couldn't be captioned: a JSON object a line."""

    def line(record: Record) -> str:
        if not record.error:
            return ""
        row = {"file_name": record.name, "path": record.path, "error": record.error}
        return to_json(row) + "\n"

    return GrowingOutput(failures_path(output), line)


# --- whole ------------------------------------------------------------------------------------


def write_output(path: Path, records: Iterable[Record], form: Format) -> None:
    """Write a ``.json`` or ``.sqlite`` of the captioned images, whole or not at all."""
    captioned = (record for record in records if not record.error)
    if output_suffix(path) == ".json":
        _write_json(path, captioned)
    else:
        _write_sqlite(path, captioned, form)


def _write_json(path: Path, records: Iterable[Record]) -> None:
    """Write COCO's results format."""
    with atomic_write(path) as file:
        between = "["
        for record in records:
            row = {"image_id": record.image_id, "caption": record.captions[0].text}
            file.write(between + to_json(row))
            between = ",\n "
        file.write("]\n" if between != "[" else "[]\n")


def _write_sqlite(path: Path, records: Iterable[Record], form: Format) -> None:
    """Write an SQLite database with a table ``captions``; lists are JSON in it."""
    kinds = {"log_probability": "REAL", "width": "INTEGER", "height": "INTEGER", "image_id": ""}
    columns = ", ".join(f"{name} {kinds.get(name, 'TEXT')}" for name in form.columns)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name[:40]}.") as folder:
        aside = Path(folder) / "captions.sqlite"
        with closing(sqlite3.connect(aside)) as connection, connection:
            connection.execute(f"CREATE TABLE captions ({columns})")
            marks = ", ".join("?" for _ in form.columns)
            connection.executemany(
                f"INSERT INTO captions VALUES ({marks})",
                ([_to_sql(value) for value in form.row(record).values()] for record in records),
            )
            connection.execute("CREATE INDEX by_image_id ON captions (image_id)")
        os.replace(aside, path)


def _to_sql(value: Any) -> Any:
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return to_cell(value) if isinstance(value, str) else value


# --- reading ----------------------------------------------------------------------------------


def read_rows(path: Path, of_failures: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Walk through a ``.jsonl`` output, or a failures file, which may be missing.

    Yields:
        Where a row is, and the row.

    Raises:
        DataError: It can't be read, or a row isn't one.
    """
    if of_failures and not path.exists():
        return
    try:
        with open_regular(path) as file:
            for number, line in enumerate(file, 1):
                place = f"{path}: line {number}"
                row = parse_json(line.decode("utf-8", "replace"), place)
                wanted = ("file_name", "error") if of_failures else ("image_id", "caption")
                if not isinstance(row, dict) or any(name not in row for name in wanted):
                    raise DataError(f"{place}: an object with {' and '.join(wanted)} was expected")
                yield place, row
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror})") from None


def record_of_row(row: dict[str, Any]) -> Record:
    """Return the record that a row of a ``.jsonl`` output, or of its failures, was made of."""
    image_id: ImageId = row["image_id"]
    name = str(row.get("file_name", image_id))
    if "error" in row:
        return Record(image_id, name, str(row.get("path", name)), error=str(row["error"]))
    texts = row.get("captions") or [row["caption"]]
    first = row.get("log_probability")
    probabilities = row.get("log_probabilities") or [first] + [None] * (len(texts) - 1)
    scores = row.get("scores") or probabilities
    captions = tuple(
        RankedCaption(text, _number(probability), _number(score))
        for text, probability, score in zip(texts, probabilities, scores, strict=True)
    )
    sizes = int(row.get("width", 0)), int(row.get("height", 0))
    return Record(image_id, name, name, captions, *sizes, sha256=str(row.get("sha256", "")))


def _number(value: float | None) -> float:
    return -math.inf if value is None else value
