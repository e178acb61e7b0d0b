"""Between processes: work that one of them does with what all of them hold, its result known to all."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from resnext_backbones.errors import UsageError

PATIENCE = timedelta(hours=1)  # processes wait for the slowest one and for the evaluation

Mine = TypeVar("Mine")
Result = TypeVar("Result")


class Between:
    """A way between the processes that carries objects, which NCCL does not, with a patience of its own.

    Held by the metric, not by the module: a group that outlives the process group aborts the interpreter's
    exit now and then.
    """

    def __init__(self) -> None:
        self._side_group: Any = None

    def on_first(self, work: Callable[[list[Mine]], Result], mine: Mine) -> Result:
        """What `work` makes on rank 0 of every process's `mine`, by rank; every process must call it.

        Raises on every process what `work` raised, as UsageError or RuntimeError: those that wait for the
        result must hear of it.
        """
        if world_size() == 1:
            return work([mine])
        if self._side_group is None:
            self._side_group = dist.new_group(backend="gloo", timeout=PATIENCE)
        everyones: Any = [None] * world_size() if is_first() else None
        dist.gather_object(mine, everyones, dst=0, group=self._side_group)
        outcome: list[Any] = [None]
        if is_first():
            try:
                outcome = [work(everyones)]
            except Exception as fault:
                kind = UsageError if isinstance(fault, UsageError) else RuntimeError
                text = str(fault) if isinstance(fault, UsageError | RuntimeError) else repr(fault)
                outcome = [kind(text).with_traceback(fault.__traceback__)]
        dist.broadcast_object_list(outcome, src=0, group=self._side_group)
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files."""
    return world_size() == 1 or dist.get_rank() == 0
