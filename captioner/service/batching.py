"""Models, each with a thread of its own, that caption together what comes together."""

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Condition, Thread

from captioner.inference.captioner import Caption
from captioner.service.captioning import Answer, Order

# Answers several orders at once.
Model = Callable[[Sequence[Order]], list[Answer]]

# Told of each batch: how many images, and how many seconds they took.
Observer = Callable[[int, float], object]


@dataclass(eq=False)
class _Job:
    """An image to be captioned.

    Attributes:
        order: The image.
        captions: Become known here.
        arrived: When it came, in seconds of ``time.monotonic``.
    """

    order: Order
    captions: Future[list[Caption]] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


class Batcher:
    """Captions images as many together as there are, shared out among the models that are free.

    Args:
        models: Each is called by one thread alone.
        max_batch: Most images at a time.
        max_wait: How long an image waits for others, in seconds, and at most a quarter of what its
            model's last batch took. It waits for none where all models are free and none come.
        coming: Tells whether others come.
        observe: Is told of each batch, in the model's thread.
    """

    def __init__(
        self,
        models: Sequence[Model],
        max_batch: int,
        max_wait: float,
        coming: Callable[[], object] = lambda: True,
        observe: Observer = lambda size, seconds: None,
    ) -> None:
        self._max_batch, self._max_wait = max_batch, max_wait
        self._coming, self._observe = coming, observe
        self._jobs: deque[_Job] = deque()
        self._closed = False
        self._free = 0  # models
        self._changed = Condition()
        self._threads = [Thread(target=self._run, args=(model,), name="model") for model in models]
        for thread in self._threads:
            thread.start()

    def submit(self, order: Order) -> Future[list[Caption]]:
        """Caption an image.

        What is cancelled before its batch begins is left out of it. The result is the order's
        ``Answer``; it raises what that is where it is an exception.
        """
        job = _Job(order)
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._jobs.append(job)
            self._changed.notify_all()
        return job.captions

    def hurry(self) -> None:
        """Let no image wait for others from now on."""
        with self._changed:
            self._max_wait = 0.0
            self._changed.notify_all()

    def close(self) -> None:
        """Caption what has been submitted, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _run(self, model: Model) -> None:
        patience = math.inf
        while jobs := self._next_batch(patience):
            started = time.monotonic()
            try:
                answers = model([job.order for job in jobs])
            # Whatever went wrong belongs to those who wait for it; the thread goes on.
            except Exception as error:
                answers = [error] * len(jobs)
            for job, answer in zip(jobs, answers, strict=True):
                if isinstance(answer, Exception):
                    job.captions.set_exception(answer)
                else:
                    job.captions.set_result(answer)
            seconds = time.monotonic() - started
            self._observe(len(jobs), seconds)
            patience = seconds / 4

    def _next_batch(self, patience: float) -> list[_Job]:
        """Wait for jobs; return those that nobody has cancelled, none once all is done."""
        with self._changed:
            self._free += 1
            try:
                while True:
                    self._changed.wait_for(lambda: self._jobs or self._closed)
                    if not self._jobs:
                        return []
                    wait = min(self._max_wait, patience)
                    left = self._jobs[0].arrived + wait - time.monotonic()
                    self._changed.wait_for(self._is_enough, max(0.0, left))
                    if batch := self._take():
                        return batch
            finally:
                self._free -= 1

    def _is_enough(self) -> bool:
        is_last = self._closed or not self._max_wait
        is_alone = self._free == len(self._threads) and not self._coming()
        return is_last or is_alone or len(self._jobs) >= self._max_batch

    def _take(self) -> list[_Job]:
        """Return this model's share of the jobs that nobody has cancelled."""
        batch: list[_Job] = []
        share = min(self._max_batch, math.ceil(len(self._jobs) / self._free))
        while self._jobs and len(batch) < share:
            job = self._jobs.popleft()
            if job.captions.set_running_or_notify_cancel():
                batch.append(job)
        return batch
