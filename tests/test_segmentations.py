"""Masks drawn from polygons and run-length codes at the size and within the window that is wanted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO

from tasks.data.segmentations import render

H, W = 40, 60


def polygons(*outlines):
    return json.dumps(outlines).encode()


def runs(mask, packed=True):
    code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    if packed:
        return json.dumps({"size": list(mask.shape), "counts": code["counts"].decode()}).encode()
    flat = mask.flatten(order="F").astype(int)
    edges = [0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]
    counts = np.diff(edges).tolist()
    return json.dumps({"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}).encode()


def blob(seed, height=H, width=W):
    """A mask with smooth outlines, a hole and separate parts."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = sum(
        np.sin(x * rng.uniform(-0.3, 0.3) + y * rng.uniform(-0.3, 0.3) + rng.uniform(0, 6)) for _ in range(4)
    )
    return waves > 0.5


def star(seed, height=H, width=W):
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = rng.uniform(0.2, 0.7, 9)  # some vertices lie outside the image
    return (
        np.stack([width * (0.5 + radii * np.cos(angles)), height * (0.5 + radii * np.sin(angles))], axis=1)
        .flatten()
        .round(2)
        .tolist()
    )


RECTANGLE = [10, 10, 30, 10, 30, 30, 10, 30]


@pytest.mark.parametrize("size", [(40, 60), (80, 120), (20, 30), (80, 30), (16, 24)])
def test_a_rectangle_covers_the_scaled_rectangle(size):
    y, x = size[0] / H, size[1] / W
    expected = torch.zeros(size, dtype=torch.uint8)
    expected[round(10 * y) : round(30 * y), round(10 * x) : round(30 * x)] = 1
    mask = np.zeros((H, W))
    mask[10:30, 10:30] = 1
    for segmentation in (polygons(RECTANGLE), runs(mask), runs(mask, packed=False)):
        drawn = render(segmentation, (H, W), size)
        assert drawn.dtype == torch.uint8
        assert drawn.is_contiguous()
        assert torch.equal(drawn, expected)


@pytest.mark.parametrize("seed", range(5))
def test_at_the_original_size_masks_are_those_of_pycocotools(seed):
    outline = star(seed)
    expected = rle.decode(rle.merge(rle.frPyObjects([outline, RECTANGLE], H, W)))
    assert np.array_equal(render(polygons(outline, RECTANGLE), (H, W), (H, W)), expected)
    for packed in (True, False):
        assert np.array_equal(render(runs(blob(seed), packed), (H, W), (H, W)), blob(seed))


@pytest.mark.parametrize("seed", range(10))
def test_a_window_is_the_same_part_of_the_whole(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(n) for n in rng.integers(8, 150, 2))
    top, left = int(rng.integers(height)), int(rng.integers(width))
    window = (top, left, int(rng.integers(1, height - top + 1)), int(rng.integers(1, width - left + 1)))
    for segmentation in (polygons(star(seed)), runs(blob(seed))):
        whole = render(segmentation, (H, W), (height, width))
        part = render(segmentation, (H, W), (height, width), window)
        assert torch.equal(part, whole[top : top + window[2], left : left + window[3]])


def covered(mask, size):
    """Share of the mask among the original's pixels whose centres lie within each resized pixel."""

    def members(many, few):
        centre, edge = np.arange(many) + 0.5, np.arange(few)[:, None] * many / few
        inside = (centre > edge) & (centre <= edge + many / few)
        return inside / inside.sum(axis=1, keepdims=True)

    return members(mask.shape[0], size[0]) @ mask @ members(mask.shape[1], size[1]).T


@pytest.mark.parametrize("size", [(20, 30), (13, 60), (31, 47), (7, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_a_smaller_pixel_is_inside_if_half_of_it_is(seed, size):
    share = covered(blob(seed).astype(float), size)
    drawn = render(runs(blob(seed)), (H, W), size).numpy()
    assert np.array_equal(drawn, share > 0.5 - 1e-9)
    assert (abs(share - 0.5) < 1e-9).any() or size != (20, 30)


def test_an_enlarged_mask_repeats_its_pixels():
    drawn = render(runs(blob(1)), (H, W), (3 * H, 2 * W))
    assert np.array_equal(drawn, blob(1).repeat(3, axis=0).repeat(2, axis=1))


def test_polygons_of_huge_images_need_no_huge_mask():
    side = 2_000_000  # a mask of four million million pixels
    drawn = render(polygons([0, 0, side / 2, 0, side / 2, side, 0, side]), (side, side), (32, 32))
    assert drawn[:, :16].all()
    assert not drawn[:, 16:].any()


@pytest.mark.parametrize(
    "segmentation",
    [
        b"",
        b"null",
        b"[",
        b"7",
        polygons(),
        polygons([]),
        polygons([1, 1]),
        polygons([1, 1, 5, 5]),
        polygons([1, 1, 5, 1, 5, 5, 1]),
        polygons([1, 1, 5, 1, 5, 1e9]),
        polygons([-9, -9, -5, -9, -5, -5]),
        b"[1, 1, 5, 5]",
        b'{"size": [60, 40], "counts": [2400]}',
        b'{"size": [40, 60], "counts": "garbage!"}',
        b'{"size": [40, 60], "counts": [10, 5]}',
        b'{"size": [40, 60], "counts": [10, -5, 2395]}',
        b'{"size": [40, 60], "counts": [2400]}',
    ],
)
def test_what_cannot_be_drawn_is_an_empty_mask(segmentation):
    drawn = render(segmentation, (H, W), (20, 30), (2, 3, 4, 5))
    assert drawn.shape == (4, 5)
    assert not drawn.any()


@pytest.mark.parametrize(
    "name", ["coco33/annotations/instances_val2017.json", "nuclei/annotations/instances_val.json"]
)
def test_real_masks_keep_their_place_and_area(real_data: Path, name):
    coco = COCO(real_data / name)
    larger = 0
    for record in list(coco.anns.values())[::4][:60]:
        image = coco.imgs[record["image_id"]]
        size = (image["height"], image["width"])
        text = json.dumps(record["segmentation"]).encode()
        original = coco.annToMask(record)
        assert np.array_equal(render(text, size, size), original)
        half = (size[0] // 2, size[1] // 2)
        drawn, share = render(text, size, half).numpy(), covered(original.astype(float), half)
        if original.sum() > 150:
            both = (drawn * share).sum()
            assert both / (drawn.sum() + share.sum() - both) > 0.8  # soft IoU
            larger += 1
    assert larger > 10
