"""Small COCO datasets on disk, for the tests of whatever reads them."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

HEIGHT, WIDTH = 40, 60


def image(image_id: Any = 1, file_name: str | None = None, **more: Any) -> dict[str, Any]:
    name = f"{image_id}.png" if file_name is None else file_name
    return {"id": image_id, "file_name": name, "height": HEIGHT, "width": WIDTH} | more


def annotation(annotation_id: Any = 1, bbox: Any = (10, 10, 20, 10), **more: Any) -> dict[str, Any]:
    return {"id": annotation_id, "image_id": 1, "category_id": 1, "bbox": list(bbox)} | more


def coco(
    annotations: list[dict[str, Any]] | None = None,
    images: list[dict[str, Any]] | None = None,
    categories: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One image, one box and one class, unless given."""
    return {
        "images": [image()] if images is None else images,
        "annotations": [annotation()] if annotations is None else annotations,
        "categories": [{"id": 1, "name": "thing"}] if categories is None else categories,
    }


def write(folder: Path, document: Any, pictures: bool = True) -> tuple[Path, Path]:
    """Writes `annotations.json` (text is written as it is) and, unless they exist, grey images of the size
    that the document says; returns the file and the image folder."""
    path, images = folder / "annotations.json", folder / "images"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    images.mkdir(exist_ok=True)
    if pictures and isinstance(document, dict):
        for record in document["images"]:
            file = images / record["file_name"]
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (record["width"], record["height"]), (90, 90, 90)).save(file)
    return path, images
