"""Images captioned in processes of their own, each with its share of the cores.

A model's small operations would wait for the threads that talk with clients if they shared a
process, and its large ones gain less from a second core than a second model does.
"""

import pickle
import traceback
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from captioner.config import SearchConfig
from captioner.device import is_out_of_memory
from captioner.errors import CaptionerError, RequestError
from captioner.inference.captioner import Caption, Captioner
from captioner.memory import keep_freed_memory
from captioner.service.processes import Worker


@dataclass(frozen=True)
class Wish:
    """How an image is to be captioned.

    Attributes:
        search: The settings of search.
        attention: Whether what the decoder looked at is wanted.
    """

    search: SearchConfig
    attention: bool = False


class Order(NamedTuple):
    """An image to be captioned.

    Attributes:
        pixels: (3, S, S), uint8.
        wish: How.
        key: What its samples depend on.
    """

    pixels: torch.Tensor
    wish: Wish
    key: int = 0


# An order's captions, best first, none where the model gives NaN; or why there are none.
Answer = list[Caption] | Exception


def caption_orders(captioner: Captioner, orders: Sequence[Order]) -> list[Answer]:
    """Caption images together, with the captions that each would get alone.

    The CNN sees all of them at once, whatever is wished of each; captions are searched for
    together where the same is wished.

    Returns:
        For each order its answer: ``ConfigError`` where captions can't be searched for so,
        ``RequestError`` (503) where memory runs out.
    """
    try:
        features = captioner.features(torch.stack([order.pixels for order in orders]))
    except Exception as error:  # whatever went wrong belongs to those who wait for it
        return [_told(error)] * len(orders)
    rows_of: dict[Wish, list[int]] = defaultdict(list)
    for row, order in enumerate(orders):
        rows_of[order.wish].append(row)
    answers: dict[int, Answer] = {}
    for wish, rows in rows_of.items():
        keys = torch.tensor([orders[row].key for row in rows])
        chosen = [part[rows] for part in features]
        try:
            found = captioner.captions_of(chosen, wish.search, keys, wish.attention)
            answers |= zip(rows, found, strict=True)
        except Exception as error:  # the others' captions may still be found
            answers |= dict.fromkeys(rows, _told(error))
    return [answers[row] for row in range(len(orders))]


def _told(error: Exception) -> Exception:
    """Return an error as it can be sent to another process."""
    if is_out_of_memory(error):
        return RequestError(503, "too little memory for this now; ask for a smaller beam")
    if isinstance(error, CaptionerError):
        return error
    return RuntimeError("".join(traceback.format_exception(error)))


class ModelProcess:
    """A captioner in a process, for one thread at a time.

    Args:
        checkpoint: Its directory.
        device: As ``Captioner`` takes it.
        precision: As ``Captioner`` takes it.
        threads: That compute, on a CPU.
    """

    def __init__(self, checkpoint: Path, device: str, precision: str, threads: int) -> None:
        self._arguments = checkpoint, device, precision, threads
        self._worker = self._start()

    def _start(self) -> Worker:
        return Worker("model", _serve, *self._arguments)

    def wait_until_ready(self) -> None:
        """Wait until it has loaded the checkpoint; raise what kept it from that."""
        try:
            error = pickle.loads(self._worker.connection.recv_bytes())
        except EOFError:
            raise CaptionerError(
                "the model's process was ended while it started, perhaps for want of memory: take "
                "fewer (--models 1)"
            ) from None
        if error:
            raise error

    def caption(self, orders: Sequence[Order]) -> list[Answer]:
        """Caption images, as ``caption_orders`` does.

        A process that dies meanwhile, of too little memory for one, is replaced, once for the same
        orders.
        """
        message = pickle.dumps(list(orders))
        for _ in range(2):
            try:
                self._worker.connection.send_bytes(message)
                answers: list[Answer] = pickle.loads(self._worker.connection.recv_bytes())
                return answers
            except (EOFError, OSError):
                self._worker.kill()
                self._worker = self._start()
                self.wait_until_ready()
        return [RequestError(503, "the model's process was ended; try again")] * len(orders)

    def close(self) -> None:
        """End the process."""
        self._worker.kill()


# --- in the process ---------------------------------------------------------------------------


def _serve(
    connection: Connection, checkpoint: Path, device: str, precision: str, threads: int
) -> None:
    # Tensors are pickled by value: what multiprocessing does, files that are shared, is slower.
    keep_freed_memory()
    torch.set_num_threads(threads)
    try:
        captioner = Captioner.from_pretrained(checkpoint, device, precision)
        side = captioner.preprocessing.image_size
        blank = torch.zeros((1, 3, side, side), dtype=torch.uint8)
        captioner.captions(blank, captioner.model.search)  # the first takes longest
    except Exception as error:
        connection.send_bytes(pickle.dumps(_told(error)))
        return
    connection.send_bytes(pickle.dumps(None))
    while True:
        orders = pickle.loads(connection.recv_bytes())
        connection.send_bytes(pickle.dumps(caption_orders(captioner, orders)))
