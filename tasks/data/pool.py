"""Work spread over processes that may crash or hang: what became of each item is always said.

`multiprocessing.Pool` waits for ever for a worker that died, and an executor of `concurrent.futures` gives up
all items with it; decoders of damaged images do die.
"""

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch


class Crashed(str):
    """Stands in the place of a result: what happened to the worker that had the item."""


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    item: int | None = None
    since: float = field(default_factory=time.monotonic)


def spread(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    """Yields (index of the item, `function(item)`) in the order in which the results come.

    A worker that dies, or needs more than `timeout` seconds for an item, is replaced, and `Crashed` is
    yielded for its item. An exception of `function` ends everything.

    function: picklable where processes are spawned. workers: at least one process is used.
    """
    context = multiprocessing.get_context()
    waiting = deque(range(len(items)))
    running: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    try:
        while waiting or any(worker.item is not None for worker in running):
            while len(running) < min(max(1, workers), len(waiting) + len(running)):
                running.append(start())
            for worker in running:
                if worker.item is None and waiting:
                    worker.item, worker.since = waiting.popleft(), time.monotonic()
                    with suppress(BrokenPipeError):  # it died: found out when its result is asked for
                        worker.pipe.send(items[worker.item])
            busy = [worker for worker in running if worker.item is not None]
            deadline = min(worker.since for worker in busy) + timeout
            ready = wait([worker.pipe for worker in busy], max(0.0, deadline - time.monotonic()))
            for worker in busy:
                if worker.pipe in ready:
                    outcome = _received(worker)
                elif time.monotonic() - worker.since > timeout:
                    outcome = Crashed(f"no result within {timeout:g} s")
                else:
                    continue
                index, worker.item = worker.item, None
                assert index is not None
                if isinstance(outcome, Crashed):
                    running.remove(worker)
                    _stop(worker)
                if isinstance(outcome, _Raised):
                    raise outcome.error
                yield index, outcome
    finally:
        for worker in running:
            _stop(worker)


@dataclass
class _Raised:
    error: Exception


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    torch.set_num_threads(1)  # a fork must not wait for its parent's threads
    parent = multiprocessing.parent_process()
    assert parent is not None
    with suppress(KeyboardInterrupt, EOFError, BrokenPipeError):
        # a parent that was killed cannot stop its workers, and forks keep each other's pipes open
        while pipe in wait([pipe, parent.sentinel]):
            item = pipe.recv()
            try:
                result = function(item)
            except Exception as error:
                result = _Raised(error)
            pipe.send(result)


def _received(worker: _Worker) -> Any:
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join(timeout=5)
        return Crashed(f"its process ended with code {worker.process.exitcode}")


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.pipe.close()
