"""Captioning spread over the machines of a Ray cluster, by Ray Data.

Each worker loads the model once, and reads the images of its batches itself: their paths must mean
the same everywhere, such as on a shared disk, or be addresses that fsspec knows (``s3://…``). A
batch whose worker dies is given to another. Results come back in order, and ``job`` keeps them as
it does those of one process: what is done is skipped by id when the job is started again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioner.checkpoint_directory import is_checkpoint, is_pretrained
from captioner.config import SearchConfig
from captioner.data.listing import ImageFile, batched
from captioner.errors import UsageError
from captioner.inference.captioner import Captioner
from captioner.inference.folder import caption_stream
from captioner.inference.journal import record_from_json, record_to_json
from captioner.inference.records import Record

if TYPE_CHECKING:
    import numpy as np

BATCH_SIZE = 128
BATCHES_AT_ONCE = 400  # handed to Ray in one piece; their records wait in its memory


def ray_stream(
    checkpoints: Sequence[Path],
    images: Iterable[ImageFile],
    search: SearchConfig,
    batch_size: int = 0,
    workers: int = 0,
    precision: str = "auto",
) -> Iterator[list[Record]]:
    """Caption image files on a Ray cluster, batch by batch, in order.

    Args:
        checkpoints: What each worker loads.
        images: What to caption.
        search: How.
        batch_size: Images encoded and decoded at a time; 0 takes 128.
        workers: Processes, each with a GPU where the cluster has some, else with a core; 0 takes as
            many as there are.
        precision: As ``Captioner`` takes it.

    Raises:
        UsageError: Ray is missing.
    """
    ray = _ray()
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = workers or gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
    # A captioner of the package is found by its name, wherever the package is on that machine.
    paths = [
        str(path) if is_pretrained(path) and not is_checkpoint(path) else os.path.abspath(path)
        for path in checkpoints
    ]
    rows = (
        {"images": json.dumps([(i.image_id, i.name, str(i.path)) for i in batch])}
        for batch in batched(images, batch_size or BATCH_SIZE)
    )
    for piece in batched(rows, BATCHES_AT_ONCE):
        data = ray.data.from_items(piece, override_num_blocks=len(piece)).map_batches(
            _Worker,
            fn_constructor_args=(paths, asdict(search), precision, bool(gpus)),
            batch_size=1,
            concurrency=min(workers, len(piece)),
            max_restarts=-1,
            max_task_retries=-1,
            **({"num_gpus": 1} if gpus else {"num_cpus": 1}),
        )
        for row in data.iter_rows():
            yield [record_from_json(text) for text in json.loads(row["records"])]


def _ray() -> Any:
    """Return the ``ray`` package, joined to a cluster: RAY_ADDRESS, else this machine as one."""
    try:
        import ray  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise UsageError("--ray needs Ray Data: pip install 'captioner[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    return ray


class _Worker:
    """A process of the cluster with the model."""

    def __init__(
        self, checkpoints: list[str], search: dict[str, Any], precision: str, on_gpu: bool
    ) -> None:
        self.captioner = Captioner.from_pretrained(
            checkpoints, "cuda" if on_gpu else "cpu", precision
        )
        self.search = self.captioner.search(**search)

    def __call__(self, batch: "dict[str, np.ndarray]") -> dict[str, list[str]]:
        rows = []
        for text in batch["images"]:
            images = [ImageFile(*image) for image in json.loads(text)]
            stream = caption_stream(self.captioner, images, self.search, len(images), workers=0)
            rows.append(json.dumps([record_to_json(r) for records in stream for r in records]))
        return {"records": rows}
