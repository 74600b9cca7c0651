"""The processes that train one model together: started by torchrun, or one alone.

All of them run the same program and meet in what is below. The first one writes the run's files.
What may fail in one process alone is done ``together``: then it fails in all, and only those whose
fault it is say so. A process that ends outright breaks its connections, so that the next meeting
fails in all others. Small things go over gloo on the CPU, gradients on a GPU over NCCL.

Where machines are to be replaced while a run goes on, set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for
torchrun: else its agents (torch 2.14) tell where they meet in the first round alone, and one that
comes later never learns it.

What a run computes doesn't depend on how many there are, but for rounding and two things:

- Dropout and scheduled sampling take random numbers of each process, by seed and rank. They are
  kept in the run's state; where another number of processes goes on, they begin anew, by seed, step
  and rank. The order of images, their augmentation and the captions that self-critical training
  draws depend on seed, epoch, step and image alone.
- Batch norm that is trained (``encoder.batch_norm=update``) takes the statistics of each process's
  part of a batch; what it keeps for use is their mean over the processes.
"""

import contextlib
import os
import re
import secrets
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from captioner.device import choose_device
from captioner.errors import ConfigError, ProcessError
from captioner.stopping import Stopped

T = TypeVar("T")

# Longest wait for the others: the first may be scoring, or writing to a slow disk.
PATIENCE = timedelta(minutes=30)
MEETING = timedelta(minutes=5)  # in which all have started
GRACE_SECONDS = 30.0  # after which torchrun, too, kills a process that it has told to end
_BROKEN_CONNECTION = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|timed out|ProcessGroup"
    r"|TCPStore",
    re.IGNORECASE,
)
ENDED = (
    "another process of this run has ended, or hasn't answered for "
    f"{PATIENCE.seconds // 60} minutes; what it said is above or in its own log. Start the same "
    "command again with --resume-or-start"
)


class Processes:
    """Some processes, of which this is one.

    Attributes:
        rank: This process's number, from 0.
        count: How many there are.
        local_rank: This process's number on its machine.
        node: Those on this machine; all of them where there is one machine.
    """

    def __init__(
        self,
        rank: int = 0,
        count: int = 1,
        local_rank: int = 0,
        members: Sequence[int] = (0,),
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.count, self.local_rank = rank, count, local_rank
        self.node = self
        self._members, self._group = members, group
        self._parent = os.getppid()

    @classmethod
    def of_environment(cls) -> "Processes":
        """Return those that torchrun has started this one with; this one alone without torchrun.

        Raises:
            ConfigError: There are more on this machine than it has GPUs.
            ProcessError: They can't be reached.
        """
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls()
        rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
        local_count = int(os.environ.get("LOCAL_WORLD_SIZE", count))
        processes = cls(rank, count, local_rank, range(count))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        Thread(target=processes._end_with_parent, daemon=True).start()
        with processes.watched():
            store = processes._meet()
            dist.init_process_group(
                backend, timeout=PATIENCE, store=store, rank=rank, world_size=count
            )
            if local_count < count:
                first = rank - local_rank
                members = range(first, first + local_count)
                group = dist.new_group(
                    list(members), PATIENCE, "gloo", use_local_synchronization=True
                )
                assert isinstance(group, dist.ProcessGroup)  # this process is a member
                processes.node = cls(local_rank, local_count, local_rank, members, group)
        return processes

    def _end_with_parent(self) -> None:
        """End this process when torchrun has died, wherever it hangs."""
        while not self.parent_signal:
            time.sleep(1)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def _meet(self) -> dist.Store:
        """Return a store that the processes of this start alone have.

        torchrun may keep one store over its restarts. In it are the addresses of processes that
        have died, and who takes one of these for that of another process waits for it in vain.
        """
        store, _, _ = next(dist.rendezvous("env://", self.rank, self.count, timeout=MEETING))
        if not self.is_first:
            own = secrets.token_hex(8)
            store.set(f"here/{self.rank}", own)
            name = store.get(f"answer/{own}").decode()  # waits for it
            store.set(f"{name}/{self.rank}", "")
            return dist.PrefixStore(name, store)
        name, deadline = secrets.token_hex(8), time.monotonic() + MEETING.seconds
        answered: set[str] = set()
        others = range(1, self.count)
        while not store.check([f"{name}/{other}" for other in others]):
            for key in (f"here/{other}" for other in others):
                found = store.get(key).decode() if store.check([key]) else ""
                if found and found not in answered:  # it may be that of a process that has died
                    store.set(f"answer/{found}", name)
                    answered.add(found)
            if self.parent_signal or time.monotonic() > deadline:
                raise ProcessError(ENDED)
            time.sleep(0.01)
        return dist.PrefixStore(name, store)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def parent_signal(self) -> int:
        """SIGTERM if the torchrun that started this process has died, as if it had sent that."""
        died = self.count > 1 and os.getppid() != self._parent
        return int(signal.SIGTERM) if died else 0

    def device(self, name: str) -> torch.device:
        """Return the device of that name, of several GPUs the one that belongs to this process.

        Raises:
            ConfigError: There is none.
        """
        device = choose_device(name)
        if self.count == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"torchrun has started process {self.local_rank + 1} of this machine, which has "
                f"{torch.cuda.device_count()} GPUs: lower --nproc-per-node"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    # --- who does what ---

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return this process's part of a list: every N-th."""
        return items[self.rank :: self.count] if self.count > 1 else items

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do what may fail in one process: an error in any of them ends it in all.

        Whatever is raised in a process goes on there, unless one before it has said the same; the
        others raise a ``ProcessError`` without a message, or ``Stopped`` if that was all.
        """
        if self.count == 1:
            yield
            return
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            if getattr(caught, "told_in", None) is self or isinstance(caught, ProcessError):
                raise
            error = caught
        try:
            outcomes = self.gather_all(_describe(error))
        except ProcessError:
            raise error or ProcessError(ENDED) from None
        if any(outcomes):
            agreed = self._agreed(error, outcomes)
            agreed.told_in = self  # type: ignore[attr-defined]
            raise agreed

    def _agreed(
        self, error: BaseException | None, outcomes: list[tuple[int, str] | None]
    ) -> BaseException:
        own = outcomes[self.rank]
        if error is not None and own not in outcomes[: self.rank]:
            return error
        stopped = [outcome[0] for outcome in outcomes if outcome and outcome[0]]
        failed = [outcome for outcome in outcomes if outcome and not outcome[0]]
        return Stopped(stopped[0]) if stopped and not failed else ProcessError("")

    # --- meetings: all processes call them, in the same order ---

    def exchange(self, values: Sequence[int]) -> list[list[int]]:
        """Return the numbers of all processes, in their order; each gives as many."""
        own = torch.tensor(values)
        if self.count == 1:
            return [own.tolist()]
        received = [torch.empty_like(own) for _ in range(self.count)]
        with self.watched():
            dist.all_gather(received, own, self._group)
        return [numbers.tolist() for numbers in received]

    def gather_all(self, value: T) -> list[T]:
        """Return what all processes give, in their order."""
        if self.count == 1:
            return [value]
        received: list[Any] = [None] * self.count
        with self.watched():
            dist.all_gather_object(received, value, self._group)
        return received

    def gather(self, value: T) -> list[T]:
        """Return to the first process what all give, in their order; to the others nothing."""
        if self.count == 1:
            return [value]
        received: list[Any] | None = [None] * self.count if self.is_first else None
        with self.watched():
            dist.gather_object(value, received, self._members[0], self._group)
        return received or []

    def first_says(self, value: T) -> T:
        """Return what the first process gives."""
        received = [value]
        if self.count > 1:
            with self.watched():
                dist.broadcast_object_list(received, self._members[0], self._group)
        return received[0]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of what all processes give, element by element, on the same device."""
        if self.count > 1:
            with self.watched():
                dist.all_reduce(values, group=self._group)
        return values

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Give tensors (C,) the mean of what they hold in all processes."""
        if self.count == 1 or not tensors:
            return
        means = self.sum(torch.cat(list(tensors))).div_(self.count)
        for own, mean in zip(tensors, means.split([len(each) for each in tensors]), strict=True):
            own.copy_(mean)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what a broken connection raises into a ``ProcessError``."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or not _BROKEN_CONNECTION.search(str(error)):
                raise
            raise ProcessError(ENDED) from None

    def parallel(self, module: nn.Module, begin: Callable[[nn.Module], Tensor]) -> nn.Module:
        """Return a module that averages its gradients over the processes.

        Args:
            module: It gets the weights of the first process.
            begin: Returns 0 for the wrapped module, by a way that takes in all that is trained.
        """
        if self.count == 1:
            return module
        # 1 x 1 kernels are laid out in two ways at once.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with self.watched(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the argument's name
            # Buffers are alike in all: see ``average``.
            parallel = nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)
            # After its first step it sorts the gradients into other buckets, by the order in which
            # they came. For more than two processes the order of the sums depends on that, so that
            # a resumed run would differ from one that went on: the first step is an empty one.
            begin(parallel).backward()
        for parameter in module.parameters():
            parameter.grad = None
        return parallel


ALONE = Processes()


def _describe(error: BaseException | None) -> tuple[int, str] | None:
    """Return what the others are told: the signal that has stopped this process, or its error."""
    if error is None:
        return None
    number = int(error.signal) if isinstance(error, Stopped) else 0
    return number, f"{type(error).__name__}: {error}"
