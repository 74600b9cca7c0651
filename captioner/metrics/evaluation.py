"""Bring captions and references together, score them, and say how: what ``evaluate_bleu.py`` does.

Both sides must be of the same images, or there is a clear word why not.
"""

import csv
import hashlib
import importlib.metadata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from captioner.data.annotations import ImageId, read_annotations
from captioner.data.near_names import show_name
from captioner.data.predictions import read_predictions
from captioner.data.tokenizer import tokenize
from captioner.errors import DataError, UsageError, name_some
from captioner.files import atomic_write, parse_json, read_text
from captioner.metrics.cider import DocumentFrequencies
from captioner.metrics.official import METEOR_JAR, SPICE_JARS
from captioner.metrics.scores import BLEU_NAMES, Scores, compare_ids
from captioner.version import __version__

T = TypeVar("T")


@dataclass(frozen=True)
class Evaluation:
    """Captions and references of the same images, in the references' order.

    Attributes:
        references: One or more captions per image id.
        hypotheses: For each result file, by its name, one caption per image id.
        file_names: The image file of each id that the references name one for.
        notes: What was found wrong but could be left out or counted, one line each.
    """

    references: dict[ImageId, list[str]]
    hypotheses: dict[str, dict[ImageId, str]]
    file_names: dict[ImageId, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_evaluation(
    references_path: str | Path,
    hypotheses_paths: Sequence[str | Path],
    split: str | None = None,
    allow_missing: bool = False,
) -> Evaluation:
    """Read result files and the captions they are scored against.

    Args:
        references_path: Captions in any format of ``read_annotations``.
        hypotheses_paths: Results as JSON, JSON lines or CSV, one caption per image.
        split: Which images of the references to take, as in ``read_annotations``.
        allow_missing: Score the images that all files have, instead of refusing.

    Raises:
        DataError: A file is malformed, or the files don't have the same images.
        UsageError: A result file is given twice.
    """
    names = _names(hypotheses_paths)
    annotations = read_annotations(references_path, split)
    references = {image.image_id: image.captions for image in annotations.images}
    file_names = {
        image.image_id: image.file_name for image in annotations.images if image.file_name
    }
    results = {
        name: _match_ids(read_predictions(path), path, references, references_path)
        for name, path in zip(names, hypotheses_paths, strict=True)
    }
    common = [key for key in references if _is_scored(key, references, results.values())]
    by_path = dict(zip(map(str, hypotheses_paths), results.values(), strict=True))
    try:
        differences = _compare_images(by_path, references, file_names, len(common), allow_missing)
    except DataError as error:
        if split or len(annotations.split_sizes) < 2:
            raise
        splits = annotations.describe_splits()
        raise DataError(
            f"{error}; --split takes one of the references' splits ({splits})"
        ) from None
    notes = [*annotations.notes, *differences, *_empty_captions(by_path, common)]
    return Evaluation(
        {key: references[key] for key in common},
        {name: {key: captions[key] for key in common} for name, captions in results.items()},
        file_names,
        notes,
    )


def _empty_captions(
    results: Mapping[str, Mapping[ImageId, str]], keys: Sequence[ImageId]
) -> list[str]:
    notes = []
    for path, captions in results.items():
        empty = [show_name(key) for key in keys if not captions[key].strip()]
        if empty:
            ids = name_some(empty)
            notes.append(f"{path}: {len(empty)} empty captions, scored as such (ids {ids})")
    return notes


def read_n_best(
    path: str | Path,
    evaluation: Evaluation,
    references_path: str | Path,
    allow_missing: bool = False,
) -> tuple[list[list[list[str]]], list[str]]:
    """Read several captions of each scored image.

    Args:
        path: JSON lines, objects with ``image_id`` and ``captions``.
        evaluation: What is scored.
        references_path: The file that the evaluation's references are from.
        allow_missing: Take the images that are scored and in the file, instead of refusing.

    Returns:
        The words of each image's captions, and notes as in ``Evaluation``.

    Raises:
        DataError: The file is malformed, or it doesn't have the images that are scored.
    """
    captions: dict[ImageId, list[str]] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}: line {number}"
        row = parse_json(line, place)
        if not _is_n_best_row(row):
            raise DataError(
                f"{place}: an object with 'image_id' and 'captions', a list of texts, was expected"
            )
        if row["image_id"] in captions:
            raise DataError(f"{place}: image {show_name(row['image_id'])} comes twice")
        captions[row["image_id"]] = row["captions"]
    references = evaluation.references
    captions = _match_ids(captions, path, references, references_path)
    common = [key for key in references if key in captions]
    notes = _compare_images(
        {str(path): captions}, references, evaluation.file_names, len(common), allow_missing
    )
    return [[tokenize(text) for text in captions[key]] for key in common], notes


def _is_n_best_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("image_id"), int | str)
        and isinstance(row.get("captions"), list)
        and all(isinstance(caption, str) for caption in row["captions"])
    )


def _is_scored(
    key: ImageId,
    references: Mapping[ImageId, Sequence[str]],
    results: Collection[Mapping[ImageId, str]],
) -> bool:
    """Tell whether an image has a reference, and a caption in each file."""
    return bool(references[key]) and all(key in captions for captions in results)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart, as printable text."""
    whole = [Path(printable(str(Path(path).resolve()))) for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError("the same result file is given twice")
    for count in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-count:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return names


def printable(text: str) -> str:
    """Return text that can be encoded: bytes of a file name that aren't UTF-8 become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()


def _match_ids(
    results: Mapping[ImageId, T],
    path: str | Path,
    references: Mapping[ImageId, object],
    references_path: str | Path,
) -> dict[ImageId, T]:
    """Give results the references' ids: CSV has no types, so ids match by how they are written."""
    suffixes = {Path(path).suffix.lower(), Path(references_path).suffix.lower()}
    if suffixes <= {".json", ".jsonl"}:
        return dict(results)
    known: dict[str, ImageId] = {str(key): key for key in references}
    matched: dict[ImageId, T] = {}
    for key, value in results.items():
        reference_key = key if key in references else known.get(str(key), key)
        if reference_key in matched:
            raise DataError(
                f"{path}: image {show_name(reference_key)} comes twice, as a number and as text"
            )
        matched[reference_key] = value
    return matched


def _compare_images(
    results: Mapping[str, Mapping[ImageId, object]],
    references: Mapping[ImageId, Collection[str]],
    file_names: Mapping[ImageId, str],
    common: int,
    allow_missing: bool,
) -> list[str]:
    """Return how the images of the sides differ, as notes, or refuse where that isn't allowed.

    Args:
        results: What each file has for each image, by the file's path.
        references: The captions of each image.
        file_names: The references' file names.
        common: How many images all sides have.
        allow_missing: Whether the sides may differ.
    """
    notes = []
    misspelt = False
    for path, captions in results.items():
        lines, hint = compare_ids(captions, references)
        hint = _file_names_hint(captions, references, file_names) or hint
        misspelt |= bool(hint)
        if lines:
            notes.append(f"{path}: {'; '.join(lines)}{hint}")
    if not common:
        notes = notes or [f"{name_some(results)}: no captions, and no references"]
        raise DataError(f"{'; '.join(notes)}; there is no image in common")
    if notes and not allow_missing:
        advice = "" if misspelt else "; --allow-missing scores the images that both have"
        raise DataError("; ".join(notes) + advice)
    return [*notes, f"scored: only the {common} images that all files have"] if notes else []


def _file_names_hint(
    captions: Mapping[ImageId, object],
    references: Mapping[ImageId, object],
    file_names: Mapping[ImageId, str],
) -> str:
    """Return a hint where results are of the references' file names, not of their ids."""
    id_of = {name: key for key, name in file_names.items()}
    names = [key for key in captions if key not in references and key in id_of]
    if not names:
        return ""
    return (
        f"; {len(names)} of them are file names of the references, whose ids are others "
        f"({show_name(names[0])} has id {show_name(id_of[str(names[0])])}): caption with "
        "--annotations and the references' file, and the results have its ids"
    )


def signature(
    evaluation: Evaluation,
    metrics: Sequence[str],
    frequencies: DocumentFrequencies | None = None,
) -> str:
    """Return a line that two scores must share to be comparable.

    Args:
        evaluation: What was scored.
        metrics: The metrics that were computed.
        frequencies: CIDEr's document frequencies, if not those of the references.
    """
    captions = sorted(
        f"{key}\t{caption}" for key, texts in evaluation.references.items() for caption in texts
    )
    digest = hashlib.sha256("\n".join(captions).encode("utf-8", "backslashreplace")).hexdigest()
    source = f"sha256-{frequencies.digest()}" if frequencies else "references"
    versions = {
        "BLEU": f"nltk-{importlib.metadata.version('nltk')}+coco",
        "ROUGE-L": "beta-1.2",
        "CIDEr-D": f"sigma-6,df-{source}",
        "CIDEr": f"df-{source}",
        "METEOR": Path(METEOR_JAR).stem,
        "SPICE": Path(SPICE_JARS[0]).stem,
    }
    used = ["BLEU" if name in BLEU_NAMES else name for name in metrics]
    return "|".join(
        [
            f"captioner:{__version__}",
            "tokeniser:ptb-3.4.1-lower-nopunct",
            *(f"{name}:{versions[name]}" for name in dict.fromkeys(used)),
            f"images:{len(evaluation.references)}",
            f"references:{len(captions)}",
            f"sha256:{digest[:12]}",
        ]
    )


def write_per_image(path: str | Path, evaluation: Evaluation, scores: Mapping[str, Scores]) -> None:
    """Write each image's scores as CSV: one line for each image and result file."""
    with atomic_write(path) as file:
        writer = csv.writer(file)
        metrics = list(next(iter(scores.values())).per_image)
        writer.writerow(["hypotheses", "image_id", "caption", *metrics])
        for name, file_scores in scores.items():
            columns = [file_scores.per_image[metric].tolist() for metric in metrics]
            for (key, caption), *values in zip(
                evaluation.hypotheses[name].items(), *columns, strict=True
            ):
                cells = [printable(str(cell)) for cell in (name, key, caption)]
                writer.writerow([*cells, *map(repr, values)])
