"""Keypoints: the skeleton from file and configuration, and poses that stay with their objects."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_files import annotation, coco, image, write
from PIL import Image
from pycocotools.cocoeval import Params

from resnext_backbones.errors import UsageError
from tasks.data.coco import CocoAnnotations, CocoDataset, part_of, read_coco
from tasks.data.keypoints import COCO_NAMES, Skeleton, poses, skeleton_of
from tasks.data.prepared import Prepared
from tasks.data.samplers import holdout
from tasks.data.shapes import write_shapes
from tasks.data.shapes_draw import scene
from tasks.data.transforms import HorizontalFlip
from tasks.prediction.predictions import Objects

FACE = {"id": 1, "name": "face", "keypoints": ["left_eye", "right_eye", "nose"]}
SIGMAS = [0.025, 0.025, 0.026]


def read(folder: Path, *categories: Any, annotations: Any = None, images: Any = None) -> CocoAnnotations:
    return read_coco(*write(folder, coco(annotations, images, list(categories) or [FACE])))


def skeleton(folder: Path, *categories: Any, **given: Any) -> Skeleton:
    return skeleton_of(read(folder, *categories), given or None)


def refused(folder: Path, *categories: Any, **given: Any) -> str:
    """The one line the skeleton is refused with; it begins with the file."""
    with pytest.raises(UsageError) as caught:
        skeleton(folder, *categories, **given)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The skeleton.


def test_the_categories_describe_it(tmp_path: Path) -> None:
    described = {**FACE, "skeleton": [[1, 3], [2, 3]], "flip_pairs": [[1, 2]], "sigmas": SIGMAS}
    found = skeleton(tmp_path, described)
    assert found.names == ("left_eye", "right_eye", "nose")
    assert found.edges == ((0, 2), (1, 2))
    assert found.mirror == (1, 0, 2)
    assert found.sigmas == tuple(SIGMAS)


def test_the_configuration_completes_and_overrules_them(tmp_path: Path) -> None:
    bare = {"id": 1, "name": "face"}
    said = {"names": ["a", "b", "c"], "skeleton": [[3, 1]], "flip_pairs": [[2, 3]], "sigmas": [1, 2, 3]}
    expected = Skeleton(("a", "b", "c"), ((2, 0),), (0, 2, 1), (1.0, 2.0, 3.0), "given")
    assert skeleton(tmp_path, bare, **said) == expected
    described = {**FACE, "skeleton": [[1, 2]], "flip_pairs": [[1, 2]], "sigmas": SIGMAS}
    assert skeleton(tmp_path, described, **said) == expected
    assert skeleton(tmp_path, described, skeleton=[], names=None).edges == ()
    assert skeleton(tmp_path, described, flip_pairs=[]).mirror == (0, 1, 2)


def test_no_pairs_at_all_can_be_said_in_either_place(tmp_path: Path) -> None:
    sided = {**FACE, "sigmas": SIGMAS}
    for found in (skeleton(tmp_path, sided, flip_pairs=[]), skeleton(tmp_path, {**sided, "flip_pairs": []})):
        assert (found.mirror, found.mirrored_by) == ((0, 1, 2), "given")
    for found in (skeleton(tmp_path, sided, flip_pairs=None), skeleton(tmp_path, sided)):
        assert (found.mirror, found.mirrored_by) == ((1, 0, 2), "names")


@pytest.mark.parametrize(
    ("names", "mirror"),
    [
        (["left_eye", "nose", "right_eye"], [2, 1, 0]),
        (["Right_Eye", "Left_Eye"], [1, 0]),
        (["eyeLeft", "eyeRight"], [1, 0]),
        (["left_eye", "right_ear"], [0, 1]),  # no twins
        (["cleft", "left", "bright"], [0, 1, 2]),
        (["l_eye", "r_eye", "nose"], [1, 0, 2]),
        (["eye_l", "nose", "eye_r"], [2, 1, 0]),
        (["eye.R", "eye.L"], [1, 0]),  # Blender
        (["L-eye", "R-eye"], [1, 0]),
        (["l eye", "r eye"], [1, 0]),
        (["LEye", "REye", "Nose"], [1, 0, 2]),  # OpenPose
        (["eyeL", "eyeR"], [1, 0]),
        (["lEye", "rEye"], [1, 0]),
        (["L1", "R1", "L2", "R2"], [1, 0, 3, 2]),
        (["LEFT_EYE", "RIGHT_EYE"], [1, 0]),
        (["left eye", "right eye"], [1, 0]),
        (["nose_l_upper", "nose_r_upper", "nose_r_lower"], [1, 0, 2]),
        (["tail", "tair", "lamp", "ramp"], [0, 1, 2, 3]),  # an l within a word is none
        (["LAMP", "RAMP"], [0, 1]),
    ],
)
def test_left_and_right_are_told_by_name(tmp_path: Path, names: list[str], mirror: list[int]) -> None:
    category = {"id": 1, "name": "x", "keypoints": names, "sigmas": [0.1] * len(names)}
    found = skeleton(tmp_path, category)
    assert found.mirror == tuple(mirror)
    assert found.mirrored_by == ("names" if mirror != sorted(mirror) else "nothing")


def test_a_mirror_undoes_itself(tmp_path: Path) -> None:
    mirror = skeleton(tmp_path, {"id": 1, "name": "person", "keypoints": list(COCO_NAMES)}).mirror
    assert sorted(mirror) == list(range(17))
    assert [mirror[k] for k in mirror] == list(range(17))


def test_cocos_seventeen_have_published_sigmas(tmp_path: Path, real_data: Path) -> None:
    """Names as in the real file, sigmas as in pycocotools; only the nose has no twin."""
    path = real_data / "coco33/annotations/person_keypoints_val2017.json"
    (person,) = json.loads(path.read_text())["categories"]
    found = skeleton(tmp_path, person)
    assert found.names == tuple(person["keypoints"])
    assert found.edges == tuple((a - 1, b - 1) for a, b in person["skeleton"])
    assert found.sigmas == tuple(Params(iouType="keypoints").kpt_oks_sigmas.tolist())
    assert found.mirror == (0, *(k for left in range(1, 17, 2) for k in (left + 1, left)))


def test_others_without_sigmas_are_refused_with_what_to_give(tmp_path: Path) -> None:
    message = refused(tmp_path)
    assert message.startswith(str(tmp_path / "annotations.json"))
    assert "data.keypoints.sigmas=[…], 3 numbers" in message
    seventeen = {"id": 1, "name": "dog", "keypoints": [f"k{i}" for i in range(17)]}
    assert "17 numbers" in refused(tmp_path, seventeen)


def test_categories_that_disagree_are_named(tmp_path: Path) -> None:
    cat = {"id": 2, "name": "cat", "keypoints": ["tail"], "sigmas": [0.1]}
    thing = {"id": 3, "name": "thing"}  # without keypoints it has no say
    message = refused(tmp_path, {**FACE, "sigmas": SIGMAS}, cat, thing)
    assert "categories face; cat have different keypoints" in message
    assert skeleton(tmp_path, {**cat, "id": 1}, thing).names == ("tail",)
    assert skeleton(tmp_path, {**cat, "id": 1, "name": "lion"}, cat).names == ("tail",)


def test_no_keypoints_at_all_is_said(tmp_path: Path) -> None:
    assert "no category has `keypoints`" in refused(tmp_path, {"id": 1, "name": "x"})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"sigmas": [0.1, 0.1]}, "data.keypoints.sigmas=[0.1, 0.1]: 3 numbers above 0"),
        ({"sigmas": [0.1, 0.1, 0]}, "3 numbers above 0"),
        ({"sigmas": [0.1, 0.1, -1]}, "3 numbers above 0"),
        ({"sigmas": [0.1, 0.1, float("nan")]}, "3 numbers above 0"),
        ({"sigmas": [0.1, 0.1, float("inf")]}, "3 numbers above 0"),
        ({"sigmas": [0.1, 0.1, "wide"]}, "3 numbers above 0"),
        ({"sigmas": 0.05}, "3 numbers above 0"),
        ({"sigmas": SIGMAS, "skeleton": [[0, 1]]}, "skeleton [0, 1]: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "skeleton": [[1, 4]]}, "skeleton [1, 4]: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "skeleton": [[1, 2, 3]]}, "skeleton [1, 2, 3]: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "skeleton": [[1, 1.5]]}, "skeleton [1, 1.5]: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "skeleton": [["left_eye", "nose"]]}, "pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "skeleton": [1, 2]}, "skeleton 1: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "flip_pairs": [[1, 9]]}, "flip_pairs [1, 9]: pairs of numbers 1…3"),
        ({"sigmas": SIGMAS, "flip_pairs": [[1, 2], [2, 3]]}, "name a keypoint twice"),
        ({"sigmas": SIGMAS, "edges": [[1, 2]]}, "data.keypoints.edges: it takes names, skeleton"),
    ],
)
def test_wrong_numbers_are_refused(tmp_path: Path, given: dict[str, Any], expected: str) -> None:
    assert expected in refused(tmp_path, **given)


def test_flip_pairs_that_overrule_each_other_are_refused(tmp_path: Path) -> None:
    """Taken one after the other these four are a permutation again, though not what was meant."""
    four = {"id": 1, "name": "x", "keypoints": list("abcd"), "sigmas": [0.1] * 4}
    pairs = [[1, 2], [3, 4], [1, 3], [2, 4]]
    assert "name a keypoint twice" in refused(tmp_path, four, flip_pairs=pairs)
    assert skeleton(tmp_path, four, flip_pairs=[[1, 2], [2, 1]]).mirror == (1, 0, 2, 3)  # said twice


# Poses.

POSE = [3, 4, 2, 50.5, 6, 1, 0, 0, 0]


def test_poses_are_read_and_missing_ones_are_zero(tmp_path: Path) -> None:
    annotations = [
        annotation(1, keypoints=POSE),
        annotation(2),
        annotation(3, keypoints=None),
        annotation(4, keypoints=[]),
        annotation(5, keypoints=[v + 1e-3 if k % 3 < 2 else v for k, v in enumerate(POSE)]),
    ]
    rows = poses(read(tmp_path, annotations=annotations), 3)
    assert rows.dtype == torch.float32
    assert rows.shape == (5, 3, 3)
    assert rows[0].tolist() == [[3.5, 4.5, 2], [51, 6.5, 1], [0, 0, 0]]  # from pixels to their centres
    assert not rows[1:4].any()
    torch.testing.assert_close(rows[4, :2, :2], rows[0, :2, :2] + 1e-3)
    assert not rows[4, 2].any()  # places without a label


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (POSE[:-1], "annotation 8 has 8 numbers"),
        ([*POSE, 1, 1, 2], "annotation 8 has 12 numbers"),
        ([*POSE[:-1], 3], "annotation 8: a visibility is not 0, 1 or 2"),
        ([*POSE[:-1], 0.5], "annotation 8: a visibility is not 0, 1 or 2"),
        ([*POSE[:-1], -1], "annotation 8: a visibility is not 0, 1 or 2"),
        ([1e300, *POSE[1:]], "a place absurdly far"),
        ([-1e300, *POSE[1:]], "a place absurdly far"),
        ([None, *POSE[1:]], "annotation 8: Expected `float`"),
        (["3", *POSE[1:]], "annotation 8: Expected `float`"),
        ([POSE], "annotation 8: Expected `float`"),
        ({"x": 3}, "annotation 8: Expected `array`"),
        ("none", "annotation 8: Expected `array`"),
        (0, "annotation 8: Expected `array`"),
    ],
)
def test_what_is_no_pose_is_refused(tmp_path: Path, wrong: Any, expected: str) -> None:
    fine = annotation(1, keypoints=POSE)
    with pytest.raises(UsageError) as caught:
        poses(read(tmp_path, annotations=[fine, annotation(8, keypoints=wrong)]), 3)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{tmp_path / 'annotations.json'}: keypoints that are not 3 times")
    assert expected in message
    assert "annotation 1" not in message


def test_a_number_that_json_does_not_know_is_refused(tmp_path: Path) -> None:
    text = json.dumps(coco([annotation(8, keypoints=["?", *POSE[1:]])], categories=[FACE]))
    for number in ("NaN", "1e999"):
        with pytest.raises(UsageError, match="annotation 8"):
            poses(read_coco(*write(tmp_path, text.replace('"?"', number), pictures=False)), 3)
        write(tmp_path, coco())  # the picture


def test_wrong_poses_are_counted_and_twenty_are_named(tmp_path: Path) -> None:
    annotations = [annotation(k, keypoints=[1, 2]) for k in range(1, 31)]
    with pytest.raises(UsageError) as caught:
        poses(read(tmp_path, annotations=annotations), 3)
    assert str(caught.value).count("has 2 numbers") == 20
    assert "… and 10 more" in str(caught.value)


# Where a keypoint lies.


def test_a_mirrored_keypoint_stays_on_its_pixel(tmp_path: Path) -> None:
    """A white pixel, the fifth of the eighth row, with a keypoint on it, as the file counts: x 4, y 7."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[7, 4] = 255
    posed = annotation(1, [2, 2, 20, 20], keypoints=[4, 7, 2, 0, 0, 0, 0, 0, 0])
    file = write(tmp_path, coco([posed], categories=[FACE]))
    Image.fromarray(pixels).save(next(file[1].iterdir()))
    annotations = read_coco(*file)
    given = skeleton_of(annotations, {"sigmas": SIGMAS, "flip_pairs": []})
    dataset = CocoDataset(annotations, "x", training=True, target="keypoints", skeleton=given)
    for flip in (0.0, 1.0):
        prepared = Prepared(dataset, (40, 60), augment=[HorizontalFlip(flip)], training=True, posed=True)
        image, target = prepared[0]
        x, y, visibility = target["keypoints"][0, 0].tolist()
        assert visibility == 2
        ((row, column),) = image[0].nonzero().tolist()
        assert (x, y) == (column + 0.5, row + 0.5)


def test_the_shapes_keypoints_come_back_as_they_were_drawn(tmp_path: Path) -> None:
    """Of the outlines themselves, in continuous coordinates, to the tenth of a pixel that is written."""
    counts = {"train": 25, "val": 1, "test": 1}
    root = write_shapes(tmp_path / "shapes", seed=5, image_size=64, **counts)
    annotations = read_coco(root / "annotations/instances_train.json", root / "train")
    rows = poses(annotations, 5)
    drawn = [shape for k in range(counts["train"]) for shape in scene(5, "train", k, 64).shapes]
    edge = 0
    assert len(drawn) == len(rows) > 30
    for shape, row in zip(drawn, rows, strict=True):
        if shape.crowd:
            assert not row.any()
            continue
        x, y = shape.loops[0].T
        extremes = [shape.loops[0][k] for k in (y.argmin(), x.argmax(), y.argmax(), x.argmin())]
        for expected, (*found, visibility) in zip([*extremes, shape.centre], row.tolist(), strict=True):
            if visibility:
                assert found == pytest.approx(np.maximum(expected, 0.5), abs=0.0501)
                edge += min(expected) < 0.4
    assert edge > 0
    text = json.loads((root / "annotations/instances_train.json").read_text())
    assert min(v for a in text["annotations"] for v in a["keypoints"]) >= 0


def test_predicted_keypoints_are_drawn_on_their_pixels() -> None:
    """A small image is enlarged, and the dot's centre with its pixel's."""
    pixels = torch.full((3, 40, 40), 90, dtype=torch.uint8)
    found = Objects(
        index=0,
        name="x",
        size=(40, 40),
        class_names=("a",),
        reading={},
        boxes=torch.tensor([[35.0, 35, 39, 39]]),
        scores=torch.ones(1),
        labels=torch.ones(1).long(),
    )
    points = torch.tensor([[[12.0, 7, 1]]])
    bare, dotted = (np.array(o.draw(pixels)) for o in (found, replace(found, keypoints=points)))
    factor = bare.shape[0] / 40
    y, x = np.nonzero((bare != dotted).any(axis=2))
    assert factor > 4
    centre = [(x.min() + x.max() + 1) / 2, (y.min() + y.max() + 1) / 2]
    assert centre == pytest.approx([12.5 * factor, 7.5 * factor], abs=1)


# Poses stay with their objects.


def marked(folder: Path, number: int = 12) -> CocoAnnotations:
    """Objects of several images, out of order, with crowds and unusable boxes among them; the first
    keypoint's x is the annotation's id, and so is the box's left side modulo the image's width."""
    annotations = []
    for k in range(1, 3 * number + 1):
        box = [k % 30, 5, 0 if k % 7 == 0 else 10, 10]
        pose = [k, 1, 2, k, 2, 1, 0, 0, 0]
        annotations.append(
            annotation(k, box, image_id=1 + k * 5 % number, iscrowd=int(k % 11 == 0), keypoints=pose)
        )
    return read(folder, annotations=annotations, images=[image(i) for i in range(number, 0, -1)])


def aligned(dataset: CocoDataset) -> list[int]:
    """The ids of all annotations, after a look at whether each has its own pose."""
    ids = []
    for index in range(len(dataset)):
        _, target = dataset.load(index)
        mine = target["annotation_ids"].tolist()
        assert target["keypoints"][:, 0, 0].tolist() == [k + 0.5 for k in mine]
        assert target["keypoints"].shape == (len(mine), 3, 2)
        assert target["visibility"].tolist() == [[2, 1, 0]] * len(mine)
        assert target["boxes"][:, 0].tolist() == [k % 30 for k in mine]
        ids += mine
    return ids


def test_poses_stay_with_their_objects(tmp_path: Path) -> None:
    annotations, every = marked(tmp_path), set(range(1, 37))
    given = Skeleton(("a", "b", "c"), (), (0, 1, 2), (0.1,) * 3, "given")

    def ids(part: CocoAnnotations, training: bool) -> list[int]:
        return aligned(CocoDataset(part, "x", training=training, target="keypoints", skeleton=given))

    learned = {k for k in every if k % 7 and k % 11}
    assert sorted(ids(annotations, False)) == sorted(every)
    assert sorted(ids(annotations.clean(), True)) == sorted(learned)
    train, val = holdout(12, 0.25, 0)
    kept, held_out = part_of(annotations, train), part_of(annotations, val)
    assert sorted(ids(kept, False) + ids(held_out, False)) == sorted(every)
    assert sorted(ids(kept.clean(), True) + ids(held_out.clean(), True)) == sorted(learned)


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_the_real_file_has_as_many_keypoints_as_it_says(real_data: Path, split: str) -> None:
    path = real_data / f"coco33/annotations/person_keypoints_{split}.json"
    document = json.loads(path.read_text())
    annotations = read_coco(path, real_data / "coco33" / split)
    given = skeleton_of(annotations)
    whole = CocoDataset(annotations, split, training=False, target="keypoints", skeleton=given)
    learned = CocoDataset(annotations, split, training=True, target="keypoints", skeleton=given)
    everything = {i["id"]: 0 for i in document["images"]}
    objects = dict(everything)
    for a in document["annotations"]:
        everything[a["image_id"]] += a["num_keypoints"]
        objects[a["image_id"]] += 0 if a["iscrowd"] else a["num_keypoints"]
    assert sum(objects.values()) > 50
    for dataset, expected in ((whole, everything), (learned, objects)):
        for index in range(len(dataset)):
            image_id = int(dataset.annotations.image_ids[index])
            labelled = dataset.poses[dataset.annotations.rows(index)][..., 2] > 0
            assert int(labelled.sum()) == expected[image_id]
