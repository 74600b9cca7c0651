"""Several real processes that train together: forked with torchrun's variables, or by torchrun."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from torch.distributed import TCPStore
from training_runs import ROOT, TrainingServer


class Crew:
    """Runs ``captioner train`` in two processes or more, without importing torch each time.

    Attributes:
        servers: One for each process.
    """

    def __init__(self, folder: Path, count: int = 2) -> None:
        self.servers = [TrainingServer(folder / f"{rank}.txt") for rank in range(count)]

    def start(
        self, *argv: object, setup: str = "", count: int = 2, store: TCPStore | None = None
    ) -> list[int]:
        """Start training; return the processes' ids.

        Args:
            argv: Arguments of ``captioner train``.
            setup: Code that is run before, and knows ``rank``.
            count: How many processes.
            store: What torchrun keeps over its restarts; None takes a new one.
        """
        # Kept here as torchrun keeps it: a free port that is looked for may be taken by then.
        self._store = store or TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for server in self.servers:
            server.output.write_text("")
        self._ids = ids = []
        for rank, server in enumerate(self.servers[:count]):
            variables = {
                "RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": count,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": self._store.port,
                "TORCHELASTIC_USE_AGENT_STORE": True,
            }
            named = {name: str(value) for name, value in variables.items()}
            code = f"rank = {rank}\nos.environ.update({named})\n{setup}"
            ids.append(server.start(*argv, setup=code))
        return ids

    def wait(self, count: int = 2) -> list[int]:
        """Return the exit codes; minus a signal that killed one. What hangs is killed."""
        timer = threading.Timer(120, lambda: [os.kill(id, signal.SIGKILL) for id in self._ids])
        timer.start()
        codes = [server.wait() for server in self.servers[:count]]
        timer.cancel()
        return codes

    def run(
        self, *argv: object, setup: str = "", count: int = 2, store: TCPStore | None = None
    ) -> list[int]:
        self.start(*argv, setup=setup, count=count, store=store)
        return self.wait(count)

    def output(self, rank: int) -> str:
        return self.servers[rank].output.read_text()

    def errors(self) -> list[str]:
        """Return the error lines that all processes have printed."""
        lines = [line for server in self.servers for line in server.output.read_text().splitlines()]
        return [line for line in lines if line.startswith("error:")]

    def close(self) -> None:
        for server in self.servers:
            server.close()


class Torchrun:
    """``torchrun tools/train.py`` in a process of its own.

    Attributes:
        output: A file with what it and its workers print.
    """

    def __init__(self, output: Path, *argv: object, options: tuple[str, ...] = ()) -> None:
        self.output = output
        words = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", *options]
        command = [*words, str(ROOT / "tools/train.py"), *map(str, argv)]
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            )

    def worker(self, rank: int) -> int:
        """Return the process id of a worker; 0 where there is none now."""
        found = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True
        )
        for word in found.stdout.split():
            environment = Path(f"/proc/{word}/environ")
            if environment.exists() and f"\0RANK={rank}\0".encode() in environment.read_bytes():
                return int(word)
        return 0

    def wait(self, seconds: float = 120) -> int:
        return self.process.wait(seconds)

    def kill_worker(self, rank: int) -> None:
        os.kill(self.worker(rank), signal.SIGKILL)


def wait_for_line(path: Path, pattern: str, seconds: float = 60) -> None:
    """Wait until a file has a line that matches."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and re.search(pattern, path.read_text(errors="replace"), re.MULTILINE):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path}: no line {pattern!r} after {seconds} s")
