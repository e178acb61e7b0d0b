"""Whether the plain loop's network is ours: as many parameters, and with equal weights equal numbers."""

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.plain_data import DATA, WORKERS
from benchmarks.plain_loop import network
from benchmarks.runs import REAL_DATA, ROOT
from tasks.building import build_body, build_model

TOLERANCE = 1e-3  # of pixels, scores and mask probabilities, and relative of losses; float32 in both


def our_words(data: str) -> list[str]:
    """What ours is started with, but for the length of the run."""
    short, long = DATA[data].size
    return [
        f"task={'instance_segmentation' if DATA[data].masks else 'detection'}",
        "experiment=small_data_cpu",
        "augment=flip_vertically",
        "trainer=cpu",
        "data=coco",
        f"data.root={REAL_DATA}/{DATA[data].folder}",
        "data.train=train",
        "data.val=val",
        f"data.image_size=[{short},{long}]",
        f"data.num_workers={WORKERS}",
        "data.keep_negatives=false",  # the reference script drops images without objects
    ]


def our_network(data: str, classes: int) -> nn.Module:
    """What train.py builds for this dataset."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=our_words(data))
    body, _ = build_body(cfg)
    return build_model(cfg, body, num_classes=classes)


@torch.no_grad()
def check_equal(data: str, classes: int) -> str:
    """Compares them on random pixels of the size they will see; says what was equal.

    Raises SystemExit where they differ.
    """
    torch.manual_seed(0)
    mine, other = our_network(data, classes), network(DATA[data], classes)
    ours, theirs = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (mine, other))
    if ours != theirs:
        raise SystemExit(f"{data}: ours has {ours:,} trainable parameters, the plain network {theirs:,}")
    other.load_state_dict(mine.state_dict())
    height, width = DATA[data].size
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    targets = [_target(height, width, classes, DATA[data].masks) for _ in images]
    padded = torch.zeros(2, 3, -(-height // 32) * 32, -(-width // 32) * 32, dtype=torch.uint8)
    padded[:, :, :height, :width] = images
    sizes, scaled = torch.tensor([[height, width]] * 2), [image / 255 for image in images]

    for part in (mine.rpn, mine.roi_heads, other.rpn, other.roi_heads):
        part.fg_bg_sampler.batch_size_per_image = 10**6  # all of them, where both would draw a sample
    losses = [
        {name: loss.item() for name, loss in found.items()}
        for found in (mine.train()(padded, sizes, targets), other.train()(scaled, targets))
    ]
    for name, loss in losses[1].items():
        if abs(losses[0][name] - loss) > TOLERANCE * (1 + abs(loss)):
            raise SystemExit(f"{data}: {name} is {losses[0][name]:.6f} here and {loss:.6f} in torchvision")
    # the pass in training mode has moved the norms' statistics: no identities are compared
    for image, (here, there) in enumerate(zip(mine.eval()(padded, sizes), other.eval()(scaled), strict=True)):
        if "masks" in here:  # ours gives the box's inside, torchvision the image with it
            here["masks"] = paste_masks_in_image(here["masks"][:, None], here["boxes"], (height, width))
        for name in there:
            _compare(data, image, name, here[name], there[name])
    count = len(there["scores"])
    return f"{ours:,} parameters in both; losses and detections ({count} an image) equal within {TOLERANCE:g}"


def _target(height: int, width: int, classes: int, masks: bool) -> dict[str, Tensor]:
    corners = torch.rand(6, 2) * torch.tensor([width * 0.6, height * 0.6])
    boxes = torch.cat([corners, corners + 16 + torch.rand(6, 2) * 60], dim=1)
    target = {"boxes": boxes, "labels": torch.randint(1, classes + 1, (6,))}
    if masks:
        target["masks"] = (torch.rand(6, height, width) < 0.5).to(torch.uint8)
    return target


def _compare(data: str, image: int, name: str, here: Tensor, there: Tensor) -> None:
    if here.shape != there.shape or (here.float() - there.float()).abs().max() > TOLERANCE:
        raise SystemExit(f"{data}: the {name} found in image {image} differ from torchvision's")
