"""Caption what is sent over HTTP, with a page to do it by hand.

  captioner serve                                   # the captioner that comes with the package
  captioner serve RUN --port 8080
  captioner serve RUN --host 0.0.0.0 --api-key-file keys.txt

  curl --form images=@dog.jpg --form images=@cat.jpg --form n_best=3 http://127.0.0.1:8000/caption

The page is at /, what can be asked at /openapi.json, numbers for Prometheus at /metrics, and
/health tells whether it serves. Images that come together are captioned together, with the
captions that each would get alone.

Only this machine is heard unless --host says otherwise. Nothing is fetched: images are what clients
send. With API keys, one a line in the file or in the environment variable CAPTIONER_API_KEY, all
but the page and /health need one: "Authorization: Bearer KEY".

Ctrl-C and SIGTERM end it after the requests that it has accepted; its exit code is then 0. Each
request is a line on standard error. Needs an extra: pip install 'captioner[serve]'.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from captioner.checkpoint_directory import default_checkpoint, find_checkpoint
from captioner.cli import HelpFormatter, Parser, command
from captioner.commands.caption_options import add_device_options
from captioner.errors import UsageError
from captioner.experiment_file import attribute_docs
from captioner.files import read_text
from captioner.progress import log_line, print_line
from captioner.service.settings import ServiceConfig

LOOPBACK_HOST = "127.0.0.1"
KEY_VARIABLE = "CAPTIONER_API_KEY"


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner serve", description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        help="checkpoint directory, a run's folder, or the name of a captioner of the package's",
    )
    parser.add_argument("--host", default=LOOPBACK_HOST, help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes any that is free")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"API keys, one a line; or one in the environment variable {KEY_VARIABLE}",
    )
    add_device_options(parser)
    group = parser.add_argument_group("limits")
    explained = attribute_docs(ServiceConfig)
    for field in dataclasses.fields(ServiceConfig):
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=explained[field.name],
        )
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Serve until a signal comes."""
    args = _parser().parse_args(argv)
    if not 0 <= args.port < 65536:
        raise UsageError(f"--port: 0 to 65535 was expected, found {args.port}")
    names = [field.name for field in dataclasses.fields(ServiceConfig)]
    settings = ServiceConfig(**{name: getattr(args, name) for name in names})
    keys = _read_keys(args.api_key_file)
    try:
        import prometheus_client  # noqa: F401
        import tornado  # noqa: F401
    except ImportError:
        raise UsageError("serving needs an extra: pip install 'captioner[serve]'") from None

    from captioner.service.processes import start_forkserver

    start_forkserver()  # it imports for seconds, meanwhile this process does, too
    from captioner.service.server import listen

    with listen(args.host, args.port) as listener:  # what is wrong with it needn't wait
        _serve(args, settings, listener, keys)
    log_line("every request that was accepted is answered")
    return 0


def _serve(
    args: argparse.Namespace,
    settings: ServiceConfig,
    listener: socket.socket,
    keys: Sequence[str],
) -> None:
    from captioner.service.server import LOOPBACK, Server
    from captioner.service.service import CaptionService
    from captioner.stopping import StopSignals

    checkpoint = find_checkpoint(args.checkpoint or default_checkpoint())
    started = CaptionService(checkpoint, args.device, args.precision, settings)
    with contextlib.closing(started) as service, StopSignals() as stop:
        stop.deferred = True
        server = Server(service, args.host, listener, keys)

        def ready() -> None:
            if args.host not in LOOPBACK and not keys:
                log_line("warning: whoever reaches this address may use it (--api-key-file)")
            print_line(f"serving on {server.address}")
            sys.stdout.flush()

        asyncio.run(server.run(stop, ready))


def _read_keys(file: Path | None) -> list[str]:
    """Return the API keys that are asked for; none where no key is."""
    text = read_text(file, UsageError) if file else os.environ.get(KEY_VARIABLE, "")
    keys = [line.strip() for line in text.splitlines() if line.strip()]
    if file and not keys:
        raise UsageError(f"--api-key-file {file}: it holds no key")
    if not all(key.isascii() and key.isprintable() and " " not in key for key in keys):
        raise UsageError("API keys: printable ASCII without spaces was expected")
    return keys
