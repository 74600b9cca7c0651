"""The model in a thread of its own, which captions together what comes together."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

import torch

from captioner.config import SearchConfig
from captioner.device import is_out_of_memory
from captioner.errors import RequestError
from captioner.inference.captioner import Caption, Captioner

# Told of each batch: how many images, and how many seconds they took.
Observer = Callable[[int, float], object]


@dataclass(frozen=True)
class Wish:
    """How an image is to be captioned.

    Attributes:
        search: The settings of search.
        attention: Whether what the decoder looked at is wanted.
    """

    search: SearchConfig
    attention: bool = False


@dataclass(eq=False)
class _Job:
    """An image to be captioned.

    Attributes:
        pixels: (3, S, S), uint8.
        wish: How.
        key: What its samples depend on.
        captions: Become known here.
        arrived: When it came, in seconds of ``time.monotonic``.
    """

    pixels: torch.Tensor
    wish: Wish
    key: int
    captions: Future[list[Caption]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Captions images in one thread, as many together as there are.

    The CNN sees all of them at once, whatever is wished of each; captions are searched for
    together where the same is wished. The captions are those that each image alone would get.

    Args:
        captioner: The captioner; nobody else may use it meanwhile.
        max_batch: Most images at a time.
        max_wait: How long an image waits for others, in seconds.
        observe: Is told of each batch, in this thread.
    """

    def __init__(
        self,
        captioner: Captioner,
        max_batch: int,
        max_wait: float,
        observe: Observer = lambda size, seconds: None,
    ) -> None:
        self._captioner, self._max_batch, self._max_wait = captioner, max_batch, max_wait
        self._observe = observe
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="model")
        self._thread.start()

    def submit(self, pixels: torch.Tensor, wish: Wish, key: int = 0) -> Future[list[Caption]]:
        """Caption an image's pixels, (3, S, S), uint8.

        What is cancelled before its batch begins is left out of it. The result is its captions,
        best first, none where the model gives NaN; it raises ``ConfigError`` where they can't be
        searched for so, and ``RequestError`` (503) where memory runs out.

        Args:
            pixels: Of the image.
            wish: How to caption it.
            key: What its samples depend on: its place in the request.
        """
        job = _Job(pixels, wish, key)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify()
        return job.captions

    def hurry(self) -> None:
        """Let no image wait for others from now on."""
        with self._changed:
            self._max_wait = 0.0
            self._changed.notify()

    def close(self) -> None:
        """Caption what has been submitted, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while jobs := self._next_batch():
            started = time.monotonic()
            try:
                self._caption(jobs)
            # Whatever went wrong belongs to those who wait for it; the thread goes on.
            except Exception as error:
                _fail(jobs, error)
            self._observe(len(jobs), time.monotonic() - started)

    def _next_batch(self) -> list[_Job]:
        """Wait for jobs; return those that nobody has cancelled, none once all is done."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return []
                left = self._jobs[0].arrived + self._max_wait - time.monotonic()
                self._changed.wait_for(self._is_enough, max(0.0, left))
                batch: list[_Job] = []
                while self._jobs and len(batch) < self._max_batch:
                    job = self._jobs.popleft()
                    if job.captions.set_running_or_notify_cancel():
                        batch.append(job)
                if batch:
                    return batch

    def _is_enough(self) -> bool:
        return len(self._jobs) >= self._max_batch or self._closed or not self._max_wait

    def _caption(self, jobs: Sequence[_Job]) -> None:
        features = self._captioner.features(torch.stack([job.pixels for job in jobs]))
        rows_of: dict[Wish, list[int]] = defaultdict(list)
        for row, job in enumerate(jobs):
            rows_of[job.wish].append(row)
        for wish, rows in rows_of.items():
            chosen = [jobs[row] for row in rows]
            try:
                found = self._captioner.captions_of(
                    [part[rows] for part in features],
                    wish.search,
                    torch.tensor([job.key for job in chosen]),
                    wish.attention,
                )
            except Exception as error:  # the others' captions may still be found
                _fail(chosen, error)
                continue
            for job, captions in zip(chosen, found, strict=True):
                job.captions.set_result(captions)


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    if is_out_of_memory(error):
        error = RequestError(503, "too little memory for this now; ask for a smaller beam")
    for job in jobs:
        if not job.captions.done():
            job.captions.set_exception(error)
