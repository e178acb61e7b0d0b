"""The local record of a run: metrics.jsonl."""

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from resnext_backbones.errors import UsageError
from tasks.provenance import plain

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlLogger(Logger):
    """The record of truth: `metrics.jsonl` in the run's folder.

    One line for each call of the trainer, in strict JSON: `{"step": 50, "epoch": 1, "time": <seconds since
    1970>, "train/loss": 0.5}`; numbers that are not finite stand as "NaN", "Infinity" and "-Infinity". Each
    line reaches the system in one write, so a kill costs at most the line being written. A resumed run goes
    on in the same file; steps it repeats stand twice, the later line counts.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.jsonl"
        self._file: int | None = None

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own, config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one line.

        Raises:
            UsageError: the file cannot be written.
        """
        values = dict(metrics)
        line = {"step": step, "epoch": values.pop("epoch", None), "time": round(time.time(), 3), **values}
        data = (json.dumps(plain(line), allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
                mend(self.path, self._file)
            if os.write(self._file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as fault:
            raise UsageError(f"{self.path}: cannot be written: {fault.strerror}") from fault

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the file; a later stage of the same run opens it again."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def mend(path: Path, file: int) -> None:
    """Give the last line of a killed run its missing end, or cut it off where it is only half there."""
    size = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return
    content = path.read_bytes()
    last = content[content.rfind(b"\n") + 1 :]
    try:
        json.loads(last)
        os.write(file, b"\n")
    except ValueError:
        os.ftruncate(file, len(content) - len(last))


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl` (the file or its folder), oldest first.

    A last line cut short by a kill is left out; "NaN" and the infinities are floats again.

    Raises:
        UsageError: there is no such file, or a line before the last is not JSON.
    """
    path = Path(path)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give the folder of a run")
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as fault:
            if number == len(lines):  # empty after a whole line
                break
            raise UsageError(f"{path}: line {number} is not JSON ({fault}); remove the line") from fault
        records.append({k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records
