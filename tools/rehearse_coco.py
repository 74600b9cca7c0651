"""Rehearse training on a data set with COCO's numbers: what takes how long, and how much memory.

  rehearse_coco.py SCRATCH --weights mobilenet_v2.pth                 # needs 17 GB and some minutes
  rehearse_coco.py SCRATCH --weights mobilenet_v2.pth --images 20000  # where the disk is smaller

Drawn in SCRATCH, and left there for the next time: 118,287 + 5,000 small JPEGs, 5 captions each of
some 10,000 words, in the layout and with the names of Karpathy's split; and a feature cache of
mobilenet_v2's size, 49 x 1,280 numbers an image, filled with random ones. Then measured: reading
and preparing; from the command to the first optimiser step of a real process, and its memory; rows
read from the cache at random, when none of it is in memory, when what fits is, and when so much
memory is taken up that a third of the cache fits; steps a second, beside those on 2,000 images with
as many words; images encoded from files, beside the CNN alone; and the memory of worker processes
that decode as they do for a GPU.
"""

import argparse
import contextlib
import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw

from captioner.cli import HelpFormatter, Parser, command
from captioner.config import Config
from captioner.data.annotations import read_annotations
from captioner.data.dataset import TrainingBatches, encode_captions
from captioner.data.images import in_batches, load_pixels
from captioner.data.vocabulary import Vocabulary
from captioner.device import choose_device, choose_precision
from captioner.experiment_file import load_config
from captioner.files import atomic_write, write_json
from captioner.models.encoder import Encoder, make_encoder
from captioner.models.inference_encoder import InferenceEncoder
from captioner.progress import Progress, log_line, progress_iter
from captioner.training.feature_cache import cached_features
from captioner.training.feature_store import FeatureStore, FileStatus, hash_file
from captioner.training.run import load_splits

TRAIN_IMAGES, VAL_IMAGES = 118_287, 5_000
SMALL = 2_000  # images of the data set that steps are compared with
WORD_FORMS, EXPONENT, WORDS = 28_000, 1.65, (8, 14)  # of a caption: gives about KEPT_WORDS
KEPT_WORDS = 10_200
DRAWINGS = 300
EXPERIMENT = """\
[data]
root = '{root}'
train_annotations = "{annotations}"
train_split = "train+restval"
train_images = "images"
val_annotations = "{annotations}"
val_split = "val"
val_images = "images"
min_word_count = {least}
cache_dir = '{root}/cache'
[encoder]
name = "mobilenet_v2"
weights = '{weights}'
padding = "tensorflow"
[decoder]
kind = "show_attend_tell"
embedding_size = 256
hidden_size = 256
attention_size = 128
[training]
epochs = 1
batch_size = 32
captions_per_image = 1
log_every = 1
[wandb]
mode = "disabled"
"""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for the data set and the cache")
    parser.add_argument(
        "--weights", required=True, help="of mobilenet_v2, converted from TensorFlow"
    )
    parser.add_argument(
        "--images", type=int, default=TRAIN_IMAGES + VAL_IMAGES, help="how many; the cache too"
    )
    parser.add_argument("--encoded", type=int, default=2000, help="photographs that are encoded")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps of each run")
    parser.add_argument("--rounds", type=int, default=2, help="of the runs that are compared")
    parser.add_argument("--output", type=Path, help="JSON file of the numbers")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Prepare what isn't there yet, measure, and print the table."""
    args = _parser().parse_args(argv)
    scratch = args.scratch.resolve()
    experiments = [
        _prepare(scratch, args.weights, count) for count in (args.images, min(SMALL, args.images))
    ]
    table = _Table()
    config = load_config(experiments[0])
    _measure_preparation(config, table)
    _measure_cache(config, table)
    _measure_runs(experiments, scratch, args.steps, args.rounds, table)
    if args.encoded:
        _measure_encoding(config, scratch, args.encoded, table)
    _measure_workers(config, table)
    print(table)
    if args.output:
        write_json(args.output, table.rows)
    return 0


class _Table:
    """What was measured: name, number, unit."""

    def __init__(self) -> None:
        self.rows: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        self.rows[name] = value
        log_line(f"{name}: {value:,.2f}")

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter(), time.process_time()
        yield
        self.add(f"{name}, s", time.perf_counter() - started[0])
        self.add(f"{name}, CPU s", time.process_time() - started[1])

    def __str__(self) -> str:
        return "\n".join(f"{name:60} {value:12,.2f}" for name, value in self.rows.items())


# --- the data set -----------------------------------------------------------------------------


def _prepare(scratch: Path, weights: str, count: int) -> Path:
    """Make what is missing of a data set of so many images; return its experiment file."""
    annotations = scratch / f"dataset_coco_{count}.json"
    names = [_file_name(i, count) for i in range(count)]
    if not annotations.exists():
        _draw_images(scratch / "images", names)
        _write_annotations(annotations, names)
    experiment = scratch / f"experiment_{count}.toml"
    experiment.write_text(
        EXPERIMENT.format(
            root=scratch,
            annotations=annotations.name,
            weights=Path(weights).resolve(),
            least=1 if count <= SMALL else 5,
        )
    )
    _fill_cache(load_config(experiment), [scratch / "images" / name for name in names])
    return experiment


def _split(number: int, count: int) -> str:
    """Return an image's split; a quarter is "restval", as in Karpathy's file."""
    train = count - count * VAL_IMAGES // (TRAIN_IMAGES + VAL_IMAGES)
    return "val" if number >= train else ("restval" if number % 4 == 3 else "train")


def _file_name(number: int, count: int) -> str:
    folder = "val2014" if _split(number, count) == "val" else "train2014"
    return f"{folder}/COCO_{folder}_{4 * number + 9:012}.jpg"


def _draw_images(folder: Path, names: Sequence[str]) -> None:
    """Write images of a few hundred drawings, each with a comment that makes it another file."""
    drawings = [_draw(number, (160, 120)) for number in range(DRAWINGS)]
    for subfolder in {Path(name).parent for name in names}:
        (folder / subfolder).mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(progress_iter(names, "drawing", len(names), "image")):
        if not (folder / name).exists():
            (folder / name).write_bytes(_commented(drawings[number % DRAWINGS], name))


def _draw(number: int, size: tuple[int, int]) -> bytes:
    """Return a JPEG of discs on noise, about as hard to compress as a photograph."""
    random = np.random.default_rng(number)
    width, height = size
    noise = random.integers(0, 256, (height // 4, width // 4, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y, radius = random.random() * width, random.random() * height, width / 6
        red, green, blue = random.integers(0, 256, 3).tolist()
        box = (x - radius, y - radius, x + radius, y + radius)
        pen.ellipse(box, fill=(red, green, blue))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def _commented(jpeg: bytes, comment: str) -> bytes:
    text = comment.encode()
    return jpeg[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + jpeg[2:]


def _write_annotations(path: Path, names: Sequence[str]) -> None:
    """Write captions of made-up words, as frequent as the words of a language."""
    random = np.random.default_rng(0)
    words = _made_up_words()
    shares = 1.0 / (np.arange(len(words)) + 10) ** EXPONENT
    if len(names) <= SMALL:  # too few captions for as many words, unless all are as frequent
        shares = (np.arange(len(words)) < KEPT_WORDS).astype(float)
    lengths = random.integers(*WORDS, size=(len(names), 5))
    drawn = random.choice(len(words), size=int(lengths.sum()), p=shares / shares.sum())
    ends = iter(np.cumsum(lengths.ravel()).tolist())
    start = 0
    with atomic_write(path) as file:
        file.write('{"images": [')
        for number, name in enumerate(progress_iter(names, "captions", len(names), "image")):
            sentences = []
            for place in range(5):
                end = next(ends)
                tokens = [words[i] for i in drawn[start:end]]
                raw = f"{' '.join(tokens).capitalize()}."
                sentid = 5 * number + place
                sentences.append({"tokens": tokens, "raw": raw, "imgid": number, "sentid": sentid})
                start = end
            folder, file_name = name.split("/")
            image = {
                "filepath": folder,
                "sentids": [sentence["sentid"] for sentence in sentences],
                "filename": file_name,
                "imgid": number,
                "split": _split(number, len(names)),
                "sentences": sentences,
                "cocoid": 4 * number + 9,
            }
            file.write(", " * bool(number) + json.dumps(image))
        file.write('], "dataset": "coco"}')


def _made_up_words() -> list[str]:
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    count = len(syllables)
    return [
        syllables[i % count] + syllables[i // count % count] + syllables[i // count**2 % count]
        for i in range(WORD_FORMS)
    ]


def _encoder(config: Config) -> Encoder:
    settings = config.encoder
    return make_encoder(
        settings.name,
        settings.weights,
        config.preprocessing,
        settings.last_stage,
        settings.padding,
    )


def _fill_cache(config: Config, paths: Sequence[Path]) -> None:
    """Give each image that has none a row of random features."""
    encoder = _encoder(config)
    precision = choose_precision(config.training.precision, choose_device("cpu"))
    fingerprint = {**encoder.fingerprint(), "precision": str(precision), "pooled": False}
    cache = Path(config.data.cache_dir)
    store = FeatureStore(cache, fingerprint, encoder.grid_shape)
    known = set(store.content_by_file.values())
    missing = [
        path for path in paths if store.content_by_file.get(FileStatus.of(path)) not in known
    ]
    if not missing:
        return
    time.sleep(3)  # the cache doesn't trust the time of a file that was written just now
    random = np.random.default_rng(0)
    features = np.abs(random.standard_normal((512, *encoder.grid_shape))).astype(np.float16)
    with store.opened_for_append(), Progress("filling the cache", len(missing), "image") as bar:
        for batch in in_batches(len(missing), 64):
            files = [missing[i] for i in batch]
            rows = features[random.integers(0, len(features), len(files))]
            store.append([hash_file(f) for f in files], rows, [FileStatus.of(f) for f in files])
            bar.update(len(files))


# --- what is measured -------------------------------------------------------------------------


def _measure_preparation(config: Config, table: _Table) -> None:
    """Time what a run does before its first step, part by part, in this process."""
    path = config.data.path("train_annotations")
    with table.timed("reading the annotations of one split"):
        read_annotations(path, config.data.train_split)
    with table.timed("reading and checking train and val"):
        train_set, _ = load_splits(config)
    captions = [text for texts in train_set.captions for text in texts]
    with table.timed("vocabulary"):
        vocabulary = Vocabulary.from_captions(captions, config.data.min_word_count)
    table.add("words", len(vocabulary))
    with table.timed("encoding the captions"):
        token_ids = encode_captions(train_set, vocabulary)
    with table.timed("preparing the batches"):
        batches = TrainingBatches(token_ids, config.training.batch_size, 5, 1, 40)
    with table.timed("batches of an epoch"):
        batches.epoch(0)


def _measure_cache(config: Config, table: _Table) -> None:
    """Time looking all images up, and reading rows at random."""
    train_set, _ = load_splits(config)
    device = choose_device("cpu")
    precision = choose_precision(config.training.precision, device)
    encoder, cache = _encoder(config), config.data.cache_dir
    with table.timed("feature cache lookup of all training images"):
        features = cached_features(encoder, train_set.paths, cache, device, precision)
    path = features.stored.path
    table.add("feature cache on disk, GB", path.stat().st_size / 1e9)
    table.add("memory that is left, GB", psutil.virtual_memory().available / 1e9)
    random = np.random.default_rng(0)

    def read_at_random(name: str, batches: int) -> None:
        indices = random.integers(len(train_set), size=(batches, 64))
        started = time.perf_counter()
        for batch in indices:
            features.take(batch.tolist())
        rate = indices.size / (time.perf_counter() - started)
        table.add(f"rows read at random, {name}, images/s", rate)

    _drop_from_memory(path)
    read_at_random("none of it in memory", 60)
    read_at_random("what fits in memory", 60)
    kept = path.stat().st_size // 3
    if (taken := psutil.virtual_memory().available - kept) > 0:
        memory = np.ones(taken, np.uint8)  # written to, so that it is really taken
        table.add("memory taken up for the next, GB", taken / 1e9)
        read_at_random("a third of it fits in memory, first 400 batches", 400)
        read_at_random("a third of it fits in memory, next 400 batches", 400)
        del memory


def _drop_from_memory(path: Path) -> None:
    """Have the system forget what it keeps of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _measure_runs(
    experiments: Sequence[Path], scratch: Path, steps: int, rounds: int, table: _Table
) -> None:
    """Time real runs on both data sets, in turns."""
    rates: list[list[float]] = [[], []]
    for number in range(rounds):
        for place, experiment in enumerate(experiments):
            run = scratch / "runs" / f"{time.time_ns()}"
            first, busy, peak, anonymous = _run(experiment, run, steps)
            rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
            rates[place] += [row["images_per_second"] for row in rows[3:]]
            if number == 0 and place == 0:
                table.add("command to first step, s", first)
                table.add("command to first step, CPU s", busy)
                table.add("peak memory of the process, GB", peak)
                table.add("of it not of files, GB", anonymous)
    table.add("training, images/s", median(rates[0]))
    table.add(f"training on {SMALL:,} images, images/s", median(rates[1]))
    table.add("their ratio", median(rates[0]) / median(rates[1]))


def _run(experiment: Path, run: Path, steps: int) -> tuple[float, float, float, float]:
    """Train some steps; return the seconds to the first, those of a CPU, and peaks of memory."""
    words = [sys.executable, str(Path(__file__).with_name("train.py"))]
    process = psutil.Popen([*words, str(experiment), "--output-dir", str(run)])
    started, first, busy, peaks = time.perf_counter(), 0.0, 0.0, [0.0, 0.0]
    log = run / "log.jsonl"
    try:
        while True:
            if process.poll() is not None:
                raise SystemExit(f"training ended with exit code {process.returncode}")
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            if lines and not first:
                first, busy = time.perf_counter() - started, sum(process.cpu_times()[:2])
            memory = process.memory_info()
            now = memory.rss / 1e9, (memory.rss - memory.shared) / 1e9
            peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
            if lines > steps:
                return first, busy, peaks[0], peaks[1]
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()


def _measure_encoding(config: Config, scratch: Path, count: int, table: _Table) -> None:
    """Compare filling a cache from files of a photograph's size with the CNN alone."""
    folder, drawings = scratch / "photographs", [_draw(n, (640, 480)) for n in range(50)]
    folder.mkdir(exist_ok=True)
    paths = [folder / f"{number:06}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(_commented(drawings[number % 50], f"{path.name} {time.time_ns()}"))
    device = choose_device("cpu")
    precision = choose_precision(config.training.precision, device)
    encoder = _encoder(config)
    cnn = InferenceEncoder(encoder, precision)
    loaded = load_pixels(paths, encoder.preprocessing, in_batches(256, 32), device, 0)
    pixels = [batch.pixels for batch in loaded]

    def encode_pixels() -> None:
        for batch in pixels:
            cnn(batch)

    encode_pixels()
    before = _rate(encode_pixels, 256)
    cache = scratch / "cache_of_photographs"
    rate = _rate(lambda: cached_features(encoder, paths, cache, device, precision), count)
    alone = (before + _rate(encode_pixels, 256)) / 2
    table.add("encoding from files into the cache, images/s", rate)
    table.add("CNN alone, images/s", alone)
    table.add("ratio of encoding to the CNN alone", rate / alone)


def _measure_workers(config: Config, table: _Table) -> None:
    """Measure the memory of the processes that decode for a GPU, beside COCO's captions here."""
    train_set, _ = load_splits(config)
    batches = in_batches(min(64 * 200, len(train_set)), 64)
    device = torch.device("meta")  # no CPU: processes decode, not threads
    loader = load_pixels(train_set.paths, _encoder(config).preprocessing, batches, device)
    most: dict[int, float] = {}
    for number, _ in enumerate(loader):
        if number % 20 == 0:
            for process in psutil.Process().children():
                own = process.memory_full_info().uss / 1e9
                most[process.pid] = max(own, most.get(process.pid, 0.0))
    table.add("worker processes", len(most))
    table.add("memory that a worker shares with none, at most, GB", max(most.values()))


def _rate(function: Callable[[], Any], count: int) -> float:
    with torch.no_grad():
        started = time.perf_counter()
        function()
        return count / (time.perf_counter() - started)


if __name__ == "__main__":
    sys.exit(main())
