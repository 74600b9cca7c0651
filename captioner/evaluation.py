"""Bring hypotheses and references together: the same ids on both sides, or a clear word why not."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from captioner.annotations import ImageId, read_annotations
from captioner.errors import DataError, name_some
from captioner.results import read_results


@dataclass(frozen=True)
class Pairs:
    """Captions and references of the same images, in the references' order.

    Attributes:
        hypotheses: One caption per image id.
        references: One or more captions per image id.
        notes: What was found wrong but could be left out or counted, one line each.
    """

    hypotheses: dict[ImageId, str]
    references: dict[ImageId, list[str]]
    notes: list[str]


def read_pairs(
    hypotheses_path: str | Path,
    references_path: str | Path,
    split: str | None = None,
    allow_missing: bool = False,
) -> Pairs:
    """Read a results file and the captions it is scored against.

    Args:
        hypotheses_path: Results as JSON, JSON lines or CSV.
        references_path: Captions in any format of ``read_annotations``.
        split: Which images of the references to take, as in ``read_annotations``.
        allow_missing: Score the images that both files have, instead of refusing.

    Raises:
        DataError: A file is malformed, or the two don't have the same images.
    """
    annotations = read_annotations(references_path, split)
    references = {image.image_id: image.captions for image in annotations.images}
    results = read_results(hypotheses_path)
    # CSV has no types, on either side.
    if Path(hypotheses_path).suffix.lower() == ".csv" or annotations.path.suffix != ".json":
        results = _with_ids_of(results, references, Path(hypotheses_path))
    notes = [*annotations.notes, *_differences(results, references, str(hypotheses_path))]
    differ = results.keys() != {key for key, captions in references.items() if captions}
    if differ and not allow_missing:
        raise DataError(
            f"{'; '.join(_differences(results, references, str(hypotheses_path)))}; "
            "--allow-missing scores the images that both have"
        )
    common = [key for key, captions in references.items() if captions and key in results]
    if not common:
        raise DataError(f"{hypotheses_path} and {references_path} have no image in common")
    if differ:
        notes.append(f"scored: the {len(common)} images that have a caption and references")
    empty = [key for key in common if not results[key].strip()]
    if empty:
        notes.append(
            f"{hypotheses_path}: {len(empty)} empty captions, scored as such ({name_some(empty)})"
        )
    return Pairs(
        {key: results[key] for key in common}, {key: references[key] for key in common}, notes
    )


def _with_ids_of(
    results: Mapping[ImageId, str], references: Mapping[ImageId, object], path: Path
) -> dict[ImageId, str]:
    """Give ids that are written like one of the references' ids that id's type."""
    known: dict[ImageId, ImageId] = {str(key): key for key in references}
    matched: dict[ImageId, str] = {}
    for key, caption in results.items():
        own = key if key in references else known.get(str(key), key)
        if own in matched:
            raise DataError(f"{path}: image {own} comes twice, once as a number and once as text")
        matched[own] = caption
    return matched


def _differences(
    results: Mapping[ImageId, str], references: Mapping[ImageId, list[str]], path: str
) -> list[str]:
    """Return a line for each way in which the images of the two sides differ."""
    described = [key for key, captions in references.items() if captions]
    without_caption = [key for key in described if key not in results]
    strangers = [key for key in results if key not in references]
    bare = [key for key in results if key in references and not references[key]]
    lines = []
    if without_caption:
        lines.append(
            f"{path}: {len(without_caption)} of {len(described)} images of the references have "
            f"no caption (ids {name_some(without_caption)})"
        )
    if strangers:
        lines.append(
            f"{path}: {len(strangers)} captions are of images that the references don't have "
            f"(ids {name_some(strangers)}){_type_hint(strangers, references)}"
        )
    if bare:
        lines.append(f"{path}: {len(bare)} images have no reference (ids {name_some(bare)})")
    return lines


def _type_hint(strangers: list[ImageId], references: Mapping[ImageId, object]) -> str:
    """Say it when ids differ in nothing but their type."""
    written = {str(key) for key in references}
    if any(str(key) in written for key in strangers):
        return "; some differ only in type: one side has integers, the other text"
    return ""
