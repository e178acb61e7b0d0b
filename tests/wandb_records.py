"""Reads back what W&B wrote offline, so that tests see the record itself and not our belief about it.

A `.wandb` file is a seven-byte header, then LevelDB's log format: blocks of 32 KiB; in each, fragments of
checksum (4 bytes), length (2, little endian), kind (1: whole, 2: first, 3: middle, 4: last) and content. Each
whole content is a protobuf `Record`.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def fragments(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = HEADER
    while at < len(data):
        if BLOCK - at % BLOCK < HEADER:  # too little room for another fragment
            at += BLOCK - at % BLOCK
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", data, at)
        yield kind, data[at + HEADER : at + HEADER + length]
        at += HEADER + length


def records(file: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    data, content = file.read_bytes(), b""
    assert data[:4] == b":W&B"
    for kind, fragment in fragments(data):
        content = fragment if kind in (1, 2) else content + fragment
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(content)
            yield record


def read_run(file: Path) -> dict[str, Any]:
    """`{"id", "name", "group", "job_type", "config", "history", "exit_code"}` of an offline run."""
    run: dict[str, Any] = {"config": {}, "history": [], "exit_code": None}

    def configure(update: Any) -> None:
        for item in update:
            run["config"][item.key or "/".join(item.nested_key)] = json.loads(item.value_json)

    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run |= {"id": record.run.run_id, "name": record.run.display_name}
            run |= {"group": record.run.run_group, "job_type": record.run.job_type}
            configure(record.run.config.update)
        elif kind == "config":
            configure(record.config.update)
        elif kind == "history":
            line: dict[str, Any] = {}
            for item in record.history.item:
                *parents, last = list(item.nested_key) or [item.key]
                place = line
                for parent in parents:
                    place = place.setdefault(parent, {})
                place[last] = json.loads(item.value_json)
            run["history"].append(line)
        elif kind == "exit":
            run["exit_code"] = record.exit.exit_code
    return run
