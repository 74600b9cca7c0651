"""Images decoded in processes of their own, which may be killed: for what strangers send.

A decoder that crashes, that hangs, or that takes too long on a hostile file, takes nothing with it
but its own process, and another one takes its place. What runs in parallel is bounded, and so is
the memory that all of them hold together.
"""

import contextlib
import os
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch

from captioner.data.image_files import MAX_MEGAPIXELS_VARIABLE, load_image
from captioner.data.preprocessing import DecodingMemory, Preprocessing, Size, to_pixels
from captioner.errors import ImageError
from captioner.memory import give_back_freed_memory
from captioner.service.processes import Worker

_BLANK = b"P6 1 1 255\n\0\0\0"
_NAME = "image"  # what messages begin with; the client knows which one it was
_TOO_LARGE = "; scale it down"


class Decoded(NamedTuple):
    """An image as the CNN takes it.

    Attributes:
        pixels: (3, S, S), uint8.
        size: Width and height of the image as it is seen, in pixels.
    """

    pixels: torch.Tensor
    size: Size


class ImageDecoders:
    """Decodes and preprocesses the content of image files, several at a time.

    Args:
        preprocessing: What is done to each.
        count: Of processes.
        max_megapixels: Images with more are refused before they are decoded.
        seconds: How long an image may take.
    """

    def __init__(
        self, preprocessing: Preprocessing, count: int, max_megapixels: float, seconds: float
    ) -> None:
        self._preprocessing, self._seconds = preprocessing, seconds
        self._max_megapixels = max_megapixels
        self._memory = DecodingMemory(processes=False)  # it is the threads here that ask for it
        self._threads = ThreadPoolExecutor(count, "decoding")
        self._own = threading.local()  # each thread's process
        self._all: set[Worker] = set()
        for _ in range(count):  # so that no image waits for a process to begin
            self._threads.submit(self._decoder)

    def submit(self, content: bytes) -> Future[Decoded]:
        """Decode a file's content; what is cancelled before it begins isn't.

        The result raises ``ImageError`` where it can't be read, is too large, or takes too long;
        the message is the reason alone.
        """
        return self._threads.submit(self._decode, content)

    def close(self) -> None:
        """Wait for what is being decoded, and end the processes."""
        self._threads.shutdown(cancel_futures=True)
        for decoder in self._all:
            decoder.kill()

    def _decode(self, content: bytes) -> Decoded:
        answer = self._ask(content)
        if isinstance(answer, EOFError):  # something else may have ended the process
            answer = self._ask(content)
        if isinstance(answer, EOFError):
            raise ImageError("it is damaged so that its decoder crashes")
        if isinstance(answer, Exception):
            raise answer
        pixels, size = answer
        side = self._preprocessing.image_size
        return Decoded(torch.frombuffer(pixels, dtype=torch.uint8).view(3, side, side), size)

    def _decoder(self) -> Worker:
        """Return this thread's process; where there is none it is started."""
        decoder: Worker | None = getattr(self._own, "decoder", None)
        if decoder is None:
            decoder = Worker("decoder", _serve, self._preprocessing, self._max_megapixels)
            with contextlib.suppress(EOFError):  # whoever uses it finds out
                decoder.connection.recv()  # it is ready
            self._own.decoder = decoder
            self._all.add(decoder)
        return decoder

    def _ask(self, content: bytes) -> "_Result":
        """Have this thread's process decode an image; return ``EOFError`` where that ends it."""
        decoder = self._decoder()
        try:
            with self._memory.reader() as reserve:
                decoder.connection.send_bytes(content)
                while True:
                    if not decoder.connection.poll(self._seconds):
                        raise ImageError(f"it takes more than {self._seconds:g} seconds to decode")
                    answer: int | _Result = decoder.connection.recv()
                    if not isinstance(answer, int):
                        return answer
                    reserve(answer)  # the time that it waits for memory isn't counted
                    decoder.connection.send(None)
        except Exception as error:
            decoder.kill()
            self._all.discard(decoder)
            self._own.decoder = None
            if isinstance(error, (EOFError, OSError)):
                return EOFError()
            raise


# Why it went wrong, or an image's pixels and size. Before it may come how many bytes it will take.
_Result = Exception | tuple[bytearray, Size]


# --- in the processes -------------------------------------------------------------------------


def _serve(connection: Connection, preprocessing: Preprocessing, max_megapixels: float) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libtiff tells there what strangers wrote
    os.environ[MAX_MEGAPIXELS_VARIABLE] = str(max_megapixels)
    torch.set_num_threads(1)
    load_image(_BLANK)  # Pillow looks for its formats when the first image comes
    connection.send(None)
    while True:
        connection.send(_load(connection.recv_bytes(), preprocessing, connection))


def _load(content: bytes, preprocessing: Preprocessing, connection: Connection) -> _Result:
    is_large = False

    def reserve(size: int) -> None:
        nonlocal is_large
        is_large = size >= DecodingMemory.BLOCK_BYTES
        if is_large:
            connection.send(size)
            connection.recv()

    try:
        square, size = preprocessing.load_square(content, reserve, _NAME)
        return bytearray(to_pixels(square).tobytes()), size
    except ImageError as error:
        reason, too_large, _ = str(error).removeprefix(f"{_NAME}: ").partition(_TOO_LARGE)
        return ImageError(reason + too_large)
    except MemoryError:
        return ImageError("there is too little memory to read it")
    except Exception as error:
        return error
    finally:
        if is_large:
            give_back_freed_memory()
