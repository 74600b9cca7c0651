"""What a service counts, in Prometheus's text format."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The numbers of one service.

    Args:
        waiting: Tells how many images are accepted and not yet captioned.

    Attributes:
        requests: By path, method and status; 499 is a client that has gone.
        seconds: From a request's head to its answer, by path.
        images: By result: captioned or failed.
        batches: Images that the model saw together.
        batch_seconds: How long that took.
    """

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self, waiting: Callable[[], float]) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "captioner_requests",
            "Requests answered",
            ("path", "method", "status"),
            registry=registry,
        )
        self.seconds = Histogram(
            "captioner_request_seconds",
            "Seconds from a request's head to its answer",
            ("path",),
            buckets=_SECONDS,
            registry=registry,
        )
        self.images = Counter("captioner_images", "Images", ("result",), registry=registry)
        self.batches = Histogram(
            "captioner_batch_images",
            "Images that the model saw together",
            buckets=_SIZES,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "captioner_batch_seconds",
            "Seconds that a batch took",
            buckets=_SECONDS,
            registry=registry,
        )
        waiting_images = Gauge(
            "captioner_waiting_images", "Images accepted, not yet captioned", registry=registry
        )
        waiting_images.set_function(waiting)

    def observe_batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.batches.observe(size)
        self.batch_seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all numbers in Prometheus's text format."""
        return generate_latest(self._registry)
