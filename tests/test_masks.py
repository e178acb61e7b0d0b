"""Pasted masks against peers and against interpolation of every pixel."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from torchvision.models.detection.roi_heads import paste_masks_in_image

from tasks.models.masks import paste


def drawn(mask, box, height, width, threshold=0.5):
    """Every pixel of the image looked up in the mask; also how near to the threshold each came."""
    x0, y0, x1, y1 = box.double()
    x = (torch.arange(width).double() + 0.5 - x0) / (x1 - x0) * 2 - 1
    y = (torch.arange(height).double() + 0.5 - y0) / (y1 - y0) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    values = F.grid_sample(mask[None, None].double(), grid, align_corners=False)[0, 0]
    inside = (grid >= -1).all(-1)[0] & (grid < 1).all(-1)[0]
    return ((values >= threshold) & inside).numpy(), (values - threshold).abs().numpy()


def blobs(n, seed=0, size=28):
    """Smooth probabilities with several pieces and holes."""
    noise = torch.randn(n, 1, 5, 5, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(noise * 3, size=(size, size), mode="bicubic")[:, 0].sigmoid()


def iou(a, b):
    return (a & b).sum() / max(1, (a | b).sum())


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    corner=st.tuples(st.floats(-60, 90), st.floats(-60, 90)),
    sides=st.tuples(st.floats(0.01, 150), st.floats(0.01, 150)),
    image=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    threshold=st.floats(0.1, 1.0),
)
def test_every_pixel_is_as_if_looked_up(seed, corner, sides, image, threshold):
    (mask,) = blobs(1, seed)
    (x, y), (w, h), (height, width) = corner, sides, image
    box = torch.tensor([x, y, x + w, y + h])
    if not (box[2] > box[0] and box[3] > box[1]):
        return
    (code,) = paste(mask[None], box[None], height, width, threshold)
    expected, margin = drawn(mask, box, height, width, threshold)
    assert code["size"] == [height, width]
    pasted = rle.decode(code).astype(bool)
    assert code["counts"] == rle.encode(np.asfortranarray(pasted, dtype=np.uint8))["counts"]  # no empty run
    # Only a pixel whose value is the threshold to the last digits may fall on either side of it, or one
    # whose centre lies on the edge of the box.
    differs = pasted != expected
    centre_x, centre_y = np.arange(width) + 0.5, np.arange(height) + 0.5
    x0, y0, x1, y1 = box.double().numpy()
    edge_x = np.minimum(abs(centre_x - x0), abs(centre_x - x1)) < 1e-6
    edge_y = np.minimum(abs(centre_y - y0), abs(centre_y - y1)) < 1e-6
    assert not (differs & (margin > 1e-6) & ~edge_x[None] & ~edge_y[:, None]).any()


@pytest.mark.parametrize("side", [16, 40, 200])
def test_masks_are_those_of_an_independent_interpolation(side):
    masks = blobs(8)
    corners = torch.rand(8, 2) * 50
    boxes = torch.cat([corners, corners + side + torch.rand(8, 2)], dim=1)
    for mask, box, code in zip(masks, boxes, paste(masks, boxes, 300, 280), strict=True):
        expected, _ = drawn(mask, box, 300, 280)
        assert iou(rle.decode(code).astype(bool), expected) >= 0.98


def test_masks_are_torchvisions_up_to_its_whole_pixels():
    """torchvision shifts boxes by up to a pixel to whole ones, so it is asked about large ones."""
    masks = blobs(6)
    boxes = torch.tensor([[20.0, 30, 420, 380]]).repeat(6, 1)
    theirs = paste_masks_in_image(masks[:, None], boxes, (400, 450))[:, 0] >= 0.5
    for code, expected in zip(paste(masks, boxes, 400, 450), theirs.numpy(), strict=True):
        assert iou(rle.decode(code).astype(bool), expected) >= 0.98


@pytest.mark.parametrize(
    "box",
    [
        [10, 10, 10, 30],
        [10, 10, 30, 10],
        [5, 5, 5, 5],
        [50, 50, 90, 90],
        [-30, -30, -1, -1],
        [10.6, 3, 11.4, 9],
    ],
    ids=["no width", "no height", "a point", "right of the image", "left of it", "between pixel centres"],
)
def test_boxes_without_a_pixel_give_empty_masks(box):
    (code,) = paste(torch.ones(1, 28, 28), torch.tensor([box], dtype=torch.float32), 40, 40)
    assert rle.area(code) == 0
    assert rle.decode(code).shape == (40, 40)


def test_a_full_mask_of_the_whole_image_is_one_run():
    """Beyond the image's edges on all sides, so that columns meet each other."""
    (code,) = paste(torch.ones(1, 28, 28), torch.tensor([[-20.0, -20, 60, 60]]), 40, 30)
    assert rle.area(code) == 40 * 30
    assert code["counts"] == rle.encode(np.ones((40, 30), dtype=np.uint8, order="F"))["counts"]


def test_a_probability_at_the_threshold_belongs_to_the_object():
    (code,) = paste(torch.full((1, 28, 28), 0.5), torch.tensor([[0.0, 0, 280, 280]]), 280, 280)
    assert rle.decode(code)[5:275, 5:275].all()  # further in than half a cell, where it fades


def test_a_huge_image_costs_runs_not_pixels():
    """100 masks of 8000 × 8000 pixels would take 6.4 GB drawn."""
    masks = blobs(100)
    boxes = torch.tensor([[0.0, 0, 8000, 8000]]).repeat(100, 1)
    codes = paste(masks, boxes, 8000, 8000)
    assert sum(len(code["counts"]) for code in codes) < 20e6
    area = float(rle.area(codes[0])) / 8000**2
    fine, _ = drawn(masks[0], torch.tensor([0.0, 0, 400, 400]), 400, 400)
    assert area == pytest.approx(fine.mean(), abs=2e-3)


def test_nothing_to_paste():
    assert paste(torch.zeros(0, 28, 28), torch.zeros(0, 4), 40, 40) == []


def test_what_cannot_be_pasted_is_refused():
    mask, box = torch.ones(1, 28, 28), torch.tensor([[0.0, 0, 10, 10]])
    for threshold in (0.0, 1.5):
        with pytest.raises(ValueError, match="threshold"):
            paste(mask, box, 40, 40, threshold)
    with pytest.raises(ValueError, match="NaN"):
        paste(mask * float("nan"), box, 40, 40)
    with pytest.raises(ValueError, match="NaN"):
        paste(mask, box * float("inf"), 40, 40)
