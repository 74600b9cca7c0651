"""Measure captioning of large folders: seconds to the first caption, memory, going on, rate.

  benchmark_folder.py RUN --image photo.jpg --counts 1000 100000 1000000 --captions 20000
  benchmark_folder.py RUN --image photo.jpg --resume 1000000
  benchmark_folder.py RUN --images photos            # streamed into files, beside in memory alone

The folders are made of links to one photograph, flat, which is the hardest case.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import psutil

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.listing import ImageFile, Listing, find_images
from captioner.inference.captioner import Captioner
from captioner.inference.folder import caption_files, caption_stream
from captioner.inference.job import JobSettings, journal_path, run_job
from captioner.inference.journal import FileState, Journal
from captioner.inference.outputs import Format, growing_output
from captioner.inference.records import RankedCaption, Record

MOST_LINKS = 50_000  # of a file; ext4 allows 65,000
LEFT = 1000  # images that a job still has to caption


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="checkpoint directory, or a run's folder")
    parser.add_argument("--image", type=Path, help="a photograph that the folders are made of")
    parser.add_argument("--counts", type=int, nargs="*", default=[], help="sizes of folders")
    parser.add_argument(
        "--captions", type=int, default=0, help="caption so many images of the last, for memory"
    )
    parser.add_argument(
        "--resume", type=int, metavar="COUNT", help=f"go on in so many, all but {LEFT:,} done"
    )
    parser.add_argument("--images", type=Path, help="photographs to compare the rates with")
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        for count in args.counts:
            folder = _make_folder(Path(scratch) / str(count), args.image, count)
            captions = args.captions if count == args.counts[-1] else 0
            _measure(args.checkpoint, folder, Path(scratch) / f"{count}.jsonl", captions)
        if args.resume:
            folder = _make_folder(Path(scratch) / "resume", args.image, args.resume)
            _measure_resuming(args.checkpoint, folder, Path(scratch) / "resume.jsonl", args.resume)
        if args.images:
            _compare_rates(args.checkpoint, args.images, Path(scratch), args.rounds)
    return 0


def _make_folder(folder: Path, image: Path, count: int) -> Path:
    folder.mkdir()
    source = folder
    for number in range(count):
        path = folder / f"{number:08}.jpg"
        if number % MOST_LINKS:
            os.link(source, path)
        else:
            source = path
            shutil.copy(image, source)
    return folder


def _start(checkpoint: Path, folder: Path, output: Path) -> subprocess.Popen[bytes]:
    code = "import sys; from captioner.commands import main; sys.exit(main())"
    words = [sys.executable, "-c", code, "caption"]
    words += [str(checkpoint), str(folder), "--output", str(output)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait_for(process: subprocess.Popen[bytes], output: Path, size: int) -> float:
    """Wait until an output is larger; return the seconds."""
    started = time.monotonic()
    while process.poll() is None and (not output.exists() or output.stat().st_size <= size):
        time.sleep(0.01)
    return time.monotonic() - started


def _megabytes(process: subprocess.Popen[bytes]) -> float:
    return psutil.Process(process.pid).memory_info().rss / 1e6


def _measure(checkpoint: Path, folder: Path, output: Path, captions: int) -> None:
    process = _start(checkpoint, folder, output)
    seconds = _wait_for(process, output, 0)
    line = f"{folder.name:>9} files: first caption after {seconds:.1f} s, "
    print(f"{line}{_megabytes(process):.0f} MB", flush=True)
    done, each = 0, max(1, captions // 4)
    while process.poll() is None and done < captions:
        time.sleep(1)
        lines = _count_lines(output)
        if lines >= done + each or lines >= captions:
            done = lines
            print(f"{'':9}        {done} captions: {_megabytes(process):.0f} MB", flush=True)
    process.send_signal(signal.SIGINT)
    process.wait()


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _measure_resuming(checkpoint: Path, folder: Path, output: Path, count: int) -> None:
    process = _start(checkpoint, folder, output)  # a job of our own begins with its signature
    _wait_for(process, output, 0)
    process.send_signal(signal.SIGINT)
    process.wait()
    begun = _count_lines(output)
    with Journal(journal_path(output)) as journal:
        lines = growing_output(output, Format())
        lines.cut(output.stat().st_size)
        ends = journal.fact("ends")
        images = islice(enumerate(Listing.of_inputs([folder]).images(quiet=True)), count - LEFT)
        images = islice(images, begun, None)
        while batch := list(islice(images, 5000)):
            records = [_record(image) for _, image in batch]
            for position, image in batch:
                journal.begin(image, position, FileState.of(image.path))
            lines.append(records)
            journal.commit(records, ends | {output.name: lines.end})
    size = output.stat().st_size
    process = _start(checkpoint, folder, output)
    seconds = _wait_for(process, output, size)
    print(
        f"{count:>9} files of which {count - LEFT} are done: first new caption after "
        f"{seconds:.1f} s, {_megabytes(process):.0f} MB",
        flush=True,
    )
    process.wait()
    print(f"{'':9}        {_count_lines(output)} lines at the end")


def _record(image: ImageFile) -> Record:
    captions = (RankedCaption("a dog runs through the grass", -7.123456, -1.017637),)
    return Record(image.image_id, image.name, str(image.path), captions, 224, 224)


def _compare_rates(checkpoint: Path, images: Path, scratch: Path, rounds: int) -> None:
    captioner = Captioner.from_pretrained(checkpoint)
    search, files = captioner.search(), find_images(images)
    caption_files(captioner, files, search)
    for number in range(rounds):
        started = time.monotonic()
        caption_files(captioner, files, search)
        plain = len(files) / (time.monotonic() - started)
        outputs = tuple(scratch / f"{number}.{kind}" for kind in ("jsonl", "csv"))
        settings = JobSettings(outputs, quiet=True)
        started = time.monotonic()
        stream = partial(caption_stream, captioner, search=search)
        run_job(stream, Listing.of_inputs([images]), search, settings, {})
        streamed = len(files) / (time.monotonic() - started)
        print(
            f"in memory {plain:.1f} images/s, into .jsonl and .csv {streamed:.1f} images/s, ratio "
            f"{streamed / plain:.3f}",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
