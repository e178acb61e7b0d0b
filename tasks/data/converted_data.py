"""The datamodules of Pascal VOC and YOLO folders: made COCO files on first use, and then read as these."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from tasks.data.coco_data import CocoData
from tasks.data.convert import Converted, convert_voc, convert_yolo
from tasks.data.module import SPLITS

say = rank_zero_only(print)


class ConvertedData(CocoData):
    """A source that becomes COCO files, one a split. They are made, and their numbers printed, once a run.

    Args:
        root: folder of the dataset.
        train, val, test: names of its splits. Without `val`, a share of `train` is held out (`val_fraction`);
            without `test`, the test stage is judged on `val`.
        cache: a folder for the COCO files where `root` cannot be written.
        settings: those of `CocoData`.
    """

    def __init__(
        self,
        root: str,
        train: str = "train",
        val: str | None = "val",
        test: str | None = None,
        *,
        cache: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(root, train, val, test, **settings)
        self.cache = None if cache is None else Path(cache)
        self._converted: dict[str, Converted] = {}

    def convert(self, split: str) -> Converted:
        raise NotImplementedError

    def prepare_data(self) -> None:
        for split in SPLITS:
            self.paths(split)

    def paths(self, split: str) -> tuple[Path, Path]:
        name = str(self.splits[split])
        if name not in self._converted:
            self._converted[name] = self.convert(name)
            say(self._converted[name].text)
        return self._converted[name].annotations, self._converted[name].images


class VocData(ConvertedData):
    """Boxes in Pascal VOC's XML files (`convert_voc`).

    Args: those of `ConvertedData`, and
        classes: in the order of their labels; by default all names in the files, sorted.
        one_based: whether pixels are counted from 1, as the development kit does.
    """

    TARGETS = ("boxes",)

    def __init__(
        self, *args: Any, classes: Sequence[str] | None = None, one_based: bool = True, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.classes, self.one_based = classes, one_based

    def convert(self, split: str) -> Converted:
        return convert_voc(
            self.root,
            split,
            self.classes,
            one_based=self.one_based,
            cache=self.cache,
            max_pixels=self.reading["max_pixels"],
            follow_symlinks=self.follow_symlinks,
        )


class YoloData(ConvertedData):
    """Boxes or outlines in YOLO's text files (`convert_yolo`)."""

    TARGETS = ("boxes", "masks", "semantic")

    def convert(self, split: str) -> Converted:
        return convert_yolo(
            self.root,
            split,
            cache=self.cache,
            max_pixels=self.reading["max_pixels"],
            follow_symlinks=self.follow_symlinks,
        )
