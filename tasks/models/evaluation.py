"""The mode in which a detector is judged by its detections and its losses at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

SEED = 0  # of the sampling in losses, so that two evaluations of the same batch give the same number


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode, no gradients, and random numbers from a fixed seed; all as it was afterwards.

    Losses taken in training mode would move running statistics, also under `no_grad`.
    """
    modes = {module: module.training for module in model.modules()}
    devices = [] if device.type == "cpu" else [device]
    with torch.no_grad(), torch.random.fork_rng(devices, device_type=device.type):
        torch.manual_seed(SEED)
        try:
            model.eval()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
