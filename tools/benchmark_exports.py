r"""Compare exported captioners with their checkpoints: size, captions, scores, speed, memory.

  python tools/benchmark_exports.py RUN/best mobilenet-flickr8k --annotations captions.json \
      --images images --limit 1000

Prints a row for each checkpoint and precision. "Equal" counts the captions that are those of torch
in float32, at beam 1 and 5; where they differ and the two scores are within 1e-4 of each other it
is a tie, counted by itself. Rates are images a second at beam 5, pixels in memory, beside torch in
float32 on the same cores; "first caption" is from the start of a process to its end with one
caption, memory its peak.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioner.checkpoint_directory import find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.data.annotations import read_annotations
from captioner.inference.captioner import Captioner
from captioner.inference.onnx_export import PRECISIONS, export_captioner
from captioner.metrics.scores import compute_metrics
from captioner.models.checkpoint import load_checkpoint
from captioner.progress import progress_iter
from captioner.runtime import OnnxCaptioner

BATCH = 32
TIE = 1e-4


def _parser() -> argparse.ArgumentParser:
    parser = Parser("benchmark_exports.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoints", nargs="+", help="checkpoints, or names of captioners")
    parser.add_argument("--annotations", type=Path, required=True, help="captions of the images")
    parser.add_argument("--split", help="of the annotations")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--limit", type=int, default=1000, help="images at most")
    parser.add_argument(
        "--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), metavar="P"
    )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Print the table."""
    args = _parser().parse_args(argv)
    images = read_annotations(args.annotations, args.split).images[: args.limit]
    paths = [args.images / str(image.file_name) for image in images]
    references: dict[int | str, Any] = {
        number: image.captions for number, image in enumerate(images)
    }
    print(
        "| captioner | precision | MB | equal, beam 1 | equal, beam 5 | ties | BLEU-4 | CIDEr-D | "
        "images/s | of torch | first caption, s | memory, MB |\n" + "|---" * 12 + "|"
    )
    for name in args.checkpoints:
        model = load_checkpoint(find_checkpoint(name))
        captioner = Captioner(model, "cpu", "float32")
        pixels = _pixels(captioner, paths)
        expected = {beam: _of_torch(captioner, pixels, beam) for beam in (1, 5)}
        label = f"{model.decoder.config.kind}, {model.decoder.config.cell}"
        empty = ("",) * 4
        _print(label, "torch, float32", *empty, *_scores(expected[5], references), *empty[:3])
        for precision in args.precisions:
            with tempfile.TemporaryDirectory() as parent:
                folder = Path(parent) / "exported"
                export_captioner(model, folder, precision)
                size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
                *equal, found = _compare(folder, precision, pixels, expected)
                start = _first_caption(folder, paths[0])
            ratio = f"{found[1] / expected[5][1]:.2f}"
            scores = _scores(found, references)
            _print(label, precision, f"{size:.1f}", *equal, *scores, ratio, *start)
    return 0


def _pixels(captioner: Captioner, paths: Sequence[Path]) -> torch.Tensor:
    load = captioner.preprocessing.load
    return torch.stack(
        [load(path) for path in progress_iter(paths, "reading", len(paths), "image")]
    )


Found = tuple[list[Any], float]  # the best caption of each image, and images a second


def _of_torch(captioner: Captioner, pixels: torch.Tensor, beam: int) -> Found:
    search = captioner.search(beam_size=beam, n_best=1)
    captioner.captions(pixels[:BATCH], search)
    started = time.perf_counter()
    found = [c[0] for part in pixels.split(BATCH) for c in captioner.captions(part, search)]
    return found, len(pixels) / (time.perf_counter() - started)


def _of_onnx(captioner: OnnxCaptioner, pixels: np.ndarray, beam: int, batch: int = BATCH) -> Found:
    search = captioner.search(beam_size=beam, n_best=1)
    captioner.captions(pixels[:batch], search)
    started = time.perf_counter()
    parts = [pixels[i : i + batch] for i in range(0, len(pixels), batch)]
    found = [captions[0] for part in parts for captions in captioner.captions(part, search)]
    return found, len(pixels) / (time.perf_counter() - started)


def _compare(
    folder: Path, precision: str, pixels: torch.Tensor, expected: dict[int, Found]
) -> tuple[int, int, int, Found]:
    """Return how many captions are equal at beam 1 and 5, the ties, and those found at beam 5."""
    captioner = OnnxCaptioner(folder)
    equal, ties = [], 0
    found: Found = ([], 0.0)
    for beam in (1, 5):
        found = _of_onnx(captioner, pixels.numpy(), beam)
        pairs = list(zip(found[0], expected[beam][0], strict=True))
        equal.append(sum(ours.text == theirs.text for ours, theirs in pairs))
        ties += sum(a.text != b.text and abs(a.score - b.score) < TIE for a, b in pairs)
    if precision == "float32":  # whatever the batch
        for batch in (1, 7):
            other, _ = _of_onnx(captioner, pixels[:98].numpy(), 5, batch)
            differ = sum(a.text != b.text for a, b in zip(other, found[0], strict=False))
            if differ:
                print(
                    f"in batches of {batch}: {differ} of {len(other)} are others", file=sys.stderr
                )
    return equal[0], equal[1], ties, found


def _scores(found: Found, references: dict[int | str, Any]) -> tuple[str, str, str]:
    """Return BLEU-4 and CIDEr-D, times 100, and the rate."""
    captions: dict[int | str, str] = {
        number: caption.text for number, caption in enumerate(found[0])
    }
    scores = compute_metrics(captions, references, ["BLEU", "CIDEr-D"])
    return f"{100 * scores['BLEU-4']:.2f}", f"{100 * scores['CIDEr-D']:.2f}", f"{found[1]:.1f}"


_CHILD = """
import sys
from captioner.runtime.__main__ import main
main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
"""


def _first_caption(folder: Path, image: Path) -> tuple[str, str]:
    """Return seconds of a process that captions one image, and its peak in MB (Linux)."""
    best, memory = float("inf"), 0
    for _ in range(3):
        started = time.perf_counter()
        line = [sys.executable, "-c", _CHILD, str(folder), str(image)]
        done = subprocess.run(line, check=True, capture_output=True, text=True)
        best = min(best, time.perf_counter() - started)
        memory = int(done.stderr.split()[-1])
    return f"{best:.2f}", f"{memory / 1024:.0f}"


def _print(*fields: Any) -> None:
    print("|", " | ".join(map(str, fields)), "|", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
