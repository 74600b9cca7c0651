"""Captions for images, from Python."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from captioner.checkpoint_directory import default_checkpoint, find_checkpoint
from captioner.config import SearchConfig
from captioner.data.preprocessing import Preprocessing
from captioner.device import choose_device, choose_precision
from captioner.errors import (
    CheckpointError,
    ConfigError,
    ImageError,
    SearchError,
    UsageError,
)
from captioner.inference.image_input import ImageLike, is_single, load_input, name_of
from captioner.models.captioning_model import CaptioningModel, generate
from captioner.models.checkpoint import load_checkpoint
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.search.consensus import NO_CONSENSUS, rerank, without_consensus
from captioner.search.hypothesis import NO_PROBABILITIES, Hypothesis
from captioner.search_config import changed_search


@dataclass(frozen=True)
class Caption:
    """One caption of an image.

    Attributes:
        text: The sentence.
        log_probability: The model's own, of its words and its end.
        score: What an image's captions are ranked by, samples too: log_probability / length **
            length_penalty, where the length counts the words and the end, and what ``consensus``
            adds.
        attention: What the decoder looked at for each word, and for the end: (T, H, W), where
            each (H, W) sums to 1 over the image's square. None unless asked for, and for a
            decoder without attention.
    """

    text: str
    log_probability: float
    score: float
    attention: Tensor | None = None


class Captioner:
    """A trained captioner, ready for use.

    Example:
        >>> captioner = Captioner.from_pretrained()  # or of a checkpoint: "runs/coco/best"
        >>> captioner.caption("dog.jpg", beam_size=5)
        'a dog is running on the beach'

    Args:
        models: The model; or several with the same vocabulary and preprocessing, an ensemble whose
            probabilities are averaged. They are moved to ``device``.
        device: "auto" (CUDA, else MPS, else CPU) or a device's name.
        precision: "auto" (bfloat16 where it is native), "bfloat16" or "float32".

    Attributes:
        model: The first of the models.
        decoders: What each model's decoder became for search.

    Raises:
        CheckpointError: The models of an ensemble don't fit together.
    """

    def __init__(
        self,
        models: CaptioningModel | Sequence[CaptioningModel],
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.device = choose_device(device)
        self.precision = choose_precision(precision, self.device)
        models = [models] if isinstance(models, CaptioningModel) else list(models)
        if not models:
            raise UsageError("a captioner needs a model: an empty list was given")
        self.models = [model.to(self.device).eval() for model in models]
        self.model = self.models[0]
        for other in self.models[1:]:
            _check_compatible(self.model, other)
        # Models that share a CNN share what it says about an image.
        cnns = [repr(model.encoder.fingerprint()) if len(models) > 1 else "" for model in models]
        self._cnn_of = [cnns.index(each) for each in cnns]
        self._cnns = {
            number: InferenceEncoder(self.models[number].encoder, self.precision)
            for number in set(self._cnn_of)
        }
        self.decoders = [InferenceDecoder(model.decoder, self.precision) for model in self.models]
        consensus = self.model.consensus
        self._consensus = consensus.to(self.device) if consensus else None

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to images before the CNN sees them."""
        return self.model.encoder.preprocessing

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | Sequence[str | Path] | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> "Captioner":
        """Load a trained captioner, or several as an ensemble.

        Args:
            source: A checkpoint directory, such as ``RUN/best``; a run's folder, ``RUN``, whose
                best checkpoint is taken; the name of a captioner that comes with the package, see
                ``captioner models``; or several of these. None takes the package's own.
            device: As the class takes it.
            precision: As the class takes it.

        Raises:
            CheckpointError: One is missing, damaged or inconsistent, or they don't fit together.
        """
        if source is None:
            source = default_checkpoint()
        several = [source] if isinstance(source, (str, Path)) else list(source)
        return cls([load_checkpoint(find_checkpoint(each)) for each in several], device, precision)

    @overload
    def caption(self, images: ImageLike, *, batch_size: int = ..., **settings: Any) -> str: ...

    @overload
    def caption(
        self, images: Iterable[ImageLike], *, batch_size: int = ..., **settings: Any
    ) -> list[str]: ...

    def caption(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        batch_size: int = 32,
        **settings: Any,
    ) -> str | list[str]:
        """Caption one image or many.

        Args:
            images: One image, or any number of them, such as a list or a generator. An image is a
                path; the bytes of an image file, or one that is open for reading them; a PIL image;
                a tensor (3, H, W), uint8 or float from 0 to 1; or a NumPy array (H, W, 3) in RGB
                order, (H, W, 4) with transparency, or (H, W) in grey, uint8. A tensor
                (B, 3, H, W) and an array (B, H, W, 3) are B images.
            batch_size: Images encoded and decoded at a time.
            settings: Any of ``config.SearchConfig``, such as ``beam_size=3``; the others are the
                checkpoint's.

        Returns:
            A caption for one image, a list for many.

        Raises:
            ImageError: An image can't be read, or it is something else.
            ConfigError: A setting is impossible, or asks for several captions of an image.
            SearchError: The model gives NaN for an image; the message names it.
        """
        search = self.search(**settings)
        for name in ("n_best", "samples"):
            if settings.get(name) is not None and getattr(search, name) > 1:
                raise ConfigError(
                    f"{name}={settings[name]}: caption gives one caption of an image; describe, "
                    "with n_best, gives several"
                )
        captions = [best[0].text for best in self._described(images, search, batch_size)]
        return captions[0] if is_single(images) else captions

    @overload
    def describe(
        self, images: ImageLike, *, attention: bool = ..., batch_size: int = ..., **settings: Any
    ) -> list[Caption]: ...

    @overload
    def describe(
        self,
        images: Iterable[ImageLike],
        *,
        attention: bool = ...,
        batch_size: int = ...,
        **settings: Any,
    ) -> list[list[Caption]]: ...

    def describe(
        self,
        images: ImageLike | Iterable[ImageLike],
        *,
        attention: bool = False,
        batch_size: int = 32,
        **settings: Any,
    ) -> list[Caption] | list[list[Caption]]:
        """Caption images, and tell more: the ``n_best`` captions of each, with their scores.

        Args:
            images: As in ``caption``.
            attention: Tell what the decoder looked at for each word.
            batch_size: Images encoded and decoded at a time.
            settings: As in ``caption``.

        Returns:
            For one image its captions, best first; for many a list of such lists.

        Raises:
            ImageError, ConfigError, SearchError: As ``caption`` does.
            UsageError: Attention was asked of an ensemble.
        """
        search = self.search(**settings)
        captions = list(self._described(images, search, batch_size, attention))
        return captions[0] if is_single(images) else captions

    def search(self, **settings: Any) -> SearchConfig:
        """Return the checkpoint's search settings with those changed that aren't None.

        Raises:
            ConfigError: A setting is unknown or impossible.
        """
        return changed_search(self.model.search, settings)

    def features(self, pixels: Tensor) -> list[Tensor]:
        """Return each model's features (B, N, D) of preprocessed pixels (B, 3, S, S), uint8."""
        found = {number: cnn(pixels) for number, cnn in self._cnns.items()}
        return [found[number] for number in self._cnn_of]

    def hypotheses(
        self, features: Sequence[Tensor], search: SearchConfig, keys: Tensor | None = None
    ) -> list[list[Hypothesis]]:
        """Return the captions found for images, best first; none where the model gives NaN.

        Args:
            features: As ``features`` gives them.
            search: How to search.
            keys: A number for each image, (B,), that its samples depend on.

        Raises:
            ConfigError: ``search.consensus`` is asked of a captioner without one.
        """
        vocabulary = self.model.vocabulary
        if not search.consensus:
            return generate(self.decoders, features, search, vocabulary, keys)
        if not self._consensus:
            raise ConfigError(NO_CONSENSUS)
        found = generate(self.decoders, features, without_consensus(search), vocabulary, keys)
        with torch.inference_mode():
            expected = self._consensus.expected(features[0]).cpu().numpy()
        return rerank(found, expected, self._consensus.ngrams, search)

    def captions(
        self,
        pixels: Tensor,
        search: SearchConfig,
        keys: Tensor | None = None,
        attention: bool = False,
    ) -> list[list[Caption]]:
        """Return the captions of preprocessed pixels (B, 3, S, S), uint8, best first.

        An image for which the model gives NaN has none.
        """
        return self.captions_of(self.features(pixels), search, keys, attention)

    def captions_of(
        self,
        features: Sequence[Tensor],
        search: SearchConfig,
        keys: Tensor | None = None,
        attention: bool = False,
    ) -> list[list[Caption]]:
        """Return the captions of images whose features are known, as ``captions`` does."""
        found = self.hypotheses(features, search, keys)
        maps = self._attention(features, found) if attention else None
        return [
            [
                Caption(
                    self.model.vocabulary.decode(each.token_ids),
                    each.log_probability,
                    each.score(search.length_penalty, search.consensus),
                    None if maps is None else maps[image][place],
                )
                for place, each in enumerate(best)
            ]
            for image, best in enumerate(found)
        ]

    def _attention(
        self, features: Sequence[Tensor], found: Sequence[Sequence[Hypothesis]]
    ) -> list[list[Tensor]] | None:
        if len(self.models) > 1:
            raise UsageError("the models of an ensemble look at different things: take one")
        maps = self.model.attention_maps(features[0], found, self.precision)
        side = math.isqrt(features[0].shape[1])  # the CNN sees a square
        return maps and [[one.unflatten(1, (side, side)) for one in of_image] for of_image in maps]

    def _described(
        self,
        images: ImageLike | Iterable[ImageLike],
        search: SearchConfig,
        batch_size: int,
        attention: bool = False,
    ) -> Iterator[list[Caption]]:
        if batch_size < 1:
            raise ConfigError(f"batch_size: at least 1 was expected, found {batch_size}")
        preprocessing = self.preprocessing
        places = ("the image" if is_single(images) else f"images[{n}]" for n in count())
        left = zip(_iterate(images), places, strict=False)
        done = 0
        while batch := list(islice(left, batch_size)):
            loaded = [load_input(image, preprocessing, place) for image, place in batch]
            keys = torch.arange(done, done + len(batch))
            results = self.captions(torch.stack(loaded), search, keys, attention)
            for (image, place), captions in zip(batch, results, strict=True):
                if not captions:
                    raise SearchError(f"{name_of(image, place)}: {NO_PROBABILITIES}")
                yield captions
            done += len(batch)


def _iterate(images: ImageLike | Iterable[ImageLike]) -> Iterator[ImageLike]:
    if is_single(images):
        return iter([images])  # type: ignore[list-item]
    try:
        return iter(images)  # type: ignore[arg-type]
    except TypeError:
        raise ImageError(
            f"an image, or several, were expected, found {type(images).__name__}"
        ) from None


def _check_compatible(first: CaptioningModel, other: CaptioningModel) -> None:
    if other.vocabulary.words != first.vocabulary.words:
        raise CheckpointError(
            f"an ensemble needs one vocabulary, found one of {len(first.vocabulary)} words and "
            f"another of {len(other.vocabulary)}: train its models on the same captions, with the "
            "same data.min_word_count"
        )
    if other.encoder.preprocessing != first.encoder.preprocessing:
        raise CheckpointError(
            "an ensemble needs one preprocessing, found "
            f"{first.encoder.preprocessing} and {other.encoder.preprocessing}"
        )
