"""The captions and photographs of Flickr8k, as the studies take them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioner.config import Config
from captioner.data.dataset import CaptionDataset, encode_captions
from captioner.data.vocabulary import PAD, Vocabulary
from captioner.device import choose_precision
from captioner.experiment_file import load_config
from captioner.models.encoder import make_encoder
from captioner.training.feature_cache import cached_features
from captioner.training.feature_store import default_cache_dir
from experiments.recurrence.study import HERE, Setting


def experiment(setting: Setting, *overrides: str) -> Config:
    """Return ``captioning.toml`` with the setting's data and weights, and overrides."""
    changes = {"data.root": setting.data, "encoder.weights": setting.weights}
    if (Path(setting.data or ".") / "images").is_dir():  # some unpack it in lower case
        changes |= {"data.train_images": "images", "data.val_images": "images"}
    return load_config(
        HERE / "captioning.toml",
        [*(f"{key}={value}" for key, value in changes.items() if value), *overrides],
    )


@dataclass(frozen=True)
class Captions:
    """A split in token ids, without BOS and EOS.

    Attributes:
        dataset: Images and captions as written.
        token_ids: Of every caption of every image.
    """

    dataset: CaptionDataset
    token_ids: list[list[list[int]]]

    @property
    def flat(self) -> list[list[int]]:
        """All captions, whichever the image."""
        return [caption for of_image in self.token_ids for caption in of_image]


@cache
def load_captions(setting: Setting) -> tuple[Captions, Captions, Vocabulary]:
    """Return the training and the validation split, and the vocabulary of the training captions."""
    data = experiment(setting).data
    train, val = (
        CaptionDataset.load(
            data.path(f"{split}_annotations"),
            data.path(f"{split}_images"),
            data.split(f"{split}_split"),
        )
        for split in ("train", "val")
    )
    if setting.quick:
        train, val = train.select(range(96)), val.select(range(32))
    texts = [caption for of_image in train.captions for caption in of_image]
    vocabulary = Vocabulary.from_captions(texts, 1 if setting.quick else data.min_word_count)
    return (
        Captions(train, encode_captions(train, vocabulary)),
        Captions(val, encode_captions(val, vocabulary)),
        vocabulary,
    )


def pooled_features(setting: Setting, dataset: CaptionDataset) -> Tensor:
    """Return the mean of the CNN's features over each photograph, (images, D), from the cache."""
    return pooled_features_of(setting, dataset.paths)


def pooled_features_of(setting: Setting, paths: Sequence[Path]) -> Tensor:
    """Return what ``pooled_features`` does, for any image files."""
    config = experiment(setting)
    cnn = config.encoder
    encoder = make_encoder(cnn.name, cnn.weights, config.preprocessing, cnn.last_stage)
    encoder.fine_tune_from("")
    device = torch.device("cpu")
    features = cached_features(
        encoder,
        paths,
        config.data.cache_dir or default_cache_dir(),
        device,
        choose_precision("auto", device),
        pooled=True,
    )
    return features.take(range(len(paths))).squeeze(1).float()


def pad_rows(captions: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return captions as (rows, T), padded at the end, and their lengths, (rows,)."""
    rows = [torch.tensor(caption) for caption in captions]
    lengths = torch.tensor([len(caption) for caption in captions])
    return pad_sequence(rows, batch_first=True, padding_value=PAD), lengths
