"""Anchors by declared strides."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList


class StridedAnchors(AnchorGenerator):
    """Anchors of each cell of each level, in float32 whatever the features' precision.

    They are centred on the cell's upper left corner, the first on (0, 0), as in torchvision and Detectron2.

    torchvision infers a level's stride from the sizes of image and feature map, which is wrong for sizes
    that the stride does not divide, and makes anchors in the features' dtype, which under bf16 misplaces them
    by pixels. Here strides are the declared ones.

    Args:
        strides: pixels between cells, a level.
        scales: sides of the square anchors as multiples of the stride; 8 in FPN (arXiv 1612.03144, §4.1).
        aspect_ratios: height ÷ width.
    """

    def __init__(
        self,
        strides: Sequence[int],
        scales: Sequence[float] = (8,),
        aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0),
    ) -> None:
        sizes = tuple(tuple(scale * stride for scale in scales) for stride in strides)
        super().__init__(sizes, (tuple(aspect_ratios),) * len(sizes))
        self.strides = list(strides)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        grids = [list(level.shape[-2:]) for level in feature_maps]
        strides = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(grids, strides))
        return [anchors] * len(image_list.image_sizes)
