"""How the commands print: a table that is never cut, JSON, CSV; into a pipe that may close."""

import csv
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import UsageError


@contextmanager
def to_stdout() -> Iterator[None]:
    """Whoever closes the pipe early (`| head`) has seen enough; a full disk is a `UsageError`."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × prints a question mark
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_the_rest()
    except OSError as error:
        _drop_the_rest()
        raise UsageError(f"cannot write the output: {error.strerror}; give it another place") from error


def _drop_the_rest() -> None:
    """Otherwise the interpreter would flush at exit, and fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def as_json(rows: Sequence[dict[str, Any]]) -> None:
    print(json.dumps(rows, indent=2))


def as_csv(rows: Sequence[dict[str, Any]]) -> None:
    writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def as_table(table: Table, notes: Sequence[str]) -> None:
    """A terminal that is too narrow wraps lines; rich would break names and numbers."""
    console = Console(width=1000, highlight=False)
    console.print(table)
    for note in notes:
        console.print(Text(note))
