"""The embedded default for every task: written once, then read as any other dataset is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.data.coco_data import CocoData
from tasks.data.folder_data import ClassFolderData
from tasks.data.module import ImageData
from tasks.data.shapes import write_shapes
from tasks.data.shapes_draw import CLASSES


class ShapesCoco(CocoData):
    """The COCO files of the embedded dataset."""

    def __init__(self, root: str, images: Mapping[str, int], **settings: Any) -> None:
        super().__init__(root, **settings)
        self.images = dict(images)

    def prepare_data(self) -> None:
        write_shapes(self.root, **self.images)


class ShapesClasses(ClassFolderData):
    """The class folders of the embedded dataset."""

    def __init__(self, root: str, images: Mapping[str, int], **settings: Any) -> None:
        # all six, though a handful of images may lack one
        super().__init__(str(Path(root) / "classes"), classes=sorted(CLASSES), **settings)
        self.images = dict(images)

    def prepare_data(self) -> None:
        write_shapes(self.root.parent, **self.images)


def shapes_data(root: str, images: Mapping[str, int], target: str, **settings: Any) -> ImageData:
    """The embedded dataset in `root` (`tasks.data.shapes`), as the task wants it.

    Args:
        root: folder, written on first use.
        images: how many each split has.
        target: `label` reads its class folders, everything else its COCO files.
        settings: those of `ClassFolderData` or `CocoData`.
    """
    kind = ShapesClasses if target == "label" else ShapesCoco
    return kind(root, images, target=target, **settings)
