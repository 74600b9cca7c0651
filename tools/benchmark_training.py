"""The parts of ``benchmark.py`` that look at training; run that one."""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmark_search import TIMES, Products, seconds_of, synchronise
from torch import Tensor, nn

from captioner.config import (
    AugmentationConfig,
    Config,
    DataConfig,
    DecoderConfig,
    EncoderConfig,
    TrainingConfig,
)
from captioner.data.dataset import CaptionDataset, TrainingBatches, encode_captions
from captioner.data.images import in_batches, load_pixels
from captioner.data.vocabulary import PAD
from captioner.device import autocast
from captioner.errors import ConfigError
from captioner.inference.captioner import Captioner
from captioner.metrics.reward import CaptionReward
from captioner.models.captioning_model import DECODERS, CaptioningModel, make_decoder
from captioner.models.compiled_steps import CompiledSteps
from captioner.models.decoder import Decoder
from captioner.models.inference_decoder import InferenceDecoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import log_line
from captioner.training.distributed import ALONE
from captioner.training.feature_cache import cached_features
from captioner.training.inputs import prepare_inputs, training_groups
from captioner.training.losses import caption_loss
from captioner.training.objectives import Counts, Moment, make_objective
from captioner.training.schedule import make_optimizer
from captioner.training.self_critical import Samples, sample_captions, self_critical_loss

CAPTIONS_PER_IMAGE = 5
ROUNDS = 5  # of the parts of a self-critical step


def cnn_alone(captioner: Captioner, paths: Sequence[Path]) -> float:
    """Return images/s of the CNN from pixels in memory: the limit of all that follows."""
    encoder = captioner.model.encoder
    batches = [
        batch.pixels
        for batch in load_pixels(
            paths, encoder.preprocessing, in_batches(len(paths), 32), captioner.device
        )
    ]

    def run() -> None:
        for pixels in batches:
            cnn(pixels)

    cnn = InferenceEncoder(encoder, captioner.precision)
    cnn(batches[0])
    return len(paths) / seconds_of(run, captioner.device)


def caching(captioner: Captioner, paths: Sequence[Path]) -> float:
    """Return images/s from files to features on disk."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            cached_features(
                captioner.model.encoder, paths, folder, captioner.device, captioner.precision
            )

        return len(paths) / seconds_of(run, captioner.device)


class BareLSTM(nn.Module):
    """A fused nn.LSTM and a linear layer: what teacher forcing costs at the very least."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)

    def loss(self, token_ids: Tensor) -> Tensor:
        """Return the cross-entropy of captions (B, K, T + 1)."""
        token_ids = token_ids.to(self.output.weight.device, non_blocking=True)
        inputs, targets = token_ids[..., :-1].flatten(0, 1), token_ids[..., 1:].flatten(0, 1)
        real = targets != PAD
        logits = self.output(self.lstm(self.embedding(inputs))[0][real])
        return nn.functional.cross_entropy(logits.float(), targets[real])


class _Training:
    """Training steps of one decoder from features in memory.

    Args:
        captioner: Whose settings, vocabulary and CNN's grid are used.
        dataset: Whose captions.
        kind: A decoder's name, or None for the bare LSTM.
        batch_size: Images in a batch.
        steps: How many steps are timed.
        compiled: Whether its steps are compiled (``training.compile``).
    """

    def __init__(
        self,
        captioner: Captioner,
        dataset: CaptionDataset,
        kind: str | None,
        batch_size: int,
        steps: int,
        compiled: bool = False,
    ) -> None:
        model, self.device, self.precision = (
            captioner.model,
            captioner.device,
            captioner.precision,
        )
        captions = encode_captions(dataset, model.vocabulary)
        plan = TrainingBatches(captions, batch_size, CAPTIONS_PER_IMAGE, 0, 40)
        batches = [batch.token_ids for epoch in range(2) for batch in plan.epoch(epoch)]
        self.batches = batches[:steps]  # on the CPU, as training has them
        regions, width = model.encoder.grid_shape
        config = model.decoder.config
        self.learner: Decoder | BareLSTM
        if kind:
            self.learner = make_decoder(replace(config, kind=kind), len(model.vocabulary), width)
            regions = 1 if self.learner.pooled else regions
        else:
            self.learner = BareLSTM(config, len(model.vocabulary))
        self.learner.to(self.device).train()
        self.run: Callable[..., Any] | None = None
        if compiled and isinstance(self.learner, Decoder):
            self.run = CompiledSteps(self.learner).run
        self.features = torch.randn(
            batch_size, regions, width, device=self.device, dtype=self.precision
        )
        self.optimizer = torch.optim.AdamW(self.learner.parameters(), lr=1e-4)

    def compute_gradients(self, token_ids: Tensor) -> None:
        """Go forwards and backwards."""
        with autocast(self.device, self.precision):
            if isinstance(self.learner, BareLSTM):
                loss = self.learner.loss(token_ids)
            else:
                features = self.features[: len(token_ids)]
                output = self.learner.teacher_forcing(features, token_ids, run=self.run)
                tokens, captions = output.targets.numel(), token_ids[..., 0].numel()
                loss = caption_loss(output, 0.0, 1.0, tokens, captions)
        loss.backward()

    def step(self, token_ids: Tensor) -> None:
        """Take an optimiser step."""
        self.compute_gradients(token_ids)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _run(self) -> None:
        for batch in self.batches:
            self.step(batch)

    def rate(self) -> float:
        """Return tokens/s."""
        self.step(self.batches[0])
        seconds = seconds_of(self._run, self.device)
        return sum(map(_count_tokens, self.batches)) / seconds

    def rate_of_products(self) -> float:
        """Return the tokens/s that the matrix products of a step would allow by themselves."""
        batch = self.batches[0]
        with Products() as products:
            self.compute_gradients(batch)
        products.run()
        return _count_tokens(batch) / seconds_of(products.run, self.device, TIMES)


def _count_tokens(token_ids: Tensor) -> int:
    return int((token_ids[..., 1:] != PAD).sum())


def training_rates(
    captioner: Captioner,
    dataset: CaptionDataset,
    batch_size: int,
    steps: int,
    compiled: bool = False,
) -> dict[str, float]:
    """Return rates of training's parts, beside their limits; of compiled steps too if asked for."""
    cnn = cnn_alone(captioner, dataset.paths)
    bare = _Training(captioner, dataset, None, batch_size, steps).rate()
    rates = {"CNN alone, images/s": cnn, "bare nn.LSTM + linear, training tokens/s": bare}
    cached = caching(captioner, dataset.paths)
    rates |= {"feature caching, images/s": cached, "of CNN alone": cached / cnn}
    for kind in DECODERS:
        try:
            training = _Training(captioner, dataset, kind, batch_size, steps)
        except ConfigError as error:  # it doesn't take the checkpoint's settings
            log_line(f"{kind} isn't measured: {error}")
            continue
        rate = training.rate()
        rates |= {
            f"{kind}, training tokens/s": rate,
            f"{kind}, of bare LSTM": rate / bare,
            f"{kind}, its matrix products alone, of bare LSTM": training.rate_of_products() / bare,
        }
        if compiled and not training.learner.pooled:
            log_line(f"{kind}: compiling takes a minute or two")
            training = _Training(captioner, dataset, kind, batch_size, steps, compiled)
            rates[f"{kind}, compiled, of bare LSTM"] = training.rate() / bare
    return rates


def waiting_shares(
    captioner: Captioner, dataset: CaptionDataset, batch_size: int, steps: int
) -> dict[str, float]:
    """Return which share of the time of training steps is spent waiting for the data.

    With cached features, and with pixels that are read and changed anew, for a CNN that is trained.
    """
    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        data = DataConfig("", "", "", "", cache_dir=folder)
        frozen = Config(data, training=TrainingConfig(batch_size=batch_size))
        trained = replace(
            frozen,
            encoder=EncoderConfig(fine_tune_from="all", batch_norm="frozen"),
            augmentation=AugmentationConfig(crop=0.6, flip=True, colour=0.2),
        )
        for name, config in {"frozen": frozen, "trained": trained}.items():
            model = copy.deepcopy(captioner.model).requires_grad_()
            model.encoder.fine_tune_from(config.encoder.fine_tune_from, config.encoder.batch_norm)
            share, rate = _train_and_wait(captioner, model, dataset, config, steps)
            shares[f"CNN {name}, share of a step waiting for data"] = share
            shares[f"CNN {name}, images/s"] = rate
    return shares


def _train_and_wait(
    captioner: Captioner,
    model: CaptioningModel,
    dataset: CaptionDataset,
    config: Config,
    steps: int,
) -> tuple[float, float]:
    """Return the share of waiting, and images/s, of as many steps after the first two."""
    device, precision = captioner.device, captioner.precision
    dataset, inputs = prepare_inputs(model, dataset, config, device, precision, training=True)
    objective = make_objective(model, config, precision, dataset)
    optimizer = make_optimizer(model, config)
    captions = encode_captions(dataset, model.vocabulary)
    plan = TrainingBatches(captions, config.training.batch_size, CAPTIONS_PER_IMAGE, 0, 40)
    batches = [batch for epoch in range(1 + steps) for batch in plan.epoch(epoch)][: steps + 2]
    groups = training_groups(batches, inputs, 0, 1, ALONE)
    waited, images, started = 0.0, 0, 0.0
    for number in range(len(batches)):
        before = time.perf_counter()
        group = next(groups)
        if number == 2:
            synchronise(device)
            waited, images, started = 0.0, 0, time.perf_counter()
            before = started
        waited += time.perf_counter() - before
        images += sum(len(batch.images) for batch in group)
        objective.compute_gradients(group, Counts.of(group), Moment(number))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    synchronise(device)
    seconds = time.perf_counter() - started
    return waited / seconds, images / seconds


class _SelfCriticalStep:
    """The parts of a step of self-critical training, which leave the weights as they are."""

    def __init__(self, captioner: Captioner, reward: CaptionReward, features: Tensor) -> None:
        self.captioner, self.reward = captioner, reward
        self.features = features.clone()  # not of inference mode
        self.images = list(range(len(features)))
        self.decoder = captioner.model.decoder.requires_grad_()
        self.sample(reward)

    def sample(self, reward: CaptionReward) -> None:
        """Draw captions and score them."""
        model = self.captioner.model
        self.samples: Samples = sample_captions(
            InferenceDecoder(self.decoder, self.captioner.precision),
            self.features,
            model.vocabulary,
            reward,
            self.images,
            CAPTIONS_PER_IMAGE,
            model.search.max_length,
            seed=0,
        )

    def compute_gradients(self) -> None:
        """Go forwards and backwards with the captions drawn last."""
        samples = self.samples
        with autocast(self.captioner.device, self.captioner.precision):
            output = self.decoder.teacher_forcing(self.features[samples.order], samples.token_ids)
            self_critical_loss(output, samples.advantages, len(self.images)).backward()
        self.decoder.zero_grad(set_to_none=True)

    def run(self) -> None:
        """Do all of it."""
        self.sample(self.reward)
        self.compute_gradients()


class _NoReward(CaptionReward):
    """Gives every caption the same reward, at no cost."""

    def __init__(self) -> None:
        pass

    def __call__(self, images: np.ndarray, token_ids: np.ndarray) -> np.ndarray:
        return np.zeros(token_ids.shape[:2])


def self_critical_rates(
    captioner: Captioner, dataset: CaptionDataset, features: Tensor, batch_size: int
) -> dict[str, float]:
    """Return what a step of self-critical training takes, beside its parts.

    Args:
        captioner: What is trained.
        dataset: Whose captions are the references.
        features: (B, N, D) of its first images.
        batch_size: Images in a step.
    """
    vocabulary = captioner.model.vocabulary
    reward = CaptionReward(encode_captions(dataset, vocabulary), len(vocabulary))
    step = _SelfCriticalStep(captioner, reward, features[:batch_size])
    parts: dict[str, Callable[[], object]] = {
        "sampling alone, s": partial(step.sample, _NoReward()),
        "gradient alone, s": step.compute_gradients,
        "sampling, reward and gradient, s": step.run,
    }
    turns = [
        {name: seconds_of(run, captioner.device) for name, run in parts.items()}
        for _ in range(ROUNDS)
    ]
    medians = {name: float(np.median([turn[name] for turn in turns])) for name in parts}
    *alone, whole = medians.values()
    images = step.samples.order.numpy()
    token_ids = step.samples.token_ids[:, :, 1:].numpy()
    seconds = seconds_of(lambda: reward(images, token_ids), captioner.device, TIMES)
    return {
        **medians,
        "whole / (sampling + gradient)": whole / sum(alone),
        "reward, captions/s": token_ids.shape[0] * token_ids.shape[1] / seconds,
    }
