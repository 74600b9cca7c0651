"""List the caches of CNN features, and remove those that are no longer wanted.

  captioner cache list
  captioner cache prune --unused-for 90         # what would be removed, and its size
  captioner cache prune resnet101 --yes         # removes it

A store holds the features of one CNN with one preprocessing. What is removed is computed again
when it is needed.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from captioner.cli import HelpFormatter, Parser, command
from captioner.errors import CacheError, UsageError, did_you_mean
from captioner.progress import log_line
from captioner.training.feature_store import (
    StoreInfo,
    default_cache_dir,
    list_stores,
    remove_store,
)


def _parser() -> argparse.ArgumentParser:
    parser = Parser("captioner cache", description=__doc__, formatter_class=HelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, metavar="list|prune")
    for action, purpose in {"list": "show all stores", "prune": "remove stores"}.items():
        subparser = actions.add_parser(action, help=purpose, formatter_class=HelpFormatter)
        subparser.add_argument(
            "--cache-dir",
            metavar="DIR",
            type=Path,
            default=default_cache_dir(),
            help="folder of the caches, as data.cache_dir sets it",
        )
    add = subparser.add_argument  # prune's
    add("names", nargs="*", metavar="NAME", help="only these stores, or all of these CNNs")
    add("--unused-for", metavar="DAYS", type=_days, help="only those unused for so many days")
    add(
        "--old",
        action="store_true",
        help="only those of an older format or damaged",
    )
    add("--all", action="store_true", help="all stores")
    add("--yes", action="store_true", help="remove them; otherwise they are only shown")
    return parser


def _days(text: str) -> float:
    days = float(text)
    if not 0 <= days < float("inf"):
        raise ValueError(text)
    return days


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    options = _parser().parse_args(argv)
    stores = list_stores(options.cache_dir)
    if options.action == "list":
        print(_table(options.cache_dir, stores))
        return 0
    chosen = _chosen(options, stores)
    print(_table(options.cache_dir, chosen))
    if not options.yes:
        print(f"nothing is removed yet: with --yes {_gigabytes(chosen)} are freed")
        return 0
    removed = []
    for store in chosen:
        try:
            remove_store(store.folder)
            removed.append(store)
        except CacheError as error:
            log_line(f"error: {error}")
    print(f"removed {len(removed)} of {len(chosen)}: {_gigabytes(removed)} freed")
    return 0 if len(removed) == len(chosen) else CacheError.exit_code


def _chosen(options: argparse.Namespace, stores: Sequence[StoreInfo]) -> list[StoreInfo]:
    """Return the stores that meet every condition given."""
    if not (options.names or options.unused_for is not None or options.old or options.all):
        raise UsageError("captioner cache prune: name stores, or give --unused-for, --old or --all")
    known = {name for store in stores for name in _names(store)}
    for name in options.names:
        if name not in known:
            hint = did_you_mean(name, known) or "; see 'captioner cache list'"
            raise UsageError(f"{options.cache_dir}: no store '{name}'{hint}")
    latest = time.time() - 86_400 * (options.unused_for or 0)
    return [
        store
        for store in stores
        if (not options.names or _names(store) & set(options.names))
        and (options.unused_for is None or store.last_used <= latest)
        and not (options.old and store.in_use)
    ]


def _names(store: StoreInfo) -> set[str]:
    return {store.folder.name, *store.encoder.split()[:1]}


def _table(cache_dir: Path, stores: Sequence[StoreInfo]) -> str:
    lines = [f"{len(stores)} stores, {_gigabytes(stores)}, in {cache_dir}"]
    for store in stores:
        last_used = time.strftime("%Y-%m-%d", time.localtime(store.last_used))
        text = (
            f"{store.folder.name}  {store.images:9,} images  {_gigabytes([store]):>8}  "
            f"used {last_used}  {store.encoder} ({store.details})"
            + "  old format, never read"
            * (not store.in_use)
        )
        lines.append("".join(letter if letter.isprintable() else "?" for letter in text))
    return "\n".join(lines)


def _gigabytes(stores: Sequence[StoreInfo]) -> str:
    return f"{sum(store.size for store in stores) / 1e9:.2f} GB"
