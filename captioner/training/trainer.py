"""The training loop: batches, optimiser steps, validation, checkpoints."""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from captioner.config import Config
from captioner.data.annotations import ImageId
from captioner.data.dataset import Batch, CaptionDataset, TrainingBatches, encode_captions
from captioner.data.image_files import load_thumbnail
from captioner.data.images import in_batches
from captioner.data.predictions import write_predictions
from captioner.data.tokenizer import tokenize
from captioner.device import memory_errors
from captioner.errors import TrainingError, UsageError
from captioner.files import atomic_directory
from captioner.metrics.diversity import describe
from captioner.metrics.scores import compute_metrics
from captioner.models.captioning_model import CaptioningModel, generate
from captioner.models.checkpoint import save_checkpoint
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress, log_line
from captioner.stopping import StopSignals
from captioner.training.averaging import make_average
from captioner.training.gradient_flow import (
    LOG_KIND,
    equally_long_captions,
    flow_numbers,
    logged_flow,
    measure_gradient_flow,
    plot_gradient_flow,
)
from captioner.training.inputs import Inputs
from captioner.training.objectives import Objective, TrainingBatch, make_objective
from captioner.training.plots import draw_training
from captioner.training.resume import (
    STATE_FILE,
    Circumstances,
    TrainState,
    pack_state,
    unpack_state,
)
from captioner.training.schedule import learning_rate_factor, make_optimizer, set_learning_rates
from captioner.training.tracking import JsonLog, Meter, Tracker, read_log

PREDICTIONS_FILE = "val_predictions.json"
VALIDATION_METRICS = ("BLEU", "ROUGE-L", "CIDEr-D")
# What shows that a better score is none: see ``diversity.describe``.
STATISTICS = (
    *("vocabulary", "unique_captions", "length_mean", "ends_in_function_word", "repeats_ngram"),
)


class Trainer:
    """Trains a model on one process; ``with`` closes its log and its W&B run.

    Args:
        config: The experiment.
        output_dir: Folder of the run.
        model: On ``device``.
        device: Where to compute.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        circumstances: Saved with the state, for whoever resumes it.
        saved: What ``load_training_state`` gave, to resume; None to start.
    """

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        model: CaptioningModel,
        device: torch.device,
        precision: torch.dtype,
        circumstances: Circumstances,
        saved: dict[str, Any] | None,
    ) -> None:
        self.config, self.output_dir = config, output_dir
        self.model, self.device, self.precision = model, device, precision
        self.circumstances = circumstances
        self.optimizer = make_optimizer(model, config)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        decay = config.training.average_decay
        self.average = make_average(model, decay) if decay else None
        self.state = (
            unpack_state(saved, self.optimizer, self.average, device) if saved else TrainState()
        )
        self.log = JsonLog(output_dir / "log.jsonl", self.state.log_bytes)
        self.tracker = Tracker(config.wandb, config.to_dict(), output_dir, self.state.wandb_id)
        self.state.wandb_id = self.tracker.run_id
        self.meter = Meter()

    @property
    def evaluated_model(self) -> CaptioningModel:
        """The model that is validated and kept as the best: averaged, where that is asked for."""
        return cast(CaptioningModel, self.average.module) if self.average else self.model

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.log.close()
        self.tracker.finish(failed=kind is not None)

    def fit(
        self,
        train_set: CaptionDataset,
        train_inputs: Inputs,
        val_set: CaptionDataset,
        val_inputs: Inputs,
        stop_signals: StopSignals,
    ) -> dict[str, float]:
        """Train all epochs that are left; return the scores of the best checkpoint.

        Raises:
            TrainingError: The loss isn't finite, or memory runs out.
            Stopped: ``stop_signals`` has received one; ``last`` was written.
        """
        training, self.stop_signals = self.config.training, stop_signals
        objective = make_objective(self.model, self.config, self.precision, train_set)
        log_line(f"objective: {objective.signature}")
        epochs = TrainingBatches(
            encode_captions(train_set, self.model.vocabulary),
            training.batch_size,
            training.captions_per_image,
            training.seed,
            self.config.data.max_words,
        )
        steps_in_epoch = -(-len(epochs) // training.accumulation_steps)
        self.total_steps = steps_in_epoch * training.epochs
        samples = val_set.select(range(min(len(val_set), self.config.wandb.sample_images)))
        thumbnails = [load_thumbnail(path) for path in samples.paths]
        if training.init_from and not self.state.best_scores:
            self._keep_initial_scores(self._validate(val_set, val_inputs))
        while self.state.epoch < training.epochs and not self._out_of_patience():
            with memory_errors(self._memory_advice):
                self._train_epoch(epochs.epoch(self.state.epoch), train_inputs, objective)
            validation = self._validate(val_set, val_inputs)
            self._finish_epoch(validation)
            self.tracker.log_samples(
                self.state.step,
                self.state.epoch,
                thumbnails,
                [validation.captions[image_id] for image_id in samples.image_ids],
                samples.captions,
            )
        self._finish_run()
        return self.state.best_scores

    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        stale = self.state.epoch - self.state.best_epoch
        if patience and stale >= patience:
            log_line(f"no better score for {stale} epochs (training.patience): stopping")
            return True
        return False

    def _train_epoch(self, batches: list[Batch], inputs: Inputs, objective: Objective) -> None:
        """Train on the batches of an epoch from ``state.batch`` on."""
        training, state = self.config.training, self.state
        remaining = batches[state.batch :]
        loaded = inputs.batches([batch.images for batch in remaining], state.epoch)
        group: list[TrainingBatch] = []
        self.meter = Meter()
        description = f"epoch {state.epoch + 1}/{training.epochs}"
        with Progress(description, len(batches), "batch", initial=state.batch) as bar:
            pairs = zip(remaining, loaded, strict=True)
            for number, (batch, (images, x)) in enumerate(pairs, 1):
                if images:
                    group.append(TrainingBatch(images, x, _token_ids_of(batch, images)))
                state.batch += 1
                is_full = number % training.accumulation_steps == 0 or number == len(remaining)
                if group and is_full:
                    self._optimise(group, objective)
                    group = []
                    self._stop_if_asked()
                bar.update(1, f"loss {state.loss / max(1, state.tokens):.3f}")

    def _optimise(self, group: list[TrainingBatch], objective: Objective) -> None:
        """Take one optimiser step on some batches."""
        training, state = self.config.training, self.state
        factor = learning_rate_factor(state.step, self.total_steps, training)
        rate = set_learning_rates(self.optimizer, factor)
        result = objective.compute_gradients(group, state.step, state.step / self.total_steps)
        norms = nn.utils.clip_grad_norm_(self.trained, training.gradient_clip or math.inf)
        loss, norm = torch.stack([result.loss, norms]).tolist()  # waits for the device, once a step
        self._check_finite(loss, norm, rate)
        if training.gradient_clip_value:
            nn.utils.clip_grad_value_(self.trained, training.gradient_clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average:
            self.average.update_parameters(self.model)
        state.step += 1
        state.loss += loss * result.tokens
        state.tokens += result.tokens
        images = sum(len(batch.images) for batch in group)
        self.meter.add(result.tokens, images, {"loss": loss, **result.values})
        if state.step % training.log_every == 0:
            self._log_step(norm, rate)
        if training.gradient_flow_every and state.step % training.gradient_flow_every == 0:
            self._log_gradient_flow(group[0])
        if training.checkpoint_every and state.step % training.checkpoint_every == 0:
            self._save("last")

    def _stop_if_asked(self) -> None:
        """Between two steps, write ``last`` and end if a signal has come."""
        if self.stop_signals.received:
            self._save("last")
            self.stop_signals.raise_if_received()

    def _memory_advice(self) -> str:
        training, last = self.config.training, self.output_dir / "last"
        kept = f"; training.init_from={last} keeps what is learnt" if last.exists() else ""
        return (
            f"at step {self.state.step + 1} on {self.device} with training.batch_size="
            f"{training.batch_size} images of training.captions_per_image="
            f"{training.captions_per_image} captions; start again with a smaller "
            "training.batch_size and training.accumulation_steps to make up for it, or fewer "
            f"captions_per_image{kept}"
        )

    def _check_finite(self, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        last = self.output_dir / "last"
        hint = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint is there"
        raise TrainingError(
            f"step {self.state.step + 1}: the loss is {loss} and the gradient norm {norm} at a "
            f"learning rate of {rate:.3g}; {hint}; try a smaller training.learning_rate or "
            "training.gradient_clip, or training.precision=float32"
        )

    def _log_step(self, norm: float, rate: float) -> None:
        values = {
            **self.meter.means(),
            "learning_rate": rate,
            "gradient_norm": norm,
            **self.meter.rates(),
        }
        self.log.write(kind="step", step=self.state.step, epoch=self.state.epoch + 1, **values)
        self.tracker.log(self.state.step, {f"train/{name}": v for name, v in values.items()})
        self.state.seconds += self.meter.seconds
        self.meter = Meter()

    def _log_gradient_flow(self, batch: TrainingBatch) -> None:
        """Measure on some captions of a batch, without changing anything that training uses."""
        images, captions = equally_long_captions(batch.token_ids)
        self.model.eval()
        with torch.no_grad():
            features = self.model.features(batch.x[images], self.precision).float()
        flow = measure_gradient_flow(
            self.model.decoder,
            features,
            captions,
            self.config.training.bptt_window,
        )
        self.log.write(kind=LOG_KIND, step=self.state.step, epoch=self.state.epoch + 1, **flow)
        self.tracker.log(self.state.step, flow_numbers(flow))

    def _validate(self, val_set: CaptionDataset, val_inputs: Inputs) -> "Validation":
        """Caption freely and score; whatever ends it early, a resumed run begins it anew."""
        started = time.monotonic()
        self._save("last")
        size = self.config.validation.batch_size
        with memory_errors(
            lambda: (
                f"in validation on {self.device} with validation.batch_size={size}; --resume "
                "goes on here with a smaller one"
            )
        ):
            captions = self.caption(val_set, val_inputs)
        scores = compute_metrics(captions, val_set.references, VALIDATION_METRICS)
        statistics = describe([tokenize(caption) for caption in captions.values()])
        chosen = {name: statistics[name] for name in STATISTICS}
        return Validation(scores, chosen, captions, time.monotonic() - started)

    def caption(self, dataset: CaptionDataset, inputs: Inputs) -> dict[ImageId, str]:
        """Caption images by free-running search; one that can't be read any more gets ""."""
        batches = in_batches(len(dataset), self.config.validation.batch_size)
        captions: dict[ImageId, str] = dict.fromkeys(dataset.image_ids, "")
        model = self.evaluated_model
        decoder = InferenceDecoder(model.decoder, self.precision)
        cnn = None if model.encoder.frozen else InferenceEncoder(model.encoder, self.precision)
        with Progress("validation", len(dataset), "image") as bar:
            for indices, x in inputs.batches(batches):
                if indices:
                    features = cnn(x) if cnn else model.features(x, self.precision)
                    hypotheses = generate([decoder], [features], model.search, model.vocabulary)
                    best = model.best_captions(hypotheses)
                    captions |= zip((dataset.image_ids[i] for i in indices), best, strict=True)
                bar.update(len(indices))
                self.stop_signals.raise_if_received()
        return captions

    def _keep_initial_scores(self, validation: "Validation") -> None:
        """Keep the checkpoint that a run begins with as its best so far."""
        state, metric = self.state, self.config.validation.metric
        state.best_scores = validation.scores
        self.log.write(kind="start", step=0, epoch=0, **validation.values())
        self._save("best", validation.captions)
        self._save("last", validation.captions)
        self.tracker.log(0, validation.values("validation/"))
        log_line(
            f"{self.config.training.init_from} to begin with: validation {metric} "
            f"{validation.scores[metric]:.4f}"
        )

    def _finish_epoch(self, validation: "Validation") -> None:
        """Log an epoch, keep its checkpoint, and the best one."""
        state, metric = self.state, self.config.validation.metric
        train_seconds = state.seconds + self.meter.seconds - validation.seconds
        scores = validation.scores
        is_best = not state.best_scores or scores[metric] > state.best_scores[metric]
        loss = state.loss / max(1, state.tokens)
        state.epoch += 1
        state.batch, state.loss, state.tokens, state.seconds = 0, 0.0, 0, 0.0
        values = {"loss": loss, "train_seconds": train_seconds, **validation.values()}
        # Before the checkpoint, which says how long the log is: a process that is killed in
        # between takes the epoch's end again, and writes this line again.
        self.log.write(kind="epoch", step=state.step, epoch=state.epoch, **values)
        if is_best:
            state.best_epoch, state.best_scores = state.epoch, scores
            self._save("best", validation.captions)
        self._save("last", validation.captions)
        draw_training(self.output_dir)
        measured = validation.values("validation/")
        self.tracker.log(state.step, {"epoch": state.epoch, "train/epoch_loss": loss, **measured})
        log_line(
            f"epoch {state.epoch}: loss {loss:.3f}, validation {metric} {scores[metric]:.4f}"
            f"{' (best so far)' if is_best else ''}"
        )

    def _finish_run(self) -> None:
        """Draw the gradient flow where it was measured, and keep the best checkpoint in W&B."""
        measurements = logged_flow(read_log(self.output_dir / "log.jsonl"))
        if measurements:
            path = self.output_dir / "gradient_flow.png"
            try:
                plot_gradient_flow(path, measurements)
            except UsageError as error:
                log_line(f"warning: {path} isn't drawn: {error}")
            else:
                self.tracker.log_images(self.state.step, {"gradient_flow": path})
        if self.config.wandb.log_checkpoint:
            aliases = ["best", f"epoch-{self.state.best_epoch}"]
            self.tracker.keep_checkpoint(self.output_dir / "best", aliases)

    def _save(self, name: str, captions: dict[ImageId, str] | None = None) -> None:
        """Write ``best`` or ``last``; ``last`` with what resuming needs.

        Args:
            name: "best" or "last".
            captions: Of the validation that has just been; None keeps those of the one before.
        """
        self.state.log_bytes = self.log.size
        scores: dict[str, float] = {"epoch": self.state.epoch, "step": self.state.step}
        if name == "best":
            scores |= self.state.best_scores
        with atomic_directory(self.output_dir / name) as aside:
            previous = self.output_dir / name / PREDICTIONS_FILE
            if captions is not None:
                rows = [{"image_id": i, "caption": text} for i, text in captions.items()]
                write_predictions(aside / PREDICTIONS_FILE, rows)
            elif previous.exists():
                shutil.copyfile(previous, aside / PREDICTIONS_FILE)
            if name == "last":
                packed = pack_state(
                    self.state,
                    self.circumstances,
                    self.config,
                    self.optimizer,
                    self.average,
                    self.device,
                )
                torch.save(packed, aside / STATE_FILE)
            model = self.model if name == "last" else self.evaluated_model
            save_checkpoint(model, aside, scores)  # last: its checksums are of all files


@dataclass(frozen=True)
class Validation:
    """What a validation gave.

    Attributes:
        scores: Of the freely decoded captions, each metric's.
        statistics: What these captions are like: see ``STATISTICS``.
        captions: By image id.
        seconds: How long it took.
    """

    scores: dict[str, float]
    statistics: dict[str, float]
    captions: dict[ImageId, str]
    seconds: float

    def values(self, prefix: str = "") -> dict[str, float]:
        """Return all numbers, for the log."""
        numbers = {"validation_seconds": self.seconds, **self.scores, **self.statistics}
        return {f"{prefix}{name}": value for name, value in numbers.items()}


def _token_ids_of(batch: Batch, images: Sequence[int]) -> Tensor:
    """Return the token ids of those of a batch's images that could be read."""
    if list(images) == batch.images:
        return batch.token_ids
    readable = set(images)
    return batch.token_ids[[image in readable for image in batch.images]]
