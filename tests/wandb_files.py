"""Reads back what W&B wrote offline: LevelDB's log format, holding protobuf records."""

import json
import struct
import time
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = b":W&B"
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_records(path: Path) -> list[Any]:
    """Return the records of a run-ID.wandb file, also while its last one is being written."""
    data = path.read_bytes()
    assert data.startswith(HEADER)
    at, records, parts = 7, [], b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # no record header fits: the block's end is padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        body = data[at + 7 : at + 7 + length]
        if len(body) < length:  # the rest of it isn't written yet
            break
        at += 7 + length
        parts = body if kind in (FULL, FIRST) else parts + body
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
    return records


def wait_for_exit(path: Path, seconds: float = 60) -> None:
    """Wait for the run's last record: W&B's own process writes it, at times after finish()."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(record.WhichOneof("record_type") == "exit" for record in read_records(path)):
            return
        time.sleep(0.1)
    raise AssertionError(f"{path}: the run has no end")


def history(path: Path) -> list[dict[str, Any]]:
    """Return what was logged, a dict for each call."""
    rows = []
    for record in read_records(path):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append(
                {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
            )
    return rows


def config(path: Path) -> dict[str, Any]:
    """Return the run's config."""
    found: dict[str, Any] = {}
    for record in read_records(path):
        kind = record.WhichOneof("record_type")
        updates = record.run.config.update if kind == "run" else []
        if kind == "config":
            updates = record.config.update
        found |= {item.key: json.loads(item.value_json) for item in updates}
    return found
