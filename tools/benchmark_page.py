r"""Measure the page that ``captioner page`` writes, in headless Chromium.

python tools/benchmark_page.py site photographs --count 200
python tools/benchmark_page.py site data/flickr8k/images \
    --annotations data/flickr8k/dataset_flickr8k.json --split val --count 200

Compares captions and pixels with those of captioner.runtime on the same files, and takes the time.
Needs playwright (pip install playwright), onnxruntime and Chromium.
"""

import argparse
import base64
import contextlib
import functools
import http.server
import json
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.listing import find_images, listed_images
from captioner.errors import UsageError
from captioner.page.writer import PAGE_FILE, is_page
from captioner.progress import print_line
from captioner.runtime import OnnxCaptioner

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

OPEN = """async (threads) => {
  const { openCaptioner } = await import("./client.js");
  window.captioner = await openCaptioner(() => {}, threads);
  window.chosen = document.createElement("input");
  Object.assign(chosen, { type: "file", multiple: true, id: "measured" });
  document.body.append(chosen);
}"""
CAPTION = """async ([place, size]) => {
  const changes = { beam_size: size, n_best: 1 };
  const { captions, seconds } = await captioner.caption(chosen.files[place], changes);
  return [captions[0].text, seconds.reading, seconds.describing];
}"""
PIXELS = """async (place) => {
  const { decode, readable, toPixels } = await import("./preprocessing.js");
  const bitmap = await decode(chosen.files[place]);
  const pixels = toPixels(readable(bitmap), captioner.config.preprocessing);
  return btoa(Array.from(pixels, (each) => String.fromCharCode(each)).join(""));
}"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the page so that it may compute in several threads."""

    def end_headers(self) -> None:
        """Isolate the page from others."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def log_message(self, *words: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[str]:
    handler = functools.partial(_Handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@contextlib.contextmanager
def _chromium() -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise UsageError("this needs playwright: pip install playwright") from None
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        raise UsageError("this needs the browser Chromium")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


def _measure(
    browser: Any, address: str, paths: Sequence[str], beam_size: int, threads: int
) -> tuple[list[str], dict[str, float], list[np.ndarray]]:
    """Return the captions of photographs, median seconds of the parts, and the pixels."""
    tab = browser.new_page()
    tab.goto(address)
    started = time.perf_counter()
    tab.evaluate(OPEN, threads)
    opened = time.perf_counter() - started
    tab.set_input_files("#measured", list(paths))
    tab.evaluate(CAPTION, [0, beam_size])  # the first takes longer
    found = [tab.evaluate(CAPTION, [place, beam_size]) for place in range(len(paths))]
    pixels = []
    for place in range(len(paths)):
        content = base64.b64decode(tab.evaluate(PIXELS, place))
        pixels.append(np.frombuffer(content, np.uint8))
    tab.close()
    texts, reading, describing = zip(*found, strict=True)
    seconds = {"reading": reading, "describing": describing}
    return (
        list(texts),
        {
            "opening": opened,
            **{name: statistics.median(values) for name, values in seconds.items()},
        },
        pixels,
    )


def _parser() -> argparse.ArgumentParser:
    parser = Parser("benchmark_page.py", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("page", type=Path, help="what captioner page wrote")
    parser.add_argument("photographs", type=Path, help="folder")
    parser.add_argument("--annotations", type=Path, help="take the images that are listed there")
    parser.add_argument("--split", help="of them, those of a split")
    parser.add_argument("--count", type=int, default=200, help="how many")
    parser.add_argument("--beam-size", type=int, default=5, help="hypotheses kept")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of wasm")
    return parser


def _paths(args: argparse.Namespace) -> list[str]:
    if args.annotations:
        images = listed_images(args.photographs, args.annotations, args.split)
    else:
        images = find_images(args.photographs)
    return [str(image.path) for image in islice(images, args.count)]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    if not is_page(args.page):
        raise UsageError(f"{args.page}: captioner page FOLDER makes one")
    paths = _paths(args)
    captioner = OnnxCaptioner(args.page / "model", threads=1)
    expected = captioner.caption(paths, batch_size=1, beam_size=args.beam_size)
    wanted = [captioner.pixels(path).ravel() for path in paths]
    files = json.loads((args.page / PAGE_FILE).read_text(encoding="utf-8"))["files"]
    size = sum(size for name, size in files.items() if not name.endswith(".wasm"))
    print_line(f"fetched: {size / 1e6:.2f} MB and {(sum(files.values()) - size) / 1e6:.2f} MB wasm")
    with _chromium() as browser, _served(args.page) as address:
        for threads in args.threads:
            texts, seconds, pixels = _measure(browser, address, paths, args.beam_size, threads)
            equal = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))
            print_line(
                f"threads {threads}, beam {args.beam_size}: {equal} of {len(paths)} captions equal "
                f"({equal / len(paths):.1%}); seconds: "
                + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items())
            )
    gaps = np.concatenate([abs(a - b.astype(int)) for a, b in zip(pixels, wanted, strict=True)])
    print_line(
        f"pixels: {np.mean(gaps == 0):.2%} equal, {np.mean(gaps <= 1):.2%} within 1, "
        f"largest difference {gaps.max()}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
