"""Rehearse bad nights: kill a training of several processes again and again, and compare its end.

  rehearse_kills.py SCRATCH             # 30 SIGKILLs at random moments, one machine
  rehearse_kills.py SCRATCH --nodes 2   # two torchrun agents as two machines, the second one killed

It trains on drawn pictures, once uninterrupted and once killed, as ``torchrun tools/train.py`` does
it: a worker, all workers, torchrun alone, or everything at once. Where torchrun is dead the same
command is started again, as a person or a queue would. Then the weights of ``last`` and ``best``
must be the same bit by bit, and the log the same but for its times. Exit code 1 where they aren't.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import psutil

from captioner.cli import HelpFormatter, Parser, command
from captioner.data.shapes_dataset import write_data_set
from captioner.errors import CaptionerError
from captioner.progress import Progress, log_line

ROOT = Path(__file__).parents[1]
SETTINGS = ("training.checkpoint_every=7", "training.log_every=1", "training.batch_size=16")
LONGEST_WAIT = 600  # seconds without an end: it hangs
TIMED = ("seconds", "per_second")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("scratch", type=Path, help="folder for pictures and runs; runs are new")
    parser.add_argument("--nodes", type=int, default=1, choices=(1, 2), help="torchrun agents")
    parser.add_argument("--processes", type=int, default=2, help="of each agent")
    parser.add_argument("--kills", type=int, default=0, help="how many (default: 30; 2 nodes: 2)")
    parser.add_argument("--images", type=int, default=1600, help="pictures that are trained on")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the victims")
    return parser


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train twice, kill, compare, and say what happened."""
    args = _parser().parse_args(argv)
    scratch = args.scratch.resolve()
    shapes = scratch / f"shapes_{args.images}"
    if not shapes.exists():
        write_data_set(shapes, {"train": args.images, "val": 60, "test": 4})
    folders = [scratch / f"{name}_{time.time_ns()}" for name in ("whole", "killed")]
    settings = [f"data.root={shapes}", f"training.epochs={args.epochs}", *SETTINGS]
    crews = [_Crew(folder, args.nodes, args.processes, settings) for folder in folders]
    started = time.monotonic()
    crews[0].start_all()
    crews[0].wait()
    whole = time.monotonic() - started
    log_line(f"uninterrupted: {whole:.0f} s")
    kills = args.kills or (30 if args.nodes == 1 else 2)
    started = time.monotonic()
    counts = _kill(crews[1], kills, random.Random(args.seed))
    seconds = time.monotonic() - started
    _compare(*folders)
    print(f"{args.nodes} x {args.processes} processes, {len(_steps(folders[1]))} steps")
    print(f"uninterrupted {whole:.0f} s; with {kills} kills {seconds:.0f} s: {dict(counts)}")
    print("the same bit by bit: weights of last and of best; the log without gap or double")
    return 0


class _Crew:
    """The torchrun agents of one run."""

    def __init__(self, folder: Path, nodes: int, processes: int, settings: Sequence[str]) -> None:
        self.folder, self.nodes = folder, nodes
        self.output = folder.with_suffix(".txt")
        where = ["--standalone"]
        if nodes > 1:
            where = [f"--nnodes={nodes}", "--rdzv-backend=c10d", f"--rdzv-id={folder.name}"]
            where += [f"--rdzv-endpoint=localhost:{20_000 + os.getpid() % 20_000}"]
        self._words = [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"),
            *(*where, "--max-restarts=1000", str(ROOT / "tools/train.py")),
            *(str(ROOT / "experiments/shapes.toml"), *settings, "wandb.mode=disabled"),
            *("--output-dir", str(folder), "--resume-or-start"),
        ]
        self.agents: list[psutil.Popen] = []

    def start(self) -> psutil.Popen:
        """Start an agent more."""
        variables = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with self.output.open("ab") as file:
            return psutil.Popen(
                self._words,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | variables | {"PYTHONPATH": str(ROOT)},
            )

    def start_all(self) -> None:
        """Start all agents."""
        self.agents = [self.start() for _ in range(self.nodes)]

    def wait(self) -> None:
        """Wait until all agents have ended well."""
        for agent in self.agents:
            code = agent.wait(LONGEST_WAIT)
            if code:
                raise CaptionerError(f"{self.output}: torchrun ended with exit code {code}")

    def is_over(self) -> bool:
        """Tell whether the run has ended well."""
        return all(agent.poll() == 0 for agent in self.agents)


def _kill(crew: _Crew, kills: int, chance: random.Random) -> Counter[str]:
    """Run to the end, with so many kills; return what was killed how often."""
    counts: Counter[str] = Counter()
    crew.start_all()
    with Progress("kills", kills, "kill") as bar:
        for _ in range(kills):
            _wait_for_workers(crew)
            # From the first instructions of the interpreter to some steps of training.
            time.sleep(chance.choice((chance.uniform(0, 3), chance.uniform(3, 14))))
            if crew.is_over():
                break
            victim = chance.choice(("a worker", "all workers", "torchrun", "everything"))
            counts[victim if crew.nodes == 1 else f"second machine, {victim}"] += 1
            _send(crew.agents[-1], victim, chance)
            for place, agent in enumerate(crew.agents):
                if agent.poll() not in (None, 0):
                    _wait_for_end(crew, agent)
                    crew.agents[place] = crew.start()
                    counts["torchrun started again"] += 1
            bar.update(1)
    crew.wait()
    done = sum(counts.values()) - counts["torchrun started again"]
    if done < kills:
        raise CaptionerError(
            f"it was over after {done} of {kills} kills; more --epochs make it longer"
        )
    return counts


def _workers(agent: psutil.Popen) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return agent.children()
    return []


def _wait_for_workers(crew: _Crew) -> None:
    deadline = time.monotonic() + LONGEST_WAIT
    while not crew.is_over() and not _workers(crew.agents[-1]):
        if time.monotonic() > deadline:
            raise CaptionerError(f"{crew.output}: no worker was started for {LONGEST_WAIT} s")
        time.sleep(0.05)


def _send(agent: psutil.Popen, victim: str, chance: random.Random) -> None:
    """Send SIGKILL."""
    workers = _workers(agent)
    if victim == "a worker" and workers:
        victims = [chance.choice(workers)]
    elif victim == "all workers":
        victims = workers
    elif victim == "torchrun":
        victims = [agent]
    else:
        victims = [agent, *workers]
    for process in victims:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    if agent in victims:
        agent.wait(LONGEST_WAIT)
    else:
        time.sleep(1)  # torchrun looks at its workers ten times a second, and starts new ones


def _wait_for_end(crew: _Crew, agent: psutil.Popen) -> None:
    """Wait for the workers that a dead agent has left: they write ``last`` and end."""
    deadline = time.monotonic() + LONGEST_WAIT
    others = {other.pid for other in crew.agents if other is not agent}
    while True:
        left = [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if str(crew.folder) in (process.info["cmdline"] or ())
            and process.info["ppid"] not in others
            and process.pid not in others
        ]
        if not left:
            return
        if time.monotonic() > deadline:
            raise CaptionerError(f"{crew.output}: workers without torchrun go on for ever")
        time.sleep(0.1)


def _compare(whole: Path, killed: Path) -> None:
    for name in ("last", "best"):
        contents = [
            (folder / name / "model.safetensors").read_bytes() for folder in (whole, killed)
        ]
        if contents[0] != contents[1]:
            raise CaptionerError(f"{killed / name}: other weights than in {whole / name}")
    if _rows(whole) != _rows(killed):
        raise CaptionerError(f"{killed / 'log.jsonl'}: not the lines of {whole / 'log.jsonl'}")
    steps = _steps(killed)
    if steps != list(range(1, len(steps) + 1)):
        raise CaptionerError(f"{killed / 'log.jsonl'}: a step is missing or there twice")


def _rows(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.endswith(TIMED)} for row in rows]


def _steps(folder: Path) -> list[int]:
    return [row["step"] for row in _rows(folder) if row["kind"] == "step"]


if __name__ == "__main__":
    sys.exit(main())
