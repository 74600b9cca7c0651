"""What training minimises: cross-entropy with people's captions, or the reward of sampled ones."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import Config
from captioner.data.dataset import CaptionDataset, encode_captions
from captioner.data.vocabulary import PAD
from captioner.device import autocast
from captioner.metrics.reward import CaptionReward
from captioner.models.captioning_model import CaptioningModel
from captioner.models.compiled_steps import CompiledSteps
from captioner.models.decoder import DecoderOutput
from captioner.models.inference_decoder import InferenceDecoder
from captioner.training.distributed import ALONE, Processes
from captioner.training.inputs import TrainingBatch
from captioner.training.losses import attribute_loss, caption_loss
from captioner.training.scheduled_sampling import mix_inputs
from captioner.training.self_critical import Samples, sample_captions, self_critical_loss


def count_tokens(token_ids: Tensor) -> int:
    """Return how many tokens captions (B, K, T + 1) have, BOS and PAD not counted."""
    return int((token_ids[..., 1:] != PAD).sum())


@dataclass(frozen=True)
class Counts:
    """What an optimiser step has, in all processes.

    Attributes:
        tokens: PAD not counted.
        captions: Captions.
        images: Images.
    """

    tokens: int
    captions: int
    images: int

    @classmethod
    def of(cls, group: Sequence[TrainingBatch]) -> "Counts":
        """Count those of some batches."""
        return cls(
            sum(count_tokens(batch.token_ids) for batch in group),
            sum(int((batch.token_ids[..., 1:] != PAD).any(-1).sum()) for batch in group),
            sum(len(batch.images) for batch in group),
        )


@dataclass(frozen=True)
class Moment:
    """When a step is taken.

    Attributes:
        step: Optimiser steps taken before; what is drawn depends on it.
        progress: What share of all steps these are, 0 to 1.
    """

    step: int
    progress: float = 0.0


@dataclass(frozen=True)
class StepLoss:
    """What this process's part of the gradients of a step was computed from.

    The sums over all processes are those of the step.

    Attributes:
        loss: On the model's device, ().
        tokens: How many tokens it has.
        values: What else is logged.
    """

    loss: Tensor
    tokens: int
    values: dict[str, float] = field(default_factory=dict)


BatchLoss = tuple[Tensor, int, dict[str, float]]


class _LossOfBatch(nn.Module):
    """What DistributedDataParallel wraps: from a batch to its loss."""

    def __init__(self, model: CaptioningModel, batch_loss: Callable[..., BatchLoss]) -> None:
        super().__init__()
        self.model, self._batch_loss = model, batch_loss

    def forward(self, batch: TrainingBatch | None, *args: Any) -> BatchLoss:
        """Return loss, tokens and values; without a batch 0, whose gradients are 0 too."""
        if batch is None:
            trained = [p for p in self.model.parameters() if p.requires_grad]
            return sum(((p * 0).sum() for p in trained), torch.zeros(())), 0, {}
        return self._batch_loss(batch, *args)


class Objective(ABC):
    """Computes the gradients of optimiser steps.

    Args:
        model: What is trained.
        config: The experiment.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        processes: Each computes the gradients of its part of a step; they are added up.

    Attributes:
        value_names: What is logged besides the loss.
    """

    value_names: tuple[str, ...] = ()

    def __init__(
        self,
        model: CaptioningModel,
        config: Config,
        precision: torch.dtype,
        processes: Processes = ALONE,
    ) -> None:
        self.model, self.config, self.precision = model, config, precision
        self.processes = processes
        self._run_captions = self._compiled_steps()
        self._loss = processes.parallel(
            _LossOfBatch(model, self.batch_loss), lambda loss: loss(None)[0]
        )

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

    def compute_gradients(
        self, group: Sequence[TrainingBatch], counts: Counts, moment: Moment
    ) -> StepLoss:
        """Add up the gradients of some batches, the parts of one optimiser step.

        Args:
            group: The batches of this process; it may have none.
            counts: Of those of all processes.
            moment: When the step is taken.
        """
        self.prepare_step()
        total = torch.zeros((), device=self.model.device)
        tokens, values = 0, dict.fromkeys(self.value_names, 0.0)
        parts: Sequence[TrainingBatch | None] = group or [None]
        for number, batch in enumerate(parts, 1):
            with self._added_up(is_last=number == len(parts)):
                loss, tokens_of_batch, more = self._loss(batch, counts, moment)
                # DistributedDataParallel takes the mean, and parts of a loss are added up.
                (loss if self.processes.count == 1 else loss * self.processes.count).backward()
            total += loss.detach()
            tokens += tokens_of_batch
            values = {name: value + more.get(name, 0.0) for name, value in values.items()}
        return StepLoss(total, tokens, values)

    @contextlib.contextmanager
    def _added_up(self, is_last: bool) -> Iterator[None]:
        """Have gradients go to the other processes with the last batch of a step alone."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.processes.watched())
            if isinstance(self._loss, nn.parallel.DistributedDataParallel) and not is_last:
                stack.enter_context(self._loss.no_sync())
            yield

    @abstractmethod
    def prepare_step(self) -> None:
        """Do what is done once a step, before its batches."""

    @abstractmethod
    def batch_loss(self, batch: TrainingBatch, counts: Counts, moment: Moment) -> BatchLoss:
        """Return a batch's part of the loss of a step, its tokens, and its ``value_names``."""

    def cross_entropy(
        self, features: Tensor, token_ids: Tensor, counts: Counts, sampled: float = 0.0
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
        self,
        features: Tensor,
        token_ids: Tensor,
        inputs: Tensor | None = None,
        run: Callable[..., Any] | None = None,
    ) -> DecoderOutput:
        window = self.config.training.bptt_window
        return self.model.decoder.teacher_forcing(
            features, token_ids, window, inputs=inputs, run=run or self._run_captions
        )

    def _compiled_steps(self) -> Callable[..., Any] | None:
        """Return what runs over captions, of one shape, in place of the decoder's own loop."""
        decoder = self.model.decoder
        # What takes the mean of the grid has all of its steps in one fused call.
        if not self.config.training.compile or decoder.pooled:
            return None
        return CompiledSteps(decoder).run


class CrossEntropy(Objective):
    """Each word of people's captions is predicted from those before it (teacher forcing)."""

    def prepare_step(self) -> None:
        """See ``Objective.prepare_step``."""
        self.model.train()

    def batch_loss(self, batch: TrainingBatch, counts: Counts, moment: Moment) -> BatchLoss:
        """See ``Objective.batch_loss``."""
        sampled = moment.progress * self.config.training.scheduled_sampling
        features = self.model.features(batch.x, self.precision)
        loss = self.cross_entropy(features, batch.token_ids, counts, sampled)
        return loss, count_tokens(batch.token_ids), {}


class SelfCritical(Objective):
    """Captions that the model draws are made likelier by what they score: see ``self_critical``.

    The decoder that is trained is the one that draws: nothing is dropped, unless
    ``self_critical.dropout`` says so.

    Args:
        model: What is trained.
        config: The experiment.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        train_set: Whose captions are the references.
        processes: See ``Objective``.
    """

    value_names = ("reward", "baseline")

    def __init__(
        self,
        model: CaptioningModel,
        config: Config,
        precision: torch.dtype,
        train_set: CaptionDataset,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__(model, config, precision, processes)
        self._run_samples = self._compiled_steps()
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

    def prepare_step(self) -> None:
        """See ``Objective.prepare_step``."""
        self._decoder = InferenceDecoder(self.model.decoder, self.precision)
        self.model.eval()

    def batch_loss(self, batch: TrainingBatch, counts: Counts, moment: Moment) -> BatchLoss:
        """See ``Objective.batch_loss``."""
        share = self.config.self_critical.cross_entropy_share
        features = self.model.features(batch.x, self.precision)
        samples = self._sample(self._decoder, features.detach(), batch.images, moment.step)
        self.model.decoder.train(self.config.self_critical.dropout)
        with autocast(self.model.device, self.precision):
            output = self._teacher_forcing(
                features[samples.order], samples.token_ids, run=self._run_samples
            )
        loss = (1 - share) * self_critical_loss(output, samples.advantages, counts.images)
        if share:
            loss = loss + share * self.cross_entropy(features, batch.token_ids, counts)
        self.model.decoder.eval()
        weight = len(batch.images) / counts.images
        values = {name: weight * getattr(samples, name) for name in self.value_names}
        return loss, count_tokens(samples.token_ids), values

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
    model: CaptioningModel,
    config: Config,
    precision: torch.dtype,
    train_set: CaptionDataset,
    processes: Processes = ALONE,
) -> Objective:
    """Return what ``training.objective`` names."""
    if config.training.objective == "self_critical":
        return SelfCritical(model, config, precision, train_set, processes)
    return CrossEntropy(model, config, precision, processes)
