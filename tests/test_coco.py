"""COCO files: read whole, refused with a reason, or cleaned with every loss named."""

import json
import multiprocessing
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import HEIGHT, WIDTH, annotation, coco, image, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from resnext_backbones.errors import UsageError
from tasks.data.coco import CocoAnnotations, CocoDataset, read_coco
from tasks.data.faults import describe


def read(folder: Path, document: Any, **more: Any) -> CocoAnnotations:
    return read_coco(*write(folder, document), **more)


def refused(folder: Path, document: Any, **more: Any) -> str:
    """The one line a file is refused with; it begins with the path of the file or of the image folder."""
    with pytest.raises(UsageError) as caught:
        read(folder, document, **more)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(folder))
    return message


def found(annotations: CocoAnnotations) -> dict[str, tuple[str, int, tuple[Any, ...]]]:
    return {f.kind: (f.action, f.count, f.ids) for f in annotations.faults}


# What is read.


def test_a_file_without_optional_keys_is_read(tmp_path: Path) -> None:
    """No `info`, `licenses`, `area`, `iscrowd` or `segmentation`."""
    annotations = read(tmp_path, coco())
    assert len(annotations) == 1
    assert annotations.image_size(0) == (HEIGHT, WIDTH)
    assert annotations.image_path(0) == tmp_path / "images" / "1.png"
    assert annotations.boxes(0).tolist() == [[10, 10, 30, 20]]
    assert annotations.labels(0).tolist() == [1]
    assert annotations.iscrowd(0).tolist() == [False]
    assert annotations.areas.tolist() == [200]
    assert annotations.faults == ()


def test_category_ids_with_gaps_map_to_labels_and_back(tmp_path: Path) -> None:
    ids = [90, 3, 44, 1, 9]
    annotations = read(
        tmp_path,
        coco(
            [annotation(k, category_id=c) for k, c in enumerate(ids)],
            categories=[{"id": c, "name": f"c{c}"} for c in ids],
        ),
    )
    assert annotations.category_ids == [1, 3, 9, 44, 90]
    assert annotations.names == ["c1", "c3", "c9", "c44", "c90"]
    assert annotations.label_of == {1: 1, 3: 2, 9: 3, 44: 4, 90: 5}
    assert annotations.labels(0).tolist() == [5, 2, 4, 1, 3]
    assert [annotations.category_ids[label - 1] for label in annotations.labels(0)] == ids


def test_categories_from_zero_do_not_become_background(tmp_path: Path) -> None:
    document = coco([annotation(category_id=0)], categories=[{"id": 0, "name": "a"}, {"id": 1, "name": "b"}])
    assert read(tmp_path, document).labels(0).tolist() == [1]


def test_ids_of_zero_and_whole_floats_are_ids(tmp_path: Path) -> None:
    document = coco(
        [annotation(0, image_id=0.0, category_id=1.0)],
        images=[image(0)],
        categories=[{"id": 1.0, "name": "a"}],
    )
    annotations = read(tmp_path, document)
    assert annotations.image_ids.tolist() == [0]
    assert annotations.annotation_ids(0).tolist() == [0]


def test_large_ids_are_kept_exactly(tmp_path: Path) -> None:
    large = 2**63 - 1
    annotations = read(tmp_path, coco([annotation(large - 1, image_id=large)], images=[image(large)]))
    assert annotations.image_ids.tolist() == [large]
    assert annotations.annotation_ids(0).tolist() == [large - 1]


def test_ids_all_of_digits_in_text_are_converted_with_one_note(tmp_path: Path) -> None:
    document = coco([annotation("7", image_id="012")], images=[image("012")])
    annotations = read(tmp_path, document)
    assert annotations.image_ids.tolist() == [12]
    assert annotations.annotation_ids(0).tolist() == [7]
    assert [str(f) for f in annotations.faults] == [
        "converted 1 file: image ids written as text",
        "converted 1 file: annotation ids written as text",
    ]


def test_images_and_annotations_keep_the_order_of_the_file(tmp_path: Path) -> None:
    document = coco(
        [annotation(k, image_id=i, bbox=[k, 0, 5, 5]) for k, i in [(5, 2), (4, 9), (3, 2), (2, 9), (1, 2)]],
        images=[image(9), image(4), image(2)],
    )
    annotations = read(tmp_path, document)
    assert annotations.image_ids.tolist() == [9, 4, 2]
    assert [annotations.annotation_ids(i).tolist() for i in range(3)] == [[4, 2], [], [5, 3, 1]]
    assert annotations.boxes(2)[:, 0].tolist() == [5, 3, 1]
    assert annotations.boxes(1).shape == (0, 4)
    assert annotations.file_name(1) == "4.png"


def test_segmentations_stay_as_written(tmp_path: Path) -> None:
    text = '{"size": [40, 60],  "counts": "a]"}'
    document = json.dumps(coco([annotation(1), annotation(2, segmentation=None), annotation(3)]))
    annotations = read(tmp_path, coco([annotation(1)]))
    path, images = write(tmp_path, document.replace('"id": 3,', f'"id": 3, "segmentation": {text},'))
    annotations = read_coco(path, images)
    assert [annotations.segmentations[row] for row in range(3)] == [b"", b"null", text.encode()]


def test_file_names_in_sub_folders_and_in_any_script(tmp_path: Path) -> None:
    names = ["a/b/1.png", "a/ü – 图.png", "./c.png"]
    annotations = read(tmp_path, coco(images=[image(k, name) for k, name in enumerate(names, start=1)]))
    assert [annotations.file_name(i) for i in range(3)] == names
    assert all(annotations.image_path(i).exists() for i in range(3))


def test_only_images_are_needed_for_prediction(tmp_path: Path) -> None:
    document = {"images": [image()]}
    assert len(read(tmp_path, document, require_annotations=False)) == 1
    message = refused(tmp_path, document)
    assert "no `annotations` and no `categories`" in message


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("coco33/annotations/instances_train2017.json", "coco33/train2017"),
        ("coco33/annotations/instances_val2017.json", "coco33/val2017"),
        ("coco33/annotations/person_keypoints_val2017.json", "coco33/val2017"),
        ("bccd/annotations/instances_test.json", "bccd/test"),
        ("nuclei/annotations/instances_val.json", "nuclei/val"),
        ("fruits_nuts/trainval.json", "fruits_nuts/images"),
    ],
)
def test_real_files_are_read_as_pycocotools_reads_them(
    real_data: Path, annotations: str, images: str
) -> None:
    ours = read_coco(real_data / annotations, real_data / images)
    theirs = COCO(str(real_data / annotations))
    assert ours.image_ids.tolist() == [i["id"] for i in theirs.dataset["images"]]
    assert ours.category_ids == sorted(theirs.getCatIds())
    assert ours.names == [c["name"] for c in theirs.loadCats(ours.category_ids)]
    for index, image_id in enumerate(ours.image_ids.tolist()):
        records = theirs.loadAnns(theirs.getAnnIds(image_id))
        assert ours.annotation_ids(index).tolist() == [a["id"] for a in records]
        assert [ours.category_ids[label - 1] for label in ours.labels(index)] == [
            a["category_id"] for a in records
        ]
        assert ours.iscrowd(index).tolist() == [bool(a["iscrowd"]) for a in records]
        rows = range(*ours.rows(index).indices(len(ours.ids)))
        assert [json.loads(ours.segmentations[row] or b"null") for row in rows] == [
            a.get("segmentation") for a in records
        ]
        expected = np.array([a["bbox"] for a in records]).reshape(-1, 4)
        expected[:, 2:] += expected[:, :2]
        np.testing.assert_array_equal(ours.boxes(index).numpy(), expected.astype(np.float32))


# What is refused.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the annotation file is empty"),
        ("[]", "not a COCO file: at the top: Expected `object`, got `array`"),
        ("null", "not a COCO file"),
        ('{"images": [], "annotations": {}, "categories": []}', "$.annotations"[1:]),
        ("{}", "no `images` and no `annotations` and no `categories`"),
        ('{\n "images": [],\n "annotations": [,]}', "line 3, column 18"),
        ('{\n "images": [{"id": 1', "ends too early, at line 2, column 21"),
        ('\ufeff{"images": []}', "byte-order mark"),
        ('{"annotations": [' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_what_is_no_coco_file_is_refused_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in refused(tmp_path, text)


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco())
    path.write_bytes(b'{"categories": [],\n"images": [{"id": 1, "file_name": "\xff"}]}')
    with pytest.raises(UsageError, match=r"not UTF-8 at line 2, column 36"):
        read_coco(path, images)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["bbox", "segmentation"])
def test_numbers_json_does_not_know_are_named(tmp_path: Path, number: str, field: str) -> None:
    text = json.dumps(coco([annotation(1), annotation(8, **{field: [[1, 2, 3, "?"]]})]))
    message = refused(tmp_path, text.replace('"?"', number))
    assert f"annotations[1].{field} (annotation 8, image 1, file '1.png')" in message
    assert "annotations[0]" not in message


def test_a_number_beyond_double_precision_is_refused(tmp_path: Path) -> None:
    text = json.dumps(coco([annotation(8, bbox=[1, 2, 3, "?"])])).replace('"?"', "1e999")
    assert "annotations[0].bbox[3]: Number out of range (annotation 8" in refused(tmp_path, text)


def test_a_box_far_beyond_any_image_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, coco([annotation(8, bbox=[0, 0, 1e12, 5])]))
    assert "annotations[0].bbox = [0.0, 0.0, 1000000000000.0, 5.0] (annotation 8, image 1 '1.png')" in message


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (coco([annotation(8, bbox=[1, 2, "3", 4])]), "annotations[0].bbox[2]: Expected `float`, got `str`"),
        (coco([annotation(8, bbox=[1, 2, 3])]), "annotations[0].bbox: Expected `array` of length 4"),
        (coco([annotation(8, bbox=[1, 2, 3, None])]), "annotations[0].bbox[3]: Expected `float`, got `null`"),
        (coco([{"id": 8, "image_id": 1, "category_id": 1}]), "missing required field `bbox`"),
        (coco([annotation(None)]), "annotations[0].id: Expected"),
        (coco([annotation(8, iscrowd="no")]), "annotations[0].iscrowd: Expected"),
        (coco([annotation(8, iscrowd=2)]), "annotations[0].iscrowd = 2.0 (annotation 8"),
        (coco([annotation(1.5)]), "annotations[0].id = 1.5"),
        (coco([annotation(-1)]), "annotations[0].id = -1"),
        (coco([annotation(2**63)]), f"annotations[0].id = {2**63}"),
        (coco([annotation(8, image_id="1")]), "images[0].id = 1; either all"),
        (coco([annotation("x")]), "annotations[0].id = 'x'; either all"),
        (coco([annotation("1"), annotation(2)]), "annotations[1].id = 2; either all of a kind are integers"),
        (
            coco([annotation(8, category_id=7)]),
            "annotations[0].category_id = 7 (annotation 8, image 1 '1.png')",
        ),
        (coco([annotation(8), annotation(8)]), "annotations[1].id = 8 (annotation 8, image 1 '1.png')"),
        (coco(images=[image(1), image(1, "b.png")]), "images[1].id = 1 (image 1 'b.png')"),
        (coco(images=[image(1, width=0)], annotations=[]), "images[0].[height, width] = [40.0, 0.0]"),
        (coco(images=[{"id": 1, "file_name": "a.png", "width": 3}]), "missing required field `height`"),
        (coco(images=[]), "`images` is empty"),
        (coco(categories=[], annotations=[]), "`categories` is empty"),
        (coco(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "categories[1].id = 1 ('b')"),
        (coco(categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]), "categories[1].name = 'a'"),
        (coco(categories=[{"id": 1}]), "categories[0]: Object missing required field `name` (category 1)"),
    ],
)
def test_wrong_records_are_named_by_their_place(tmp_path: Path, document: Any, expected: str) -> None:
    path, images = write(tmp_path, document, pictures=False)
    with pytest.raises(UsageError) as caught:
        read_coco(path, images)
    assert expected in str(caught.value)
    assert str(caught.value).startswith(str(path))


def test_all_wrong_records_are_counted_and_twenty_are_named(tmp_path: Path) -> None:
    message = refused(tmp_path, coco([annotation(k) | ({"bbox": "?"} if k % 2 else {}) for k in range(60)]))
    assert "30 records of a wrong form" in message
    assert message.count("(annotation ") == 20
    assert "annotations[39].bbox" in message
    assert "… and 10 more" in message


def test_missing_annotation_file_and_folder_say_what_is_there(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco())
    with pytest.raises(UsageError, match=r"no such annotation file; .* holds annotations\.json"):
        read_coco(tmp_path / "other.json", images)
    with pytest.raises(UsageError, match=r"no such image folder; .* holds the folders images"):
        read_coco(path, tmp_path / "image")
    with pytest.raises(UsageError, match="not a folder"):
        read_coco(path, path)


def test_missing_images_are_counted_and_named(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco(images=[image(k) for k in range(1, 31)]))
    for k in range(1, 26):
        (images / f"{k}.png").unlink()
    (images / "30.png").unlink()
    (images / "30.png").mkdir()  # a folder is no image
    with pytest.raises(UsageError) as caught:
        read_coco(path, images)
    assert "26 of 30 image files missing: '1.png'; '2.png'" in str(caught.value)
    assert "… and 6 more" in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["/etc/hostname", "../secret.png", "a/../../secret.png", "..\\secret.png", "C:/secret.png", "", "a\0b"],
)
def test_a_file_name_that_leaves_the_image_folder_is_refused(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    path, images = write(tmp_path, coco(images=[image(1, name)]), pictures=False)
    with pytest.raises(UsageError, match="outside the image folder"):
        read_coco(path, images, follow_symlinks=True)


def test_links_out_of_the_image_folder_are_followed_only_on_request(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    Image.new("RGB", (WIDTH, HEIGHT)).save(outside / "1.png")
    path, images = write(tmp_path, coco(images=[image(1), image(2, "sub/1.png")]), pictures=False)
    (images / "1.png").symlink_to(outside / "1.png")
    (images / "sub").symlink_to(outside)
    with pytest.raises(UsageError, match=r"2 image files outside the image folder: '1.png'; 'sub/1.png'"):
        read_coco(path, images)
    assert len(read_coco(path, images, follow_symlinks=True)) == 2


def test_links_within_the_folder_and_a_folder_that_is_one_are_fine(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco(images=[image(1), image(2, "link.png")]), pictures=False)
    Image.new("RGB", (WIDTH, HEIGHT)).save(images / "1.png")
    (images / "link.png").symlink_to("1.png")
    (tmp_path / "elsewhere").symlink_to(images)
    assert len(read_coco(path, tmp_path / "elsewhere")) == 2


def test_an_image_named_twice_is_noted(tmp_path: Path) -> None:
    annotations = read(tmp_path, coco(images=[image(1, "a.png"), image(2, "a.png")]))
    assert found(annotations) == {"file name that an earlier image has": ("kept", 1, (2,))}


# What training and evaluation make of faulty boxes.

FAULTY = {
    1: [10, 10, 20, 10],  # good
    2: [10, 10, 0, 10],  # no area
    3: [10, 10, 1e-4, 10],  # none but for rounding
    4: [30, 10, -20, 10],  # inverted
    5: [WIDTH, 5, 10, 10],  # outside
    6: [-30, -30, 20, 20],  # outside
    7: [WIDTH - 0.5, 5, 10, 10],  # half a pixel of it is inside
    8: [10, 10, 0.6, 10],  # thinner than a pixel
    9: [-5, -5, 20, 20],  # partly outside
    10: [50, 30, 30, 30],  # partly outside
    11: [0, 0, WIDTH, HEIGHT],  # all of the image
    12: [20.3, 20.1, 1.0, 1.0],  # just a pixel, though not in single precision
}


def test_training_drops_or_clips_faulty_boxes_and_names_them(tmp_path: Path) -> None:
    document = coco([annotation(k, bbox=box) for k, box in FAULTY.items()])
    cleaned = read(tmp_path, document).clean(max_drop_fraction=1)
    assert found(cleaned) == {
        "box without area": ("dropped", 2, (2, 3)),
        "box with a negative side": ("dropped", 1, (4,)),
        "box outside its image": ("dropped", 2, (5, 6)),
        "box of less than a pixel within its image": ("dropped", 2, (7, 8)),
        "box reaching over the edge of its image": ("clipped", 2, (9, 10)),
    }
    assert cleaned.annotation_ids(0).tolist() == [1, 9, 10, 11, 12]
    expected = [[10, 10, 30, 20], [0, 0, 15, 15], [50, 30, 60, 40], [0, 0, 60, 40], [20.3, 20.1, 21.3, 21.1]]
    torch.testing.assert_close(cleaned.boxes(0), torch.tensor(expected), rtol=0, atol=1e-6)
    text = describe(cleaned.faults, "a.json")
    assert text.startswith("warning: a.json:\n")
    assert "  dropped 2 annotations: box without area (id 2, 3)" in text


def test_evaluation_keeps_and_names_faulty_boxes(tmp_path: Path) -> None:
    annotations = read(tmp_path, coco([annotation(k, bbox=box) for k, box in FAULTY.items()]))
    assert annotations.annotation_ids(0).tolist() == list(FAULTY)
    assert {f.action for f in annotations.faults} == {"kept"}
    assert sum(f.count for f in annotations.faults) == 9
    dataset = CocoDataset(annotations, "val", training=False)
    assert dataset[0][1]["boxes"][3].tolist() == [30, 10, 10, 20]


def test_one_bad_box_does_not_end_a_run_but_many_do(tmp_path: Path) -> None:
    good = [annotation(k) for k in range(100)]
    few = read(tmp_path, coco([*good, *(annotation(200 + k, bbox=[0, 0, 0, 5]) for k in range(5))]))
    assert len(few.clean().ids) == 100
    many = read(tmp_path, coco([*good, *(annotation(200 + k, bbox=[0, 0, 0, 5]) for k in range(6))]))
    with pytest.raises(
        UsageError, match=r"6 of 106 annotations \(5.7%\) would be dropped.*id 200, .*raise data"
    ):
        many.clean()
    assert len(many.clean(max_drop_fraction=0.06).ids) == 100


def test_annotations_of_unlisted_images_are_left_out_and_counted(tmp_path: Path) -> None:
    annotations = read(tmp_path, coco([annotation(1), annotation(2, image_id=77)]))
    assert found(annotations) == {"annotation of an image not listed": ("dropped", 1, (2,))}
    assert found(annotations.clean()) == found(annotations)
    assert annotations.ids.tolist() == [1]
    lost = [annotation(k, image_id=77) for k in range(2, 9)]
    with pytest.raises(UsageError, match="7 of 8 annotations"):
        read(tmp_path, coco([annotation(1), *lost])).clean()


def test_images_without_objects_stay_and_those_with_only_crowds_leave_training(tmp_path: Path) -> None:
    document = coco(
        [
            annotation(1, image_id=1),
            annotation(2, image_id=1, iscrowd=1),
            annotation(3, image_id=2, iscrowd=1),
            annotation(4, image_id=4, bbox=[5, 5, 0, 0]),
        ],
        images=[image(k) for k in (1, 2, 3, 4)],
    )
    annotations = read(tmp_path, document)
    assert annotations.crowds == 2
    training = CocoDataset(annotations, "train", training=True)
    assert [training[i][1]["image_id"] for i in range(len(training))] == [1, 3, 4]
    assert training[0][1]["annotation_ids"].tolist() == [1]
    assert training[1][1]["boxes"].shape == (0, 4)
    assert found(training.annotations)["image with nothing but crowds"] == ("dropped", 1, (2,))
    evaluation = CocoDataset(annotations, "val", training=False)
    assert [evaluation[i][1]["image_id"] for i in range(len(evaluation))] == [1, 2, 3, 4]
    assert evaluation[0][1]["iscrowd"].tolist() == [False, True]


def test_images_too_small_to_train_on_are_left_out_and_named(tmp_path: Path) -> None:
    document = coco(
        [annotation(1), annotation(2, bbox=[0, 0, 2, 2], image_id=2)],
        images=[image(1), image(2, height=2, width=2000), image(3, height=1, width=1)],
    )
    annotations = read(tmp_path, document)
    cleaned = annotations.clean(min_image_side=8)
    assert cleaned.image_ids.tolist() == [1]
    assert [(f.count, f.of, f.ids) for f in cleaned.faults] == [(2, "image", (2, 3))]
    assert len(annotations.clean()) == 3


def test_a_file_with_nothing_to_learn_from_is_refused_for_training(tmp_path: Path) -> None:
    annotations = read(tmp_path, coco([annotation(1, iscrowd=1)]))
    with pytest.raises(UsageError, match="nothing to train on"):
        annotations.clean()


def test_cleaning_again_changes_nothing(tmp_path: Path) -> None:
    cleaned = read(tmp_path, coco([annotation(k, bbox=b) for k, b in FAULTY.items()])).clean(
        max_drop_fraction=1
    )
    assert cleaned.clean() is cleaned


@pytest.mark.parametrize(("split", "number", "bad"), [("train", 2805, 2288), ("val", 1138, 887)])
def test_the_real_box_without_area_is_dropped_in_training_and_kept_in_evaluation(
    real_data: Path, split: str, number: int, bad: int
) -> None:
    annotations = read_coco(
        real_data / f"bccd/annotations/instances_{split}.json", real_data / "bccd" / split
    )
    assert len(annotations.ids) == number
    assert found(annotations) == {"box without area": ("kept", 1, (bad,))}
    cleaned = annotations.clean()
    assert len(cleaned.ids) == number - 1
    assert found(cleaned) == {"box without area": ("dropped", 1, (bad,))}


# The dataset.


def test_a_sample_is_what_its_docstring_says(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco([annotation(3, bbox=[10, 5, 20, 10])]))
    dataset = CocoDataset(read_coco(path, images), "train", training=True)
    picture, target = dataset[0]
    assert isinstance(picture, tv_tensors.Image)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, HEIGHT, WIDTH)
    assert isinstance(target["boxes"], tv_tensors.BoundingBoxes)
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert target["boxes"].dtype == torch.float32
    assert target["boxes"].tolist() == [[10, 5, 30, 15]]
    assert target["labels"].dtype == target["annotation_ids"].dtype == torch.int64
    assert (target["image_id"], target["original_size"]) == (1, (HEIGHT, WIDTH))
    assert "iscrowd" not in target


def test_changing_a_sample_does_not_change_the_dataset(tmp_path: Path) -> None:
    dataset = CocoDataset(read(tmp_path, coco()), "val", training=False)
    for value in dataset[0][1].values():
        if isinstance(value, torch.Tensor):
            value.fill_(7)
    target = dataset[0][1]
    assert target["boxes"].tolist() == [[10, 10, 30, 20]]
    assert [target[k].tolist() for k in ("labels", "annotation_ids", "iscrowd")] == [[1], [1], [False]]


def test_a_jpeg_far_larger_than_needed_is_decoded_smaller_with_its_boxes(tmp_path: Path) -> None:
    document = coco([annotation(bbox=[160, 80, 320, 160])], images=[image(1, "1.jpg", width=640, height=480)])
    dataset = CocoDataset(read(tmp_path, document), "val", training=False)
    picture, target = dataset.load(0, at_least=(120, 160))
    assert picture.shape == (3, 240, 320)
    assert target["boxes"].tolist() == [[80, 40, 240, 120]]
    assert target["boxes"].canvas_size == (240, 320)
    assert target["original_size"] == (480, 640)
    assert dataset.load(0, at_least=(121, 160))[0].shape == (3, 480, 640)


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data.target='label'.*boxes, masks, keypoints, semantic"):
        CocoDataset(read(tmp_path, coco()), "train", training=True, target="label")


def test_images_above_the_limit_are_refused_before_anything_is_decoded(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"more than 2399 pixels.*image 1 '1.png': \(40, 60\).*data.max_pixels"
    ):
        CocoDataset(read(tmp_path, coco()), "train", training=True, max_pixels=HEIGHT * WIDTH - 1)


def test_an_error_names_split_id_and_file(tmp_path: Path) -> None:
    path, images = write(tmp_path, coco([annotation(image_id=0)], images=[image(0)]))
    (images / "0.png").write_bytes(b"")
    dataset = CocoDataset(read_coco(path, images), "val", training=False)
    with pytest.raises(UsageError, match=r"^val: image 0 '0.png': .*0\.png: the file is empty"):
        dataset[0]


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_give_the_same_samples(tmp_path: Path, method: str) -> None:
    document = coco(
        [annotation(k, image_id=k, bbox=[k, 1, 5, 5]) for k in range(4)], [image(k) for k in range(4)]
    )
    dataset = CocoDataset(read(tmp_path, document), "train", training=True)
    context = multiprocessing.get_context(method)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=context)
    for (_, ours), (_, theirs) in zip(loader, (dataset[i] for i in range(4)), strict=True):
        assert ours["image_id"] == theirs["image_id"]
        assert torch.equal(ours["boxes"], theirs["boxes"])


def test_columns_hold_no_python_objects_for_workers_to_copy(tmp_path: Path) -> None:
    """What grows with the file is in tensors: pickled without their storage a thousand boxes add nothing."""

    def weight(number: int) -> int:
        document = coco([annotation(k, segmentation=[[0, 0, 9, 0, 9, 9]]) for k in range(number)])
        columns = read(tmp_path, document)
        own = [v for v in vars(columns).values() if not isinstance(v, torch.Tensor)]
        return len(pickle.dumps([v for v in own if not hasattr(v, "buffer")]))

    assert weight(1) == weight(1000)


# Anything may be in a file.

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**30), 10**30),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([1e308, 10**400, "1", "../1.png", [], {}, [[]], [1, 2, 3, 4], {"id": 1}, "\0"]),
)
PATHS = [
    ("images",), ("annotations",), ("categories",), ("images", 0), ("annotations", 0), ("categories", 0),
    *(("images", 0, key) for key in ("id", "file_name", "height", "width")),
    *(("annotations", 1, key) for key in ("id", "image_id", "category_id", "bbox", "area", "iscrowd")),
    ("annotations", 1, "segmentation"), ("annotations", 0, "bbox", 2), ("annotations", 0, "bbox", 0),
    *(("categories", 0, key) for key in ("id", "name", "keypoints", "skeleton")),
]  # fmt: skip


def changed(document: Any, path: tuple[Any, ...], value: Any, delete: bool) -> None:
    for key in path[:-1]:
        document = document[key]
    if delete:
        document.pop(path[-1], None) if isinstance(document, dict) else document.pop(path[-1])
    else:
        document[path[-1]] = value


@given(
    st.lists(st.tuples(st.sampled_from(PATHS), VALUES, st.booleans()), min_size=1, max_size=3),
    st.one_of(st.none(), st.floats(0, 1)),
)
@settings(max_examples=300, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_mutilated_file_is_read_or_refused(tmp_path: Path, changes: Any, cut: float | None) -> None:
    path, images = write(tmp_path, coco([annotation(1), annotation(2)]))
    document = coco([annotation(1), annotation(2, segmentation=[[1, 1, 5, 1, 5, 5]], area=9, iscrowd=0)])
    for place, value, delete in changes:
        try:
            changed(document, place, value, delete)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue
    text = json.dumps(document)
    path.write_text(text if cut is None else text[: int(cut * len(text))])
    with suppress(UsageError):
        dataset = CocoDataset(read_coco(path, images), "train", training=True)
        for index in range(len(dataset)):
            boxes = dataset[index][1]["boxes"]
            assert torch.isfinite(boxes).all()
            assert (boxes[:, 2:] > boxes[:, :2]).all()


@given(st.binary(max_size=60), st.integers(0, 300))
@settings(max_examples=200, deadline=1000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_overwritten_bytes_are_read_or_refused(tmp_path: Path, rubbish: bytes, at: int) -> None:
    path, images = write(tmp_path, coco())
    data = path.read_bytes()
    path.write_bytes(data[:at] + rubbish + data[at + len(rubbish) :])
    with suppress(UsageError):
        read_coco(path, images)


@pytest.mark.slow
def test_a_large_file_opens_in_seconds(tmp_path: Path) -> None:
    """A quarter of COCO's train2017, with ten-point polygons."""
    number, images = 200_000, 30_000
    polygon = [[float(v) + 0.25 for v in range(20)]]
    document = coco(
        [annotation(k, image_id=k % images, segmentation=polygon) for k in range(number)],
        images=[image(k, "1.png") for k in range(images)],
    )
    path, folder = write(tmp_path, document)
    start = time.monotonic()
    assert len(read_coco(path, folder).ids) == number
    assert time.monotonic() - start < 5
