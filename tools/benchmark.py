"""Measure how fast each part runs, beside the limit it can't pass, in one run."""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from captioner.captioner import Captioner
from captioner.cli import HelpFormatter, command
from captioner.config import DecoderConfig
from captioner.data import CaptionDataset, TrainingBatches, encode_captions
from captioner.decoder import make_decoder
from captioner.device import autocast
from captioner.features import cached_features
from captioner.files import write_json
from captioner.folder import ImageFile, caption_files
from captioner.images import in_batches, load_pixels
from captioner.progress import say
from captioner.training import caption_loss
from captioner.vocabulary import PAD

BEAM_SIZES = (1, 3, 5)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    _synchronise(device)
    started = time.perf_counter()
    run()
    _synchronise(device)
    return time.perf_counter() - started


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

    cnn = encoder.for_inference(captioner.precision)
    cnn(batches[0])
    return len(paths) / _seconds(run, captioner.device)


def caching(captioner: Captioner, paths: Sequence[Path]) -> float:
    """Return images/s from files to features on disk."""
    with tempfile.TemporaryDirectory() as folder:

        def run() -> None:
            cached_features(
                captioner.model.encoder, paths, folder, captioner.device, captioner.precision
            )

        return len(paths) / _seconds(run, captioner.device)


class BareLSTM(nn.Module):
    """A fused nn.LSTM and a linear layer: what teacher forcing costs at the very least."""

    def __init__(self, config: DecoderConfig, vocabulary_size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary_size, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, batch_first=True)
        self.output = nn.Linear(config.hidden_size, vocabulary_size)

    def loss(self, token_ids: Tensor) -> Tensor:
        """Return the cross-entropy of captions (B, K, T + 1)."""
        inputs, targets = token_ids[..., :-1].flatten(0, 1), token_ids[..., 1:].flatten(0, 1)
        real = targets != PAD
        logits = self.output(self.lstm(self.embedding(inputs))[0][real])
        return nn.functional.cross_entropy(logits.float(), targets[real])


def training(
    captioner: Captioner, dataset: CaptionDataset, kind: str | None, batch_size: int, steps: int
) -> float:
    """Return tokens/s of training steps from features in memory; kind None is the bare LSTM."""
    model, device = captioner.model, captioner.device
    plan = TrainingBatches(encode_captions(dataset, model.vocabulary), batch_size, 5, 0, 40)
    batches = [plan.epoch(epoch)[i] for epoch in range(2) for i in range(len(plan))][: steps + 1]
    regions, width = model.encoder.grid_shape
    config = model.decoder.config
    if kind:
        decoder = make_decoder(
            replace(config, kind=kind),  # type: ignore[arg-type]
            len(model.vocabulary),
            width,
        )
        regions = 1 if decoder.pooled else regions
        learner: nn.Module = decoder
    else:
        learner = bare = BareLSTM(config, len(model.vocabulary))
    learner.to(device).train()
    features = torch.randn(batch_size, regions, width, device=device, dtype=captioner.precision)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-4)

    def step(token_ids: Tensor) -> None:
        token_ids = token_ids.to(device)
        with autocast(device, captioner.precision):
            if kind:
                said = decoder.teacher_forcing(features[: len(token_ids)], token_ids)
                loss = caption_loss(said, 0.0, 1.0, said.targets.numel(), token_ids[..., 0].numel())
            else:
                loss = bare.loss(token_ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step(batches[0].token_ids)

    def run() -> None:
        for batch in batches[1:]:
            step(batch.token_ids)

    seconds = _seconds(run, device)
    tokens = sum(int((batch.token_ids[..., 1:] != PAD).sum()) for batch in batches[1:])
    return tokens / seconds


def captioning(captioner: Captioner, paths: Sequence[Path], beam_size: int) -> float:
    """Return images/s from files to captions."""
    images = [ImageFile(number, path.name, path) for number, path in enumerate(paths)]
    search = captioner.search(beam_size=beam_size)
    return len(paths) / _seconds(lambda: caption_files(captioner, images, search), captioner.device)


def measure(
    captioner: Captioner, dataset: CaptionDataset, batch_size: int, steps: int
) -> dict[str, float]:
    """Return all rates, in running order."""
    paths = dataset.paths
    rates = {"CNN alone, images/s": cnn_alone(captioner, paths)}
    rates["feature caching, images/s"] = caching(captioner, paths)
    rates["bare nn.LSTM + linear, training tokens/s"] = training(
        captioner, dataset, None, batch_size, steps
    )
    for kind in ("show_and_tell", "show_attend_tell"):
        rates[f"{kind}, training tokens/s"] = training(captioner, dataset, kind, batch_size, steps)
    for beam_size in BEAM_SIZES:
        rates[f"captioning, beam {beam_size}, images/s"] = captioning(captioner, paths, beam_size)
    return rates


def _print(rates: dict[str, float]) -> None:
    for name, rate in rates.items():
        limit = "bare nn.LSTM" if "tokens/s" in name else "CNN alone"
        ceiling = next(value for key, value in rates.items() if key.startswith(limit))
        print(f"{name:42} {rate:10.1f}   {rate / ceiling:6.2f} of {limit}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see the module's docstring."""
    parser = argparse.ArgumentParser(
        "benchmark.py", description=__doc__, formatter_class=HelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, help="a trained checkpoint directory")
    parser.add_argument("annotations", type=Path, help="captions file of the images")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("--count", type=int, default=500, help="images measured on")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a training batch")
    parser.add_argument("--steps", type=int, default=10, help="training steps timed")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--output", type=Path, help="write the rates as JSON too")
    args = parser.parse_args(argv)
    captioner = Captioner.from_pretrained(args.checkpoint, args.device, args.precision)
    dataset = CaptionDataset.load(args.annotations, args.images)
    dataset = dataset.select(range(min(args.count, len(dataset))))
    say(
        f"{len(dataset)} images, {captioner.model.encoder.name}, {captioner.device}, "
        f"{captioner.precision}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
    )
    rates = measure(captioner, dataset, args.batch_size, args.steps)
    _print(rates)
    if args.output:
        write_json(args.output, rates)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
