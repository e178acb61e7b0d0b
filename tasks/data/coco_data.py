"""The datamodule of COCO files: one annotation file and one image folder a split, or one file for two."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from resnext_backbones.errors import UsageError
from tasks.data.annotations import CocoAnnotations
from tasks.data.coco import CocoDataset, part_of, read_coco
from tasks.data.dense_data import DenseData
from tasks.data.faults import listed
from tasks.data.image_files import check_image_files
from tasks.data.images import BACKGROUND, IGNORED
from tasks.data.keypoints import Skeleton, poses, skeleton_of
from tasks.data.module import SPLITS
from tasks.data.samplers import repeat_factors, subset
from tasks.data.transforms import MIN_SIDE

Split = str | Mapping[str, str]


class CocoData(DenseData):
    """Images with annotations in COCO's format, for every task but classification.

    Args:
        root: folder of the dataset.
        train, val, test: each the name of a split (`root/annotations/instances_{split}.json`, for keypoints
            `person_keypoints_{split}.json` where it exists, and `root/{split}/`: COCO's own layout) or a
            mapping with the paths `annotations` and `images`, absolute or relative to `root`; for semantic
            segmentation it may name a folder `semantic` of PNG files with category ids.
        keypoints: names, skeleton, flip_pairs and sigmas where the categories lack them (`skeleton_of`).
        group_by_aspect: batches of only upright or only lying images, which need less padding.
        repeat_threshold: classes in a smaller share of the images than this are shown more often
            (`repeat_factors`).
        keep_negatives: whether training sees images without objects; for keypoints, without a labelled one.
        min_image_side: training leaves out images with a shorter side, in pixels (not of class maps).
        max_drop_fraction: more faulty annotations than this share end the run (not of class maps).
        settings: those of `DenseData`.
    """

    TARGETS: ClassVar[tuple[str, ...]] = CocoDataset.TARGETS

    def __init__(
        self,
        root: str,
        train: Split = "train2017",
        val: Split | None = "val2017",
        test: Split | None = None,
        *,
        target: str = "boxes",
        keypoints: Mapping[str, Any] | None = None,
        group_by_aspect: bool = True,
        repeat_threshold: float | None = None,
        keep_negatives: bool = True,
        min_image_side: int = 8,
        max_drop_fraction: float = 0.01,
        **settings: Any,
    ) -> None:
        super().__init__(root, target, train, val, test, **settings)
        self.group_by_aspect, self.repeat_threshold = group_by_aspect, repeat_threshold
        self.keep_negatives = keep_negatives
        self.cleaning: dict[str, Any] = {
            "min_image_side": min_image_side,
            "max_drop_fraction": max_drop_fraction,
            "masks": target == "masks",
        }
        self._keypoints = keypoints
        self._skeleton: Skeleton | None = None
        self._files: dict[tuple[Path, Path], CocoAnnotations] = {}
        self._digests: dict[Path, str] = {}
        self._annotations: dict[str, CocoAnnotations] = {}
        self._datasets: dict[str, CocoDataset] = {}

    # What is where.

    def paths(self, split: str) -> tuple[Path, Path]:
        """Annotation file and image folder of `train`, `val` or `test`."""
        where = self.splits[split]
        if isinstance(where, str):
            folder = self.root / "annotations"
            poses = folder / f"person_keypoints_{where}.json"
            instances = folder / f"instances_{where}.json"
            return poses if self.target == "keypoints" and poses.is_file() else instances, self.root / where
        if {"annotations", "images"} - set(where) or set(where) - {"annotations", "images", "semantic"}:
            raise UsageError(
                f"data.{split}={dict(where)}: give a split's name, or both paths: "
                f"data.{split}='{{annotations: FILE, images: FOLDER}}'"
            )
        return self.root / where["annotations"], self.root / where["images"]

    def annotation_file(self, split: str) -> Path:
        return self.paths(split)[0]

    def class_maps(self, split: str) -> Path | None:
        """The folder of class maps of a split; None where they are painted from its instances."""
        where = self.splits[split]
        given = None if isinstance(where, str) else where.get("semantic")
        return None if given is None else self.root / given

    def annotations(self, split: str) -> CocoAnnotations:
        """A split's annotations, read once: for `train` what can be learned from, else as they are."""
        if split not in self._annotations:
            paths = self.paths(split)
            if paths not in self._files:
                self._digests[paths[0]] = _digest(paths[0])
                self._files[paths] = read_coco(*paths, follow_symlinks=self.follow_symlinks)
            read = self._files[paths]
            if self.val_fraction is not None and paths == self.paths("train"):
                read = part_of(read, self._held_out(read)[split != "train"])
            if split == "train" and self.fraction < 1:
                read = part_of(read, subset(len(read), self.fraction, self.split_seed))
            if self.target == "semantic":  # painted from all there is, crowds too
                if self.class_maps(split) is None:
                    read = read.with_paintable(self.cleaning["max_drop_fraction"])
            elif split == "train":
                read = self._learnable(read.clean(**self.cleaning))
            self._annotations[split] = read
        return self._annotations[split]

    def _held_out(self, read: CocoAnnotations) -> tuple[Tensor, Tensor]:
        """Images to train on and to validate on; a file that is listed twice is on one side only."""
        names = {name: k for k, name in enumerate(dict.fromkeys(map(read.file_name, range(len(read)))))}
        file = torch.tensor([names[read.file_name(index)] for index in range(len(read))])
        train, val = self.held_out(len(names), str(read.path))
        return torch.isin(file, train).nonzero().squeeze(1), torch.isin(file, val).nonzero().squeeze(1)

    def _learnable(self, cleaned: CocoAnnotations) -> CocoAnnotations:
        if self.keep_negatives:
            return cleaned
        if self.target != "keypoints":
            return cleaned.teaching(torch.ones(len(cleaned.ids), dtype=torch.bool))
        number = len(skeleton_of(cleaned, self._keypoints).names)
        return cleaned.teaching((poses(cleaned, number)[..., 2] > 0).any(dim=1))

    @property
    def categories(self) -> list[dict[str, Any]]:
        found = [{"id": c.id, "name": c.name} for c in self.annotations("train").categories]
        if self.target == "semantic" and self.class_maps("train") is None:
            return [{"id": 0, "name": BACKGROUND}, *found]
        return found

    @property
    def skeleton(self) -> Skeleton | None:
        if self.target == "keypoints" and self._skeleton is None:
            self._skeleton = skeleton_of(self.annotations("train"), self._keypoints)
        return self._skeleton

    @property
    def model_arguments(self) -> dict[str, Any]:
        poses = {} if self.skeleton is None else {"num_keypoints": len(self.skeleton.names)}
        return super().model_arguments | poses

    def image_ids(self, split: str) -> list[int]:
        return self.annotations(split).image_ids.tolist()

    def fingerprint(self, split: str) -> str:
        """Of the annotation file as it was when it was read."""
        self.annotations(split)
        return self._digests[self.annotation_file(split)]

    def setup(self, stage: str) -> None:
        """Reads what the stage needs, so that a fault shows before anything is trained."""
        train, mine = self.annotations("train"), self._classes("train")
        for split in ("val", "test"):
            if (theirs := self._classes(split)) != mine:
                odd = sorted(set(mine) ^ set(theirs))[:20]
                raise UsageError(
                    f"{self.annotation_file(split)}: its categories differ from those of "
                    f"{self.annotation_file('train')}: {odd}; make both lists equal"
                )
        if self.target == "semantic":
            self._refuse_class_maps()
        for split in SPLITS:
            self.dataset(split)
        if self.skeleton is not None and self.skeleton.mirrored_by == "nothing" and self.flip:
            rank_zero_warn(
                f"{train.path}: keypoints {listed(self.skeleton.names)}: no name says left or right, and "
                "images are mirrored: give data.keypoints.flip_pairs=[[a, b], …], [] if there are none, or "
                "data.flip=0"
            )

    def _classes(self, split: str) -> list[tuple[Any, ...]]:
        """What has to be the same in all splits."""
        posed = self.target == "keypoints"
        categories = self.annotations(split).categories
        return [(c.id, c.name, c.keypoints) if posed else (c.id, c.name) for c in categories]

    def _refuse_class_maps(self) -> None:
        given, train = self.class_maps("train") is not None, self.annotations("train")
        for split in SPLITS:
            if (folder := self.class_maps(split)) is not None:
                names = map(self.annotations(split).file_name, range(len(self.annotations(split))))
                maps = [str(Path(name).with_suffix(".png")) for name in names]
                check_image_files(folder, maps, follow_symlinks=self.follow_symlinks)
            if (folder is not None) != given:
                raise UsageError(
                    f"data.{split}, data.train: only one of them names a folder `semantic`, and painted "
                    "class maps have a background that others lack; name it for all splits, or for none"
                )
        if len(self.categories) > IGNORED or (given and max(train.category_ids) >= IGNORED):
            raise UsageError(f"{train.path}: class maps hold {IGNORED} classes at most, with ids below it")

    def dataset(self, split: str) -> CocoDataset:
        if split not in self._datasets:
            self._datasets[split] = CocoDataset(
                self.annotations(split),
                split,
                training=split == "train",
                target=self.target,
                skeleton=self.skeleton,
                class_maps=self.class_maps(split),
                **self.reading,
            )
        return self._datasets[split]

    def prepared(self, split: str) -> Dataset:
        if split == "train":
            self._name_boxes_lost_by_resizing()
        return super().prepared(split)

    def _name_boxes_lost_by_resizing(self) -> None:
        annotations = self.annotations("train")
        sizes = annotations.sizes[annotations.image_of()].double()
        short, long = self.image_size
        short = max(short) if isinstance(short, Sequence) else short
        short, long = short * self.jitter[1], long * self.jitter[1]
        scale = torch.minimum(short / sizes.amin(dim=1), long / sizes.amax(dim=1))
        lost = (annotations.xywh[:, 2:] * scale[:, None]).amin(dim=1) < MIN_SIDE
        if lost.any() and self.target != "semantic":
            ids = annotations.ids[lost].tolist()
            rank_zero_warn(
                f"{annotations.path}: {len(ids)} boxes have a side of less than {MIN_SIDE:g} pixel at "
                f"data.image_size={list(self.image_size)} and are not trained on (ids {ids[:20]})"
            )

    def sampling(self) -> dict[str, Any]:
        annotations = self.annotations("train")
        found: dict[str, Any] = {}
        if self.group_by_aspect:
            height, width = annotations.sizes.double().unbind(dim=1)
            found["aspect"] = width / height
        if self.repeat_threshold is not None:
            found["repeat_factors"] = repeat_factors(
                annotations.image_of(), annotations.all_labels, len(annotations), self.repeat_threshold
            )
        return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:  # said with a remedy by who reads it
        return ""
