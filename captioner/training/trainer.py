"""Training, from an experiment's config to a checkpoint; read it downwards from ``train``.

A run's folder:

    best/, last/       checkpoints; ``last`` also holds what resuming needs
    log.jsonl          a line per log step, per epoch and per measurement of gradient flow
    run.json           config, package versions, git commit, hardware, command
    split.json         image ids of train and val
    wandb/             what Weights & Biases keeps
"""

import dataclasses
import importlib.metadata
import json
import math
import pickle
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from captioner.config import Config, TrainingConfig, parse
from captioner.data.annotations import ImageId
from captioner.data.dataset import (
    Batch,
    CaptionDataset,
    TrainingBatches,
    encode_captions,
    refuse_overlap,
)
from captioner.data.images import Preprocessing, in_batches, load_image, load_pixels
from captioner.data.predictions import write_results
from captioner.data.vocabulary import PAD, Vocabulary
from captioner.device import (
    autocast,
    choose_device,
    choose_precision,
    keep_freed_memory,
)
from captioner.errors import CheckpointError, ConfigError, TrainingError, UsageError
from captioner.files import atomic_directory, recover_directory, write_json
from captioner.metrics.report import write_flow_plot
from captioner.metrics.scores import compute_metrics
from captioner.models.captioning_model import CaptionModel, decode, load_checkpoint, save_checkpoint
from captioner.models.decoder import TeacherForced
from captioner.models.encoder import make_encoder
from captioner.progress import Progress, log_line
from captioner.training.feature_cache import (
    Features,
    cached_features,
    default_cache_dir,
    report_failures,
)
from captioner.training.tracking import JsonLog, Tracker, read_log

STATE = "training_state.pt"
FLOW = "gradient_flow"  # the kind of its lines in log.jsonl
VALIDATION_METRICS = ("BLEU", "ROUGE-L", "CIDEr-D")
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "nltk", "wandb", "pycocotools")

# Settings that may differ when a run is resumed: they don't change what is computed.
FREE_TO_CHANGE = {
    "data.root",
    "data.workers",
    "data.cache_dir",
    "training.device",
    "training.log_every",
    "training.gradient_flow_every",
    "training.checkpoint_every",
    "training.patience",
}


def train(config: Config, output_dir: str | Path, resume: bool = False) -> dict[str, float]:
    """Train a captioner.

    Args:
        config: The experiment.
        output_dir: Folder of the run.
        resume: Continue the run in ``output_dir``, from its last checkpoint; the result is that
            of a run that was never interrupted.

    Returns:
        The validation scores of the best checkpoint.

    Raises:
        CaptionerError: Anything that a user can mend; most before training starts.
    """
    output_dir = Path(output_dir)
    state = _load_state(output_dir, config, resume)
    keep_freed_memory()
    device = choose_device(config.training.device)
    precision = choose_precision(config.training.precision, device)
    torch.manual_seed(config.training.seed)

    train_set, val_set = _load_splits(config)
    model = _make_model(config, train_set, output_dir if state else None).to(device)
    train_set, train_inputs = _prepare_inputs(model, train_set, config, device, precision)
    val_set, val_inputs = _prepare_inputs(model, val_set, config, device, precision)
    _save_run(config, output_dir, device, precision, train_set, val_set)

    trainer = _Trainer(config, output_dir, model, device, precision, state)
    failed = True
    try:
        scores = trainer.fit(train_set, train_inputs, val_set, val_inputs)
        failed = False
    finally:
        trainer.close(failed)
    return scores


# --- before training --------------------------------------------------------------------------


def _load_splits(config: Config) -> tuple[CaptionDataset, CaptionDataset]:
    data = config.data
    train_set, val_set = (
        CaptionDataset.load(
            data.path(f"{split}_annotations"),
            data.path(f"{split}_images"),
            data.split(f"{split}_split"),
            data.bad_images,
        )
        for split in ("train", "val")
    )
    refuse_overlap(train_set, val_set)
    if config.validation.max_images:
        val_set = val_set.select(range(min(len(val_set), config.validation.max_images)))
    return train_set, val_set


def _load_state(output_dir: Path, config: Config, resume: bool) -> dict[str, Any] | None:
    """Read what a run needs to be resumed; None if it starts from the beginning.

    Raises:
        ConfigError: A run is there, but it is not to be resumed.
        CheckpointError: The state can't be read, or is that of another experiment.
    """
    for name in ("last", "best"):
        recover_directory(output_dir / name)
        for half_written in output_dir.glob(f".{name}.*.tmp"):  # by a process that was killed
            shutil.rmtree(half_written, ignore_errors=True)
    path = output_dir / "last" / STATE
    if not resume and ((output_dir / "last").exists() or (output_dir / "best").exists()):
        raise ConfigError(
            f"{output_dir}: a run is there already; --resume continues it, another --output-dir "
            "starts a new one"
        )
    if not resume:
        return None
    if not path.exists():
        log_line(f"nothing to resume in {output_dir}: starting from the beginning")
        return None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        # Settings that are newer than the run take their defaults.
        saved = parse(Config, json.loads(state["config"]), str(path)).to_dict()
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({str(error).splitlines()[0]})") from None
    _refuse_changes(saved, config.to_dict(), output_dir)
    return state


def _refuse_changes(saved: dict[str, Any], given: dict[str, Any], output_dir: Path) -> None:
    for section in given:
        for key, value in given[section].items():
            name, before = f"{section}.{key}", saved.get(section, {}).get(key)
            if value != before and section != "wandb" and name not in FREE_TO_CHANGE:
                raise CheckpointError(
                    f"{output_dir}: this run was started with {name} = {before!r}, and can't be "
                    f"resumed with {value!r}"
                )


def _make_model(config: Config, train_set: CaptionDataset, resumed: Path | None) -> CaptionModel:
    captions = [caption for per_image in train_set.captions for caption in per_image]
    vocabulary = Vocabulary.from_captions(captions, config.data.min_word_count)
    if resumed:
        model = load_checkpoint(resumed / "last")
        if model.vocabulary.words != vocabulary.words:
            raise CheckpointError(
                f"{resumed}/last: its vocabulary isn't that of {train_set.name}; the training "
                "captions have changed since, so this run can't be resumed"
            )
    else:
        cnn = config.encoder
        encoder = make_encoder(cnn.name, cnn.weights, config.preprocessing, cnn.last_stage)
        model = CaptionModel(encoder, config.decoder, vocabulary, config.search)
    model.encoder.fine_tune_from(config.encoder.fine_tune_from)
    log_line(
        f"{len(train_set)} training images, {len(captions)} captions, {len(vocabulary)} words; "
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,} parameters to train"
    )
    return model


@dataclass(frozen=True)
class _CachedInputs:
    """Batches of cached features, (B, N, D), float16."""

    features: Features

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        for indices in batches:
            yield list(indices), self.features.take(indices)


@dataclass(frozen=True)
class _PixelInputs:
    """Batches of pixels, (B, 3, S, S), uint8, for a CNN that is being trained."""

    paths: list[Path]
    preprocessing: Preprocessing
    workers: int
    device: torch.device

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], Tensor]]:
        loaded = load_pixels(self.paths, self.preprocessing, batches, self.device, self.workers)
        for batch in loaded:
            # They could be read before training: a disk that fails now must not end the job.
            for _, message in batch.failures:
                log_line(f"warning: {message}; left out of this batch")
            yield batch.indices, batch.pixels


_Inputs = _CachedInputs | _PixelInputs


def _prepare_inputs(
    model: CaptionModel,
    dataset: CaptionDataset,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[CaptionDataset, _Inputs]:
    """Encode all images once if the CNN is frozen, else see that they can all be read."""
    data = config.data
    if model.encoder.frozen:
        features = cached_features(
            model.encoder,
            dataset.paths,
            data.cache_dir or default_cache_dir(),
            device,
            precision,
            model.decoder.pooled,
            data.workers,
            data.bad_images,
        )
        good = [i for i, row in enumerate(features.rows) if row >= 0]
        inputs: _Inputs = _CachedInputs(Features(features.store, features.rows[good]))
        return dataset.select(good), inputs
    preprocessing = model.encoder.preprocessing
    batches = in_batches(len(dataset), 32)
    failures = []
    with Progress("checking images", len(dataset), "image") as bar:
        for batch in load_pixels(dataset.paths, preprocessing, batches, device, data.workers):
            failures += batch.failures
            bar.update(len(batch.indices) + len(batch.failures))
    report_failures(failures, len(dataset), data.bad_images)
    bad = {index for index, _ in failures}
    dataset = dataset.select([i for i in range(len(dataset)) if i not in bad])
    return dataset, _PixelInputs(dataset.paths, preprocessing, data.workers, device)


def _save_run(
    config: Config,
    output_dir: Path,
    device: torch.device,
    precision: torch.dtype,
    train_set: CaptionDataset,
    val_set: CaptionDataset,
) -> None:
    """Save what is needed to reproduce the run; a resumed run keeps a record of each session."""
    path = output_dir / "run.json"
    sessions = json.loads(path.read_text(encoding="utf-8"))["sessions"] if path.exists() else []
    sessions.append(
        {
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": sys.argv,
            "git": git_state(),
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."),
            "python": platform.python_version(),
            "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        }
    )
    write_json(path, {"config": config.to_dict(), "sessions": sessions})
    write_json(
        output_dir / "split.json",
        {"train": train_set.image_ids, "val": val_set.image_ids},
        indent=None,
    )


def git_state() -> dict[str, Any] | None:
    """Return commit and uncommitted changes of the code, or None outside a git checkout."""
    here = Path(__file__).parent
    try:
        commit, status = (
            subprocess.run(
                ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
            ).stdout.rstrip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "changed_files": status.splitlines()}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


# --- the loss ---------------------------------------------------------------------------------


def caption_loss(
    said: TeacherForced, smoothing: float, regularisation: float, tokens: int, captions: int
) -> Tensor:
    """Return cross-entropy plus the doubly stochastic term, as a batch's part of a step.

    Divided by the tokens and captions of the whole optimiser step, the losses of accumulated
    batches add up to that of one large batch.

    Args:
        said: What the decoder said under teacher forcing.
        smoothing: Label smoothing.
        regularisation: Weight of the doubly stochastic term (Xu et al. 2015, eq. 14), here a mean
            over the regions: each should get about as much attention as any other over a caption.
        tokens: True tokens in the optimiser step.
        captions: Captions in the optimiser step.
    """
    loss = nn.functional.cross_entropy(
        said.logits.float(), said.targets, label_smoothing=smoothing, reduction="sum"
    )
    loss = loss / tokens
    if said.attention is not None and regularisation:
        uneven = (1 - said.attention).square().mean(1).sum() / captions
        loss = loss + regularisation * uneven
    return loss


def learning_rate_factor(step: int, total: int, config: TrainingConfig) -> float:
    """Return by how much the peak learning rate is multiplied at an optimiser step, from 0."""
    warmup = min(config.warmup_steps, total)
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if config.schedule == "linear" else 1.0


# --- the loop ---------------------------------------------------------------------------------


@dataclass
class _Position:
    """How far a run is: what a resumed run starts from, besides weights and optimiser."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best_epoch: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    wandb_id: str | None = None
    loss: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class _Trainer:
    def __init__(
        self,
        config: Config,
        output_dir: Path,
        model: CaptionModel,
        device: torch.device,
        precision: torch.dtype,
        state: dict[str, Any] | None,
    ) -> None:
        self.config, self.output_dir = config, output_dir
        self.model, self.device, self.precision = model, device, precision
        self.optimizer = _make_optimizer(model, config)
        self.at = _Position()
        if state:
            self._restore(state)
        self.log = JsonLog(output_dir / "log.jsonl", self.at.step)
        self.tracker = Tracker(config.wandb, config.to_dict(), output_dir, self.at.wandb_id)
        self.at.wandb_id = self.tracker.run_id

    def fit(
        self,
        train_set: CaptionDataset,
        train_inputs: _Inputs,
        val_set: CaptionDataset,
        val_inputs: _Inputs,
    ) -> dict[str, float]:
        training = self.config.training
        plan = TrainingBatches(
            encode_captions(train_set, self.model.vocabulary),
            training.batch_size,
            training.captions_per_image,
            training.seed,
            self.config.data.max_words,
        )
        steps_in_epoch = -(-len(plan) // training.accumulation_steps)
        self.total_steps = steps_in_epoch * training.epochs
        samples = [_thumbnail(path) for path in val_set.paths[: self.config.wandb.sample_images]]
        while self.at.epoch < training.epochs and not self._out_of_patience():
            self._train_epoch(plan.epoch(self.at.epoch), train_inputs)
            started = time.monotonic()
            captions = self._caption(val_set, val_inputs)
            scores = compute_metrics(captions, val_set.references, VALIDATION_METRICS)
            self._finish_epoch(scores, captions, time.monotonic() - started)
            shown = list(captions.values())[: len(samples)]
            self.tracker.log_samples(
                self.at.step, self.at.epoch, samples, shown, val_set.captions[: len(samples)]
            )
        self._plot_gradient_flow()
        if self.config.wandb.log_checkpoint:
            self.tracker.keep_checkpoint(
                self.output_dir / "best", ["best", f"epoch-{self.at.best_epoch}"]
            )
        return self.at.best_scores

    def _out_of_patience(self) -> bool:
        patience = self.config.training.patience
        stale = self.at.epoch - self.at.best_epoch
        if patience and stale >= patience:
            log_line(f"no better score for {stale} epochs (training.patience): stopping")
            return True
        return False

    def _train_epoch(self, batches: list[Batch], inputs: _Inputs) -> None:
        """Train on the batches of an epoch from ``at.batch`` on."""
        training = self.config.training
        left = batches[self.at.batch :]
        loaded = inputs.batches([batch.images for batch in left])
        group: list[tuple[Tensor, Tensor]] = []
        description = f"epoch {self.at.epoch + 1}/{training.epochs}"
        self._meter = _Meter()
        with Progress(description, len(batches), "batch", initial=self.at.batch) as bar:
            for number, (batch, (images, x)) in enumerate(zip(left, loaded, strict=True), 1):
                if images:
                    group.append((x, _rows_of(batch, images)))
                self.at.batch += 1
                if group and (number % training.accumulation_steps == 0 or number == len(left)):
                    self._optimise(group)
                    group = []
                bar.update(1, f"loss {self.at.loss / max(1, self.at.tokens):.3f}")

    def _optimise(self, group: list[tuple[Tensor, Tensor]]) -> None:
        """Take one optimiser step on some batches of inputs and token ids (B, K, T + 1)."""
        training, decoder = self.config.training, self.config.decoder
        rate = self._set_learning_rate()
        targets = [token_ids[..., 1:] != PAD for _, token_ids in group]
        tokens = sum(int(real.sum()) for real in targets)
        captions = sum(int(real.any(-1).sum()) for real in targets)
        self.model.train()
        total = torch.zeros((), device=self.device)
        for x, token_ids in group:
            with autocast(self.device, self.precision):
                said = self.model.decoder.teacher_forcing(
                    self._features(x),
                    token_ids.to(self.device, non_blocking=True),
                    training.bptt_window,
                )
                loss = caption_loss(
                    said,
                    training.label_smoothing,
                    decoder.attention_regularisation,
                    tokens,
                    captions,
                )
            loss.backward()
            total += loss.detach()
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trained, training.gradient_clip or math.inf)
        self._refuse_non_finite(float(total), float(norm), rate)
        if training.gradient_clip_value:
            nn.utils.clip_grad_value_(trained, training.gradient_clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.at.step += 1
        self._meter.add(float(total), tokens, sum(len(x) for x, _ in group))
        self.at.loss += float(total) * tokens
        self.at.tokens += tokens
        if self.at.step % training.log_every == 0:
            self._log_step(float(norm), rate)
        if training.gradient_flow_every and self.at.step % training.gradient_flow_every == 0:
            self._log_gradient_flow(*group[0])
        if training.checkpoint_every and self.at.step % training.checkpoint_every == 0:
            self._save("last")

    def _features(self, x: Tensor) -> Tensor:
        """Return features (B, N, D) for cached features or for pixels (B, 3, S, S)."""
        x = x.to(self.device, non_blocking=True)
        if x.dim() == 4:
            return self.model.encoder(x)
        return x.float() if self.precision == torch.float32 else x.to(self.precision)

    def _set_learning_rate(self) -> float:
        factor = learning_rate_factor(self.at.step, self.total_steps, self.config.training)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        return self.optimizer.param_groups[0]["lr"]

    def _refuse_non_finite(self, loss: float, norm: float, rate: float) -> None:
        if math.isfinite(loss) and math.isfinite(norm):
            return
        last = self.output_dir / "last"
        good = f"the last good checkpoint is {last}" if last.exists() else "no checkpoint is there"
        raise TrainingError(
            f"step {self.at.step + 1}: the loss is {loss} and the gradient norm {norm} at a "
            f"learning rate of {rate:.3g}; {good}; try a smaller training.learning_rate or "
            "training.gradient_clip, or training.precision=float32"
        )

    def _log_step(self, norm: float, rate: float) -> None:
        values = {
            "loss": self._meter.loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            **self._meter.rates(),
        }
        self.log.write(kind="step", step=self.at.step, epoch=self.at.epoch + 1, **values)
        self.tracker.log(self.at.step, {f"train/{name}": v for name, v in values.items()})
        self.at.seconds += self._meter.seconds
        self._meter = _Meter()

    def _log_gradient_flow(self, x: Tensor, token_ids: Tensor) -> None:
        """Measure on some captions of a batch, without changing anything that training uses."""
        images, captions = _equally_long(token_ids)
        self.model.eval()
        with torch.no_grad():
            features = self._features(x[images]).float()
        flow = self.model.decoder.gradient_flow(
            features, captions.to(self.device), self.config.training.bptt_window
        )
        self.log.write(kind=FLOW, step=self.at.step, epoch=self.at.epoch + 1, **flow)
        self.tracker.log(
            self.at.step,
            {
                f"gradient_flow/{name}/layer{number}/back{back}": layer[back]
                for name, layers in flow.items()
                for number, layer in enumerate(layers)
                for back in (0, 1, 2, 4, 8, 16)
                if back < len(layer)
            },
        )

    def _plot_gradient_flow(self) -> None:
        measured = [row for row in read_log(self.output_dir / "log.jsonl") if row["kind"] == FLOW]
        if not measured:
            return
        path = self.output_dir / "gradient_flow.png"
        try:
            write_flow_plot(path, measured)
        except UsageError as error:
            log_line(f"warning: {path} isn't drawn: {error}")
        else:
            self.tracker.log_images(self.at.step, {"gradient_flow": path})

    def _caption(self, dataset: CaptionDataset, inputs: _Inputs) -> dict[ImageId, str]:
        """Caption validation images by free-running search."""
        batches = in_batches(len(dataset), self.config.validation.batch_size)
        captions: dict[ImageId, str] = dict.fromkeys(dataset.image_ids, "")
        decoder = self.model.decoder.for_search(self.precision)
        vocabulary, settings = self.model.vocabulary, self.model.search
        with Progress("validation", len(dataset), "image") as bar:
            for indices, x in inputs.batches(batches):
                if indices:
                    with torch.inference_mode(), autocast(self.device, self.precision):
                        self.model.eval()
                        features = self._features(x)
                    found = decode([decoder], [features], settings, vocabulary)
                    for i, caption in zip(indices, self.model.words(found), strict=True):
                        captions[dataset.image_ids[i]] = caption
                bar.update(len(indices))
        return captions

    def _finish_epoch(
        self, scores: dict[str, float], captions: dict[ImageId, str], seconds: float
    ) -> None:
        """Log an epoch, keep its checkpoint, and the best one."""
        train_seconds = self.at.seconds + self._meter.seconds - seconds
        metric = self.config.validation.metric
        better = not self.at.best_scores or scores[metric] > self.at.best_scores[metric]
        loss = self.at.loss / max(1, self.at.tokens)
        values = {"loss": loss, "train_seconds": train_seconds, "validation_seconds": seconds}
        self.at.epoch += 1
        self.at.batch, self.at.loss, self.at.tokens, self.at.seconds = 0, 0.0, 0, 0.0
        if better:
            self.at.best_epoch, self.at.best_scores = self.at.epoch, scores
            self._save("best", captions)
        self._save("last", captions)
        self.log.write(kind="epoch", step=self.at.step, epoch=self.at.epoch, **values, **scores)
        self.tracker.log(
            self.at.step,
            {
                "epoch": self.at.epoch,
                "train/epoch_loss": loss,
                **{f"validation/{name}": score for name, score in scores.items()},
            },
        )
        log_line(
            f"epoch {self.at.epoch}: loss {loss:.3f}, validation {metric} {scores[metric]:.4f}"
            f"{' (best so far)' if better else ''}"
        )

    def _save(self, name: str, captions: dict[ImageId, str] | None = None) -> None:
        """Write ``best`` or ``last``; ``last`` with what resuming needs."""
        scores: dict[str, float] = {"epoch": self.at.epoch, "step": self.at.step}
        if name == "best":
            scores |= self.at.best_scores
        with atomic_directory(self.output_dir / name) as aside:
            save_checkpoint(self.model, aside, scores)
            if captions is not None:
                rows = [{"image_id": i, "caption": text} for i, text in captions.items()]
                write_results(aside / "val_predictions.json", rows)
            if name == "last":
                torch.save(self._state(), aside / STATE)

    def _state(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        return {
            "config": json.dumps(self.config.to_dict()),
            "position": dataclasses.asdict(self.at),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": cuda,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.at = _Position(**state["position"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and len(state["rng_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        log_line(f"resuming after step {self.at.step}, in epoch {self.at.epoch + 1}")

    def close(self, failed: bool) -> None:
        self.log.close()
        self.tracker.finish(failed)


class _Meter:
    """Mean loss and rates since the last log line."""

    def __init__(self) -> None:
        self._since, self._tokens, self._images = time.monotonic(), 0, 0
        self._losses: list[float] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._since

    def add(self, loss: float, tokens: int, images: int) -> None:
        self._losses.append(loss)
        self._tokens += tokens
        self._images += images

    @property
    def loss(self) -> float:
        return sum(self._losses) / len(self._losses) if self._losses else math.nan

    def rates(self) -> dict[str, float]:
        return {
            "tokens_per_second": self._tokens / self.seconds,
            "images_per_second": self._images / self.seconds,
        }


def _rows_of(batch: Batch, images: Sequence[int]) -> Tensor:
    """Return the token ids of those of a batch's images that could be read."""
    if list(images) == batch.images:
        return batch.token_ids
    kept = set(images)
    return batch.token_ids[[image in kept for image in batch.images]]


def _equally_long(token_ids: Tensor, at_most: int = 16) -> tuple[Tensor, Tensor]:
    """Choose captions of the commonest length out of a batch.

    Args:
        token_ids: (B, K, T + 1).
        at_most: How many.

    Returns:
        The image in the batch and the token ids of each: (rows,), (rows, T' + 1).
    """
    lengths = (token_ids != PAD).sum(-1)
    commonest = int(lengths[lengths > 0].mode().values)
    images, slots = (lengths == commonest).nonzero()[:at_most].unbind(1)
    return images, token_ids[images, slots, :commonest]


def _thumbnail(path: Path) -> Image.Image:
    image = load_image(path)
    image.thumbnail((256, 256))
    return image


def _make_optimizer(model: CaptionModel, config: Config) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices alone, the CNN's trained stages at their own rate."""
    groups = []
    for part, rate in (
        (model.decoder, config.training.learning_rate),
        (model.encoder, config.encoder.learning_rate),
    ):
        trained = [p for p in part.parameters() if p.requires_grad]
        for decayed in (True, False):
            groups.append(
                {
                    "params": [p for p in trained if (p.dim() > 1) == decayed],
                    "weight_decay": config.training.weight_decay if decayed else 0.0,
                    "peak": rate,
                }
            )
    fused = model.device.type in ("cpu", "cuda")  # one pass over the weights, not one an operation
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, fused=fused)
