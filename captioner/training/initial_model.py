"""The model that a run begins with: a new one, another run's checkpoint, or its own last one."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from captioner.config import Config, EncoderConfig
from captioner.data.dataset import CaptionDataset
from captioner.data.vocabulary import SPECIAL_WORDS, Vocabulary
from captioner.errors import CheckpointError, ConfigError, DataError
from captioner.models.captioning_model import CaptioningModel
from captioner.models.checkpoint import load_checkpoint
from captioner.models.encoder import make_encoder, make_preprocessing
from captioner.progress import log_line

# Settings of a decoder that its weights don't depend on; all others must be the checkpoint's.
FREE_OF_WEIGHTS = {
    *("dropout", "recurrent_dropout", "attention_regularisation", "attribute_weight"),
    *("recurrent_initialisation", "forget_bias"),
}


def check_something_is_learnt(config: Config) -> None:
    """Refuse a CNN that is random and stays so; warn of settings that do less than they seem to.

    Raises:
        ConfigError: The CNN has no weights and isn't trained.
    """
    cnn = config.encoder
    if cnn.weights == "none" and not config.training.init_from:
        if not cnn.fine_tune_from:
            raise ConfigError(
                "encoder.weights=none with a frozen CNN: random features tell next to nothing of "
                "an image; set encoder.weights=DEFAULT or a file, or encoder.fine_tune_from=all"
            )
        if cnn.fine_tune_from != "all":
            log_line(
                f"warning: encoder.weights=none: the stages before {cnn.fine_tune_from} stay "
                "random; encoder.fine_tune_from=all trains them too"
            )
    if not cnn.fine_tune_from and cnn.learning_rate != EncoderConfig().learning_rate:
        log_line(
            f"warning: encoder.learning_rate={cnn.learning_rate:g} has no effect on a frozen CNN; "
            "encoder.fine_tune_from=all, or the name of a stage, trains it"
        )


def make_model(config: Config, train_set: CaptionDataset, resumed: Path | None) -> CaptioningModel:
    """Return the model to train, its CNN set to be trained from ``encoder.fine_tune_from`` on.

    Args:
        config: The experiment.
        train_set: Whose captions give a new model its vocabulary.
        resumed: The folder of the run, if it is resumed.

    Raises:
        CaptionerError: The checkpoint can't be read or doesn't fit the experiment, or the captions
            hold no words to learn.
    """
    if resumed:
        model = load_checkpoint(resumed / "last")
    elif config.training.init_from:
        model = _model_of_checkpoint(config)
    else:
        cnn = config.encoder
        encoder = make_encoder(
            cnn.name, cnn.weights, config.preprocessing, cnn.last_stage, cnn.padding
        )
        vocabulary = _make_vocabulary(config, train_set)
        model = CaptioningModel(encoder, config.decoder, vocabulary, config.search)
    model.encoder.fine_tune_from(config.encoder.fine_tune_from, config.encoder.batch_norm)
    if config.training.init_from:
        _report_unknown_words(config, train_set, model.vocabulary)
    elif resumed and model.vocabulary.words != _make_vocabulary(config, train_set).words:
        raise CheckpointError(
            f"{resumed}/last: its vocabulary isn't that of {train_set.name}; the training "
            "captions have changed since, so this run can't be resumed"
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log_line(
        f"{len(train_set)} training images, {len(_captions(train_set))} captions, "
        f"{len(model.vocabulary) - len(SPECIAL_WORDS)} words; {trained:,} parameters to train"
    )
    return model


def _captions(dataset: CaptionDataset) -> list[str]:
    return [caption for image_captions in dataset.captions for caption in image_captions]


def _make_vocabulary(config: Config, train_set: CaptionDataset) -> Vocabulary:
    least = config.data.min_word_count
    captions = [words for of_image in train_set.tokens for words in of_image]
    vocabulary = Vocabulary.from_tokens(captions, least)
    if len(vocabulary) == len(SPECIAL_WORDS):
        raise DataError(
            f"{train_set.name}: no word comes data.min_word_count = {least} times in its "
            f"{len(captions)} captions, so there is none to learn; set a smaller one"
        )
    return vocabulary


def _model_of_checkpoint(config: Config) -> CaptioningModel:
    """Return ``training.init_from``'s weights and vocabulary with the experiment's settings."""
    path = Path(config.training.init_from).expanduser()
    checkpoint = load_checkpoint(path)
    found = {
        "encoder.name": checkpoint.encoder.name,
        "encoder.last_stage": checkpoint.encoder.last_stage,
        "encoder.padding": checkpoint.encoder.padding,
        **_named("decoder", checkpoint.decoder.config),
        **_named("preprocessing", checkpoint.encoder.preprocessing),
    }
    check_fits(found, settings_of_weights(config), f"training.init_from={path}")
    model = CaptioningModel(
        checkpoint.encoder, config.decoder, checkpoint.vocabulary, config.search
    )
    model.load_state_dict(checkpoint.state_dict())
    return model


def settings_of_weights(config: Config) -> dict[str, object]:
    """Return by name what a checkpoint that an experiment begins with must have been made with."""
    cnn = config.encoder
    return {
        "encoder.name": cnn.name,
        "encoder.last_stage": cnn.last_stage,
        "encoder.padding": cnn.padding,
        **_named("decoder", config.decoder),
        **_named("preprocessing", make_preprocessing(cnn.name, cnn.weights, config.preprocessing)),
    }


def check_fits(found: Mapping[str, object], wanted: Mapping[str, object], source: str) -> None:
    """Compare what a checkpoint was made with to what the experiment asks for.

    Raises:
        CheckpointError: Names ``source`` and all differences that matter to the weights.
    """
    differences = [
        f"{name} is {found[name]!r} there and {value!r} here"
        for name, value in wanted.items()
        if found[name] != value and name.removeprefix("decoder.") not in FREE_OF_WEIGHTS
    ]
    if differences:
        raise CheckpointError(f"{source}: it doesn't fit the experiment: {'; '.join(differences)}")


def _named(section: str, settings: object) -> dict[str, object]:
    values = dataclasses.asdict(settings)  # type: ignore[call-overload]
    return {f"{section}.{name}": value for name, value in values.items()}


def _report_unknown_words(config: Config, train_set: CaptionDataset, known: Vocabulary) -> None:
    captions = _captions(train_set)
    unknown = Counter(word for caption in captions for word in known.unknown_words(caption))
    count, total = unknown.total(), sum(len(known.encode(caption)) for caption in captions)
    if count == total:
        raise DataError(
            f"{train_set.name}: none of its words is in the vocabulary of training.init_from="
            f"{config.training.init_from}, so there is none to learn"
        )
    if count:
        log_line(
            f"warning: {count} of {total} words of the training captions ({len(unknown)} different "
            f"ones) aren't in the vocabulary of {config.training.init_from}: they become UNK"
        )


def origin_record(config: Config) -> dict[str, str] | None:
    """Return path and SHA-256 of the weights that a new run begins with; None without any."""
    if not config.training.init_from:
        return None
    path = Path(config.training.init_from).expanduser().resolve()
    with open(path / "model.safetensors", "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": str(path), "sha256": digest}
