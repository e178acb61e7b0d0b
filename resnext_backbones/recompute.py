"""Activation checkpointing that leaves the numbers alone."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which only x is kept; the backward pass computes the inside again (arXiv 1604.06174).

    The second time, running statistics stay as they are: `torch.utils.checkpoint` alone would move them twice
    a step. `torch.compile` does not take it.
    """
    return checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), _still(block)))


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    norms = [norm for norm in module.modules() if isinstance(norm, _NormBase)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        # Not `track_running_stats`: without the statistics autograd saves another number of tensors, and
        # checkpoint refuses what does not match the first time.
        norm.momentum = 0.0
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked
