"""Captions for images from an exported captioner."""

import hashlib
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from captioner.checksums import CHECKSUMS_FILE, check_sha256, read_checksums
from captioner.data.image_files import UNNAMED
from captioner.data.preprocessing import Preprocessing, to_pixels
from captioner.data.vocabulary import BOS, Vocabulary
from captioner.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    SearchError,
    UsageError,
)
from captioner.files import open_regular, read_json
from captioner.runtime.beam_search import Arrays, beam_search, check_settings
from captioner.runtime.exported import (
    ENCODER_FILE,
    EXPORT_FILE,
    NGRAMS_FILE,
    STEP_FILE,
    VOCABULARY_FILE,
    ExportConfig,
)
from captioner.search.consensus import NO_CONSENSUS, Ngrams, rerank, without_consensus
from captioner.search.hypothesis import NO_PROBABILITIES, Hypothesis
from captioner.search.rules import Constraints
from captioner.search_config import SearchConfig, changed_search

ImageLike = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray


@dataclass(frozen=True)
class OnnxCaption:
    """One caption of an image.

    Attributes:
        text: The sentence.
        log_probability: The model's own, of its words and its end.
        score: What an image's captions are ranked by: log_probability / length **
            length_penalty, where the length counts the words and the end, and what ``consensus``
            adds.
        attention: What the decoder looked at for each word, and for the end: (T, H, W), where each
            (H, W) sums to 1 over the image's square. None unless asked for, and for a decoder
            without attention.
    """

    text: str
    log_probability: float
    score: float
    attention: np.ndarray | None = None


class OnnxCaptioner:
    """An exported captioner, ready for use.

    Args:
        directory: What ``captioner export`` wrote.
        threads: That compute; 0 takes as many as there are cores.

    Attributes:
        config: What export.json holds.
        vocabulary: Its words.

    Raises:
        CheckpointError: The folder is missing, damaged or another version's.
        UsageError: onnxruntime isn't installed.
    """

    def __init__(self, directory: str | Path, threads: int = 0) -> None:
        directory = Path(directory)
        self.config = ExportConfig.read(directory)
        contents = _read_files(directory)
        self.vocabulary = Vocabulary(read_json(directory / VOCABULARY_FILE, CheckpointError))
        self._encoder = _session(directory / ENCODER_FILE, contents[ENCODER_FILE], threads)
        self._step = _session(directory / STEP_FILE, contents[STEP_FILE], threads)
        outputs = [output.name for output in self._encoder.get_outputs()]
        self._states = sum(name.startswith("state_") for name in outputs)
        self._memories = sum(name.startswith("memory_") for name in outputs)
        self._inputs = [entry.name for entry in self._step.get_inputs()]
        shapes = {output.name: output.shape for output in self._encoder.get_outputs()}
        self._ngrams = (
            _read_ngrams(directory, shapes["expected"][1]) if "expected" in shapes else None
        )

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to images before the CNN sees them."""
        return self.config.preprocessing

    def caption(
        self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 32, **settings: Any
    ) -> str | list[str]:
        """Caption one image or many.

        Args:
            images: One image, or any number of them. An image is a path; the bytes of an image
                file, or one that is open for reading them; a PIL image; or a NumPy array (H, W, 3)
                in RGB order, uint8. An array (B, H, W, 3) is B images.
            batch_size: Images encoded and decoded at a time.
            settings: Any of ``SearchConfig`` but samples, groups and forced words, such as
                ``beam_size=3``; the others are those that were exported.

        Returns:
            A caption for one image, a list for many.

        Raises:
            ImageError: An image can't be read, or it is something else.
            ConfigError: A setting is impossible.
            SearchError: The model gives NaN for an image.
        """
        captions = [best[0].text for best in self._described(images, batch_size, False, settings)]
        return captions[0] if _is_single(images) else captions

    def describe(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        attention: bool = False,
        batch_size: int = 32,
        **settings: Any,
    ) -> list[OnnxCaption] | list[list[OnnxCaption]]:
        """Caption images, and tell more: the ``n_best`` captions of each, with their scores.

        Args:
            images: As in ``caption``.
            attention: Tell what the decoder looked at for each word.
            batch_size: Images encoded and decoded at a time.
            settings: As in ``caption``.

        Returns:
            For one image its captions, best first; for many a list of such lists.
        """
        found = self._described(images, batch_size, attention, settings)
        return found[0] if _is_single(images) else found

    def _described(
        self, images: Any, batch_size: int, attention: bool, settings: dict[str, Any]
    ) -> list[list[OnnxCaption]]:
        search = self.search(**settings)
        if batch_size < 1:
            raise ConfigError(f"batch_size: at least 1 was expected, found {batch_size}")
        single = _is_single(images)
        places = ("the image" if single else f"images[{n}]" for n in count())
        left = zip([images] if single else images, places, strict=False)
        found: list[list[OnnxCaption]] = []
        while batch := list(islice(left, batch_size)):
            pixels = np.stack([self.pixels(image, place) for image, place in batch])
            results = self.captions(pixels, search, attention)
            for (_, place), captions in zip(batch, results, strict=True):
                if not captions:
                    raise SearchError(f"{place}: {NO_PROBABILITIES}")
                found.append(captions)
        return found

    def search(self, **settings: Any) -> SearchConfig:
        """Return the exported search settings with those changed that aren't None.

        Raises:
            ConfigError: A setting is unknown or impossible, or needs torch.
        """
        search = changed_search(self.config.search, settings)
        check_settings(search)
        if search.consensus and not self._ngrams:
            raise ConfigError(NO_CONSENSUS)
        return search

    def pixels(self, image: ImageLike, name: str = "the image") -> np.ndarray:
        """Return what the CNN sees of an image: (3, S, S), uint8.

        Raises:
            ImageError: It can't be read, or it isn't an image.
        """
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise ImageError(
                    f"{name}: an array (H, W, 3), uint8, was expected, found {image.shape}, "
                    f"{image.dtype}"
                )
            image = Image.fromarray(image)
        try:
            source = os.fspath(image) if isinstance(image, os.PathLike) else image
            return to_pixels(self.preprocessing.load_square(source)[0])
        except ImageError as error:
            raise ImageError(str(error).replace(UNNAMED, name, 1)) from None

    def captions(
        self, pixels: np.ndarray, search: SearchConfig, attention: bool = False
    ) -> list[list[OnnxCaption]]:
        """Return the captions of preprocessed pixels (B, 3, S, S), uint8, best first.

        An image for which the model gives NaN has none.
        """
        constraints = Constraints.from_config(search, self.vocabulary)
        outputs = self._encoder.run(None, {"pixels": pixels})
        count = self._states + self._memories
        state, memory = tuple(outputs[: self._states]), tuple(outputs[self._states : count])
        if search.consensus and self._ngrams:
            settings = without_consensus(search)
            found = beam_search(self._take_step, state, memory, settings, constraints)
            found = rerank(found, outputs[count], self._ngrams, search)
        else:
            found = beam_search(self._take_step, state, memory, search, constraints)
        maps = self._attention(found, state, memory) if attention and self.config.regions else None
        return [
            [
                OnnxCaption(
                    self.vocabulary.decode(each.token_ids),
                    each.log_probability,
                    each.score(search.length_penalty, search.consensus),
                    None if maps is None else maps[image][place],
                )
                for place, each in enumerate(best)
            ]
            for image, best in enumerate(found)
        ]

    def _take_step(
        self, tokens: np.ndarray, state: Arrays, memory: Arrays
    ) -> tuple[np.ndarray, Arrays]:
        outputs = self._run_step(tokens, state, memory)
        return outputs[0], tuple(outputs[1 : 1 + self._states])

    def _run_step(self, tokens: np.ndarray, state: Arrays, memory: Arrays) -> Sequence[np.ndarray]:
        values = (tokens, *state, *memory)
        outputs: Sequence[np.ndarray] = self._step.run(
            None, dict(zip(self._inputs, values, strict=True))
        )
        return outputs

    def _attention(
        self, found: Sequence[Sequence[Hypothesis]], state: Arrays, memory: Arrays
    ) -> list[list[np.ndarray]]:
        """Return what the decoder looks at for each word of captions, and for their ends."""
        side = math.isqrt(self.config.regions)  # the CNN sees a square
        maps = []
        for image, best in enumerate(found):
            of_image = []
            for hypothesis in best:
                parts = tuple(part[image : image + 1] for part in state)
                own = tuple(part[image : image + 1] for part in memory)
                weights = []
                for token in (BOS, *hypothesis.token_ids):
                    outputs = self._run_step(np.full((1, 1), token), parts, own)
                    parts = tuple(outputs[1 : 1 + self._states])
                    weights.append(outputs[-1].reshape(side, side))
                of_image.append(np.stack(weights))
            maps.append(of_image)
        return maps


def _is_single(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 3
    return isinstance(images, (str, os.PathLike, bytes, Image.Image)) or hasattr(images, "read")


def _read_files(directory: Path) -> dict[str, bytes]:
    """Return the graphs, after their checksums and those of the other files were compared."""
    try:
        with open_regular(directory / CHECKSUMS_FILE) as file:
            checksums = read_checksums(file, directory)
        contents = {}
        for name in (ENCODER_FILE, STEP_FILE, EXPORT_FILE, VOCABULARY_FILE, NGRAMS_FILE):
            if name == NGRAMS_FILE and not (directory / name).exists():
                continue
            with open_regular(directory / name) as file:
                contents[name] = file.read()
            check_sha256(hashlib.sha256(contents[name]).hexdigest(), directory / name, checksums)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: {error.strerror}") from None
    return contents


def _read_ngrams(directory: Path, count: int) -> Ngrams:
    path = directory / NGRAMS_FILE
    try:
        ngrams = Ngrams.of_content(read_json(path, CheckpointError))
        if len(ngrams.rarity) != count:
            raise ValueError(f"{count} n-grams were expected, found {len(ngrams.rarity)}")
        return ngrams
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"{path}: not what captioner export wrote ({error}); export it again"
        ) from None


def _session(path: Path, content: bytes, threads: int) -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise UsageError("exported captioners need onnxruntime: pip install onnxruntime") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors alone
    options.add_session_config_entry("session.disable_quant_qdq", "1")  # weights once, not a step
    try:
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: onnxruntime can't read it ({reason})") from None
