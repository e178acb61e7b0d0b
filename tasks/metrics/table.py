"""Tables of numbers on disk."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from tasks.checkpoint import replacing


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a table in UTF-8, row by row, whole or not at all."""
    with replacing(path) as binary:
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="", write_through=True)
        table = csv.writer(text, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)
        text.detach()  # closing it would close the file before it is on the disk
