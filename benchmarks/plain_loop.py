"""A detector trained by torchvision alone, in a plain loop, as its reference scripts do.

One run in a process of its own; `benchmarks.plain_torchvision` starts it and judges what it found.

    uv run python -m benchmarks.plain_loop bccd sgd --lr 0.01 --seconds 60 --seed 0 --out runs/x

On the CPU, in float32 and contiguous memory, with one process that loads images. Nothing of this project is
in it but the clock (`benchmarks/clock.py`) and the cosine of our recipe (`tasks/schedule.py`).
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.ops import MultiScaleRoIAlign

from benchmarks.clock import OverTime, cosine_over_time, leave_trained
from benchmarks.plain_data import DATA, WORKERS, CocoImages, Data, endless, pairs

BATCH = 4


# The network.


def network(data: Data, classes: int) -> FasterRCNN:
    """torchvision's Faster or Mask R-CNN on its ResNet, with the settings of `small_data_cpu_faster_rcnn`."""
    body = ResNet(Bottleneck, [2, 2, 2, 2], groups=32, width_per_group=4)  # ResNeXt-26 32×4d
    levels = {f"layer{i + 1}": str(i) for i in range(4)}
    backbone = BackboneWithFPN(body, levels, [256, 512, 1024, 2048], 128)  # live norms, nothing frozen
    strides = (4, 8, 16, 32, 64)

    def pool(output_size: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(list("0123"), output_size, sampling_ratio=2, canonical_scale=112)

    heads: dict[str, Any] = {
        "rpn_anchor_generator": AnchorGenerator(
            tuple((4 * s, 8 * s) for s in strides), ((0.5, 1.0, 2.0),) * len(strides)
        ),
        "box_roi_pool": pool(7),
        "box_head": TwoMLPHead(128 * 7 * 7, 512),
        "box_predictor": FastRCNNPredictor(512, classes + 1),
    }
    if data.masks:
        heads["mask_roi_pool"] = pool(14)
        heads["mask_head"] = MaskRCNNHeads(128, (256,) * 4, dilation=1)
        heads["mask_predictor"] = MaskRCNNPredictor(256, 256, classes + 1)
    kind = MaskRCNN if data.masks else FasterRCNN
    return kind(
        backbone,
        min_size=data.size[0],
        max_size=data.size[1],
        rpn_batch_size_per_image=128,
        **{f"rpn_{when}_nms_top_n_{mode}": 300 for when in ("pre", "post") for mode in ("train", "test")},
        box_batch_size_per_image=64,
        **heads,
    )


# The recipes.


@dataclass(frozen=True)
class Recipe:
    """An optimizer with its schedule, over (parameters of a model, seconds of the run, steps of an epoch)."""

    build: Callable[[nn.Module, float, int], tuple[Optimizer, OverTime]]
    clip: float | None = None
    flip_vertically: bool = False


def reference(lr: float) -> Recipe:
    """The reference script's: SGD, an epoch of warm-up (1000 steps at most), a tenth at 2/3 and at 8/9."""

    def build(model: nn.Module, seconds: float, epoch: int) -> tuple[Optimizer, OverTime]:
        optimizer = SGD(model.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        rising = max(1, min(1000, epoch - 1))

        def factor(step: int, share: float) -> float:
            warm = min(1.0, 1e-3 + (1 - 1e-3) * step / rising)
            return warm * 0.1 ** sum(share >= milestone for milestone in (2 / 3, 8 / 9))

        return optimizer, OverTime(optimizer, seconds, factor)

    return Recipe(build)


def ours() -> Recipe:
    """That of `experiment=small_data_cpu augment=flip_vertically`, in float32 and contiguous memory."""

    def build(model: nn.Module, seconds: float, epoch: int) -> tuple[Optimizer, OverTime]:
        groups = [
            {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.05},
            {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, lr=6e-4, fused=True)
        return optimizer, cosine_over_time(optimizer, seconds=seconds, warmup=0.05)

    return Recipe(build, clip=10.0, flip_vertically=True)


# Training and finding.


def train(model: nn.Module, images: Dataset, recipe: Recipe, seconds: float, seed: int) -> dict[str, Any]:
    """Trains in place until `seconds` have passed since the first batch was there.

    Returns `steps`, the `seconds` they took, and whether a loss was not finite (`diverged`, at which step),
    where the reference gives up.
    """
    torch.manual_seed(seed)
    loader = DataLoader(
        images,
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=WORKERS,
        collate_fn=pairs,
        persistent_workers=True,
    )
    optimizer, schedule = recipe.build(model, seconds, len(loader))
    model.train()
    steps = 0
    for batch, targets in endless(loader):
        schedule.begin()
        losses = model(batch, targets)
        total = torch.stack(list(losses.values())).sum()
        if not math.isfinite(total.item()):
            return {"diverged": steps, "steps": steps, "seconds": schedule.elapsed}
        optimizer.zero_grad()
        total.backward()
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        steps += 1
        if steps % 10 == 0:
            print(
                f"step {steps}, {schedule.elapsed:.0f} s of {seconds:g}  loss {total.item():.3f}", flush=True
            )
        if schedule.share >= 1:
            break
    return {"diverged": None, "steps": steps, "seconds": schedule.elapsed}


@torch.no_grad()
def detections(model: nn.Module, images: CocoImages) -> dict[str, list[dict[str, Any]]]:
    """What is found, in COCO's results format, in the pixels of the images as they are in the files."""
    model.eval()
    categories = {label: category for category, label in images.labels.items()}
    results: dict[str, list[dict[str, Any]]] = {iou_type: [] for iou_type in images.data.iou_types}
    for image, target in (images[i] for i in range(len(images))):
        found = model([image])[0]
        for i in range(len(found["scores"])):
            x1, y1, x2, y2 = found["boxes"][i].tolist()
            what = {"image_id": target["image_id"], "category_id": categories[int(found["labels"][i])]}
            what["score"] = float(found["scores"][i])
            results["bbox"].append({**what, "bbox": [x1, y1, x2 - x1, y2 - y1]})
            if "masks" in found:
                code = rle.encode(np.asfortranarray((found["masks"][i, 0] >= 0.5).numpy().astype(np.uint8)))
                code["counts"] = code["counts"].decode()
                results["segm"].append({**what, "segmentation": code})
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=DATA)
    parser.add_argument("recipe", choices=("sgd", "ours"))
    parser.add_argument("--lr", type=float, help="of sgd")
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="folder; trained.json in it comes last")
    args = parser.parse_args()
    if (args.recipe == "sgd") != (args.lr is not None) or args.seconds <= 0:
        parser.error("--lr is for sgd, which needs it; --seconds must be above 0")
    recipe = ours() if args.recipe == "ours" else reference(args.lr)
    torch.manual_seed(args.seed)
    images = CocoImages(DATA[args.data], "train", training=True, vertically=recipe.flip_vertically)
    model = network(DATA[args.data], len(images.labels))
    result = train(model, images, recipe, args.seconds, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    if result["diverged"] is None:
        found = detections(model, CocoImages(DATA[args.data], "val", training=False))
        for iou_type, entries in found.items():
            (args.out / f"predictions_test_{iou_type}.json").write_text(json.dumps(entries))
    leave_trained(args.out, **result, workers=WORKERS, precision="32-true")


if __name__ == "__main__":
    main()
