"""What `CocoAP` reads of an annotation file before the evaluator reads the rest, and what it checks."""

from pathlib import Path
from typing import TypeVar

import msgspec

from resnext_backbones.errors import UsageError

T = TypeVar("T")


class _Image(msgspec.Struct):
    id: int | float


class _Category(msgspec.Struct):
    id: int | float
    name: str


class _Header(msgspec.Struct):
    images: list[_Image]
    categories: list[_Category]


class _Pose(msgspec.Struct):
    keypoints: list[float] | None = None


class _Poses(msgspec.Struct):
    annotations: list[_Pose] = []


def images_and_classes(path: Path) -> tuple[set[int], dict[int, str]]:
    """The image ids, and the class names by category id in ascending order.

    Raises UsageError if the file is no COCO file.
    """
    header = _read(path, _Header)
    images = {int(image.id) for image in header.images}
    return images, {int(c.id): c.name for c in sorted(header.categories, key=lambda c: c.id)}


def check_sigmas(path: Path, sigmas: int) -> None:
    """With the wrong number of sigmas pycocotools fails obscurely and hotcoco gives a wrong number."""
    for i, pose in enumerate(_read(path, _Poses).annotations):
        if pose.keypoints and len(pose.keypoints) != 3 * sigmas:
            raise UsageError(
                f"{path}: annotations[{i}] has {len(pose.keypoints) / 3:g} keypoints and there are {sigmas} "
                "sigmas; give keypoint_sigmas, one for each keypoint"
            )


def _read(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as fault:
        raise UsageError(f"{path}: {fault.strerror}; give a COCO annotation file") from fault
    except msgspec.DecodeError as fault:
        raise UsageError(f"{path}: {fault}; give a COCO annotation file") from fault
