"""A job over many images: its outputs grow as it goes, and the same command goes on after any end.

Read from ``run_job`` downward. ``journal`` keeps what is done, ``outputs`` and ``sidecars`` write.
"""

import dataclasses
import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.config import SearchConfig
from captioner.data.listing import Counter, ImageFile, Listing
from captioner.errors import UsageError
from captioner.files import open_regular
from captioner.inference.gallery import Attention, write_gallery
from captioner.inference.journal import Entry, FileState, Journal
from captioner.inference.metadata import Metadata
from captioner.inference.outputs import (
    GROWING,
    Format,
    failures_output,
    growing_output,
    output_suffix,
    write_output,
)
from captioner.inference.records import Record
from captioner.inference.sidecars import Sidecars
from captioner.progress import Progress, log_line
from captioner.stopping import StopSignals

# Captions images in order, batch by batch.
Stream = Callable[[Iterable[ImageFile]], Iterator[list[Record]]]

JOURNAL = ".journal"
IN_PLACE = Path("in-place")
MOST_WARNINGS = 20  # printed; all are in the failures file


@dataclass(frozen=True)
class JobSettings:
    """How a job's results are kept.

    Attributes:
        outputs: Files: .jsonl and .csv grow, .json and .sqlite are written at the end.
        redo: Begin anew, whatever the outputs hold.
        append: Go on although the checkpoint, the settings or the inputs are others.
        retry: Try images again that couldn't be captioned.
        has_hash: Tell whether a file changed by its content, not by its size and time; and keep
            the SHA-256 of each.
        csv_safe: As in ``outputs.Format``.
        sidecars: Write a text file beside each image.
        metadata: Write the caption into each image's own metadata: into copies in this folder, or,
            for ``IN_PLACE``, into the images themselves.
        overwrite: Overwrite text files and descriptions that this tool did not write.
        gallery: A page that shows all images; see ``gallery.write_gallery``.
        batch_size: As in ``caption_stream``.
        workers: As in ``caption_stream``.
        quiet: Show no progress, and no warnings of single images.
    """

    outputs: tuple[Path, ...]
    redo: bool = False
    append: bool = False
    retry: bool = False
    has_hash: bool = False
    csv_safe: bool = False
    sidecars: bool = False
    metadata: Path | None = None
    overwrite: bool = False
    gallery: Path | None = None
    batch_size: int = 0
    workers: int = -1
    quiet: bool = False


@dataclass
class Summary:
    """What a job has done.

    Attributes:
        captioned: Images captioned now.
        total: Images captioned now and before.
        failed: Images, now and before, that couldn't be.
        failed_names: The names of some of them.
        seconds: How long it took.
        empty: The names of some images whose captions are empty.
        empty_count: How many there are.
        sidecars_left: Text files that were left as they were.
        metadata_left: Images whose metadata was.
    """

    captioned: int = 0
    total: int = 0
    failed: int = 0
    failed_names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    empty: list[str] = field(default_factory=list)
    empty_count: int = 0
    sidecars_left: int = 0
    metadata_left: int = 0

    def add(self, records: Iterable[Record]) -> None:
        """Count a batch."""
        for record in records:
            self.captioned += not record.error
            if record.captions and not record.captions[0].text:
                self.empty_count += 1
                self.empty += [record.name] if len(self.empty) < 5 else []


def journal_path(output: Path) -> Path:
    """Return where the journal of a job is whose first output this is."""
    return output.with_name(output.name + JOURNAL)


def run_job(
    stream: Stream,
    listing: Listing,
    search: SearchConfig,
    settings: JobSettings,
    signature: Mapping[str, Any],
    attention: Attention | None = None,
) -> Summary:
    """Caption a listing's images into files; go on where an earlier run ended.

    Args:
        stream: What captions the images.
        listing: What to caption.
        search: How.
        settings: What becomes of the captions.
        signature: What must be the same when the job goes on, by the names that a user knows.
        attention: What the gallery shows of the decoder's attention; see ``gallery.attention_of``.

    Raises:
        Stopped: By Ctrl-C or SIGTERM, after the batch in flight; what was captioned is kept.
        CaptionerError: Another process writes there, or the outputs are of another job.
        OSError: The disk is full, say; what was captioned is kept.
    """
    path = journal_path(settings.outputs[0])
    if not path.exists():
        _check_absent(settings, settings.outputs)
    is_needed = True
    try:
        with StopSignals() as signals, Journal(path) as journal:
            signals.deferred = True
            job = _Job(stream, listing, search, settings, journal, attention)
            try:
                job.prepare({**signature, "inputs": f"{listing.key} {listing.shard or ''}".strip()})
                job.run(signals)
            finally:
                is_needed = sum(journal.counts()) > 0
    finally:
        if not is_needed:  # there is nothing to go on from
            path.unlink(missing_ok=True)
    return job.summary


def _check_absent(settings: JobSettings, paths: Iterable[Path]) -> None:
    """Refuse to overwrite files that aren't this job's."""
    for path in paths:
        if path.exists() and not settings.redo:
            raise UsageError(
                f"{path} is there, and not from a job that can go on (it has no "
                f"{journal_path(settings.outputs[0])}); --redo overwrites it"
            )


class _Job:
    def __init__(
        self,
        stream: Stream,
        listing: Listing,
        search: SearchConfig,
        settings: JobSettings,
        journal: Journal,
        attention: Attention | None,
    ) -> None:
        self.stream, self.listing, self.attention = stream, listing, attention
        self.settings, self.journal = settings, journal
        form = Format(max(search.n_best, 1), settings.has_hash, settings.csv_safe)
        self.form = form
        paths = [path for path in settings.outputs if output_suffix(path) in GROWING]
        self.growing = [growing_output(path, form) for path in paths]
        self.growing.append(failures_output(settings.outputs[0]))
        self.whole = [path for path in settings.outputs if path not in paths]
        self.sidecars = Sidecars(journal, settings.overwrite)
        self.metadata = None
        if settings.metadata:
            copies = None if settings.metadata == IN_PLACE else settings.metadata
            self.metadata = Metadata(copies, settings.overwrite)
        self.summary = Summary()

    # --- before -------------------------------------------------------------------------------

    def prepare(self, signature: dict[str, Any]) -> None:
        """Have the outputs stand where the journal says, or refuse to go on."""
        if self.settings.redo:
            self.journal.forget_records()
        known = self.journal.fact("signature")
        if known and known != signature and not self.settings.append:
            raise UsageError(self._changes(known, signature))
        states: dict[str, list[int]] = self.journal.fact("states", {})
        self._check_untouched(states)
        with self.journal.transaction():
            self.journal.set_fact("signature", signature)
            self.journal.set_fact("states", {})
            self.first = self.journal.first_position(signature["inputs"])
        ends = self.journal.fact("ends", {})
        for output in self.growing:
            if not output.cut(ends.get(output.path.name, 0)) or output.path.name not in ends:
                output.write(self.journal.records())
        with self.journal.transaction():
            self._keep_ends()
            self.journal.set_fact("whole", [path.name for path in self.whole])

    def _changes(self, known: dict[str, Any], now: dict[str, Any]) -> str:
        """Say what is another now than when the job began."""
        changed = [
            f"{name} was {known.get(name)} and is {value}"
            for name, value in now.items()
            if known.get(name) != value
        ]
        return (
            f"{self.settings.outputs[0]} was begun otherwise: {'; '.join(changed)}. --redo begins "
            "anew, --append keeps what is there and goes on"
        )

    def _check_untouched(self, states: dict[str, list[int]]) -> None:
        """Refuse outputs that were changed by others since they were finished, or aren't ours."""
        known = self.journal.fact("ends", {}).keys() | self.journal.fact("whole", [])
        _check_absent(self.settings, (p for p in self.settings.outputs if p.name not in known))
        for path in self.settings.outputs:
            state = FileState.of(path)
            wanted = states.get(path.name)
            if wanted and path.exists() and [state.size, state.time] != wanted:
                raise UsageError(
                    f"{path} was changed since this tool wrote it; move it away to have it written "
                    "again, or --redo overwrites it"
                )

    # --- captioning ---------------------------------------------------------------------------

    def run(self, signals: StopSignals) -> None:
        """Caption what isn't yet, and finish the outputs."""
        started, settings = time.monotonic(), self.settings
        if settings.sidecars:
            self.sidecars.write_missing()
        while self.metadata and (records := self.journal.records_without("described")):
            self._describe(records)
        done = sum(self.journal.counts())
        with (
            Progress("captioning", None, "image", hidden=settings.quiet) as bar,
            Counter(self.listing, lambda count: bar.set_total(max(0, count - done))) as counter,
        ):
            self._caption_all(bar, counter, signals)
        self.summary.seconds = time.monotonic() - started
        self._finish()

    def _caption_all(self, bar: Progress, counter: Counter, signals: StopSignals) -> None:
        """Caption what isn't yet; each batch reaches the disk while the next is captioned."""
        with ThreadPoolExecutor(1, "writer") as writer:
            writing: Future[None] | None = None
            try:
                for records in self.stream(self._todo()):
                    if writing:
                        writing.result()
                    writing = writer.submit(self._keep, records)
                    bar.update(len(records), self._note())
                    counter.begin()  # not sooner: the first caption shouldn't wait for it
                    signals.raise_if_received()
            finally:
                if writing:
                    writing.result()

    def _todo(self) -> Iterator[ImageFile]:
        """Walk through the images that are to be captioned, and compare the others."""
        done, seen, last_turn = sum(self.journal.counts()), 0, 0
        for position, image in enumerate(self.listing.images(self.settings.quiet), self.first):
            if self.journal.is_begun(image):  # it is in the listing twice
                continue
            entry, state = self.journal.entry(image), FileState.of(image.path)
            if entry and self._is_unchanged(image, entry, state):
                seen += 1
                if entry.turn < last_turn:
                    self._note_disorder()
                last_turn = entry.turn
                if entry.position != position:
                    self.journal.move(image, position)
                continue
            # Its line would stand behind those of images that follow it in the listing.
            if entry or seen < done:
                self._note_disorder()
            seen += entry is not None
            self.journal.begin(image, position, state)
            yield image

    def _is_unchanged(self, image: ImageFile, entry: Entry, state: FileState) -> bool:
        if entry.failed and self.settings.retry:
            return False
        if self.settings.has_hash and not entry.failed:
            return entry.sha256 == file_sha256(image.path)
        return entry.state == state

    def _note_disorder(self) -> None:
        """Have the growing outputs written anew at the end: they aren't in the listing's order."""
        if self.journal.fact("in_order", True):
            self.journal.set_fact("in_order", False)

    def _keep(self, records: list[Record]) -> None:
        """Have a batch's records on the disk."""
        if self.settings.has_hash:
            records = _with_hashes(records)
        for output in self.growing:
            output.append(records)
        self.journal.commit(records, self._ends())
        if self.settings.sidecars:
            self.sidecars.write(records)
        if self.metadata:
            self._describe([record for record in records if not record.error])
        self.summary.add(records)
        for record in records:
            if record.error:
                self._warn(record)

    def _describe(self, records: list[Record]) -> None:
        if self.metadata:
            self.journal.keep_described(records, self.metadata.write(records))

    def _warn(self, record: Record) -> None:
        self.summary.failed += 1
        if self.settings.quiet or self.summary.failed > MOST_WARNINGS:
            return
        log_line(f"warning: {record.error}")
        if self.summary.failed == MOST_WARNINGS:
            log_line(f"warning: further failures are in {self.growing[-1].path} alone")

    def _note(self) -> str:
        return f"{self.summary.failed} failed" if self.summary.failed else ""

    def _ends(self) -> dict[str, int]:
        return {output.path.name: output.end for output in self.growing}

    def _keep_ends(self) -> None:
        self.journal.set_fact("ends", self._ends())

    # --- after --------------------------------------------------------------------------------

    def _finish(self) -> None:
        """Put the outputs into the listing's order, and write those that are written whole."""
        self.summary.total, self.summary.failed = self.journal.counts()
        self.summary.failed_names = self.journal.failed_names()
        self.summary.sidecars_left = self.sidecars.left
        self.summary.metadata_left = self.metadata.left if self.metadata else 0
        if not self.summary.total:
            return
        if not self.journal.fact("in_order", True):
            for output in self.growing:
                output.write(self.journal.records())
            with self.journal.transaction():
                self._keep_ends()
                self.journal.set_fact("in_order", True)
        for path in self.whole:
            if self.summary.captioned or not path.exists():
                write_output(path, self.journal.records(), self.form)
        page = self.settings.gallery
        if page and (self.summary.captioned or not page.exists()):
            self._write_gallery(page)
        states = {path: FileState.of(path) for path in self.settings.outputs}
        self.journal.set_fact(
            "states", {path.name: [state.size, state.time] for path, state in states.items()}
        )

    def _write_gallery(self, page: Path) -> None:
        title = f"Captions of {self.settings.outputs[0].stem}"
        write_gallery(page, self.journal.records(), title, self.attention, self.settings.quiet)


def _with_hashes(records: list[Record]) -> list[Record]:
    """Return records with the SHA-256 of their files, which the system still has in memory."""
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        digests = threads.map(
            lambda record: "" if record.error else file_sha256(record.path), records
        )
        pairs = zip(records, digests, strict=True)
        return [dataclasses.replace(record, sha256=digest) for record, digest in pairs]


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits; "" where it can't be read."""
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except (OSError, ValueError):
        return ""
