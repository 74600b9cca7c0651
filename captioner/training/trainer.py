"""The training loop: batches, optimiser steps, validation, checkpoints."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from captioner.config import Config
from captioner.data.annotations import ImageId
from captioner.data.dataset import Batch, CaptionDataset, TrainingBatches, encode_captions
from captioner.data.image_files import load_thumbnail
from captioner.device import memory_errors
from captioner.errors import ProcessError, TrainingError, UsageError
from captioner.models.captioning_model import CaptioningModel
from captioner.progress import Progress, log_line
from captioner.stopping import Stopped, StopSignals
from captioner.training.averaging import make_average
from captioner.training.checkpoints import keep_last, write_checkpoint
from captioner.training.distributed import ALONE, Processes
from captioner.training.gradient_flow import (
    LOG_KIND,
    equally_long_captions,
    flow_numbers,
    logged_flow,
    measure_gradient_flow,
    plot_gradient_flow,
)
from captioner.training.inputs import Inputs, TrainingBatch, training_groups
from captioner.training.objectives import Counts, Moment, Objective, make_objective
from captioner.training.plots import draw_training
from captioner.training.resume import (
    Circumstances,
    Randomness,
    TrainState,
    pack_state,
    randomness_of,
    seed_process,
    unpack_state,
)
from captioner.training.schedule import learning_rate_factor, make_optimizer, set_learning_rates
from captioner.training.step_numbers import StepNumbers, UnreadSteps
from captioner.training.tracking import JsonLog, Meter, Tracker, read_log
from captioner.training.validation import Validation, caption_images


class Trainer:
    """Trains a model; ``with`` closes its log and its W&B run.

    Args:
        config: The experiment.
        output_dir: Folder of the run.
        model: On ``device``.
        device: Where to compute.
        precision: torch.bfloat16 or torch.float32, for matrix products.
        circumstances: Saved with the state, for whoever resumes it.
        saved: What ``load_training_state`` gave, to resume; None to start.
        processes: They train it together; the first one writes.
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
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.config, self.output_dir = config, output_dir
        self.model, self.device, self.precision = model, device, precision
        self.circumstances = circumstances
        self.optimizer = make_optimizer(model, config)
        self.trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        decay = config.training.average_decay
        self.average = make_average(model, decay) if decay else None
        if saved:
            self.state = unpack_state(
                saved, config, self.optimizer, self.average, device, processes
            )
        else:
            self.state = TrainState()
            if processes.count > 1:
                seed_process(config, 0, processes.rank)
        # Each number that is read waits for the device, and on a CPU for nothing.
        self.read_every = 1 if device.type == "cpu" else config.training.log_every
        self._unread = UnreadSteps(processes)
        self._saved_at = time.monotonic()
        path = output_dir / "log.jsonl" if processes.is_first else None
        self.log = JsonLog(path, self.state.log_bytes)
        self.tracker = Tracker(
            config.wandb, config.to_dict(), output_dir, self.state.wandb_id, processes.is_first
        )
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
        objective = make_objective(
            self.model, self.config, self.precision, train_set, self.processes
        )
        log_line(f"objective: {objective.signature}")
        epochs = TrainingBatches(
            encode_captions(train_set, self.model.vocabulary),
            self._choose_batch_size(),
            training.captions_per_image,
            training.seed,
            self.config.data.max_words,
        )
        self.total_steps = -(-len(epochs) // training.accumulation_steps) * training.epochs
        samples = val_set.select(range(min(len(val_set), self.config.wandb.sample_images)))
        with self.processes.together():
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

    def _choose_batch_size(self) -> int:
        """Return how many images all processes have in a batch: as many as when the run began."""
        count, before = self.processes.count, self.state.batch_images
        if before and before != self.config.training.batch_size * count:
            log_line(
                f"batches of {before} images, as when this run began, are divided among {count} "
                f"process{'es' if count > 1 else ''}: up to {-(-before // count)} images each"
            )
        self.state.batch_images = before or self.config.training.batch_size * count
        return self.state.batch_images

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
        left = batches[state.batch :]
        groups = training_groups(
            left, inputs, state.epoch, training.accumulation_steps, self.processes
        )
        self.meter = Meter()
        description = f"epoch {state.epoch + 1}/{training.epochs}"
        with Progress(description, len(batches), "batch", initial=state.batch) as bar:
            while state.batch < len(batches):
                group, counts = self._next_group(groups)
                size = min(training.accumulation_steps, len(batches) - state.batch)
                state.batch += size
                if counts.images:
                    self._optimise(group, objective, counts)
                bar.update(size, f"loss {state.loss / max(1, state.tokens):.3f}")

    def _next_group(
        self, groups: Iterator[list[TrainingBatch]]
    ) -> tuple[list[TrainingBatch], Counts]:
        """Load the batches of a step; learn what all processes have, and what they want to do.

        Raises:
            CaptionerError: Some process couldn't load its part.
            Stopped: Some process has received a signal; ``last`` was written.
        """
        error, group = None, []
        try:
            with self.meter.waiting():
                group = next(groups)
        except Exception as raised:
            error = raised
        own = Counts.of(group)
        stop = self.stop_signals.received or self.processes.parent_signal
        minutes = self.config.training.checkpoint_minutes
        due = minutes and time.monotonic() - self._saved_at >= 60 * minutes
        is_due = bool(due and self.processes.is_first)  # one clock counts
        rows = self.processes.exchange(
            [own.tokens, own.captions, own.images, stop, is_due, error is not None]
        )
        *sums, _, due, failed = (sum(column) for column in zip(*rows, strict=True))
        if failed:
            raise error or ProcessError("")
        if signal := max(row[3] for row in rows):
            self._save("last")
            raise Stopped(signal)
        if due:
            self._save("last")
        return group, Counts(*sums)

    def _optimise(self, group: list[TrainingBatch], objective: Objective, counts: Counts) -> None:
        """Take one optimiser step; ``group`` is this process's part of what all count."""
        training, state = self.config.training, self.state
        factor = learning_rate_factor(state.step, self.total_steps, training)
        rate = set_learning_rates(self.optimizer, factor)
        moment = Moment(state.step, state.step / self.total_steps)
        loss = objective.compute_gradients(group, counts, moment)
        norm = nn.utils.clip_grad_norm_(self.trained, training.gradient_clip or math.inf)
        self._unread.add(state.step + 1, rate, counts.images, loss, norm)
        if (state.step + 1) % self.read_every == 0:
            self._read_losses()
        if training.gradient_clip_value:
            nn.utils.clip_grad_value_(self.trained, training.gradient_clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.model.encoder.training:
            self.processes.average(self.model.encoder.moving_statistics)
        if self.average:
            self.average.update_parameters(self.model)
        state.step += 1
        if state.step % training.log_every == 0:
            self._log_step(self._last_norm, rate)
        if training.gradient_flow_every and state.step % training.gradient_flow_every == 0:
            self._log_gradient_flow(group)
        if training.checkpoint_every and state.step % training.checkpoint_every == 0:
            self._save("last")

    def _read_losses(self) -> None:
        """Add up the losses of the steps since they were last read.

        Raises:
            TrainingError: One isn't finite.
        """
        for step in self._unread.read():
            self._check_finite(step)
            self.state.loss += step.loss * step.tokens
            self.state.tokens += step.tokens
            self.meter.add(step.tokens, step.images, {"loss": step.loss, **step.values})
            self._last_norm = step.norm

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

    def _check_finite(self, step: StepNumbers) -> None:
        if math.isfinite(step.loss) and math.isfinite(step.norm):
            return
        last = self.output_dir / "last"
        hint = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint is there"
        error = TrainingError(
            f"step {step.number}: the loss is {step.loss} and the gradient norm {step.norm} at a "
            f"learning rate of {step.rate:.3g}; {hint}; try a smaller training.learning_rate or "
            "training.gradient_clip, or training.precision=float32"
        )
        raise error if self.processes.is_first else ProcessError("")  # all see the same numbers

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

    def _log_gradient_flow(self, group: list[TrainingBatch]) -> None:
        """Measure on some captions of a batch, without changing anything that training uses."""
        if not (self.processes.is_first and group):
            return
        batch = group[0]
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

    def _validate(self, val_set: CaptionDataset, val_inputs: Inputs) -> Validation:
        """Caption freely and score; whatever ends it early, a resumed run begins it anew."""
        started = time.monotonic()
        self._save("last")
        size = self.config.validation.batch_size
        with (
            self.processes.together(),
            memory_errors(
                lambda: (
                    f"in validation on {self.device} with validation.batch_size={size}; --resume "
                    "goes on here with a smaller one"
                )
            ),
        ):
            captions = self.caption(val_set, val_inputs)
        parts = self.processes.gather(captions)
        validation = None
        with self.processes.together():
            if self.processes.is_first:
                captions = {image: text for part in parts for image, text in part.items()}
                validation = Validation.of(captions, val_set, started)
        return cast(Validation, self.processes.first_says(validation))

    def caption(self, dataset: CaptionDataset, inputs: Inputs) -> dict[ImageId, str]:
        """Caption this process's part of some images: see ``caption_images``."""
        return caption_images(
            self.evaluated_model,
            dataset,
            inputs,
            self.config.validation.batch_size,
            self.precision,
            self.processes,
            self.stop_signals,
        )

    def _keep_initial_scores(self, validation: Validation) -> None:
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

    def _finish_epoch(self, validation: Validation) -> None:
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
        if self.processes.is_first:
            draw_training(self.output_dir)
        measured = validation.values("validation/")
        self.tracker.log(state.step, {"epoch": state.epoch, "train/epoch_loss": loss, **measured})
        log_line(
            f"epoch {state.epoch}: loss {loss:.3f}, validation {metric} {scores[metric]:.4f}"
            f"{' (best so far)' if is_best else ''}"
        )

    def _finish_run(self) -> None:
        """Draw the gradient flow where it was measured, and keep the best checkpoint in W&B."""
        with self.processes.together():
            if self.processes.is_first:
                self._draw_and_keep()

    def _draw_and_keep(self) -> None:
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
        self._read_losses()  # no checkpoint holds what came of a loss that isn't finite
        randomness = self.processes.gather(randomness_of(self.device)) if name == "last" else []
        with self.processes.together():
            if self.processes.is_first:
                self._write(name, captions, randomness)
        self._saved_at = time.monotonic()

    def _write(
        self, name: str, captions: dict[ImageId, str] | None, randomness: list[Randomness]
    ) -> None:
        self.state.log_bytes = self.log.size
        scores: dict[str, float] = {"epoch": self.state.epoch, "step": self.state.step}
        directory = self.output_dir / name
        if name == "best":
            scores |= self.state.best_scores
            write_checkpoint(directory, self.evaluated_model, scores, captions)
            return
        packed = pack_state(
            self.state, self.circumstances, self.config, self.optimizer, self.average, randomness
        )
        write_checkpoint(directory, self.model, scores, captions, packed)
        keep_last(directory, self.state.step, self.config.training.keep_last)
