"""A training step of Faster R-CNN: ours (channels last, bf16) against torchvision's (float32, contiguous).

    uv run python -m benchmarks.train_step [--pairs 5] [--images 2] [--size 256 320] [--json]

Both have the same ResNeXt-50-FPN weights, images and settings of proposals; the losses are compared first.
Runs alternate (A B A B …) and the ratio is taken pair by pair, since other programs disturb neighbours alike.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from resnext_backbones import FPN, resnext50_32x4d
from tasks.models.rcnn import MEAN, STD, faster_rcnn, roi_align
from tasks.provenance import versions

CLASSES = 20
GOAL = 3.0  # docs: torchvision's time divided by ours, on two CPU cores


def targets(images: int, height: int, width: int) -> list[dict[str, Tensor]]:
    corners = torch.rand(images, 10, 2) * torch.tensor([width * 0.6, height * 0.6])
    sides = 16 + torch.rand(images, 10, 2) * torch.tensor([width * 0.3, height * 0.3])
    boxes = torch.cat([corners, corners + sides], dim=2)
    return [{"boxes": b, "labels": torch.randint(1, CLASSES + 1, (10,))} for b in boxes]


def theirs(weights: dict[str, Tensor], height: int, width: int) -> nn.Module:
    mean, std = ([value / 255 for value in values] for values in (MEAN, STD))
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    body = FPN(resnext50_32x4d())
    model = FasterRCNN(body, CLASSES + 1, image_mean=mean, image_std=std, **sides)
    pooled = {name: spec for name, spec in body.features.items() if name != "p6"}
    model.roi_heads.box_roi_pool = roi_align(pooled, 7, 224)
    model.load_state_dict(weights)
    return model.train()


def stepper(model: nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step() -> float:
        torch.manual_seed(0)
        began = time.perf_counter()
        total = torch.stack(list(losses().values())).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        total.item()
        return time.perf_counter() - began

    return step


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 320), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    height, width = args.size
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, height, width), dtype=torch.uint8)
    sizes, truth = torch.tensor([[height, width]] * args.images), targets(args.images, height, width)

    mine = faster_rcnn(resnext50_32x4d(), CLASSES).train()
    other = theirs(mine.state_dict(), height, width)
    mine = mine.to(memory_format=torch.channels_last)

    def our_losses() -> dict[str, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return mine(images, sizes, truth)

    def their_losses() -> dict[str, Tensor]:
        return other([image / 255 for image in images], truth)

    torch.manual_seed(0)
    ours_first = {name: loss.item() for name, loss in our_losses().items()}
    torch.manual_seed(0)
    theirs_first = {name: loss.item() for name, loss in their_losses().items()}
    for name, loss in theirs_first.items():  # bf16, and another sample of proposals
        assert abs(ours_first[name] - loss) <= 0.1 * abs(loss) + 0.05, (name, ours_first[name], loss)

    ours_step, theirs_step = stepper(mine, our_losses), stepper(other, their_losses)
    ours_step(), theirs_step()
    rows = [{"ours": ours_step(), "torchvision": theirs_step()} for _ in range(args.pairs)]
    ratios = sorted(row["torchvision"] / row["ours"] for row in rows)
    ratio = statistics.median(ratios)
    if not args.json:
        for name in ("ours", "torchvision"):
            times = sorted(row[name] for row in rows)
            print(f"{name:12} {statistics.median(times):.3f} s  ({times[0]:.3f} … {times[-1]:.3f})")
        print(f"ratio        {ratio:.2f}  ({ratios[0]:.2f} … {ratios[-1]:.2f})")
    result = {"name": "train_step", "ratio": ratio, "goal": GOAL, "met": ratio >= GOAL, "rows": rows}
    print(json.dumps({**result, "hardware": versions()["hardware"], "versions": versions()}))


if __name__ == "__main__":
    main()
