"""From uint8 pixels to what a network reads; the same for every task."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

# ImageNet's mean and standard deviation of RGB in 0…255, which published weights were trained with.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


class Normalised(nn.Module):
    """A network that normalises its images itself, on its own device.

    Its buffers `mean` and `std` (0…255) are no part of its weights, so published ones load.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def normalise(self, images: Tensor, shapes: Sequence[tuple[int, int]] | None = None) -> Tensor:
        """Zero mean, unit variance; the padding is exactly 0, as torchvision pads after it normalises.

        Args:
            images: uint8 [B, 3, H, W], RGB, padded at the right and at the bottom.
            shapes: height and width of each image within its padding; None where there is none.

        Returns:
            float32 [B, 3, H, W], channels last.
        """
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if shapes is not None:
            for image, (height, width) in zip(x, shapes, strict=True):
                image[:, height:] = 0
                image[:, :, width:] = 0
        return x


def shapes_of(sizes: Tensor) -> list[tuple[int, int]]:
    """int64 [B, 2] as pairs of height and width."""
    return [(int(height), int(width)) for height, width in sizes.tolist()]
