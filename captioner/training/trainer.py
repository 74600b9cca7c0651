"""The training loop: batches, optimiser steps, validation, checkpoints."""

import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captioner.config import Config
from captioner.data.annotations import ImageId
from captioner.data.dataset import Batch, CaptionDataset, TrainingBatches, encode_captions
from captioner.data.image_files import load_thumbnail
from captioner.data.images import in_batches
from captioner.data.predictions import write_predictions
from captioner.data.vocabulary import PAD
from captioner.device import autocast
from captioner.errors import TrainingError, UsageError
from captioner.files import atomic_directory
from captioner.metrics.scores import compute_metrics
from captioner.models.captioning_model import CaptioningModel, generate
from captioner.models.checkpoint import save_checkpoint
from captioner.models.inference_decoder import InferenceDecoder
from captioner.progress import Progress, log_line
from captioner.training.gradient_flow import (
    LOG_KIND,
    equally_long_captions,
    measure_gradient_flow,
    plot_gradient_flow,
)
from captioner.training.inputs import Inputs
from captioner.training.losses import caption_loss
from captioner.training.resume import (
    STATE_FILE,
    Circumstances,
    TrainState,
    pack_state,
    unpack_state,
)
from captioner.training.schedule import learning_rate_factor, make_optimizer, set_learning_rates
from captioner.training.stopping import StopSignals, memory_errors
from captioner.training.tracking import JsonLog, Tracker, read_log

PREDICTIONS_FILE = "val_predictions.json"
VALIDATION_METRICS = ("BLEU", "ROUGE-L", "CIDEr-D")


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
        self.state = unpack_state(saved, self.optimizer, device) if saved else TrainState()
        self.log = JsonLog(output_dir / "log.jsonl", self.state.log_bytes)
        self.tracker = Tracker(config.wandb, config.to_dict(), output_dir, self.state.wandb_id)
        self.state.wandb_id = self.tracker.run_id
        self.meter = Meter()

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
            TrainingStopped: ``stop_signals`` has received one; ``last`` was written.
        """
        training, self.stop_signals = self.config.training, stop_signals
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
            self._keep_initial_scores(*self._validate(val_set, val_inputs))
        while self.state.epoch < training.epochs and not self._out_of_patience():
            with memory_errors(self._memory_advice):
                self._train_epoch(epochs.epoch(self.state.epoch), train_inputs)
            scores, captions, seconds = self._validate(val_set, val_inputs)
            self._finish_epoch(scores, captions, seconds)
            self.tracker.log_samples(
                self.state.step,
                self.state.epoch,
                thumbnails,
                [captions[image_id] for image_id in samples.image_ids],
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

    def _train_epoch(self, batches: list[Batch], inputs: Inputs) -> None:
        """Train on the batches of an epoch from ``state.batch`` on."""
        training, state = self.config.training, self.state
        remaining = batches[state.batch :]
        loaded = inputs.batches([batch.images for batch in remaining], state.epoch)
        group: list[tuple[Tensor, Tensor]] = []
        self.meter = Meter()
        description = f"epoch {state.epoch + 1}/{training.epochs}"
        with Progress(description, len(batches), "batch", initial=state.batch) as bar:
            pairs = zip(remaining, loaded, strict=True)
            for number, (batch, (images, x)) in enumerate(pairs, 1):
                if images:
                    group.append((x, _token_ids_of(batch, images)))
                state.batch += 1
                is_full = number % training.accumulation_steps == 0 or number == len(remaining)
                if group and is_full:
                    self._optimise(group)
                    group = []
                    self._stop_if_asked()
                bar.update(1, f"loss {state.loss / max(1, state.tokens):.3f}")

    def _optimise(self, group: list[tuple[Tensor, Tensor]]) -> None:
        """Take one optimiser step on some batches of inputs and token ids (B, K, T + 1)."""
        training, state = self.config.training, self.state
        factor = learning_rate_factor(state.step, self.total_steps, training)
        rate = set_learning_rates(self.optimizer, factor)
        total, tokens = self._compute_gradients(group)
        norms = nn.utils.clip_grad_norm_(self.trained, training.gradient_clip or math.inf)
        loss, norm = torch.stack([total, norms]).tolist()  # waits for the device, once a step
        self._check_finite(loss, norm, rate)
        if training.gradient_clip_value:
            nn.utils.clip_grad_value_(self.trained, training.gradient_clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.loss += loss * tokens
        state.tokens += tokens
        self.meter.add(loss, tokens, sum(len(x) for x, _ in group))
        if state.step % training.log_every == 0:
            self._log_step(norm, rate)
        if training.gradient_flow_every and state.step % training.gradient_flow_every == 0:
            self._log_gradient_flow(*group[0])
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

    def _compute_gradients(self, group: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
        """Add up the gradients of some batches; return the loss a token, and the tokens."""
        training = self.config.training
        real = [token_ids[..., 1:] != PAD for _, token_ids in group]
        tokens = sum(int(mask.sum()) for mask in real)
        captions = sum(int(mask.any(-1).sum()) for mask in real)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for x, token_ids in group:
            with autocast(self.device, self.precision):
                output = self.model.decoder.teacher_forcing(
                    self._features(x),
                    token_ids,
                    training.bptt_window,
                )
                loss = caption_loss(
                    output,
                    training.label_smoothing,
                    self.config.decoder.attention_regularisation,
                    tokens,
                    captions,
                )
            loss.backward()
            total += loss.detach()
        return total, tokens

    def _features(self, x: Tensor) -> Tensor:
        """Return features (B, N, D) for cached features or for pixels (B, 3, S, S)."""
        x = x.to(self.device, non_blocking=True)
        if x.dim() == 4:
            return self.model.encoder(x)
        return x.float() if self.precision == torch.float32 else x.to(self.precision)

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
            "loss": self.meter.loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            **self.meter.rates(),
        }
        self.log.write(kind="step", step=self.state.step, epoch=self.state.epoch + 1, **values)
        self.tracker.log(self.state.step, {f"train/{name}": v for name, v in values.items()})
        self.state.seconds += self.meter.seconds
        self.meter = Meter()

    def _log_gradient_flow(self, x: Tensor, token_ids: Tensor) -> None:
        """Measure on some captions of a batch, without changing anything that training uses."""
        images, captions = equally_long_captions(token_ids)
        self.model.eval()
        with torch.no_grad():
            features = self._features(x[images]).float()
        flow = measure_gradient_flow(
            self.model.decoder,
            features,
            captions,
            self.config.training.bptt_window,
        )
        self.log.write(kind=LOG_KIND, step=self.state.step, epoch=self.state.epoch + 1, **flow)
        self.tracker.log(
            self.state.step,
            {
                f"gradient_flow/{name}/layer{number}/back{back}": layer[back]
                for name, layers in flow.items()
                for number, layer in enumerate(layers)
                for back in (0, 1, 2, 4, 8, 16)
                if back < len(layer)
            },
        )

    def _validate(
        self, val_set: CaptionDataset, val_inputs: Inputs
    ) -> tuple[dict[str, float], dict[ImageId, str], float]:
        """Return the scores of freely decoded captions, these captions, and the seconds it took.

        Whatever ends it early, a resumed run begins it anew.
        """
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
        return scores, captions, time.monotonic() - started

    def caption(self, dataset: CaptionDataset, inputs: Inputs) -> dict[ImageId, str]:
        """Caption images by free-running search; one that can't be read any more gets ""."""
        batches = in_batches(len(dataset), self.config.validation.batch_size)
        captions: dict[ImageId, str] = dict.fromkeys(dataset.image_ids, "")
        decoder = InferenceDecoder(self.model.decoder, self.precision)
        with Progress("validation", len(dataset), "image") as bar:
            for indices, x in inputs.batches(batches):
                if indices:
                    self.model.eval()
                    with torch.inference_mode(), autocast(self.device, self.precision):
                        features = self._features(x)
                    hypotheses = generate(
                        [decoder], [features], self.model.search, self.model.vocabulary
                    )
                    best = self.model.best_captions(hypotheses)
                    captions |= zip((dataset.image_ids[i] for i in indices), best, strict=True)
                bar.update(len(indices))
                self.stop_signals.raise_if_received()
        return captions

    def _keep_initial_scores(
        self, scores: dict[str, float], captions: dict[ImageId, str], seconds: float
    ) -> None:
        """Keep the checkpoint that a run begins with as its best so far."""
        state, metric = self.state, self.config.validation.metric
        state.best_scores = scores
        self.log.write(kind="start", step=0, epoch=0, validation_seconds=seconds, **scores)
        self._save("best", captions)
        self._save("last", captions)
        self.tracker.log(0, {f"validation/{name}": score for name, score in scores.items()})
        log_line(
            f"{self.config.training.init_from} to begin with: validation {metric} "
            f"{scores[metric]:.4f}"
        )

    def _finish_epoch(
        self, scores: dict[str, float], captions: dict[ImageId, str], seconds: float
    ) -> None:
        """Log an epoch, keep its checkpoint, and the best one."""
        state, metric = self.state, self.config.validation.metric
        train_seconds = state.seconds + self.meter.seconds - seconds
        is_best = not state.best_scores or scores[metric] > state.best_scores[metric]
        loss = state.loss / max(1, state.tokens)
        state.epoch += 1
        state.batch, state.loss, state.tokens, state.seconds = 0, 0.0, 0, 0.0
        values = {"loss": loss, "train_seconds": train_seconds, "validation_seconds": seconds}
        # Before the checkpoint, which says how long the log is: a process that is killed in
        # between takes the epoch's end again, and writes this line again.
        self.log.write(kind="epoch", step=state.step, epoch=state.epoch, **values, **scores)
        if is_best:
            state.best_epoch, state.best_scores = state.epoch, scores
            self._save("best", captions)
        self._save("last", captions)
        self.tracker.log(
            state.step,
            {
                "epoch": state.epoch,
                "train/epoch_loss": loss,
                **{f"validation/{name}": score for name, score in scores.items()},
            },
        )
        log_line(
            f"epoch {state.epoch}: loss {loss:.3f}, validation {metric} {scores[metric]:.4f}"
            f"{' (best so far)' if is_best else ''}"
        )

    def _finish_run(self) -> None:
        """Draw the gradient flow where it was measured, and keep the best checkpoint in W&B."""
        measurements = [
            line for line in read_log(self.output_dir / "log.jsonl") if line["kind"] == LOG_KIND
        ]
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
                    self.state, self.circumstances, self.config, self.optimizer, self.device
                )
                torch.save(packed, aside / STATE_FILE)
            save_checkpoint(self.model, aside, scores)  # last: its checksums are of all files


class Meter:
    """Mean loss and rates since the last log line."""

    def __init__(self) -> None:
        self._since, self._tokens, self._images = time.monotonic(), 0, 0
        self._losses: list[float] = []

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._since

    def add(self, loss: float, tokens: int, images: int) -> None:
        """Count an optimiser step."""
        self._losses.append(loss)
        self._tokens += tokens
        self._images += images

    @property
    def loss(self) -> float:
        """Mean over the steps."""
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    def rates(self) -> dict[str, float]:
        """Return tokens and images a second."""
        return {
            "tokens_per_second": self._tokens / self.seconds,
            "images_per_second": self._images / self.seconds,
        }


def _token_ids_of(batch: Batch, images: Sequence[int]) -> Tensor:
    """Return the token ids of those of a batch's images that could be read."""
    if list(images) == batch.images:
        return batch.token_ids
    readable = set(images)
    return batch.token_ids[[image in readable for image in batch.images]]
