"""Learning rates over the steps of a run: a linear warm-up, then cosine or steps."""

import math
from collections.abc import Callable, Sequence
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from resnext_backbones.errors import UsageError


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, *, warmup: float = 0.0, final: float = 0.0
) -> LambdaLR:
    """Linear warm-up, then half a cosine (Loshchilov & Hutter, arXiv 1608.03983).

    Args:
        total_steps: optimizer steps of the whole run.
        warmup: in which the rate rises: below 1 a share of `total_steps`, from 1 on a number of steps.
        final: what is left of the rate at the end, 0…1.

    Raises UsageError for a warm-up that is neither.
    """
    rising = warmup_steps(warmup, total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        done = min(1.0, (step - rising) / max(1, total_steps - rising))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def warmup_multistep(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup: float = 0.0,
    milestones: Sequence[float] = (2 / 3, 8 / 9),
    gamma: float = 0.1,
) -> LambdaLR:
    """Linear warm-up, then `gamma` times the rate at each milestone.

    Args:
        total_steps, warmup: as above.
        milestones: shares of `total_steps`, 0…1; the default is that of Detectron's 1× schedule, steps
            60,000 and 80,000 of 90,000.
    """
    rising = warmup_steps(warmup, total_steps)

    def factor(step: int) -> float:
        passed = sum(step >= round(share * total_steps) for share in milestones)
        return min(1.0, (step + 1) / (rising + 1)) * gamma**passed

    return LambdaLR(optimizer, factor)


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of a warm-up, which recipes quote either as a share of the run or as a number (Detectron2: 1000).

    One longer than the run is no mistake: a trial of two steps takes the first two of it. `Recipe` warns.
    """
    number = isinstance(warmup, int | float) and 0 <= warmup < math.inf
    if not number or (warmup >= 1 and warmup != int(warmup)):
        raise UsageError(
            f"scheduler.warmup={warmup}: give a share of the run, from 0 to below 1, or a number of steps"
        )
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def warmup_of(schedule: Callable[..., LRScheduler], total_steps: int) -> int:
    """Steps of the warm-up that a configured schedule (`functools.partial`) has; 0 if it is none of these."""
    if not isinstance(schedule, partial) or schedule.func not in (warmup_cosine, warmup_multistep):
        return 0
    return warmup_steps(schedule.keywords.get("warmup", 0.0), total_steps)
