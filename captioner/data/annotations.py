"""Captions files: COCO JSON, Karpathy split JSON and Flickr-style CSV, read into one form.

This module knows nothing of torch, so that scoring can read references without it.
"""

import contextlib
import csv
import io
import os
import reprlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pycocotools.coco import COCO

from captioner.data.near_names import near_names_hint, show_name
from captioner.errors import DataError, did_you_mean, name_some
from captioner.files import read_json, read_text

ImageId = int | str

IMAGE_COLUMNS = ("image", "image_name", "file_name", "filename")
CAPTION_COLUMNS = ("caption", "comment", "captions")
KIND_NAMES: dict[type, str] = {int: "integer", str: "text", list: "a list", type(None): "null"}
# Names of splits in the field's files: one that is missing is no mistyped other one.
SPLIT_NAMES = {"train", "restval", "trainval", "val", "test", "dev", "minival"}


@dataclass
class AnnotatedImage:
    """One image and its captions.

    Attributes:
        image_id: Its id, an integer or a string.
        file_name: Its path below the images folder; None where the file gives only an id.
        captions: Its captions, stripped of white space at both ends, none of them empty.
    """

    image_id: ImageId
    file_name: str | None
    captions: list[str] = field(default_factory=list)


@dataclass
class Annotations:
    """What a captions file says.

    Attributes:
        path: The file.
        images: Its images in the file's order (those of the split that was asked for).
        notes: What was found wrong but could be left out, one line each, with counts and ids.
        split_sizes: How many images each split has, where the file names splits.
    """

    path: Path
    images: list[AnnotatedImage]
    notes: list[str]
    split_sizes: Counter[str] = field(default_factory=Counter)

    def describe_splits(self) -> str:
        """Return the splits and how many images each has, ``"train 6000, val 1000"``."""
        return ", ".join(f"{name} {size}" for name, size in self.split_sizes.items())


def read_content(path: str | Path) -> Any:
    """Return what a JSON captions file holds, for ``read_annotations``; None for another file.

    Raises:
        DataError: It is missing or no JSON.
    """
    return read_json(path) if Path(path).suffix.lower() == ".json" else None


def read_annotations(
    path: str | Path, split: str | None = None, content: Any = None
) -> Annotations:
    """Read a captions file in whichever of the known formats it is.

    Args:
        path: COCO captions JSON, Karpathy split JSON, ``image,caption`` CSV (also ``|`` or tab
            between the columns), or Flickr's ``name.jpg#0<tab>caption`` lines.
        split: Which images to take: a split name as in the Karpathy file or the CSV's ``split``
            column (several joined by ``+``: ``train+restval``), or a text file that lists image
            file names, one a line. None takes all.
        content: What ``read_content`` gave, where several splits of a file are read.

    Raises:
        DataError: The file is missing, malformed or inconsistent; the message names the file,
            the first few ids and their count.
    """
    path = Path(path)
    split_file = split if split and os.path.isfile(split) else None
    split_name = None if split_file else split
    if path.suffix.lower() != ".json":
        annotations = _from_csv(path, split_name)
    else:
        content = read_content(path) if content is None else content
        if _is_karpathy(content):
            annotations = _from_karpathy(path, content, split_name)
        else:
            annotations = _from_coco(path, content, split_name)
    if split_file:
        _keep_listed(annotations, split_file)
    elif not split and len(annotations.split_sizes) > 1:
        annotations.notes.append(
            f"{path}: no split was chosen, so the images of all splits are taken "
            f"({annotations.describe_splits()})"
        )
    return annotations


# --- COCO -----------------------------------------------------------------------------------


def _from_coco(path: Path, content: Any, split: str | None) -> Annotations:
    if not isinstance(content, dict) or "images" not in content:
        keys = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise DataError(
            f"{path}: neither COCO captions ('images' and 'annotations') nor a Karpathy split "
            f"('images' with 'sentences'); found {keys or 'nothing'}"
        )
    if split:
        raise DataError(
            f"{path}: split '{split}' was asked for, but COCO captions have no splits; give a "
            "text file that lists the images, or leave the split out"
        )
    content.setdefault("annotations", [])  # test sets come without captions
    name_kinds = {"file_name": (str, type(None))}
    images = _entries(path, content, "images", needed={"id": (int, str)}, optional=name_kinds)
    captions = _entries(
        path,
        content,
        "annotations",
        needed={"image_id": (int, str), "caption": (str,)},
        optional={"id": (int, str)},
    )
    _check_unique_ids(path, (image["id"] for image in images))
    for position, entry in enumerate(captions):  # the index asks for an id
        entry.setdefault("id", f"annotations[{position}]")

    coco = COCO()
    coco.dataset = {"images": images, "annotations": captions}
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    _check_known_ids(path, (entry["image_id"] for entry in captions), coco.imgs)
    annotated = []
    empty: list[object] = []
    for image_id, entry in coco.imgs.items():
        image = AnnotatedImage(image_id, entry.get("file_name"))
        for annotation in coco.imgToAnns.get(image_id, []):
            _add_caption(image, annotation["caption"], annotation["id"], empty)
        annotated.append(image)
    return Annotations(path, annotated, _notes(path, annotated, empty))


def _check_known_ids(path: Path, ids: Iterable[ImageId], known: Collection[ImageId]) -> None:
    unknown = sorted({image_id for image_id in ids if image_id not in known}, key=str)
    if unknown:
        raise DataError(
            f"{path}: captions name {len(unknown)} image ids that 'images' doesn't list "
            f"({name_some(unknown)})" + near_names_hint(unknown, known, "'images'")
        )


def _entries(
    path: Path,
    content: dict[str, Any],
    name: str,
    needed: Mapping[str, tuple[type, ...]],
    optional: Mapping[str, tuple[type, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Return ``content[name]`` after checking that it lists objects with these fields."""
    entries = content[name]
    if not isinstance(entries, list):
        raise DataError(f"{path}: '{name}' must be a list, found {type(entries).__name__}")
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise DataError(
                f"{path}: {name}[{position}] must be an object, found {reprlib.repr(entry)}"
            )
        present = {key: kinds for key, kinds in (optional or {}).items() if key in entry}
        for key, kinds in {**needed, **present}.items():
            value = entry.get(key)
            if not isinstance(value, kinds) or isinstance(value, bool):
                expected = " or ".join(KIND_NAMES[kind] for kind in kinds)
                raise DataError(
                    f"{path}: {name}[{position}] (id {reprlib.repr(entry.get('id'))}): '{key}' "
                    f"must be {expected}, found {reprlib.repr(value)}"
                )
    return entries


# --- Karpathy -------------------------------------------------------------------------------


def _is_karpathy(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return bool(
        isinstance(images, list)
        and images
        and "annotations" not in content
        and isinstance(images[0], dict)
        and "sentences" in images[0]
    )


def _from_karpathy(path: Path, content: dict[str, Any], split: str | None) -> Annotations:
    """Read a split file of Karpathy & Fei-Fei (2015); the id is ``cocoid`` where there is one."""
    entries = _entries(
        path,
        content,
        "images",
        needed={"filename": (str,), "split": (str,)},
        optional={
            "cocoid": (int, str),
            "imgid": (int, str),
            "filepath": (str,),
            "sentences": (list,),
        },
    )
    split_sizes = Counter(entry["split"] for entry in entries)
    splits = _chosen_splits(path, split, split_sizes)
    annotated: list[AnnotatedImage] = []
    empty: list[object] = []
    for position, entry in enumerate(entries):
        if entry["split"] not in splits:
            continue
        image_id = entry.get("cocoid", entry.get("imgid", entry["filename"]))
        image = AnnotatedImage(image_id, str(Path(entry.get("filepath", "")) / entry["filename"]))
        for sentence in entry.get("sentences", []):
            if not isinstance(sentence, dict) or not isinstance(sentence.get("raw"), str):
                raise DataError(
                    f"{path}: images[{position}] (id {image_id}): a sentence lacks 'raw'"
                )
            _add_caption(image, sentence["raw"], sentence.get("sentid", image_id), empty)
        annotated.append(image)
    _check_unique_ids(path, (image.image_id for image in annotated))
    return Annotations(path, annotated, _notes(path, annotated, empty), split_sizes)


# --- CSV ------------------------------------------------------------------------------------


def _from_csv(path: Path, split: str | None) -> Annotations:
    text = read_text(path)
    header = text.split("\n", 1)[0]
    if "#" in header and "\t" in header and header.split("\t")[0].rpartition("#")[2].isdigit():
        rows = _flickr_token_rows(path, text)
    else:
        rows = _csv_rows(path, text)
    pairs = dict.fromkeys((row["image"], row["split"]) for row in rows if "split" in row)
    split_sizes = Counter(name for _, name in pairs)
    if split and not split_sizes:
        raise DataError(
            f"{path}: split '{split}' was asked for, but the file has no 'split' column; "
            "give a text file that lists the images instead"
        )
    if split_sizes:
        splits = _chosen_splits(path, split, split_sizes)
        rows = [row for row in rows if row["split"] in splits]
    images: dict[str, AnnotatedImage] = {}
    empty: list[object] = []
    for row in rows:
        image = images.setdefault(row["image"], AnnotatedImage(row["image"], row["image"]))
        _add_caption(image, row["caption"], row["image"], empty)
    annotated = list(images.values())
    return Annotations(path, annotated, _notes(path, annotated, empty), split_sizes)


def _csv_rows(path: Path, text: str) -> list[dict[str, str]]:
    header = text.split("\n", 1)[0].strip()
    delimiter = max(",|\t;", key=header.count)
    try:
        lines = _csv_lines(path, text, delimiter, csv.QUOTE_MINIMAL)
    except DataError:
        if delimiter in ",;":
            raise
        # Flickr30k's results.csv and many TSV files quote nothing: a quote is a quote there.
        lines = _csv_lines(path, text, delimiter, csv.QUOTE_NONE)
    names = [name.strip().lower() for name in lines[0][1]] if lines else []
    image_column = next((names.index(name) for name in IMAGE_COLUMNS if name in names), None)
    caption_column = next((names.index(name) for name in CAPTION_COLUMNS if name in names), None)
    if image_column is None or caption_column is None:
        raise DataError(
            f"{path}: line 1 must name the columns, such as 'image,caption'; found {header[:80]!r}"
        )
    split_column = names.index("split") if "split" in names else None
    rows = []
    for number, cells in lines[1:]:
        if len(cells) != len(names) or not cells[image_column].strip():
            raise DataError(
                f"{path}: line {number}: {len(names)} columns were expected "
                f"({delimiter.join(names)}), found {len(cells)}; a caption with '{delimiter}' in "
                "it must stand in double quotes"
            )
        row = {"image": cells[image_column].strip(), "caption": cells[caption_column]}
        if split_column is not None:
            row["split"] = cells[split_column].strip()
        rows.append(row)
    return rows


def _csv_lines(
    path: Path, text: str, delimiter: str, quoting: Literal[0, 3]
) -> list[tuple[int, list[str]]]:
    """Return the cells of each row that isn't blank, with the number of its first line."""
    reader = csv_reader(text, delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    lines, number = [], 1
    try:
        for cells in reader:
            if any(cells):
                lines.append((number, cells))
            number = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{path}: line {number}: not valid CSV ({error}); is a double quote missing?"
        ) from None
    return lines


def _flickr_token_rows(path: Path, text: str) -> list[dict[str, str]]:
    rows = []
    for number, line in enumerate(_lines(text), 1):
        name, tab, caption = line.partition("\t")
        if line.strip() and not (tab and "#" in name):
            raise DataError(f"{path}: line {number}: 'name.jpg#0<tab>caption' was expected")
        if line.strip():
            rows.append({"image": name.rpartition("#")[0], "caption": caption})
    return rows


# --- shared ---------------------------------------------------------------------------------


def _chosen_splits(path: Path, split: str | None, sizes: Counter[str]) -> set[str]:
    """Return the splits that are asked for, such as "train+restval"; None asks for all."""
    if not split:
        return set(sizes)
    chosen = set(split.split("+"))
    for name in sorted(chosen - sizes.keys()):
        hint = "" if name in SPLIT_NAMES else did_you_mean(name, sizes)
        raise DataError(
            f"{path}: no image has split '{name}'{hint} (there are {', '.join(sorted(sizes))})"
        )
    return chosen


def csv_reader(text: str, **form: Any) -> Any:
    """Return a ``csv.reader`` over a text, for captions of any length; ``form`` as it takes it."""
    csv.field_size_limit(2**31 - 1)  # the greatest everywhere; it is one for the whole process
    # strict: else a quote that isn't closed swallows the rest of the file
    return csv.reader(io.StringIO(text, newline=""), strict=True, **form)


def _lines(text: str) -> list[str]:
    """Split at line feeds and carriage returns; ``splitlines`` also does at U+2028 and others."""
    return io.StringIO(text, newline=None).read().split("\n")


def _check_unique_ids(path: Path, image_ids: Iterable[ImageId]) -> None:
    repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{path}: {len(repeated)} image ids are listed twice ({name_some(repeated)})"
        )


def _add_caption(
    image: AnnotatedImage, caption: str, caption_id: object, empty: list[object]
) -> None:
    if caption.strip():
        image.captions.append(caption.strip())
    else:
        empty.append(caption_id)


def _notes(path: Path, images: list[AnnotatedImage], empty: list[object]) -> list[str]:
    notes = []
    if empty:
        notes.append(f"{path}: {len(empty)} empty captions left out (ids {name_some(empty)})")
    uncaptioned = [image.image_id for image in images if not image.captions]
    if uncaptioned:
        notes.append(
            f"{path}: {len(uncaptioned)} images have no caption (ids {name_some(uncaptioned)})"
        )
    return notes


def _keep_listed(annotations: Annotations, split_file: str) -> None:
    """Keep the images whose file names a text file lists, one a line."""
    listed = {line.strip() for line in _lines(read_text(split_file)) if line.strip()}
    kept = [image for image in annotations.images if image.file_name in listed]
    unknown = sorted(listed - {image.file_name for image in kept})
    if unknown:
        names = [image.file_name for image in annotations.images if image.file_name]
        raise DataError(
            f"{split_file}: {len(unknown)} listed images are not in {annotations.path} "
            f"({name_some(unknown)}){near_names_hint(unknown, names, str(annotations.path))}"
        )
    annotations.images = kept


def image_path(folder: str | Path, file_name: str) -> Path:
    """Return where an annotated image is, below the folder of the images.

    Raises:
        DataError: The name reaches outside the folder: it is absolute, or has too many ``..``.
    """
    normalised = os.path.normpath(file_name)
    if Path(file_name).anchor or Path(normalised).parts[:1] == ("..",):
        raise DataError(f"{show_name(file_name)} reaches outside the folder of the images")
    return Path(folder) / normalised
