"""Tracking of a training run: JSON lines in its folder, and Weights & Biases."""

import contextlib
import io
import json
import netrc
import os
import shlex
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import wandb
from PIL import Image

from captioner.config import WandbConfig
from captioner.errors import ConfigError
from captioner.progress import log_line

WANDB_HOST = "https://api.wandb.ai"
MODES = ("auto", "online", "offline", "disabled", "shared")
LOG_IN = "log in with `wandb login` or WANDB_API_KEY, or set wandb.mode=offline"


class JsonLog:
    """One JSON object a line, each with the optimiser ``step`` it belongs to.

    Args:
        path: The file; it is continued if it exists. None keeps no log.
        size: What lies beyond so many bytes is dropped: a resumed run writes it again.
    """

    def __init__(self, path: Path | None, size: int = 0) -> None:
        self._file: IO[bytes] = io.BytesIO()
        if not path:
            return
        self._file = open(path, "ab")  # noqa: SIM115 - open as long as training
        self._file.truncate(min(size, self._file.seek(0, os.SEEK_END)))
        self._file.seek(0, os.SEEK_END)

    @property
    def size(self) -> int:
        """How many bytes the file has."""
        return self._file.tell()

    def write(self, **values: Any) -> None:
        """Write a line; it is in the file when this returns."""
        self._file.write(json.dumps(values).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return what is in a log; a line that was being written when its process died is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("}\n")]


class Meter:
    """Mean loss and rates since the last log line."""

    def __init__(self) -> None:
        self._since, self._tokens, self._images = time.monotonic(), 0, 0
        self._waited = 0.0
        self._values: list[dict[str, float]] = []

    @property
    def seconds(self) -> float:
        """Seconds since it was made."""
        return time.monotonic() - self._since

    def add(self, tokens: int, images: int, values: dict[str, float]) -> None:
        """Count an optimiser step, with its loss and what else is logged of it."""
        self._values.append(values)
        self._tokens += tokens
        self._images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that is spent in here as waiting for data."""
        started = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - started

    def means(self) -> dict[str, float]:
        """Return the mean over the steps of each value."""
        return {
            name: sum(values[name] for values in self._values) / len(self._values)
            for name in self._values[0]
        }

    def rates(self) -> dict[str, float]:
        """Return tokens and images a second, and the seconds of waiting for data."""
        return {
            "waiting_seconds": self._waited,
            "tokens_per_second": self._tokens / self.seconds,
            "images_per_second": self._images / self.seconds,
        }


class Tracker:
    """A run in Weights & Biases: online when logged in, otherwise offline, or off.

    Args:
        config: Settings.
        experiment: The resolved experiment, shown as the run's config.
        output_dir: Folder of the run; W&B's own files go into ``wandb`` below it.
        run_id: The run to resume, or None for a new one.
        active: Whether this process tracks; else another one does.

    Attributes:
        run_id: For resuming; None when W&B is off.
    """

    def __init__(
        self,
        config: WandbConfig,
        experiment: Mapping[str, Any],
        output_dir: Path,
        run_id: str | None = None,
        active: bool = True,
    ) -> None:
        self._run = _start(config, experiment, output_dir, run_id) if active else None
        self.run_id: str | None = self._run.id if self._run else None
        if self._run:
            self._run.define_metric("*", step_metric="step")
            self._run.define_metric("validation/*", step_metric="step", summary="max")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Log numbers at an optimiser step."""
        if self._run:
            self._run.log({"step": step, **values})

    def log_samples(
        self,
        step: int,
        epoch: int,
        images: Sequence[Image.Image],
        captions: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> None:
        """Log a table of validation images with their captions and references."""
        if not self._run or not images:
            return
        table = wandb.Table(columns=["epoch", "image", "caption", "references"])
        for image, caption, truth in zip(images, captions, references, strict=True):
            table.add_data(epoch, wandb.Image(image), caption, "\n".join(truth))
        self._run.log({"step": step, "validation/samples": table})

    def log_images(self, step: int, paths: Mapping[str, Path]) -> None:
        """Log image files by their names."""
        if self._run:
            images = {name: wandb.Image(str(path)) for name, path in paths.items()}
            self._run.log({"step": step, **images})

    def keep_checkpoint(self, directory: Path, aliases: Sequence[str]) -> None:
        """Keep a checkpoint as an artifact of the run."""
        if self._run:
            artifact = wandb.Artifact(f"captioner-{self._run.id}", type="model")
            artifact.add_dir(str(directory))
            self._run.log_artifact(artifact, aliases=list(aliases))

    def finish(self, failed: bool = False) -> None:
        """End the run."""
        if self._run:
            self._run.finish(exit_code=int(failed))


def choose_mode(config: WandbConfig) -> str:
    """Return how W&B is used: "online", "offline", "disabled" or "shared".

    Raises:
        ConfigError: Online, but nobody is logged in; or $WANDB_MODE is none of the modes.
    """
    mode = os.environ.get("WANDB_MODE") or config.mode
    mode = {"dryrun": "offline", "run": "online"}.get(mode, mode)  # W&B's own names for them
    if mode not in MODES:
        raise ConfigError(f"WANDB_MODE={mode}: one of {', '.join(MODES)} was expected")
    if mode == "auto":
        return "online" if _logged_in(_host()) else "offline"
    if mode == "online" and not _logged_in():
        raise ConfigError(f"wandb.mode=online: {LOG_IN}")
    return mode


def _start(
    config: WandbConfig, experiment: Mapping[str, Any], output_dir: Path, run_id: str | None
) -> Any:
    mode = choose_mode(config)
    if mode == "disabled":
        return None
    try:
        run = _init(mode, config, experiment, output_dir, run_id)
    except wandb.errors.UsageError as error:
        raise ConfigError(f"wandb: {' '.join(str(error).split())}; {LOG_IN}") from None
    except wandb.errors.CommError as error:
        log_line(f"warning: W&B can't be reached ({str(error).splitlines()[0]}); going on offline")
        mode = "offline"
        run = _init(mode, config, experiment, output_dir, run_id)
    if mode == "offline":
        log_line(f"W&B is offline; to show the run there: {sync_command(run.dir)}")
    else:
        log_line(f"W&B: {run.url}")
    return run


def _init(
    mode: str,
    config: WandbConfig,
    experiment: Mapping[str, Any],
    output_dir: Path,
    run_id: str | None,
) -> Any:
    return wandb.init(
        mode=cast(Any, mode),  # its type differs between versions of wandb
        project=config.project,
        entity=config.entity or None,
        group=config.group or None,
        name=config.name or None,
        tags=list(config.tags),
        config=dict(experiment),
        dir=str(output_dir),
        id=run_id,
        resume="allow",
        settings=wandb.Settings(silent=True, console="off"),
    )


def sync_command(run_files: str) -> str:
    """Return the command that uploads an offline run, whose files are in ``run_files``."""
    return shlex.join(["wandb", "sync", str(Path(run_files).parent)])


def _host() -> str:
    return urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", WANDB_HOST)).hostname or ""


def _logged_in(host: str = "") -> bool:
    """Tell whether there is a login for a host; for any one without ``host``."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        logins = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return logins.authenticators(host) is not None if host else bool(logins.hosts)
