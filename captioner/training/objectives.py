"""What training minimises: cross-entropy with people's captions, or the reward of sampled ones."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captioner.config import Config
from captioner.data.dataset import CaptionDataset, encode_captions
from captioner.data.vocabulary import PAD
from captioner.device import autocast
from captioner.metrics.reward import CaptionReward
from captioner.models.captioning_model import CaptioningModel
from captioner.models.decoder import DecoderOutput
from captioner.models.inference_decoder import InferenceDecoder
from captioner.training.losses import attribute_loss, caption_loss
from captioner.training.scheduled_sampling import mix_inputs
from captioner.training.self_critical import Samples, sample_captions, self_critical_loss


@dataclass(frozen=True)
class TrainingBatch:
    """Some images and their captions, as an optimiser step takes them.

    Attributes:
        images: Which images of the training set these are, B of them.
        x: Their cached features (B, N, D), or pixels (B, 3, S, S).
        token_ids: Captions from BOS to EOS, then PAD, (B, K, T + 1).
    """

    images: Sequence[int]
    x: Tensor
    token_ids: Tensor


@dataclass(frozen=True)
class StepLoss:
    """What the gradients of a step were computed from.

    Attributes:
        loss: On the model's device, ().
        tokens: How many tokens it is a mean over.
        values: What else is logged.
    """

    loss: Tensor
    tokens: int
    values: dict[str, float] = field(default_factory=dict)


class Objective(ABC):
    """Computes the gradients of optimiser steps.

    Args:
        model: What is trained.
        config: The experiment.
        precision: torch.bfloat16 or torch.float32, for matrix products.
    """

    def __init__(self, model: CaptioningModel, config: Config, precision: torch.dtype) -> None:
        self.model, self.config, self.precision = model, config, precision

    @property
    def signature(self) -> str:
        """What is minimised, in a line for the log; two runs with the same can be compared."""
        training, decoder = self.config.training, self.config.decoder
        text = f"cross-entropy, label smoothing {training.label_smoothing:g}"
        if training.scheduled_sampling:
            text += f", scheduled sampling up to {training.scheduled_sampling:g}"
        if decoder.attributes:
            text += f", {decoder.attributes} attributes by {decoder.attribute_weight:g}"
        return text

    @abstractmethod
    def compute_gradients(
        self, group: Sequence[TrainingBatch], step: int, progress: float = 0.0
    ) -> StepLoss:
        """Add up the gradients of some batches, the parts of one optimiser step.

        Args:
            group: The batches.
            step: Optimiser steps taken before; what is drawn depends on it.
            progress: What share of all steps these are, 0 to 1.
        """

    def cross_entropy(
        self, features: Tensor, token_ids: Tensor, counts: "Counts", sampled: float = 0.0
    ) -> Tensor:
        """Return the loss of captions under teacher forcing, as a batch's part of a step.

        Args:
            features: (B, N, D).
            token_ids: (B, K, T + 1).
            counts: Of the whole step.
            sampled: Share of the words that are fed that are drawn: see ``scheduled_sampling``.
        """
        with autocast(self.model.device, self.precision):
            inputs = None
            if sampled:
                with torch.no_grad():
                    output = self._teacher_forcing(features, token_ids)
                inputs = mix_inputs(token_ids.to(features.device), output, sampled)
            output = self._teacher_forcing(features, token_ids, inputs)
            loss = caption_loss(
                output,
                self.config.training.label_smoothing,
                self.config.decoder.attention_regularisation,
                counts.tokens,
                counts.captions,
            )
            if output.attributes is not None:
                weight = self.config.decoder.attribute_weight
                loss = loss + weight * attribute_loss(output.attributes, output, counts.images)
            return loss

    def _teacher_forcing(
        self, features: Tensor, token_ids: Tensor, inputs: Tensor | None = None
    ) -> DecoderOutput:
        window = self.config.training.bptt_window
        return self.model.decoder.teacher_forcing(features, token_ids, window, inputs=inputs)


@dataclass(frozen=True)
class Counts:
    """How many tokens (PAD not counted), captions and images an optimiser step has."""

    tokens: int
    captions: int
    images: int

    @classmethod
    def of(cls, token_ids: Sequence[Tensor]) -> "Counts":
        """Count those of batches of captions, (B, K, T + 1) each."""
        real = [ids[..., 1:] != PAD for ids in token_ids]
        return cls(
            sum(int(mask.sum()) for mask in real),
            sum(int(mask.any(-1).sum()) for mask in real),
            sum(len(mask) for mask in real),
        )


class CrossEntropy(Objective):
    """Each word of people's captions is predicted from those before it (teacher forcing)."""

    def compute_gradients(
        self, group: Sequence[TrainingBatch], step: int, progress: float = 0.0
    ) -> StepLoss:
        """See ``Objective.compute_gradients``."""
        counts = Counts.of([batch.token_ids for batch in group])
        sampled = progress * self.config.training.scheduled_sampling
        self.model.train()
        total = torch.zeros((), device=self.model.device)
        for batch in group:
            features = self.model.features(batch.x, self.precision)
            loss = self.cross_entropy(features, batch.token_ids, counts, sampled)
            loss.backward()
            total += loss.detach()
        return StepLoss(total, counts.tokens)


class SelfCritical(Objective):
    """Captions that the model draws are made likelier by what they score: see ``self_critical``.

    The decoder that is trained is the one that draws: nothing is dropped, unless
    ``self_critical.dropout`` says so.

    Args:
        model: What is trained.
        config: The experiment.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        train_set: Whose captions are the references.
    """

    def __init__(
        self,
        model: CaptioningModel,
        config: Config,
        precision: torch.dtype,
        train_set: CaptionDataset,
    ) -> None:
        super().__init__(model, config, precision)
        settings = config.self_critical
        references = encode_captions(train_set, model.vocabulary)
        self.reward = CaptionReward(
            references, len(model.vocabulary), settings.cider_weight, settings.bleu_weight
        )

    @property
    def signature(self) -> str:
        """See ``Objective.signature``."""
        settings = self.config.self_critical
        parts = [
            f"reward {self.reward.signature}",
            f"baseline {settings.baseline} of {settings.samples} samples",
        ]
        if settings.cross_entropy_share:
            parts.append(f"share {settings.cross_entropy_share:g} of {super().signature}")
        return "; ".join(parts)

    def compute_gradients(
        self, group: Sequence[TrainingBatch], step: int, progress: float = 0.0
    ) -> StepLoss:
        """See ``Objective.compute_gradients``."""
        share = self.config.self_critical.cross_entropy_share
        counts = Counts.of([batch.token_ids for batch in group])
        images = sum(len(batch.images) for batch in group)
        decoder = InferenceDecoder(self.model.decoder, self.precision)
        self.model.eval()
        total = torch.zeros((), device=self.model.device)
        drawn: list[Samples] = []
        for batch in group:
            features = self.model.features(batch.x, self.precision)
            samples = self._sample(decoder, features.detach(), batch.images, step)
            drawn.append(samples)
            self.model.decoder.train(self.config.self_critical.dropout)
            with autocast(self.model.device, self.precision):
                output = self._teacher_forcing(features[samples.order], samples.token_ids)
            loss = (1 - share) * self_critical_loss(output, samples.advantages, images)
            if share:
                loss = loss + share * self.cross_entropy(features, batch.token_ids, counts)
            loss.backward()
            self.model.decoder.eval()
            total += loss.detach()
        tokens = Counts.of([samples.token_ids for samples in drawn]).tokens
        weights = [len(batch.images) / images for batch in group]
        values = {
            name: sum(w * getattr(samples, name) for w, samples in zip(weights, drawn, strict=True))
            for name in ("reward", "baseline")
        }
        return StepLoss(total, tokens, values)

    def _sample(
        self, decoder: InferenceDecoder, features: Tensor, images: Sequence[int], step: int
    ) -> Samples:
        settings = self.config.self_critical
        return sample_captions(
            decoder,
            features,
            self.model.vocabulary,
            self.reward,
            images,
            settings.samples,
            self.model.search.max_length,
            ((self.config.training.seed << 32) + step) % (1 << 62),
            settings.baseline,
        )


def make_objective(
    model: CaptioningModel, config: Config, precision: torch.dtype, train_set: CaptionDataset
) -> Objective:
    """Return what ``training.objective`` names."""
    if config.training.objective == "self_critical":
        return SelfCritical(model, config, precision, train_set)
    return CrossEntropy(model, config, precision)
