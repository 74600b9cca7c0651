"""What a service allows: how much may be sent, asked, kept waiting, and for how long."""

from dataclasses import dataclass

from captioner.checks import check_at_least, check_between, check_positive
from captioner.errors import ConfigError

# The most that a client may ask of a search; what isn't named here is limited by SearchConfig.
MOST_OF_SEARCH = {"beam_size": 20, "n_best": 20, "groups": 20, "samples": 20, "max_length": 50}
MOST_PHRASES = {"forced": 5, "forbidden": 100}
MOST_HYPOTHESES = 200  # of an image; each word that is forced takes a beam more

MEBIBYTE = 1 << 20


@dataclass(frozen=True)
class ServiceConfig:
    """What a service allows.

    Attributes:
        max_batch: Most images that the model sees at a time.
        max_wait_ms: How long an image waits for others that are being decoded, to be captioned with
            them, in milliseconds.
        max_queue: Most images that are accepted and not yet captioned; with more the answer is
            503, and after how many seconds to try again.
        max_images: Most images of a request.
        max_body_mb: Most bytes of a request's body, in MiB.
        max_megapixels: Most pixels of an image that are decoded, in millions.
        decode_seconds: How long an image may take to be decoded, in seconds.
        receive_seconds: How long a client may take to send a request, in seconds; its head and its
            body each.
        decoders: Processes that decode images.
        models: Processes that run the model, which share the processor's cores; 0 takes one a core,
            8 at most, and one on a GPU.
        max_connections: Most connections that are open at a time; others are closed at once.
    """

    max_batch: int = 32
    max_wait_ms: float = 25.0
    max_queue: int = 256
    max_images: int = 16
    max_body_mb: float = 32.0
    max_megapixels: float = 32.0
    decode_seconds: float = 10.0
    receive_seconds: float = 30.0
    decoders: int = 2
    models: int = 0
    max_connections: int = 500

    def __post_init__(self) -> None:
        """Refuse impossible values and combinations."""
        check_between(self, max_batch=(1, 1024), max_queue=(1, 100_000))
        check_between(self, decoders=(1, 64), models=(0, 64))
        check_between(self, max_wait_ms=(0.0, 10_000.0), max_connections=(1, 100_000))
        check_at_least(self, max_images=1)
        check_positive(self, "max_body_mb", "max_megapixels", "decode_seconds", "receive_seconds")
        if self.max_images > self.max_queue:
            raise ConfigError(
                f"service.max_images: at most service.max_queue = {self.max_queue} was expected, "
                f"found {self.max_images}"
            )

    @property
    def body_bytes(self) -> int:
        """The most bytes of a request's body."""
        return int(self.max_body_mb * MEBIBYTE)

    @property
    def bodies_bytes(self) -> int:
        """The most bytes that the bodies of all requests take together."""
        return max(256 * MEBIBYTE, 4 * self.body_bytes)
