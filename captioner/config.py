"""Every setting of an experiment, with its default; checked when it is made."""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from captioner.checks import (
    check_at_least,
    check_between,
    check_positive,
    check_share,
    expected_error,
)
from captioner.errors import ConfigError
from captioner.search_config import SearchConfig

Cell = Literal["lstm", "gru", "rnn_tanh", "rnn_relu"]
Padding = Literal["torchvision", "tensorflow"]
BatchNorm = Literal["update", "frozen"]
Initialisation = Literal["orthogonal", "xavier", "identity"]
Objective = Literal["cross_entropy", "self_critical"]


@dataclass(frozen=True)
class DataConfig:
    """Where the images and captions are. Paths below ``root``, itself below the working folder.

    Attributes:
        root: Folder that the other paths start from.
        train_annotations, val_annotations: Captions files (COCO, Karpathy or CSV).
        train_images, val_images: Folders that the annotations' file names start from.
        train_split, val_split: Split names (Karpathy, CSV) or files that list images; "" takes all.
        min_word_count: A word seen less often in the training captions becomes UNK.
        max_words: Longer training captions are cut to this many words.
        bad_images: What an image that is missing or can't be decoded does: "error" or "skip".
        cache_dir: Feature cache; "" is the user's cache folder.
        workers: Processes (GPU) or threads (CPU) that decode images; -1 takes one a core, 16 at
            most.
    """

    train_annotations: str
    val_annotations: str
    train_images: str
    val_images: str
    root: str = "."
    train_split: str = ""
    val_split: str = ""
    min_word_count: int = 5
    max_words: int = 40
    bad_images: Literal["error", "skip"] = "error"
    cache_dir: str = ""
    workers: int = -1

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_at_least(self, min_word_count=1, max_words=1, workers=-1)

    def path(self, name: str) -> Path:
        """Return the path in the field ``name``, with ``root`` before it."""
        return Path(self.root).expanduser() / Path(getattr(self, name)).expanduser()

    def split(self, name: str) -> str | None:
        """Return the split in the field ``name``, as ``read_annotations`` takes it."""
        listed = self.path(name)
        return str(listed) if listed.is_file() else getattr(self, name) or None


@dataclass(frozen=True)
class PreprocessingConfig:
    """What differs from the preprocessing that belongs to the CNN's weights; 0 keeps theirs.

    Attributes:
        resize: "crop" scales the shorter side to ``resize_size`` and cuts out the centre, as for
            ImageNet; "squash" scales the whole image to the square, so that nothing is cut off.
        image_size: Side of the square that the CNN sees, in pixels, at most 2,048.
        resize_size: Length of the shorter side before the cut, in pixels, at most 4,096 ("crop"
            alone).
        interpolation: "bilinear" or "bicubic"; "" keeps the weights' own.
        mean, std: What is subtracted from, and divides, red, green and blue (0 to 1).
    """

    resize: Literal["crop", "squash"] = "crop"
    image_size: int = 0
    resize_size: int = 0
    interpolation: Literal["", "bilinear", "bicubic"] = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_between(self, image_size=(0, 2048), resize_size=(0, 4096))
        if self.image_size and self.resize_size and self.resize_size < self.image_size:
            raise ConfigError(
                f"preprocessing.resize_size ({self.resize_size}) must be at least "
                f"preprocessing.image_size ({self.image_size})"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (0, 3):
                raise expected_error(self, name, "three numbers (red, green, blue)")
        if not all(map(math.isfinite, self.mean)):
            raise expected_error(self, "mean", "three finite numbers")
        if not all(0 < value < math.inf for value in self.std):
            raise expected_error(self, "std", "three numbers above 0")


@dataclass(frozen=True)
class AugmentationConfig:
    """How training images are changed at random; off by default. Validation never is.

    A CNN that is trained sees each image changed anew in each epoch, by ``training.seed``. For a
    frozen CNN ``views`` are drawn once, and their features cached.

    Attributes:
        crop: Least share of the image's area that is kept, at least 0.05; the part is then scaled
            to the square that the CNN sees, by which its aspect changes by 3/4 to 4/3. 1 is off.
        flip: Flip half of the images from left to right; never one of whose (English) captions
            says left or right.
        colour: Change brightness, contrast and saturation by a factor of 1 - ``colour`` to
            1 + ``colour`` each; below 1, 0 is off.
        views: Of a frozen CNN: so many versions of each image are encoded and cached, the first
            of them plain, at most 100; each epoch trains on one of each image, in turn.
        seed: Of these views, below 2 ** 63: runs that differ in ``training.seed`` share them.
    """

    crop: float = 1.0
    flip: bool = False
    colour: float = 0.0
    views: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_between(self, crop=(0.05, 1.0), views=(1, 100), seed=(0, 2**63 - 1))
        check_share(self, "colour")
        if self.views > 1 and not self.changes:
            raise ConfigError(
                f"augmentation.views ({self.views}) has no effect without augmentation.crop, flip "
                "or colour: all views would be the same"
            )

    @property
    def changes(self) -> bool:
        """Whether anything is changed at all."""
        return self.crop < 1 or self.flip or self.colour > 0


@dataclass(frozen=True)
class EncoderConfig:
    """The CNN.

    Attributes:
        name: A torchvision classification CNN by its torchvision name.
        weights: A torchvision weights name ("DEFAULT", "IMAGENET1K_V1", …), the path of a
            state_dict file, or "none" for random weights.
        last_stage: The stage whose output is the features; "" takes the last. An earlier one has
            a finer grid: vgg16's "features.29" is 14 x 14 regions of 224 pixels (Xu et al. 2015).
        padding: How layers with a stride pad: as torchvision's (the same on all sides), or as
            TensorFlow's "SAME" (at even sizes right and bottom alone), for weights from there.
        fine_tune_from: The first stage that is trained ("layer3", "features.14"); "" freezes all.
            "all" trains the whole CNN.
        batch_norm: Statistics of the trained stages' batch norm: "update" takes each batch's own
            and keeps a running mean for use, as a CNN that is trained from nothing needs it;
            "frozen" keeps those of the weights, as is usual with small batches. Scale and shift
            are trained either way.
        learning_rate: Peak learning rate of the trained stages.
    """

    name: str = "resnet50"
    weights: str = "DEFAULT"
    last_stage: str = ""
    padding: Padding = "torchvision"
    fine_tune_from: str = ""
    batch_norm: BatchNorm = "update"
    learning_rate: float = 1e-5

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_positive(self, "learning_rate")


@dataclass(frozen=True)
class DecoderConfig:
    """The recurrent decoder.

    Attributes:
        kind: "show_and_tell" (Vinyals et al. 2015), "show_attend_tell" (Xu et al. 2015),
            "up_down" (Anderson et al. 2018) or "adaptive_attention" (Lu et al. 2017); the decoders
            are listed in ``models.captioning_model.DECODERS``.
        cell: The recurrent cell.
        layers: Recurrent layers on top of each other, at most 32.
        embedding_size: Width of a word vector; this and the other widths are at most 32,768.
        hidden_size: Width of the recurrent state.
        attention_size: Width in which attention scores are computed.
        attention_heads: Attention with so many score vectors, each for its share of the context.
        feature_size: Width to which region features are projected once per image; 0 keeps the
            CNN's own width (adaptive_attention always projects to ``hidden_size``).
        embedding_scale: Word vectors begin uniformly between this and its negative. Decoders with
            attention end best with 0.1, Show and Tell with 1 (experiments/LOG.md).
        feature_norm: Normalise the features of each region as they come in (Ba et al. 2016). It
            helps Show and Tell much, and attention to a quicker start.
        output_norm: Normalise the recurrent state that a word is predicted from.
        tie_output: The output layer's weights are the word vectors (Press and Wolf 2017).
        dropout: Share of units dropped before, between and after the recurrent layers.
        recurrent_dropout: Share of units dropped of the h that a recurrent layer takes from the
            step before, at each step anew; what it remembers is kept (Semeniuta et al. 2016).
        attention_regularisation: Weight of the doubly stochastic term (Xu et al. 2015, eq. 14).
        attributes: So many of the vocabulary's most frequent words are predicted from the image, as
            further input (see ``models.attributes``); 0 predicts none.
        attribute_weight: Weight of their binary cross-entropy, summed over the words, in the loss.
        recurrent_initialisation: What the recurrent weights of each gate begin with; "identity"
            with rnn_relu is the IRNN (Le et al. 2015).
        forget_bias: What the bias of the LSTM's forget gate begins with; the larger, the longer
            it remembers at first (Jozefowicz et al. 2015).
    """

    kind: str = "show_attend_tell"
    cell: Cell = "lstm"
    layers: int = 1
    embedding_size: int = 512
    hidden_size: int = 512
    attention_size: int = 512
    attention_heads: int = 1
    feature_size: int = 0
    embedding_scale: float = 0.1
    feature_norm: bool = False
    output_norm: bool = False
    tie_output: bool = False
    dropout: float = 0.5
    recurrent_dropout: float = 0.0
    attention_regularisation: float = 1.0
    attributes: int = 0
    attribute_weight: float = 0.05
    recurrent_initialisation: Initialisation = "orthogonal"
    forget_bias: float = 1.0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        widths = dict.fromkeys(("embedding_size", "hidden_size", "attention_size"), (1, 32_768))
        check_between(self, layers=(1, 32), **widths, feature_size=(0, 32_768))
        check_between(self, attention_heads=(1, 1024), attributes=(0, 32_768))
        check_at_least(self, attention_regularisation=0.0, attribute_weight=0.0)
        check_positive(self, "embedding_scale")
        if not math.isfinite(self.forget_bias):
            raise expected_error(self, "forget_bias", "a finite number")
        check_share(self, "dropout")
        check_share(self, "recurrent_dropout")


@dataclass(frozen=True)
class TrainingConfig:
    """The training run.

    Attributes:
        objective: "cross_entropy" with people's captions, or "self_critical": the reward of sampled
            ones (see ``SelfCriticalConfig``), from a model that can caption already.
        epochs: Passes over the training images.
        batch_size: Images in a batch, of each process that begins the run: two processes make it
            twice as large (the learning rate stays as it is set). A run that goes on with another
            number of processes keeps the size of its batches, and divides them anew.
        captions_per_image: Captions of each image in a batch, drawn anew each epoch where an
            image has more.
        learning_rate: Peak learning rate of the decoder.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Optimiser steps over which the learning rate rises from 0.
        schedule: How it falls afterwards: "cosine" or "linear" to 0, or "constant".
        gradient_clip: Largest norm of the whole gradient; 0 doesn't clip.
        gradient_clip_value: Largest size of each number in the gradient, cut after
            ``gradient_clip``; 0 doesn't clip.
        bptt_window: Truncated back-propagation: gradients go back at most so many tokens and the
            state goes on over the cut; 0 is the whole caption.
        accumulation_steps: Batches whose gradients make one optimiser step.
        init_from: A checkpoint (``runs/a/best``) whose weights, vocabulary and CNN the run begins
            with, in place of new ones; the experiment must fit it. "" begins anew.
        label_smoothing: Probability mass spread over the other words.
        scheduled_sampling: Share of the words fed in cross-entropy training that the model draws
            itself (Bengio et al. 2015): it rises evenly from 0 to this at the last step, and takes
            a second pass through the decoder.
        average_decay: Validation and ``best`` take a moving average of the weights: at each step so
            much of the average stays (0.99, say), less in the first steps; 0 takes the weights
            themselves.
        precision: "auto" is bfloat16 where the device computes in it, else float32. A CNN that is
            trained on a CPU without AMX, or has grouped convolutions as MobileNets have, computes
            in float32 on a CPU in any case, which is faster there.
        device: "auto" is CUDA, else MPS, else CPU.
        seed: Seed of weights, batches and dropout.
        patience: Epochs without a better score before training stops; 0 never stops early.
        log_every: Optimiser steps between log lines.
        gradient_flow_every: Optimiser steps between measurements of how much gradient reaches the
            state at each step back in time; 0 never measures.
        checkpoint_every: Optimiser steps between writes of ``last`` within an epoch; 0 writes at
            the end of each epoch alone.
        checkpoint_minutes: Minutes between writes of ``last``, besides; 0 goes by steps alone.
        keep_last: So many of the latest ``last`` stay as ``last-STEP``; 0 keeps none.
        deterministic: On a GPU, use slower operations that give the same bits each time, so that
            two runs end with the same weights on the same kind of GPU and software with as many
            processes; torch warns of those for which it has none. A CPU gives the same in any case.
        compile: Have torch.compile make one program of some steps of an attention decoder, on a GPU
            a CUDA graph. It takes a minute at the start and a C++ compiler; the numbers are the
            same to rounding.
    """

    objective: Objective = "cross_entropy"
    epochs: int = 20
    batch_size: int = 64
    captions_per_image: int = 5
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    warmup_steps: int = 200
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    gradient_clip: float = 5.0
    gradient_clip_value: float = 0.0
    bptt_window: int = 0
    accumulation_steps: int = 1
    label_smoothing: float = 0.1
    scheduled_sampling: float = 0.0
    average_decay: float = 0.0
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    device: str = "auto"
    seed: int = 0
    patience: int = 5
    log_every: int = 20
    gradient_flow_every: int = 0
    checkpoint_every: int = 1000
    checkpoint_minutes: float = 0.0
    keep_last: int = 0
    deterministic: bool = False
    compile: bool = False
    init_from: str = ""

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_at_least(self, epochs=1, batch_size=1, captions_per_image=1, accumulation_steps=1)
        check_at_least(
            self, weight_decay=0.0, warmup_steps=0, gradient_clip=0.0, patience=0, seed=0
        )
        check_at_least(self, log_every=1, checkpoint_every=0, gradient_flow_every=0, bptt_window=0)
        check_at_least(self, gradient_clip_value=0.0, checkpoint_minutes=0.0, keep_last=0)
        check_positive(self, "learning_rate")
        check_share(self, "label_smoothing")
        check_share(self, "scheduled_sampling")
        check_share(self, "average_decay")


@dataclass(frozen=True)
class SelfCriticalConfig:
    """Self-critical training (Rennie et al. 2017): see ``training.self_critical``.

    Attributes:
        samples: Captions drawn of each image at each step.
        baseline: What a caption's reward is compared with: the "mean" of its image's other samples,
            or that of the "greedy" caption.
        cider_weight, bleu_weight: Weights of CIDEr-D (0 to 10) and BLEU-4 (0 to 1) in the reward.
        cross_entropy_share: Share (0 to 1) of the loss that stays cross-entropy.
        dropout: Whether ``decoder.dropout`` stays on where gradients are computed; captions are
            always drawn without it.
    """

    samples: int = 5
    baseline: Literal["mean", "greedy"] = "mean"
    cider_weight: float = 1.0
    bleu_weight: float = 0.0
    cross_entropy_share: float = 0.0
    dropout: bool = False

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        least = 2 if self.baseline == "mean" else 1
        check_between(self, samples=(least, 1000))
        check_at_least(self, cider_weight=0.0, bleu_weight=0.0)
        check_share(self, "cross_entropy_share")
        if not self.cider_weight and not self.bleu_weight:
            raise ConfigError("self_critical: cider_weight and bleu_weight are both 0")


@dataclass(frozen=True)
class ValidationConfig:
    """Validation after each epoch: captions are decoded freely and scored.

    Attributes:
        metric: The score that picks the best checkpoint and stops early; all of them are logged.
        batch_size: Images decoded at a time.
        max_images: Validate on the first so many images; 0 takes all.
    """

    metric: Literal["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L", "CIDEr-D"] = "BLEU-4"
    batch_size: int = 100
    max_images: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_at_least(self, batch_size=1, max_images=0)


@dataclass(frozen=True)
class WandbConfig:
    """Tracking in Weights & Biases.

    Attributes:
        mode: "auto" is online when logged in, else offline.
        project, entity, group, name: As W&B shows them; "" leaves the choice to W&B. For the stages
            of an experiment "" is the folder's name, and each stage's name follows ``name``.
        sample_images: Validation images shown with their captions at each validation.
        log_checkpoint: Keep the best checkpoint as an artifact.
    """

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    project: str = "captioner"
    entity: str = ""
    group: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    sample_images: int = 8
    log_checkpoint: bool = True

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        check_at_least(self, sample_images=0)


@dataclass(frozen=True)
class Config:
    """A whole experiment."""

    data: DataConfig
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    self_critical: SelfCriticalConfig = field(default_factory=SelfCriticalConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        if self.search.consensus:
            raise ConfigError(
                "search.consensus: it is fitted to a trained captioner, by tools/fit_consensus.py; "
                f"0 was expected, found {self.search.consensus:g}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as nested dicts of plain values, as JSON and W&B take it."""
        return dataclasses.asdict(self)
