"""Measure how fast each part runs, beside the limit it can't pass, in one run."""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from benchmark_search import (
    against_published,
    batches_alike,
    decoder_alone,
    products_alone,
    seconds_of,
)
from benchmark_training import self_critical_rates, training_rates, waiting_shares
from torch import Tensor

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.dataset import CaptionDataset
from captioner.data.images import in_batches, load_pixels
from captioner.data.listing import ImageFile
from captioner.files import write_json
from captioner.inference.captioner import Captioner
from captioner.inference.folder import caption_files
from captioner.memory import keep_freed_memory
from captioner.progress import log_line

ROUNDS = 9  # of all parts of captioning


# --- captioning -----------------------------------------------------------------------------------


def parts_of_captioning(
    captioner: Captioner, images: Sequence[ImageFile], beam_size: int
) -> dict[str, float]:
    """Return milliseconds per image of each part alone, and of the whole."""
    paths = [image.path for image in images]
    preprocessing = captioner.model.encoder.preprocessing
    batches = in_batches(len(paths), 128)
    search = captioner.search(beam_size=beam_size)

    def read() -> list[Tensor]:
        loaded = load_pixels(paths, preprocessing, batches, captioner.device)
        return [batch.pixels for batch in loaded]

    pixels = read()
    (features,) = zip(*map(captioner.features, pixels), strict=True)
    captioner.hypotheses(features[:1], search)
    runs: dict[str, Callable[[], object]] = {
        "CNN alone": lambda: [captioner.features(x) for x in pixels],
        "reading images alone": read,
        "decoder's matrix products alone": products_alone(captioner, features, search),
        "decoder alone": lambda: [captioner.hypotheses([x], search) for x in features],
        "whole": lambda: caption_files(captioner, images, search),
    }
    # In turns, so that a slow minute of the machine meets them all; and the ratio is that of a
    # turn, since the shortest of all turns would favour what is short.
    rounds = [
        {name: 1000 * seconds_of(run, captioner.device) / len(images) for name, run in runs.items()}
        for _ in range(ROUNDS)
    ]
    parts = ("CNN alone", "reading images alone", "decoder's matrix products alone")
    ratios = [turn["whole"] / sum(turn[part] for part in parts) for turn in rounds]
    rates = {name: statistics.median(turn[name] for turn in rounds) for name in runs}
    lower, _, upper = statistics.quantiles(ratios)
    return {
        **rates,
        "whole / (CNN + reading + products)": statistics.median(ratios),
        "the same, first quartile": lower,
        "the same, third quartile": upper,
    }


def latency(captioner: Captioner, checkpoint: Path, paths: Sequence[Path]) -> dict[str, float]:
    """Return milliseconds for single images, and seconds from a new process to its caption."""
    times = []
    captioner.caption(paths[0])
    for path in paths[:200]:
        times.append(1000 * seconds_of(partial(captioner.caption, path), captioner.device))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(paths[0], folder)
        command = [sys.executable, str(Path(__file__).with_name("caption_folder.py"))]
        command += [str(checkpoint), name, "--output", str(folder / "captions.json")]
        command += ["--device", str(captioner.device)]
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        whole = time.perf_counter() - started
    return {
        "one image, median, ms": statistics.median(times),
        "one image, 95th percentile, ms": statistics.quantiles(times, n=20)[-1],
        "from starting a process to its caption, s": whole,
    }


# --- all of it ------------------------------------------------------------------------------------


def measure(
    args: argparse.Namespace, checkpoint: Path, datasets: Sequence[tuple[CaptionDataset, str]]
) -> dict[str, dict[str, float]]:
    """Return what was measured with one checkpoint: tables of numbers by their names."""
    captioner = Captioner.from_pretrained(checkpoint, args.device, args.precision)
    model = captioner.model
    title = f"{model.encoder.name}, {model.decoder.config.kind}"
    tables: dict[str, dict[str, float]] = {}
    first = True
    for dataset, folder in datasets:
        log_line(
            f"{checkpoint}: {title}, {len(dataset)} images of {folder}, {captioner.device}, "
            f"{captioner.precision}, {torch.get_num_threads()} threads of {os.cpu_count()} cores"
        )
        images = [ImageFile(number, path.name, path) for number, path in enumerate(dataset.paths)]
        place = f"{title}, {Path(folder).parent.name}"
        if "captioning" in args.parts:
            for beam_size in (1, 5):
                parts = parts_of_captioning(captioner, images, beam_size)
                tables[f"{place}, beam {beam_size}, ms/image"] = parts
        if first:  # what depends on the model alone
            first = False
            some = dataset.paths[:256]
            loaded = load_pixels(
                some, model.encoder.preprocessing, in_batches(len(some), 64), captioner.device
            )
            features = torch.cat([captioner.features(batch.pixels)[0] for batch in loaded])
            if "decoder" in args.parts:
                tables[f"{title}, decoder alone, captions/s"] = decoder_alone(captioner, features)
            if "published" in args.parts:
                tables[f"{title}, the published search"] = against_published(captioner, features)
            if "batches" in args.parts:
                name = f"{title}, captions that differ from one by one, of {len(features)}"
                tables[name] = batches_alike(captioner, features)
            if "latency" in args.parts:
                tables[f"{title}, latency"] = latency(captioner, checkpoint, dataset.paths)
            if "training" in args.parts:
                sizes = captioner, dataset, args.batch_size, args.steps
                tables[f"{title}, training"] = training_rates(*sizes, args.compile)
                tables[f"{title}, waiting"] = waiting_shares(*sizes)
            if "self_critical" in args.parts:
                tables[f"{title}, self-critical training"] = self_critical_rates(
                    captioner, dataset, features, args.batch_size
                )
    return tables


PARTS = (
    *("captioning", "decoder", "published", "batches", "latency", "training", "self_critical"),
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; see the module's docstring."""
    parser = Parser("benchmark.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoints", type=Path, nargs="+", help="trained checkpoint directories")
    parser.add_argument(
        "--images",
        nargs=2,
        action="append",
        required=True,
        metavar=("ANNOTATIONS", "FOLDER"),
        help="captions file and folder of photographs; may be given several times",
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--count", type=int, default=512, help="images measured on")
    parser.add_argument("--batch-size", type=int, default=64, help="images in a training batch")
    parser.add_argument("--steps", type=int, default=10, help="training steps timed")
    parser.add_argument(
        "--compile", action="store_true", help="training with compiled steps too; takes minutes"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", choices=["auto", "bfloat16", "float32"])
    parser.add_argument("--output", type=Path, help="write the numbers as JSON too")
    args = parser.parse_args(argv)
    keep_freed_memory()  # as the commands do
    datasets = []
    for annotations, folder in args.images:
        dataset = CaptionDataset.load(annotations, folder)
        datasets.append((dataset.select(range(min(args.count, len(dataset)))), folder))
    tables: dict[str, dict[str, float]] = {}
    for checkpoint in args.checkpoints:
        measured = measure(args, checkpoint, datasets)
        for title, rows in measured.items():
            print(f"\n{title}")
            for name, value in rows.items():
                print(f"  {name:48} {value:12.3f}")
        tables |= measured
    if args.output:
        write_json(args.output, tables)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
