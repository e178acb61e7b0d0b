"""Images with a PNG of classes each: pairing, values, sizes, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.data import images
from tasks.data.check import check_dataset, start_report
from tasks.data.folder_data import MaskFolderData
from tasks.data.folder_images import MaskImages
from tasks.data.mask_folders import MaskFolders, read_mask, read_mask_folders

HEIGHT, WIDTH = 24, 40


def classes(*values: int) -> NDArray[np.uint8]:
    """A mask of upright stripes, one a value."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    for part, value in zip(np.array_split(np.arange(WIDTH), len(values)), values, strict=True):
        mask[:, part] = value
    return mask


def save(path: Path, picture: Image.Image, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, **options)  # type: ignore[arg-type]
    return path


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    return save(path, Image.new("RGB", size, (9, 9, 9)))


def pair(root: Path, stem: str, *values: int, split: str = "train") -> None:
    image(root / f"images/{split}/{stem}.jpg")
    save(root / f"masks/{split}/{stem}.png", Image.fromarray(classes(*values)))


# One mask.


def test_of_a_palette_the_index_counts(tmp_path: Path) -> None:
    """As in Pascal VOC, whose colours are only to look at."""
    picture = Image.fromarray(classes(0, 3, 255))
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    assert picture.mode == "P"
    path = save(tmp_path / "a.png", picture)
    np.testing.assert_array_equal(read_mask(path), classes(0, 3, 255))
    np.testing.assert_array_equal(
        read_mask(save(tmp_path / "b.png", picture, transparency=0)), classes(0, 3, 255)
    )


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint8, "png"), (np.uint16, "png"), (np.int32, "tif")])
def test_grey_masks_of_any_depth(tmp_path: Path, dtype: type, suffix: str) -> None:
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(classes(0, 200, 255).astype(dtype)))
    mask = read_mask(path)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, classes(0, 200, 255))


def test_masks_of_two_values_in_one_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", Image.fromarray(classes(0, 1).astype(bool)))
    np.testing.assert_array_equal(read_mask(path), classes(0, 1))


def test_masks_that_hold_no_classes_are_refused(tmp_path: Path) -> None:
    colours = save(tmp_path / "a.png", Image.new("RGB", (WIDTH, HEIGHT)))
    with pytest.raises(UsageError, match=r"a\.png: a colour image \(mode RGB\), not a class map"):
        read_mask(colours)
    lossy = save(tmp_path / "b.jpg", Image.fromarray(classes(0, 1)))
    with pytest.raises(UsageError, match="JPEG changes the values"):
        read_mask(lossy)
    deep = save(tmp_path / "c.png", Image.fromarray(classes(0, 1).astype(np.uint16) * 7000))
    with pytest.raises(UsageError, match="values from 0 to 7000; classes are 0 to 254, and 255 is ignored"):
        read_mask(deep)
    (tmp_path / "d.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    for path, expected in ((tmp_path / "d.png", "cannot be decoded"), (tmp_path / "e.png", "no such")):
        with pytest.raises(UsageError, match=expected):
            read_mask(path)
    with pytest.raises(UsageError, match="more than 99 pixels"):
        read_mask(save(tmp_path / "f.png", Image.fromarray(classes(0))), max_pixels=99)


# Folders.


def files(folders: MaskFolders) -> dict[str, str]:
    return {
        folders.file_name(i): str(folders.mask_path(i).relative_to(folders.masks))
        for i in range(len(folders))
    }


@pytest.mark.parametrize(
    ("images", "masks", "split"),
    [
        ("images/val", "masks/val", "val"),
        ("img_dir/val", "ann_dir/val", "val"),
        ("val", "semantic/val", "val"),
        ("a/b", "c", {"images": "a/b", "masks": "c"}),
    ],
)
def test_layouts(tmp_path: Path, images: str, masks: str, split: str | dict[str, str]) -> None:
    image(tmp_path / images / "city/1.jpg")
    save(tmp_path / masks / "city/1.png", Image.fromarray(classes(0, 2)))
    folders = read_mask_folders(tmp_path, split)
    assert files(folders) == {"city/1.jpg": "city/1.png"}
    assert folders.names == ["class 0", "class 1", "class 2"]
    assert start_report({"val": folders}) == "val: 1 image with a mask, 3 classes"


def test_cityscapes_endings(tmp_path: Path) -> None:
    image(tmp_path / "leftImg8bit/train/ulm/ulm_01_leftImg8bit.png")
    for kind, value in (("labelTrainIds", 1), ("labelIds", 33), ("instanceIds", 200)):
        save(tmp_path / f"gtFine/train/ulm/ulm_01_gtFine_{kind}.png", Image.fromarray(classes(value, 255)))
    save(tmp_path / "gtFine/train/ulm/ulm_01_gtFine_color.png", Image.new("RGBA", (WIDTH, HEIGHT)))
    (tmp_path / "gtFine/train/ulm/ulm_01_gtFine_polygons.json").write_text("{}")
    folders = read_mask_folders(
        tmp_path,
        {"images": "leftImg8bit/train", "masks": "gtFine/train"},
        endings=("_leftImg8bit", "_gtFine_labelTrainIds"),
    )
    assert files(folders) == {"ulm/ulm_01_leftImg8bit.png": "ulm/ulm_01_gtFine_labelTrainIds.png"}
    assert len(folders.names) == 2


def test_what_has_no_partner_is_named_and_refused_in_training(tmp_path: Path) -> None:
    pair(tmp_path, "both", 0, 1)
    image(tmp_path / "images/train/lone.jpg")
    save(tmp_path / "masks/train/spare.png", Image.fromarray(classes(0, 1)))
    (tmp_path / "masks/train/notes.txt").touch()
    folders = read_mask_folders(tmp_path, "train")
    assert files(folders) == {"both.jpg": "both.png"}
    assert [str(f) for f in folders.faults] == [
        "left out 1 image: without a mask (id lone.jpg)",
        "left out 1 mask: without an image (id spare.png)",
        "left out 1 file: not an image, by its ending (id notes.txt)",
    ]
    with pytest.raises(UsageError, match=r"1 of 2 images without a mask in .*masks/train: lone\.jpg"):
        read_mask_folders(tmp_path, "train", training=True)


def test_a_list_chooses_the_images_of_a_split(tmp_path: Path) -> None:
    """Pascal VOC: most images of its folder have no mask."""
    image(tmp_path / "JPEGImages/boxes_only.jpg")
    for name in ("1", "2", "3"):
        image(tmp_path / f"JPEGImages/{name}.jpg")
        save(tmp_path / f"SegmentationClass/{name}.png", Image.fromarray(classes(0, 1)))
    chosen = tmp_path / "ImageSets/Segmentation/train.txt"
    chosen.parent.mkdir(parents=True)
    chosen.write_text("3\n1\n")
    split = {"images": "JPEGImages", "masks": "SegmentationClass", "list": "ImageSets/Segmentation/train.txt"}
    folders = read_mask_folders(tmp_path, split, training=True)
    assert files(folders) == {"1.jpg": "1.png", "3.jpg": "3.png"}
    assert not folders.faults
    chosen.write_text("3\n4\n")
    with pytest.raises(UsageError, match=r"train\.txt: 1 image missing: 4"):
        read_mask_folders(tmp_path, split)
    chosen.write_text("boxes_only\n3\n")
    with pytest.raises(UsageError, match=r"1 of 2 images without a mask"):
        read_mask_folders(tmp_path, split, training=True)


def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"neither .*images/train with .*masks/train nor .*img_dir/train"):
        read_mask_folders(tmp_path, "train")
    with pytest.raises(UsageError, match="give a split's name, or both paths"):
        read_mask_folders(tmp_path, {"images": "a"})
    with pytest.raises(UsageError, match=r"/a: there is no such folder of images"):
        read_mask_folders(tmp_path, {"images": "a", "masks": "b"})
    image(tmp_path / "images/train/1.jpg")
    (tmp_path / "masks/train").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"1 of 1 image without a mask"):
        read_mask_folders(tmp_path, "train")
    image(tmp_path / "masks/train/1.jpg")
    with pytest.raises(UsageError, match=r"JPEG changes the values of pixels"):
        read_mask_folders(tmp_path, "train")
    pair(tmp_path, "1", 0, 1)
    image(tmp_path / "images/train/1.png")
    with pytest.raises(UsageError, match=r"differ only in their suffix: '1\.jpg' and '1\.png'"):
        read_mask_folders(tmp_path, "train")


def test_links_may_not_lead_out_unless_allowed(tmp_path: Path) -> None:
    root = tmp_path / "root"
    pair(root, "1", 0, 1)
    elsewhere = save(tmp_path / "2.png", Image.fromarray(classes(0, 1)))
    image(root / "images/train/2.jpg")
    (root / "masks/train/2.png").symlink_to(elsewhere)
    with pytest.raises(UsageError, match=r"masks/train: 1 link out of .*'2\.png'"):
        read_mask_folders(root, "train")
    assert len(read_mask_folders(root, "train", follow_symlinks=True)) == 2


# Classes.


def test_names_are_given_listed_or_counted(tmp_path: Path) -> None:
    for stem, values in (("1", (0, 1)), ("2", (4, 255)), ("3", (0, 255))):
        pair(tmp_path, stem, *values)
    assert read_mask_folders(tmp_path, "train", workers=2).names == [f"class {k}" for k in range(5)]
    (tmp_path / "classes.txt").write_text("ground\n\nroad\n")
    with pytest.raises(UsageError, match=r"classes\.txt: .* different names are wanted"):
        read_mask_folders(tmp_path, "train")
    (tmp_path / "classes.txt").write_text("ground\nroad \n\n")
    assert read_mask_folders(tmp_path, "train").names == ["ground", "road"]
    assert read_mask_folders(tmp_path, "train", ["a", "b", "c"]).names == ["a", "b", "c"]
    for wrong in (["a"], ["a", "b", "a"], ["a", ""], [str(k) for k in range(256)]):
        with pytest.raises(UsageError, match=r"data\.classes: .*different names are wanted"):
            read_mask_folders(tmp_path, "train", wrong)


@pytest.mark.parametrize("names", [None, ["background", "nucleus"]])
def test_masks_of_0_and_255_have_one_class_only(tmp_path: Path, names: list[str] | None) -> None:
    """The usual mistake with two classes; without a word nothing but background would be learned."""
    for number in range(4):
        pair(tmp_path, str(number), 0, *[255] * (number % 2))
    with pytest.raises(
        UsageError, match=r"masks/train: .* no value but 0 and 255, which is ignored; write 1 in place of 255"
    ):
        read_mask_folders(tmp_path, "train", names, training=True)
    pair(tmp_path, "4", 0, 1)
    assert len(read_mask_folders(tmp_path, "train", names, training=True)) == 5


def test_white_masks_are_refused_even_where_another_split_has_classes(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 255)
    pair(tmp_path, "1", 0, 1, split="val")
    with pytest.raises(UsageError, match=r"masks/train: the masks hold no value but 0 and 255"):
        MaskFolderData(str(tmp_path), num_workers=0).setup("fit")


def test_masks_of_background_alone_are_no_mistake(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0)
    assert read_mask_folders(tmp_path, "train", ["ground", "road"], training=True).names == ["ground", "road"]


def test_classes_are_counted_in_all_splits(tmp_path: Path) -> None:
    """Otherwise a class that only val shows would end the run after an epoch."""
    for split, value in (("train", 2), ("val", 4), ("test", 3)):
        pair(tmp_path, "1", 0, value, split=split)
    data = MaskFolderData(str(tmp_path), test="test", num_workers=0)
    data.setup("fit")
    assert data.names == [f"class {k}" for k in range(5)]
    for split in ("train", "val", "test"):
        assert data.annotations(split).names == data.names
        data.dataset(split).load(0)


def test_large_masks_are_refused_while_classes_are_looked_for(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 1)
    for classes in (None, ["ground", "road"]):
        data = MaskFolderData(str(tmp_path), val="train", classes=classes, max_pixels=99, num_workers=0)
        with pytest.raises(UsageError, match=r"more than 99 pixels.*data\.max_pixels"):
            data.setup("fit")
    with pytest.raises(UsageError, match="more than 99 pixels"):
        read_mask_folders(tmp_path, "train", max_pixels=99)


def test_a_bad_mask_is_named_while_classes_are_looked_for(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 1)
    image(tmp_path / "images/train/2.jpg")
    save(tmp_path / "masks/train/2.png", Image.new("RGB", (WIDTH, HEIGHT)))
    with pytest.raises(UsageError, match=r"masks/train/2\.png: a colour image"):
        read_mask_folders(tmp_path, "train")


# Samples.


def dataset(root: Path, training: bool = False, names: tuple[str, ...] = ("a", "b", "c")) -> MaskImages:
    return MaskImages(read_mask_folders(root, "train", names), "train", training=training)


def test_a_sample_holds_the_values_of_the_file(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 2, 255)
    picture, target = dataset(tmp_path).load(0)
    assert picture.shape == (3, HEIGHT, WIDTH)
    assert target["semantic"].dtype == torch.uint8
    np.testing.assert_array_equal(target["semantic"], classes(0, 2, 255))
    assert torch.equal(target["semantic"].as_subclass(torch.Tensor), target["original_semantic"])
    assert (target["image_id"], target["original_size"]) == (0, (HEIGHT, WIDTH))
    assert dataset(tmp_path).image_size(0) == (HEIGHT, WIDTH)
    assert "original_semantic" not in dataset(tmp_path, training=True)[0][1]


def test_the_mask_follows_a_jpeg_that_is_decoded_smaller(tmp_path: Path) -> None:
    large = (16 * WIDTH, 16 * HEIGHT)
    image(tmp_path / "images/train/1.jpg", large)
    mask = np.kron(classes(0, 1, 2, 255), np.ones((16, 16), dtype=np.uint8))
    save(tmp_path / "masks/train/1.png", Image.fromarray(mask))
    picture, target = dataset(tmp_path).load(0, at_least=(HEIGHT, WIDTH))
    assert picture.shape[-2:] == target["semantic"].shape == (2 * HEIGHT, 2 * WIDTH)
    np.testing.assert_array_equal(
        target["semantic"], np.kron(classes(0, 1, 2, 255), np.ones((2, 2), dtype=np.uint8))
    )
    np.testing.assert_array_equal(target["original_semantic"], mask)


@pytest.mark.parametrize("turned", [False, True])
def test_a_mask_may_be_of_the_image_as_stored_or_as_shown(tmp_path: Path, turned: bool) -> None:
    exif = Image.Exif()
    exif[274] = 6
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    stored = Image.fromarray(np.stack([x * 6, y * 10, x + y], axis=2).astype(np.uint8))
    save(tmp_path / "images/train/1.png", stored, exif=exif)
    mask = classes(0, 1).T if turned else classes(0, 1)
    save(tmp_path / "masks/train/1.png", Image.fromarray(np.ascontiguousarray(mask)))
    picture, target = dataset(tmp_path)[0]
    expected = stored.transpose(Image.Transpose.ROTATE_270) if turned else stored
    np.testing.assert_array_equal(picture.permute(1, 2, 0), np.array(expected))
    np.testing.assert_array_equal(target["semantic"], mask)


def test_a_sample_opens_each_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "1", 0, 1)
    data, opened = dataset(tmp_path), []

    def counting(path: Path, *args: Any) -> Any:
        opened.append(path)
        return original(path, *args)

    original = images._open
    monkeypatch.setattr(images, "_open", counting)
    data.load(0, at_least=(4, 4))
    assert opened == [tmp_path / "masks/train/1.png", tmp_path / "images/train/1.jpg"]


def test_faulty_pairs_are_named_with_both_files(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 3, 7)
    pair(tmp_path, "2", 0, 1)
    image(tmp_path / "images/train/2.jpg", (WIDTH, HEIGHT + 1))
    data = dataset(tmp_path)
    wrong = int((classes(0, 3, 7) == 3).sum()), int((classes(0, 3, 7) == 7).sum())
    with pytest.raises(
        UsageError,
        match=rf"^train: image 0 '1\.jpg': .*masks/train/1\.png: values that are no class: 3 \({wrong[0]} "
        rf"pixels\); 7 \({wrong[1]} pixels\); the 3 classes are 0 to 2",
    ):
        data.load(0)
    with pytest.raises(
        UsageError,
        match=r"image 1 .*train/2\.jpg has .*25×40, but its mask .*masks/train/2\.png 24×40",
    ):
        data.load(1)


# The check.


def test_the_check_counts_pixels_and_draws(tmp_path: Path) -> None:
    pair(tmp_path, "1", 0, 1)
    pair(tmp_path, "2", 0, 255)
    pair(tmp_path, "3", 0, 9)
    report = check_dataset({"train": dataset(tmp_path)}, tmp_path / "out", workers=2)
    assert not report.ok
    assert [(f.kind, f.ids) for f in report.faults["train"]] == [("image that cannot be used", (2,))]
    rows = [line.strip("│ ").split("│") for line in report.text.splitlines() if line.startswith("│")]
    half = HEIGHT * WIDTH // 2
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["a", "0", "2", str(2 * half), "50.00%"],
        ["b", "1", "1", str(half), "25.00%"],
        ["c", "2", "0", "0", "0.00%"],
        ["(ignored)", "255", "1", str(half), "25.00%"],
    ]
    assert "1 of 3 classes without a pixel: c" in report.text
    with Image.open(report.pictures["train"]) as sheet:
        assert len(np.unique(np.array(sheet).reshape(-1, 3), axis=0)) > 3


def test_nuclei_as_masks(real_data: Path, tmp_path: Path) -> None:
    """Real images with masks painted from real instances: the check's count is pycocotools' own."""
    from pycocotools.coco import COCO

    coco = COCO(real_data / "nuclei/annotations/instances_val.json")
    covered = 0
    for record in list(coco.imgs.values())[:8]:
        union = np.zeros((record["height"], record["width"]), dtype=np.uint8)
        for annotation in coco.imgToAnns[record["id"]]:
            union |= coco.annToMask(annotation)
        covered += int(union.sum())
        save(tmp_path / "masks" / Path(record["file_name"]).with_suffix(".png"), Image.fromarray(union))
    folders = read_mask_folders(
        tmp_path, {"images": str(real_data / "nuclei/val"), "masks": "masks"}, ["ground", "nucleus"]
    )
    assert len(folders) == 8
    report = check_dataset({"val": MaskImages(folders, "val", training=False)}, tmp_path, workers=2)
    assert report.ok
    assert f"│ {covered} │" in report.text.replace("  ", " ")
