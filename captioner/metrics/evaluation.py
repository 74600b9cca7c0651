"""Bring captions and references together, score them, and say how: what ``evaluate_bleu.py`` does.

Both sides must be of the same images, or there is a clear word why not.
"""

import csv
import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from captioner.data.annotations import Annotations, ImageId, read_annotations
from captioner.data.predictions import read_predictions
from captioner.errors import DataError, UsageError, name_some
from captioner.files import atomic_write
from captioner.metrics.official import METEOR_JAR, SPICE_JARS
from captioner.metrics.scores import BLEU_NAMES, Scores
from captioner.version import __version__


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
    results, differences = {}, []
    for name, path in zip(names, hypotheses_paths, strict=True):
        results[name] = _read_matching(path, references, annotations)
        differences += _differences(results[name], references, str(path))
    if differences and not allow_missing:
        reasons = "; ".join(differences)
        raise DataError(f"{reasons}; --allow-missing scores the images that both have")
    common = [key for key in references if _is_scored(key, references, results)]
    if not common:
        files = ", ".join(map(str, hypotheses_paths))
        raise DataError(f"{files} and {references_path}: no image in common")
    notes = [*annotations.notes, *differences]
    if differences:
        notes.append(f"scored: only the {len(common)} images that all files have")
    for name, path in zip(names, hypotheses_paths, strict=True):
        notes += _empty_captions(path, results[name], common)
    return Evaluation(
        {key: references[key] for key in common},
        {name: {key: captioned[key] for key in common} for name, captioned in results.items()},
        {image.image_id: image.file_name for image in annotations.images if image.file_name},
        notes,
    )


def _is_scored(
    key: ImageId,
    references: Mapping[ImageId, Sequence[str]],
    results: Mapping[str, Mapping[ImageId, str]],
) -> bool:
    """Tell whether an image has a reference, and a caption in each file."""
    return bool(references[key]) and all(key in captions for captions in results.values())


def _empty_captions(
    path: str | Path, captions: Mapping[ImageId, str], common: Sequence[ImageId]
) -> list[str]:
    empty = [key for key in common if not captions[key].strip()]
    if not empty:
        return []
    return [f"{path}: {len(empty)} empty captions, scored as such (ids {name_some(empty)})"]


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    whole = [Path(path).resolve() for path in paths]
    if len(set(whole)) < len(whole):
        raise UsageError("the same result file is given twice")
    for parts in range(1, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-parts:]) for path in whole]
        if len(set(names)) == len(names):
            break
    return names


def _read_matching(
    path: str | Path, references: Mapping[ImageId, object], annotations: Annotations
) -> dict[ImageId, str]:
    """Read results; where a side is CSV, which has no types, ids match by how they are written."""
    results = read_predictions(path)
    if Path(path).suffix.lower() != ".csv" and annotations.path.suffix.lower() == ".json":
        return results
    known: dict[str, ImageId] = {str(key): key for key in references}
    matched: dict[ImageId, str] = {}
    for key, caption in results.items():
        own = key if key in references else known.get(str(key), key)
        if own in matched:
            raise DataError(f"{path}: image {own} comes twice, as a number and as text")
        matched[own] = caption
    return matched


def _differences(
    results: Mapping[ImageId, str], references: Mapping[ImageId, list[str]], path: str
) -> list[str]:
    """Return a line for each way in which the images of the two sides differ."""
    described = [key for key, captions in references.items() if captions]
    uncaptioned = [key for key in described if key not in results]
    strangers = [key for key in results if key not in references]
    bare = [key for key in results if key in references and not references[key]]
    lines = []
    if uncaptioned:
        lines.append(
            f"{path}: {len(uncaptioned)} of {len(described)} images of the references have no "
            f"caption (ids {name_some(uncaptioned)})"
        )
    if strangers:
        lines.append(
            f"{path}: {len(strangers)} captions are of images that the references don't have "
            f"(ids {name_some(strangers)}){_type_hint(strangers, references)}"
        )
    if bare:
        lines.append(f"{path}: {len(bare)} images have no reference (ids {name_some(bare)})")
    return lines


def _type_hint(strangers: Sequence[ImageId], references: Mapping[ImageId, object]) -> str:
    written = {str(key) for key in references}
    if any(str(key) in written for key in strangers):
        return "; some differ only in type: one side has integers, the other text"
    return ""


def signature(evaluation: Evaluation, metrics: Sequence[str], frequencies: str = "") -> str:
    """Return a line that two scores must share to be comparable.

    Args:
        evaluation: What was scored.
        metrics: The metrics that were computed.
        frequencies: Where CIDEr's document frequencies came from, if not from the references.
    """
    captions = sorted(
        f"{key}\t{caption}" for key, texts in evaluation.references.items() for caption in texts
    )
    digest = hashlib.sha256("\n".join(captions).encode("utf-8", "backslashreplace")).hexdigest()
    versions = {
        "BLEU": f"nltk-{importlib.metadata.version('nltk')}+coco",
        "ROUGE-L": "beta-1.2",
        "CIDEr-D": f"sigma-6,df-{frequencies or 'references'}",
        "CIDEr": f"df-{frequencies or 'references'}",
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
        for number, (name, of_file) in enumerate(scores.items()):
            if number == 0:
                writer.writerow(["hypotheses", "image_id", "caption", *of_file.per_image])
            columns = [values.tolist() for values in of_file.per_image.values()]
            for (key, caption), *values in zip(
                evaluation.hypotheses[name].items(), *columns, strict=True
            ):
                cells = [
                    str(cell).encode("utf-8", "backslashreplace").decode()
                    for cell in (name, key, caption)
                ]
                writer.writerow([*cells, *(repr(value) for value in values)])
