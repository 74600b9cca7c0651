"""Images with their captions, and the batches that training takes them in."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captioner.data.annotations import AnnotatedImage, ImageId, read_annotations
from captioner.data.tokenizer import tokenize
from captioner.data.vocabulary import BOS, EOS, PAD, Vocabulary
from captioner.errors import DataError, name_some
from captioner.progress import log_line

# Batches are cut from so many batches' worth of shuffled images, sorted by caption length.
BATCHES_IN_POOL = 16

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED_LETTER = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f]"
)
LONGEST_MEAN_WORD = 6  # letters; in all of these scripts words are shorter on average


@dataclass(frozen=True)
class CaptionDataset:
    """The images of one split and their captions; all lists are in the same order.

    Attributes:
        name: What messages call it, such as the annotations file.
        image_ids: Ids as the annotations give them, integers or text.
        paths: The image files.
        captions: The captions of each image.
        tokens: The words of each of these captions, as ``tokenize`` gives them.
    """

    name: str
    image_ids: list[ImageId]
    paths: list[Path]
    captions: list[list[str]]
    tokens: list[list[list[str]]] = field(repr=False)

    @classmethod
    def load(
        cls,
        annotations: str | Path,
        images: str | Path,
        split: str | None = None,
        missing: str = "error",
        content: Any = None,
    ) -> "CaptionDataset":
        """Read a captions file and find its images.

        Args:
            annotations: A captions file: see ``captioner.annotations``.
            images: The folder that file names start from.
            split: Which images to take; None takes all.
            missing: "error" refuses images that aren't on disk, "skip" leaves them out.
            content: What the file holds, where it was read already: see ``read_annotations``.

        Raises:
            DataError: Nothing is left, or an image file is missing; with ids and counts.
        """
        read = read_annotations(annotations, split, content)
        for note in read.notes:
            log_line(f"warning: {note}")
        entries, tokens = _with_words(read.images, str(annotations))
        nameless = [image.image_id for image in entries if not image.file_name]
        if nameless:
            raise DataError(
                f"{annotations}: {len(nameless)} images have no 'file_name' (ids "
                f"{name_some(nameless)})"
            )
        paths = {image.image_id: Path(images) / str(image.file_name) for image in entries}
        entries = _existing(entries, paths, f"{annotations}", images, missing)
        if not entries:
            raise DataError(f"{annotations}: no image with a caption" + _in_split(split))
        return cls(
            name=f"{annotations}{_in_split(split)}",
            image_ids=[image.image_id for image in entries],
            paths=[paths[image.image_id] for image in entries],
            captions=[image.captions for image in entries],
            tokens=[tokens[image.image_id] for image in entries],
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def select(self, indices: Sequence[int]) -> "CaptionDataset":
        """Return these images alone."""
        return CaptionDataset(
            self.name,
            [self.image_ids[i] for i in indices],
            [self.paths[i] for i in indices],
            [self.captions[i] for i in indices],
            [self.tokens[i] for i in indices],
        )

    @property
    def references(self) -> dict[ImageId, list[str]]:
        """The captions by image id, as scoring takes them."""
        return dict(zip(self.image_ids, self.captions, strict=True))


def _existing(
    entries: list[AnnotatedImage],
    paths: Mapping[ImageId, Path],
    source: str,
    images: str | Path,
    missing: str,
) -> list[AnnotatedImage]:
    """Return the images whose files are there; see ``CaptionDataset.load`` for ``missing``."""
    absent = [image_id for image_id, path in paths.items() if not os.path.isfile(path)]
    if not absent:
        return entries
    message = (
        f"{source}: {len(absent)} of {len(paths)} images are not in {images} "
        f"(ids {name_some(absent)}; {paths[absent[0]]} was expected)"
    )
    if missing == "error" or len(absent) == len(paths):
        raise DataError(f"{message}; fetch them, or set data.bad_images=skip")
    log_line(f"warning: {message}; they are left out")
    gone = set(absent)
    return [image for image in entries if image.image_id not in gone]


def _with_words(
    images: Sequence[AnnotatedImage], source: str
) -> tuple[list[AnnotatedImage], dict[ImageId, list[list[str]]]]:
    """Leave out captions of punctuation alone, and images that have no other; say what is odd.

    Returns:
        The images that are left, and the words of each of their captions.
    """
    kept, tokens_by_image = [], {}
    count, wordless, repeated, unspaced = 0, 0, 0, 0
    for image in images:
        pairs = [(caption, tokenize(caption)) for caption in image.captions]
        captions = [caption for caption, words in pairs if words]
        # Each word once in memory, not once for each time that it is said.
        tokens = [list(map(sys.intern, words)) for _, words in pairs if words]
        if captions:
            kept.append(AnnotatedImage(image.image_id, image.file_name, captions))
            tokens_by_image[image.image_id] = tokens
        count += len(captions)
        wordless += len(pairs) - len(captions)
        repeated += len(captions) - len(set(map(tuple, tokens)))
        unspaced += sum(map(_is_unspaced, tokens))
    if wordless:
        log_line(f"warning: {source}: {wordless} captions without a word are left out")
    if repeated:
        log_line(
            f"{source}: {repeated} of {count} captions repeat another of the same image; they are "
            "kept, and count as often as they come"
        )
    if unspaced:
        log_line(
            f"warning: {source}: {unspaced} of {count} captions are in a script without spaces "
            "between words (Chinese, Japanese, Thai, …) and become a word or two each; put spaces "
            "between their words with a word segmenter first"
        )
    return kept, tokens_by_image


def _is_unspaced(words: Sequence[str]) -> bool:
    """Tell whether words are so long that they must be whole phrases of a script without spaces."""
    letters = [len(UNSPACED_LETTER.findall(word)) for word in words if not word.isascii()]
    letters = [count for count in letters if count]
    return sum(letters) > LONGEST_MEAN_WORD * len(letters)


def check_no_overlap(train: CaptionDataset, val: CaptionDataset) -> None:
    """Raise a DataError when two splits share image files."""
    trained = set(_resolve(train.paths))
    shared = [
        image_id
        for image_id, path in zip(val.image_ids, _resolve(val.paths), strict=True)
        if path in trained
    ]
    if shared:
        raise DataError(
            f"{val.name}: {len(shared)} of its images are in {train.name} too (ids "
            f"{name_some(shared)}); validation must be on images that training doesn't see"
        )


def _resolve(paths: Sequence[Path]) -> list[str]:
    """Return the paths without links, as ``os.path.realpath`` does; each folder is asked once."""
    folders: dict[str, str] = {}
    resolved = []
    for path in paths:
        folder, name = os.path.split(path)
        if name in ("", os.pardir) or os.path.islink(path):
            resolved.append(os.path.realpath(path))
            continue
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
        resolved.append(os.path.join(folders[folder], name))
    return resolved


def _in_split(split: str | None) -> str:
    return f" (split {split})" if split else ""


@dataclass(frozen=True)
class Batch:
    """Some images and some captions of each.

    Attributes:
        images: Which images of the data set these are, of length B.
        token_ids: Captions from BOS to EOS, then PAD: (B, K, T + 1). An image with fewer than K
            captions has rows of PAD alone.
    """

    images: list[int]
    token_ids: Tensor

    def share(self, number: int, count: int) -> "Batch":
        """Return every ``count``-th image of it, from ``number`` on; it may have none."""
        if count == 1:
            return self
        return Batch(self.images[number::count], self.token_ids[number::count])


class TrainingBatches:
    """Cuts each epoch into batches of images whose captions are about equally long.

    An image comes with K of its captions, so that all that depends on the image alone is
    computed once for K captions. Which captions and which batches is decided by (seed, epoch)
    alone: a resumed epoch is the same epoch.

    Args:
        captions: Token ids of every caption of every image, without BOS and EOS.
        batch_size: B, images in a batch.
        captions_per_image: K; an image that has more gives a new random choice each epoch.
        seed: Seed of choice and order.
        max_words: Longer captions are cut.
    """

    def __init__(
        self,
        captions: Sequence[Sequence[Sequence[int]]],
        batch_size: int,
        captions_per_image: int,
        seed: int,
        max_words: int,
    ) -> None:
        self.captions = [[list(c[:max_words]) for c in per_image] for per_image in captions]
        self.batch_size, self.captions_per_image = batch_size, captions_per_image
        self.seed = seed

    def __len__(self) -> int:
        return -(-len(self.captions) // self.batch_size)

    def epoch(self, epoch: int) -> list[Batch]:
        """Return the batches of an epoch, in the order in which they are trained on."""
        random = np.random.default_rng((self.seed, epoch))
        chosen = [self._choose(per_image, random) for per_image in self.captions]
        longest = np.array([max(map(len, per_image)) for per_image in chosen])
        order = random.permutation(len(chosen))
        pool = self.batch_size * BATCHES_IN_POOL
        batches = []
        for start in range(0, len(order), pool):
            part = order[start : start + pool]
            part = part[np.argsort(-longest[part], kind="stable")]
            batches += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        return [
            Batch(batches[i].tolist(), pad([chosen[image] for image in batches[i]]))
            for i in random.permutation(len(batches))
        ]

    def _choose(self, per_image: list[list[int]], random: np.random.Generator) -> list[list[int]]:
        """Return at most K captions, the longest first: see ``decoder._rectangles``."""
        if len(per_image) > self.captions_per_image:
            choice = random.choice(len(per_image), self.captions_per_image, replace=False)
            per_image = [per_image[i] for i in choice]
        return sorted(per_image, key=len, reverse=True)


def pad(captions: Sequence[Sequence[Sequence[int]]]) -> Tensor:
    """Put BOS before and EOS behind each caption, then PAD: (B, K, T + 1)."""
    slots = max(len(per_image) for per_image in captions)
    length = max(len(caption) for per_image in captions for caption in per_image)
    token_ids = np.full((len(captions), slots, length + 2), PAD, dtype=np.int64)
    for b, per_image in enumerate(captions):
        for k, caption in enumerate(per_image):
            token_ids[b, k, : len(caption) + 2] = [BOS, *caption, EOS]
    return torch.from_numpy(token_ids)


def encode_captions(dataset: CaptionDataset, vocabulary: Vocabulary) -> list[list[list[int]]]:
    """Return the token ids of every caption of every image."""
    return [[vocabulary.encode_tokens(words) for words in of_image] for of_image in dataset.tokens]
