"""Measure the service under load, beside captioning the same photographs from their folder.

  load_service.py photos --seconds 60                  # starts a service of its own, and ends it
  load_service.py photos --url http://127.0.0.1:8000   # one that runs already

Each client sends one photograph after the other, over a connection that it keeps. Clients and
service share this machine's cores. The folder is captioned by a process of its own, before and
after the service; the middle of its rates is what the service is compared with.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from urllib.parse import urlsplit

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import DataError

BOUNDARY = "load-service-boundary"
FOLDER_RATE = """
import sys, time
from captioner.inference.captioner import Captioner
from captioner.inference.folder import caption_files
from captioner.data.listing import find_images
captioner = Captioner.from_pretrained(sys.argv[2] or None)
search, files = captioner.search(), find_images(sys.argv[1])[:int(sys.argv[3])]
caption_files(captioner, files[:64], search)
started = time.monotonic()
caption_files(captioner, files, search)
print(len(files) / (time.monotonic() - started))
"""


@dataclass
class Outcome:
    """What came of the requests.

    Attributes:
        seconds: That each answered request took.
        statuses: How many answers had each status; 0 is a broken connection.
        wrong: Captions that weren't those of the same photograph before.
    """

    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("images", type=Path, help="a folder of photographs")
    parser.add_argument("--checkpoint", default="", help="checkpoint directory or name")
    parser.add_argument("--url", help="of a service that runs already")
    parser.add_argument("--clients", type=int, default=32, help="clients at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load, in seconds")
    parser.add_argument("--photographs", type=int, default=1000, help="how many are sent in turn")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of serve")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    args = _parser().parse_args(argv)
    paths = sorted(path for path in args.images.glob("*.jpg"))[: args.photographs]
    if not paths:
        raise DataError(f"{args.images}: no .jpg in it")
    requests = [_request(path) for path in paths]
    rates = [] if args.url else [_folder_rate(args)]
    process, url = (None, args.url) if args.url else _start(args)
    try:
        outcome = asyncio.run(_load(url, requests, args.clients, args.seconds))
    finally:
        code = _stop(process)
    if not args.url:
        rates.append(_folder_rate(args))
    _report(outcome, args.seconds, rates)
    if code:
        print(f"the service ended with {code}")
    failures = sum(n for status, n in outcome.statuses.items() if status not in (200, 503))
    return 1 if failures or code or outcome.wrong else 0


def _request(path: Path) -> bytes:
    """Return a whole request for a photograph's caption."""
    head = (
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; name=images; "
        f'filename="{path.name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    )
    body = head.encode() + path.read_bytes() + f"\r\n--{BOUNDARY}--\r\n".encode()
    return (
        "POST /caption HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _folder_rate(args: argparse.Namespace) -> float:
    words = [str(args.images), args.checkpoint, str(args.photographs)]
    run = subprocess.run(
        [sys.executable, "-c", FOLDER_RATE, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    return float(run.stdout.split()[-1])


def _start(args: argparse.Namespace) -> tuple[subprocess.Popen[str], str]:
    code = "import sys; from captioner.commands import main; sys.exit(main())"
    words = ["serve", *([args.checkpoint] if args.checkpoint else []), "--port", "0", *args.serve]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout
    return process, process.stdout.readline().split()[-1]


def _stop(process: subprocess.Popen[str] | None) -> int:
    if process is None:
        return 0
    process.terminate()
    return process.wait(60)


async def _load(url: str, requests: Sequence[bytes], clients: int, seconds: float) -> Outcome:
    address, outcome, numbers = urlsplit(url), Outcome(), count()
    known: dict[int, str] = {}
    for _ in range(2):  # the first requests aren't counted
        outcome = Outcome()
        end = time.monotonic() + (seconds if known else min(3.0, seconds))
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(
                    _client(address.hostname, address.port, requests, numbers, end, outcome, known)
                )
    return outcome


async def _client(
    host: str | None,
    port: int | None,
    requests: Sequence[bytes],
    numbers: "count[int]",
    end: float,
    outcome: Outcome,
    known: dict[int, str],
) -> None:
    connection = None
    while (started := time.monotonic()) < end:
        which = next(numbers) % len(requests)
        try:
            connection = connection or await asyncio.open_connection(host, port)
            reader, writer = connection
            writer.write(requests[which])
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode().split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
            content = json.loads(await reader.readexactly(int(headers["content-length"])))
        except (OSError, asyncio.IncompleteReadError):
            outcome.statuses[0] += 1
            connection = None
            continue
        status = int(lines[0].split()[1])
        outcome.statuses[status] += 1
        if status == 200:
            outcome.seconds.append(time.monotonic() - started)
            caption = content["images"][0]["captions"][0]["text"]
            outcome.wrong += known.setdefault(which, caption) != caption
        elif status == 503:
            await asyncio.sleep(float(headers["retry-after"]))
        if headers.get("connection") == "close":
            writer.close()
            connection = None


def _report(outcome: Outcome, seconds: float, rates: Sequence[float]) -> None:
    rate = len(outcome.seconds) / seconds
    print(f"service: {rate:.1f} images/s")
    if rates:
        folder = statistics.median(rates)
        each = ", ".join(f"{one:.1f}" for one in rates)
        print(f"folder:  {each} images/s; service / folder {rate / folder:.2f}")
    if len(outcome.seconds) > 1:
        parts = statistics.quantiles(outcome.seconds, n=100)
        print(
            f"latency: median {1000 * parts[49]:.0f} ms, 99th percentile {1000 * parts[98]:.0f} ms"
        )
    told = ", ".join(f"{number} x {status}" for status, number in sorted(outcome.statuses.items()))
    print(f"answers: {told}; captions that differ from those before: {outcome.wrong}")


if __name__ == "__main__":
    raise SystemExit(main())
