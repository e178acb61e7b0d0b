"""The embedded default: pictures of six shapes, drawn from numbers, written once for every task.

Image `index` of a split is a function of (seed, split, index, image size) and of nothing else: not of the
number of images, nor of the process that draws it (`shapes_draw.py`). A true COCO dataset: what is annotated
is what is seen, mask, box and area are those of the visible part, exact to the pixel. Beside it the same
scenes as class maps and, cut out one by one, in class folders.
"""

import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from resnext_backbones.errors import UsageError
from tasks.data.images import IGNORED
from tasks.data.keypoints import TO_CENTRE
from tasks.data.outlines import box, polygons, runs
from tasks.data.shapes_draw import CLASSES, SPLITS, Scene, Shape, scene
from tasks.drawing.pictures import class_colour

KEYPOINTS = ("top", "right", "bottom", "left", "centre")
SKELETON = ((1, 5), (2, 5), (3, 5), (4, 5))  # 1-based, as COCO has it
SIGMAS = (0.05,) * len(KEYPOINTS)  # as precise as the eyes and wrists of COCO's people

VERSION = 3  # raised whenever the same seed gives other files
MIN_IMAGE_SIZE = 32  # pixels; in less there is no room for shapes on one another
CUTTINGS = 2  # shapes of a scene that are cut out for the class folders, at most
CUTTING_SIZE = 64  # pixels
MIN_CUTTING = 16  # pixels of the longer side of a box; a smaller shape is not cut out
STALE_SECONDS = 3600  # a write takes seconds, so what is older was left by one that was killed


# --- annotations ----------------------------------------------------------------------------------------


def _keypoints(shape: Shape, above: NDArray[np.bool_]) -> list[float]:
    """x, y, v of the outline's extreme points and its centre; v: 0 outside the image, 1 hidden, 2 in sight.

    The extremes are those in the picture (its top is up), since turned shapes have no top of their own. x and
    y are COCO's, 0 at the centre of the first pixel; what lies in its outer half is moved there.
    """
    x, y = shape.loops[0].T
    extremes = [shape.loops[0][i] for i in (y.argmin(), x.argmax(), y.argmax(), x.argmin())]
    result = []
    for point in [*extremes, shape.centre]:
        if not all(0 <= v < len(above) for v in np.round(point, 1)):
            result += [0.0, 0.0, 0]
            continue
        # an extreme lies on the edge: whether it is hidden shows a little further in
        inwards = shape.centre - point
        column, row = (point + inwards * min(1.0, 1.5 / max(float(np.linalg.norm(inwards)), 1e-9))).astype(
            int
        )
        x_y = np.round(point - TO_CENTRE[:2], 1).clip(0)
        result += [*x_y.tolist(), 1 if above[row, column] else 2]
    return result


def _annotations(shapes: list[Shape], image_id: int, first_id: int) -> list[dict[str, Any]]:
    """The COCO annotations of one image, numbered from `first_id`."""
    result = []
    for number, shape in enumerate(shapes):
        # what a later shape hides of an earlier one stays in its own sight or in that of a still later one
        above = np.any([np.zeros_like(shape.visible), *(s.visible for s in shapes[number + 1 :])], axis=0)
        keypoints = [0.0] * 3 * len(KEYPOINTS) if shape.crowd else _keypoints(shape, above)
        result.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": shape.label,
                "bbox": box(shape.visible),
                "area": int(shape.visible.sum()),
                "iscrowd": int(shape.crowd),
                "segmentation": runs(shape.visible) if shape.crowd else polygons(shape.visible),
                "keypoints": keypoints,
                "num_keypoints": sum(v > 0 for v in keypoints[2::3]),
            }
        )
    return result


def class_map(shapes: list[Shape], size: int) -> NDArray[np.uint8]:
    """The class of each pixel, uint8 [H, W]: 0 ground, 1…6 a shape, `IGNORED` a crowd."""
    values = np.zeros((size, size), dtype=np.uint8)
    for shape in shapes:
        values[shape.visible] = IGNORED if shape.crowd else shape.label
    return values


def _palette() -> list[int]:
    colours = {0: (0, 0, 0), IGNORED: (255, 255, 255)}
    return [v for value in range(256) for v in colours.get(value) or class_colour(value)]


def cuttings(drawn: Scene) -> Iterator[tuple[int, Image.Image]]:
    """Label and picture, `CUTTING_SIZE` square, of the topmost shapes with some of their surroundings."""
    size = len(drawn.image)
    sides = [(max(box(shape.visible)[2:]), shape) for shape in reversed(drawn.shapes) if not shape.crowd]
    for longest, shape in [pair for pair in sides if pair[0] >= MIN_CUTTING][:CUTTINGS]:
        x, y, width, height = box(shape.visible)
        # the share of the shape varies, but is the same whenever this shape is drawn
        side = min(size, round(longest * (1.2 + 0.5 * (shape.centre[0] % 1))))
        left = int(np.clip(x + (width - side) // 2, 0, size - side))
        above = int(np.clip(y + (height - side) // 2, 0, size - side))
        window = Image.fromarray(drawn.image[above : above + side, left : left + side])
        yield shape.label, window.resize((CUTTING_SIZE, CUTTING_SIZE), Image.Resampling.BICUBIC)


# --- files ----------------------------------------------------------------------------------------------


def write_shapes(
    root: Path,
    seed: int = 0,
    train: int = 1000,
    val: int = 150,
    test: int = 200,
    image_size: int = 128,
) -> Path:
    """Write the dataset into `root` unless it is there already; return `root`.

    In COCO's 2017 layout: `annotations/instances_{split}.json`, `{split}/000001.jpg` (JPEG, quality 95). For
    semantic segmentation: `semantic/{split}/000001.png`, the class of each pixel as the index of a palette,
    and `classes.txt`. For classification: `classes/{split}/{class}/000001.png`, up to `CUTTINGS` shapes of
    each image. `dataset.json` says what was written.

    `root` appears whole or not at all, also when two processes write it at once. Raises UsageError where
    `root` holds anything else, a dataset of other settings or of an older version, or cannot be written.
    """
    if image_size < MIN_IMAGE_SIZE:
        raise UsageError(f"image_size {image_size}: the shapes need at least {MIN_IMAGE_SIZE} pixels")
    counts = dict(zip(SPLITS, (train, val, test), strict=True))
    described = {
        "name": "shapes",
        "version": VERSION,
        "seed": seed,
        "image_size": image_size,
        "images": counts,
    }
    if _finished(root, described):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        part = Path(tempfile.mkdtemp(prefix=f".{root.name}-", suffix=".part", dir=root.parent))
        try:
            _write(part, described)
            part.chmod(0o755)  # mkdtemp makes it private
            _publish(part, root, described)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise UsageError(
            f"{root}: cannot write the shapes dataset ({error.strerror}); give another data.root"
        ) from error
    return root


def _finished(root: Path, described: dict[str, Any]) -> bool:
    """Whether `root` holds this dataset; False where it is free to be written."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise UsageError(f"{root}: is a file, but the shapes dataset needs a folder; give another data.root")
    try:
        found = json.loads((root / "dataset.json").read_bytes())
    except (OSError, ValueError):
        found = None
    if found == described:
        return True
    if isinstance(found, dict) and found.get("name") == "shapes":
        differing = [k for k in described if found.get(k) != described[k]]
        asked = ", ".join(f"{k} {found.get(k)} instead of {described[k]}" for k in differing)
        raise UsageError(
            f"{root}: holds a shapes dataset of {asked}; delete the folder or give another data.root"
        )
    if any(root.iterdir()):
        raise UsageError(
            f"{root}: holds other files than the shapes dataset; empty it or give another data.root"
        )
    return False


def _sweep(root: Path) -> None:
    """Remove what writers that were killed have left beside `root`."""
    for part in root.parent.glob(f".{root.name}-*.part"):
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            shutil.rmtree(part, ignore_errors=True)


def _publish(part: Path, root: Path, described: dict[str, Any]) -> None:
    """Give the finished folder its name, unless another process was first with the same."""
    try:
        os.replace(part, root)
    except OSError:
        if not _finished(root, described):
            raise


def _write(root: Path, described: dict[str, Any]) -> None:
    (root / "annotations").mkdir()
    with Progress(transient=True) as progress:
        bar = progress.add_task("writing the shapes dataset", total=sum(described["images"].values()))
        for split, count in described["images"].items():
            scenes = progress.track(
                (scene(described["seed"], split, k, described["image_size"]) for k in range(count)),
                task_id=bar,
            )
            _write_split(root, split, scenes)
    (root / "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n")
    (root / "dataset.json").write_text(json.dumps(described, indent=2) + "\n")


def _write_split(root: Path, split: str, scenes: Iterable[Scene]) -> None:
    for folder in (root / split, root / "semantic" / split, root / "classes" / split):
        folder.mkdir(parents=True)
    palette = _palette()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    cut_out: Counter[str] = Counter()
    for image_id, drawn in enumerate(scenes, start=1):
        size = len(drawn.image)
        name = f"{image_id:06d}"
        Image.fromarray(drawn.image).save(root / split / f"{name}.jpg", quality=95)
        images.append({"id": image_id, "file_name": f"{name}.jpg", "width": size, "height": size})
        annotations += _annotations(drawn.shapes, image_id, len(annotations) + 1)

        values = Image.fromarray(class_map(drawn.shapes, size))
        values.putpalette(palette)
        values.save(root / "semantic" / split / f"{name}.png")

        for label, cutting in cuttings(drawn):
            folder = root / "classes" / split / CLASSES[label - 1]
            folder.mkdir(exist_ok=True)
            cut_out[folder.name] += 1
            cutting.save(folder / f"{cut_out[folder.name]:06d}.png", compress_level=1)
    content = {
        "info": {"description": f"shapes, {split}", "version": str(VERSION)},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": _categories(),
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content, separators=(",", ":")))


def _categories() -> list[dict[str, Any]]:
    points = {"keypoints": KEYPOINTS, "skeleton": SKELETON, "sigmas": SIGMAS}
    return [
        {"id": i, "name": name, "supercategory": "shape", **points} for i, name in enumerate(CLASSES, start=1)
    ]
