"""What becomes of a request for captions: decoded, captioned with others, told.

Nothing here knows HTTP, and nothing that takes long runs on the event loop: bodies are read and
images decoded and captioned by other threads and processes.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from captioner.config import SearchConfig
from captioner.device import choose_device
from captioner.errors import ImageError, RequestError
from captioner.inference.captioner import Caption
from captioner.inference.gallery import AttentionMaps, cut_of
from captioner.models.checkpoint import load_checkpoint
from captioner.search.hypothesis import NO_PROBABILITIES
from captioner.service.batching import Batcher
from captioner.service.captioning import ModelProcess, Order, Wish
from captioner.service.decoding import ImageDecoders
from captioner.service.metrics import Metrics
from captioner.service.requests import CaptionRequest, SentImage, read_request
from captioner.service.settings import MOST_HYPOTHESES, ServiceConfig

_SMALL_BODY = 1 << 16  # is read faster than handed to a thread
_MOST_MODELS = 8  # that are started without being asked for: each takes memory


class CaptionService:
    """Captions what clients send.

    Args:
        checkpoint: Of the captioner.
        device: As ``Captioner`` takes it.
        precision: As ``Captioner`` takes it.
        settings: What is allowed.

    Attributes:
        search: The checkpoint's settings.
        settings: As given.
        metrics: What is counted.
        waiting: Images that are accepted and not yet captioned.

    Raises:
        CaptionerError: The checkpoint can't be loaded, or not on this device.
    """

    def __init__(
        self, checkpoint: Path, device: str, precision: str, settings: ServiceConfig
    ) -> None:
        model = load_checkpoint(checkpoint)
        preprocessing = model.encoder.preprocessing
        self.search, self._vocabulary = model.search, model.vocabulary
        self.settings = settings
        self._cut = cut_of(preprocessing)
        self.waiting = self._decoding = 0
        self.metrics = Metrics(lambda: self.waiting)
        threads = torch.get_num_threads() if choose_device(device).type == "cpu" else 1
        count = settings.models or min(threads, _MOST_MODELS)
        self._models = [
            ModelProcess(checkpoint, device, precision, max(1, threads // count))
            for _ in range(count)
        ]
        self._decoders = ImageDecoders(
            preprocessing, settings.decoders, settings.max_megapixels, settings.decode_seconds
        )
        for process in self._models:
            process.wait_until_ready()
        self._batcher = Batcher(
            [process.caption for process in self._models],
            settings.max_batch,
            settings.max_wait_ms / 1000,
            lambda: self._decoding,
            self._observe_batch,
        )
        self._readers = ThreadPoolExecutor(1, "reading")
        self._seconds_per_image = 0.1  # a guess until the first batch

    def hurry(self) -> None:
        """Let no image wait for others from now on: the end is near."""
        self._batcher.hurry()

    def close(self) -> None:
        """Caption what was accepted, and end all threads and processes."""
        self._readers.shutdown()
        self._decoders.close()
        self._batcher.close()
        for process in self._models:
            process.close()

    @property
    def is_full(self) -> bool:
        """Whether not even one image more is accepted now."""
        return self.waiting >= self.settings.max_queue

    @property
    def retry_after(self) -> int:
        """In how many seconds there should be room again, at least 1."""
        return max(1, math.ceil(self.waiting * self._seconds_per_image))

    def full_error(self) -> RequestError:
        """Return what to tell a client that comes when the queue is full."""
        return RequestError(503, f"too many images are waiting; try again in {self.retry_after} s")

    async def read(self, body: bytes, content_type: str) -> CaptionRequest:
        """Read a request's body: see ``read_request``."""
        wanted = body, content_type, self.search, self.settings.max_images
        if len(body) <= _SMALL_BODY:
            request = read_request(*wanted)
        else:
            loop = asyncio.get_running_loop()
            request = await loop.run_in_executor(self._readers, read_request, *wanted)
        self._check_hypotheses(request.wish.search)
        return request

    def _check_hypotheses(self, search: SearchConfig) -> None:
        words = sum(len(self._vocabulary.encode(text)) for text in search.forced)
        if words and search.beam_size * (1 + words) > MOST_HYPOTHESES:
            most = MOST_HYPOTHESES // search.beam_size - 1
            raise RequestError(
                400, f"forced: at most {most} words at beam_size={search.beam_size}, found {words}"
            )

    async def caption(self, request: CaptionRequest) -> list[dict[str, Any]]:
        """Caption a request's images.

        Cancelling this takes those out again that aren't yet being captioned.

        Returns:
            For each image its name, and its size and captions or an error, ready for JSON.

        Raises:
            RequestError: 503 where the queue is full; 422 where no image can be captioned.
            ConfigError: The model can't search so: a forced word that it doesn't know, say.
        """
        async with self._place_in_queue(len(request.images)):
            tasks: list[asyncio.Task[dict[str, Any]]] = []
            try:
                async with asyncio.TaskGroup() as group:
                    for key, image in enumerate(request.images):
                        tasks.append(group.create_task(self._caption(image, request.wish, key)))
            except ExceptionGroup as errors:  # one for all: the same is wished of each image
                raise errors.exceptions[0] from None
        results = [task.result() for task in tasks]
        failed = [result for result in results if "error" in result]
        self.metrics.images.labels("captioned").inc(len(results) - len(failed))
        self.metrics.images.labels("failed").inc(len(failed))
        if len(failed) == len(results):
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise RequestError(422, f"{failed[0]['name']}: {failed[0]['error']}{more}")
        return results

    @contextlib.asynccontextmanager
    async def _place_in_queue(self, images: int) -> AsyncIterator[None]:
        if self.waiting + images > self.settings.max_queue:
            raise self.full_error()
        self.waiting += images
        try:
            yield
        finally:
            self.waiting -= images

    async def _caption(self, image: SentImage, wish: Wish, key: int) -> dict[str, Any]:
        self._decoding += 1
        try:
            decoded = await asyncio.wrap_future(self._decoders.submit(image.content))
        except ImageError as error:
            return {"name": image.name, "error": str(error)}
        finally:
            self._decoding -= 1
        captions = await asyncio.wrap_future(self._batcher.submit(Order(decoded.pixels, wish, key)))
        if not captions:
            return {"name": image.name, "error": NO_PROBABILITIES}
        width, height = decoded.size
        told = [self._tell(caption, wish) for caption in captions]
        return {"name": image.name, "width": width, "height": height, "captions": told}

    def _tell(self, caption: Caption, wish: Wish) -> dict[str, Any]:
        told: dict[str, Any] = {
            "text": caption.text,
            "log_probability": _finite(caption.log_probability),
            "score": _finite(caption.score),
        }
        if wish.attention:
            maps = AttentionMaps.of(caption, self._cut)
            told["attention"] = maps and asdict(maps)
        return told

    def _observe_batch(self, size: int, seconds: float) -> None:
        """Called in a model's thread."""
        self.metrics.observe_batch(size, seconds)
        each = seconds / size / len(self._models)
        self._seconds_per_image += 0.1 * (each - self._seconds_per_image)


def _finite(number: float) -> float | None:
    """Return a number as JSON knows it; a caption that no search found has none."""
    return number if math.isfinite(number) else None
