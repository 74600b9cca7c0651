"""Result files: one caption per image, as COCO results JSON, JSON lines or CSV.

A row is a mapping with ``image_id`` (integer or text) and ``caption``; what else it holds, such
as ``file_name``, is kept. CSV has no types: every id read from it is text, so readers that match
it against integer ids use ``captioner.metrics.evaluation``.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from captioner.data.annotations import IMAGE_COLUMNS, ImageId, csv_reader
from captioner.errors import DataError, UsageError, name_some
from captioner.files import atomic_write, parse_json, read_json, read_text

Row = Mapping[str, Any]

# What makes a spreadsheet take a cell for a formula.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def write_predictions(path: str | Path, rows: Iterable[Row], csv_safe: bool = False) -> None:
    """Write captions in the format that the suffix names, whole or not at all.

    Args:
        path: ``.json`` (COCO results: one list), ``.jsonl`` (one object a line) or ``.csv``.
        rows: Mappings with at least ``image_id`` and ``caption``.
        csv_safe: For spreadsheets: a CSV cell that one would take for a formula begins with ``'``.
            Readers, ``read_predictions`` too, see it as a part of the id or caption.

    Raises:
        UsageError: The suffix is none of the three.
        DataError: A row lacks a field or has one of the wrong type, or an id comes twice.
    """
    path = Path(path)
    kind = predictions_format(path)
    rows = list(rows)
    _check(path, rows, [f"row {number}" for number in range(len(rows))])
    with atomic_write(path) as file:
        if kind == ".csv":
            _write_csv(file, rows, "'" if csv_safe else "")
        elif kind == ".jsonl":
            file.writelines(f"{to_json(row)}\n" for row in rows)
        else:
            file.write("[" + ",\n ".join(to_json(row) for row in rows) + "]\n")


def read_predictions(path: str | Path) -> dict[ImageId, str]:
    """Read a results file into a caption for each image id, in the file's order.

    Args:
        path: ``.json``, ``.jsonl`` or ``.csv``. Ids from JSON keep their type, ids from CSV are
            text. A CSV without ``image_id`` may name its images as captions files do (``image``).

    Raises:
        UsageError: The suffix is none of the three.
        DataError: The file is missing or malformed, or an id comes twice; the message names the
            place, the count and the first few.
    """
    path = Path(path)
    rows, places = _READERS[predictions_format(path)](path)
    _check(path, rows, places)
    return {row["image_id"]: row["caption"] for row in rows}


def predictions_format(path: str | Path) -> str:
    """Return the suffix that names a results file's format, or raise a ``UsageError``."""
    suffix = Path(path).suffix.lower()
    if suffix not in _READERS:
        raise UsageError(
            f"{path}: a results file's name must end in .json, .jsonl or .csv, found "
            f"'{suffix or Path(path).name}'"
        )
    return suffix


def _check(path: Path, rows: Sequence[Any], places: Sequence[str]) -> None:
    """Refuse rows that aren't objects with a usable id and a caption, and ids that come twice."""
    seen: set[ImageId] = set()
    twice: dict[ImageId, None] = {}
    for place, row in zip(places, rows, strict=True):
        problem = _problem(row)
        if problem:
            raise DataError(f"{path}: {place}: {problem}")
        if row["image_id"] in seen:
            twice[row["image_id"]] = None
        seen.add(row["image_id"])
    if twice:
        raise DataError(
            f"{path}: {len(twice)} image ids come more than once ({name_some(twice)}); "
            "each image must have one caption"
        )


def _problem(row: Any) -> str:
    if not isinstance(row, Mapping):
        return f"an object with 'image_id' and 'caption' was expected, found {_short(row)}"
    for key, kinds, name in (("image_id", (int, str), "integer or text"), ("caption", str, "text")):
        if key not in row:
            return f"no '{key}' (there are {', '.join(map(str, row)) or 'no fields'})"
        if not isinstance(row[key], kinds) or isinstance(row[key], bool):
            of = "" if key == "image_id" else f" of image {_short(row['image_id'])}"
            return f"'{key}'{of} must be {name}, found {_short(row[key])}"
    return ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "…"


# --- JSON and JSON lines --------------------------------------------------------------------


def to_json(row: Row) -> str:
    """Return a row as JSON on one line, whatever its texts hold."""
    line = json.dumps(dict(row), ensure_ascii=False)
    # A file name that isn't UTF-8 holds lone surrogates, which only \\u escapes can carry.
    return json.dumps(dict(row)) if _LONE_SURROGATE.search(line) else line


def _read_json(path: Path) -> tuple[list[Any], list[str]]:
    content = read_json(path)
    if not isinstance(content, list):
        raise DataError(
            f"{path}: a list of objects with 'image_id' and 'caption' was expected (COCO results "
            f"format), found {_short(content) if not isinstance(content, dict) else 'an object'}"
        )
    return content, [f"entry {number}" for number in range(len(content))]


def _read_jsonl(path: Path) -> tuple[list[Any], list[str]]:
    lines = read_text(path).split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    rows = [parse_json(line, f"{path}: line {number}") for number, line in numbered]
    return rows, [f"line {number}" for number, _ in numbered]


# --- CSV ------------------------------------------------------------------------------------


def _write_csv(file: Any, rows: Sequence[Row], before_formula: str) -> None:
    columns = list(dict.fromkeys(["image_id", "caption", *(key for row in rows for key in row)]))
    writer = csv.writer(file)
    writer.writerow(columns)
    for row in rows:
        cells = [to_cell(row.get(column, "")) for column in columns]
        writer.writerow(
            [before_formula + cell if cell.startswith(FORMULA_STARTS) else cell for cell in cells]
        )


def to_cell(value: Any) -> str:
    """Return a value as the text of a CSV's cell."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _read_csv(path: Path) -> tuple[list[Any], list[str]]:
    rows: list[dict[str, str]] = []
    places: list[str] = []
    try:
        for number, cells in _csv_lines(read_text(path)):
            if not places:
                names = _columns(path, cells)
            elif len(cells) != len(names):
                raise DataError(
                    f"{path}: line {number}: {len(names)} columns were expected "
                    f"({','.join(names)}), found {len(cells)}; a caption with a comma in it must "
                    "stand in double quotes"
                )
            rows.append(dict(zip(names, cells, strict=True)))
            places.append(f"line {number}")
    except csv.Error as error:
        raise DataError(f"{path}: not valid CSV ({error})") from None
    if not places:
        raise DataError(f"{path}: the file is empty; its first line must be 'image_id,caption'")
    return rows[1:], places[1:]


def _csv_lines(text: str) -> Iterator[tuple[int, list[str]]]:
    """Yield each row that isn't blank with the number of its last line."""
    reader = csv_reader(text)
    for cells in reader:
        if cells:
            yield reader.line_num, cells


def _columns(path: Path, header: list[str]) -> list[str]:
    names = [name.strip().lower() for name in header]
    image = next((name for name in ("image_id", *IMAGE_COLUMNS) if name in names), None)
    if image is None or "caption" not in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: line 1 must name the columns once each, such as 'image_id,caption'; "
            f"found {_short(','.join(header))}"
        )
    return ["image_id" if name == image else name for name in names]


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv}
