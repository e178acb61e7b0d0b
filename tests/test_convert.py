"""Pascal VOC and YOLO datasets as COCO files: what hotcoco reads of them, and what it does not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hotcoco import COCO
from PIL import Image

from resnext_backbones.errors import UsageError
from tasks.data import converted_data
from tasks.data.coco import read_coco
from tasks.data.convert import Converted, convert_voc, convert_yolo
from tasks.data.converted_data import VocData, YoloData
from tasks.data.images import decode

HEIGHT, WIDTH = 80, 100


def image(path: Path, size: tuple[int, int] = (WIDTH, HEIGHT), **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (9, 9, 9)).save(path, **options)  # type: ignore[arg-type]


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def document(converted: Converted) -> dict[str, Any]:
    return json.loads(converted.annotations.read_text())


def objects(content: dict[str, Any]) -> dict[str, list[tuple[Any, ...]]]:
    """Class, box and crowd mark of each image's objects, by the image's name without its suffix."""
    names = {c["id"]: c["name"] for c in content["categories"]}
    files = {i["id"]: Path(i["file_name"]).stem for i in content["images"]}
    found: dict[str, list[tuple[Any, ...]]] = {file: [] for file in files.values()}
    for a in content["annotations"]:
        box = [pytest.approx(v, abs=1e-3) for v in a["bbox"]]
        found[files[a["image_id"]]].append((names[a["category_id"]], box, a["iscrowd"]))
    return found


# Pascal VOC.


def thing(name: str, box: tuple[float, ...], more: str = "") -> str:
    corners = "".join(f"<{t}>{v}</{t}>" for t, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name>{more}<bndbox>{corners}</bndbox></object>"


SIZE = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"


def xml(*things: str, size: str = SIZE) -> str:
    return f"<annotation><filename>x.jpg</filename>{size}{''.join(things)}</annotation>"


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """A development kit of four images: a and b in `train`, c in `val`, d in none."""
    root = tmp_path / "VOC2012"
    part = thing("head", (1, 1, 3, 3)).replace("object", "part")
    files = {
        "a": xml(
            thing("dog", (1, 1, WIDTH, HEIGHT), "<difficult>1</difficult>"),
            thing("cat", (10.5, 11, 20, 30), "<truncated>1</truncated>"),
        ),
        "b": xml(thing("person", (30, 11, 40, 300), part)),
        "c": xml(thing("cat", (5, 5, 6, 6))),
        "d": xml(thing("zebra", (5, 5, 6, 6))),
    }
    for name, content in files.items():
        text(root / f"Annotations/{name}.xml", content.replace("x.jpg", f"{name}.jpg"))
        image(root / f"JPEGImages/{name}.jpg")
    text(root / "ImageSets/Main/train.txt", "b\na\n\n")
    text(root / "ImageSets/Main/val.txt", "c\n")
    text(root / "ImageSets/Main/cat_train.txt", "a  1\nb -1\n")
    return root


def test_boxes_are_those_that_hotcoco_reads(kit: Path) -> None:
    """One-based corners, both within the box; difficult objects as crowds; boxes of parts left alone."""
    content = document(convert_voc(kit, "train"))
    peer = objects(COCO.from_voc(str(kit)).dataset)
    assert objects(content) == {name: peer[name] for name in ("a", "b")}
    assert objects(content)["a"][0] == ("dog", [0, 0, WIDTH, HEIGHT], 1)
    assert [i["file_name"] for i in content["images"]] == ["JPEGImages/a.jpg", "JPEGImages/b.jpg"]


def test_every_split_has_the_same_classes(kit: Path) -> None:
    for split in ("train", "val", "cat_train"):
        names = [c["name"] for c in document(convert_voc(kit, split))["categories"]]
        assert names == ["cat", "dog", "person", "zebra"]
    given = document(convert_voc(kit, "val", ["dog", "cat"]))
    assert [(c["id"], c["name"]) for c in given["categories"]] == [(1, "dog"), (2, "cat")]
    text(kit / "labels.txt", "zebra\nperson\ndog\ncat\n")
    assert document(convert_voc(kit, "val"))["categories"][0]["name"] == "zebra"
    with pytest.raises(
        UsageError, match=r"2 objects of a class that is not trained on: Annotations/a\.xml 'dog'; "
    ):
        convert_voc(kit, "train", ["cat"])


def test_what_was_met_is_said(kit: Path) -> None:
    text(
        kit / "Annotations/b.xml",
        xml(*[thing("person", (0, 1, 5, 5))] * 2, size="<size><width>0</width></size>"),
    )
    converted = convert_voc(kit, "train")
    assert converted.text.splitlines() == [
        f"train of {kit}: 2 images, 4 objects of 4 classes; as a COCO file: {converted.annotations}",
        "  measured 1 image: without a size in its XML file (id JPEGImages/b.jpg)",
        "  ignored 1 object: difficult: neither learned from nor judged (id 1)",
        "  kept 1 object: truncated by the edge or by other things (id 2)",
        "  kept 2 objects: begins before pixel 1; where files count from 0 and not as VOC does, set "
        "data.one_based=false (id 3, 4)",
        "  kept 1 object: repeats another one of its image (id 4)",
    ]
    sizes = {i["file_name"]: (i["height"], i["width"]) for i in document(converted)["images"]}
    assert set(sizes.values()) == {(HEIGHT, WIDTH)}
    assert objects(document(convert_voc(kit, "train", one_based=False)))["b"][0] == (
        "person",
        [0, 1, 5, 4],
        0,
    )


def test_the_result_is_read_as_any_coco_file(kit: Path) -> None:
    converted = convert_voc(kit, "train")
    annotations = read_coco(converted.annotations, converted.images)
    assert annotations.crowds == 1
    assert len(COCO(str(converted.annotations)).dataset["annotations"]) == 3  # and by the evaluator
    assert [str(f) for f in annotations.faults] == [
        "kept 1 annotation: box reaching over the edge of its image (id 3)"
    ]


def test_a_folder_a_split_with_the_images_beside_the_files(tmp_path: Path) -> None:
    """As exporting tools write it; and with folders of their own for the two."""
    for name in ("train/1", "train/sub/2"):
        text(tmp_path / f"{name}.xml", xml(thing("cat", (1, 1, 5, 5))))
        image(tmp_path / f"{name}.png")
    text(tmp_path / "valid/Annotations/3.xml", xml(thing("dog", (1, 1, 5, 5))))
    image(tmp_path / "valid/images/3.jpeg")
    image(tmp_path / "valid/images/4.jpeg")
    text(tmp_path / "valid/Annotations/5.xml", xml())
    train, valid = (convert_voc(tmp_path, split) for split in ("train", "valid"))
    assert [i["file_name"] for i in document(train)["images"]] == ["train/1.png", "train/sub/2.png"]
    assert [i["file_name"] for i in document(valid)["images"]] == ["valid/images/3.jpeg"]
    assert document(train)["categories"] == document(valid)["categories"]
    assert valid.text.splitlines()[1:] == [
        "  left out 1 image: without an XML file (id valid/images/4.jpeg)",
        "  left out 1 XML file: without an image (id 5)",
    ]
    assert len(document(convert_voc(tmp_path, "."))["images"]) == 3


def test_the_folder_above_may_be_given(kit: Path) -> None:
    assert convert_voc(kit.parent, "val").images == kit
    (kit.parent / "VOC2007/Annotations").mkdir(parents=True)
    with pytest.raises(UsageError, match="holds VOC2007, VOC2012; give one of them"):
        convert_voc(kit.parent, "val")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "no element found"),
        ("<annotation><object>", "no element found"),
        ("<html></html>", "<annotation> is expected, not <html>"),
        (xml("<object><name>cat</name></object>"), "an <object> without <name> or <bndbox>"),
        (xml(thing("", (1, 1, 5, 5))), "an <object> without <name> or <bndbox>"),
        (xml("<object><name>a</name><bndbox><xmin>1</xmin></bndbox></object>"), "<ymin> '' is not a number"),
        (xml(thing("cat", (1, 1, 5, float("nan")))), "<ymax> 'nan' is not a number"),
        ('<!DOCTYPE a [<!ENTITY x "dog">]>' + xml(thing("&x;", (1, 1, 5, 5))), "declares a document type"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd">' + xml(), "declares a document type"),
        (xml(thing("&lol;", (1, 1, 5, 5))), "undefined entity"),
        (xml("<x>" * 50_000), "mismatched tag"),
        ("<x>" * 50_000 + "</x>" * 50_000, "<annotation> is expected, not <x>"),
    ],
)
def test_bad_xml_is_named(kit: Path, content: str, expected: str) -> None:
    text(kit / "Annotations/b.xml", content)
    with pytest.raises(
        UsageError, match=rf"1 XML file not in the form of Pascal VOC: Annotations/b\.xml: .*{expected}"
    ):
        convert_voc(kit, "train")


def test_entities_are_refused_in_any_encoding(kit: Path) -> None:
    bomb = '<?xml version="1.0" encoding="utf-16"?><!DOCTYPE a [<!ENTITY x "dog">]><annotation/>'
    (kit / "Annotations/b.xml").write_bytes(bomb.encode("utf-16"))
    with pytest.raises(UsageError, match="declares a document type or entities"):
        convert_voc(kit, "train")


def test_lists_that_do_not_fit_are_refused(kit: Path) -> None:
    with pytest.raises(
        UsageError, match=r"test\.txt: there is no such list of images; there are cat_train, train"
    ):
        convert_voc(kit, "test")
    with pytest.raises(UsageError, match=r"no such folder"):
        convert_voc(kit.parent / "nowhere", "train")
    for split in ("../other", str(kit.parent)):
        with pytest.raises(UsageError, match=r"a split is a folder below data\.root"):
            convert_voc(kit, split)
    for content, expected in (
        ("a\ne\n", "1 annotation file missing: e"),
        ("a\nb\na\n", "listed more than once: a"),
        ("\n", "the list is empty"),
    ):
        text(kit / "ImageSets/Main/train.txt", content)
        with pytest.raises(UsageError, match=rf"train\.txt: {expected}"):
            convert_voc(kit, "train")
    image(kit / "JPEGImages/c.png")
    with pytest.raises(UsageError, match=r"'JPEGImages/c\.jpg' and 'JPEGImages/c\.png' have the same name"):
        convert_voc(kit, "val")


# YOLO.


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    """Three images in `train`, of which b has no text file and c an empty one; one in `val`."""
    root = tmp_path / "yolo"
    text(
        root / "data.yaml",
        "path: ../datasets/yolo\ntrain: images/train\nval: images/val\nnames:\n  0: cat\n  1: dog\n",
    )
    for name in ("train/a", "train/b", "train/sub/c", "val/d"):
        image(root / f"images/{name}.jpg")
    text(root / "labels/train/a.txt", "0 0.5 0.5 0.2 0.25\r\n1 0.35 0.9 0.1 0.2")
    text(root / "labels/train/sub/c.txt", "\n")
    text(root / "labels/val/d.txt", "1 0.1 0.1 0.4 0.1 0.4 0.5\n")
    return root


def test_boxes_are_those_of_the_description(yolo: Path) -> None:
    """docs.ultralytics.com/datasets/detect: centre and sides as shares of width and height."""
    converted = convert_yolo(yolo, "train")
    content = document(converted)
    assert objects(content) == {
        "a": [("cat", [40, 30, 20, 20], 0), ("dog", [30, 64, 10, 16], 0)],
        "b": [],
        "c": [],
    }
    assert [i["file_name"] for i in content["images"]] == [
        "images/train/a.jpg",
        "images/train/b.jpg",
        "images/train/sub/c.jpg",
    ]
    assert content["annotations"][0]["area"] == pytest.approx(400)
    assert converted.text.splitlines() == [
        f"train of {yolo}: 3 images, 2 objects of 2 classes; as a COCO file: {converted.annotations}",
        "  kept 1 image: without a text file: there is no object in it (id images/train/b.jpg)",
    ]
    assert not read_coco(converted.annotations, converted.images).faults


def test_outlines_keep_their_points_and_get_box_and_area(yolo: Path) -> None:
    (annotation,) = document(convert_yolo(yolo, "val"))["annotations"]
    assert annotation["segmentation"] == [[10, 8, 40, 8, 40, 40]]
    assert annotation["bbox"] == [10, 8, 30, 32]
    assert annotation["area"] == 480  # half of 30 × 32


def test_labels_without_an_image_and_shared_and_repeated_ones_are_named(yolo: Path) -> None:
    text(yolo / "labels/train/lost.txt", "0 0.5 0.5 0.2 0.2")
    text(yolo / "labels/train/classes.txt", "cat\ndog\n")
    text(yolo / "labels/train/a.txt", "0 0.5 0.5 0.2 0.2\n" * 2)
    image(yolo / "images/train/a.png")
    assert convert_yolo(yolo, "train").text.splitlines()[2:] == [
        "  left out 1 text file: without an image (id labels/train/lost.txt)",
        "  used 1 text file: of several images (id labels/train/a.txt)",
        "  kept 2 objects: repeats another one of its image (id 2, 4)",
    ]


@pytest.mark.parametrize(
    "names", ["[cat, dog]", "\n- cat\n- dog", "{0: cat, 1: dog}", "{'1': dog, '0': cat}", "[cat, dog]\nnc: 2"]
)
def test_names_in_all_their_forms(yolo: Path, names: str) -> None:
    text(yolo / "data.yaml", f"train: images/train\nnames: {names}\n")
    assert [(c["id"], c["name"]) for c in document(convert_yolo(yolo, "train"))["categories"]] == [
        (1, "cat"),
        (2, "dog"),
    ]


@pytest.mark.parametrize(
    ("train", "path"),
    [
        ("images/train", ""),
        ("../images/train", ""),  # as Roboflow writes it
        ("images/train", "/home/somebody/datasets/yolo"),
        ("train", "images"),
        ("[images/train, images/val]", "."),
        ("train.txt", "."),
    ],
)
def test_splits_in_all_their_forms(yolo: Path, train: str, path: str) -> None:
    text(yolo / "data.yaml", f"path: {path}\ntrain: {train}\nnames: [cat, dog]\n")
    text(yolo / "train.txt", "./images/train/a.jpg\nimages/train/b.jpg\n\n./images/train/sub/c.jpg\n")
    found = objects(document(convert_yolo(yolo / "data.yaml", "train")))
    assert sorted(found)[:3] == ["a", "b", "c"]
    assert len(found["a"]) == 2


def test_text_files_beside_the_images_and_a_folder_a_split(tmp_path: Path) -> None:
    text(tmp_path / "coco8.yaml", "train: one\nval: valid/images\nnames: [cat]\n")
    for folder, labels in (("one", "one"), ("valid/images", "valid/labels")):
        image(tmp_path / folder / "a.jpg")
        text(tmp_path / labels / "a.txt", "0 0.5 0.5 1 1")
    for split in ("train", "val"):
        assert objects(document(convert_yolo(tmp_path, split))) == {"a": [("cat", [0, 0, WIDTH, HEIGHT], 0)]}


def test_shares_are_of_the_image_as_it_is_shown(yolo: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    image(yolo / "images/train/a.jpg", exif=exif)
    converted = convert_yolo(yolo, "train")
    record = document(converted)["images"][0]
    assert (record["height"], record["width"]) == (WIDTH, HEIGHT)
    assert decode(converted.images / record["file_name"], (WIDTH, HEIGHT)).shape == (3, WIDTH, HEIGHT)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5 0.2", r"3 numbers after the class"),
        ("0 0.5 0.5 0.2 0.2 0.9", r"5 numbers after the class"),
        ("2 0.5 0.5 0.2 0.2", r"class 2; the 2 classes are 0 to 1"),
        ("-1 0.5 0.5 0.2 0.2", r"class -1;"),
        ("0.5 0.5 0.5 0.2 0.2", r"class 0.5;"),
        ("cat 0.5 0.5 0.2 0.2", r"something other than numbers"),
        ("0 0.5 0.5 nan 0.2", r"a number that is not finite"),
        ("0 50 40 20 20", r"50 is no share of the image's side; are these pixels\?"),
    ],
)
def test_bad_lines_are_named(yolo: Path, line: str, expected: str) -> None:
    text(yolo / "labels/train/a.txt", f"0 0.5 0.5 0.2 0.2\n{line}\n")
    where = r"1 line not in YOLO's form: labels/train/a\.txt, line 2"
    with pytest.raises(UsageError, match=f"{where}: {expected}"):
        convert_yolo(yolo, "train")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "`names` and the splits"),
        ("a: [", "not YAML"),
        ("train: images/train\n", "`names` is missing"),
        ("train: images/train\nnames: [yes, no]\n", "`names`: True; False; .*in quotes"),
        ("train: images/train\nnames: [cat, cat]\n", "`names`: cat; different names"),
        ("train: images/train\nnames: {1: cat, 2: dog}\n", "numbers are 1; 2, not 0, 1"),
        ("train: images/train\nnames: [cat]\nnc: 2\n", "`nc` is 2, but `names` has 1"),
        ("val: images/val\nnames: [cat]\n", "says nothing of 'train'; it has val"),
        ("train: images/test\nnames: [cat]\n", "'images/test' is neither a folder nor a list"),
        ("train: /etc\nnames: [cat]\n", "'/etc' is neither"),
        ("train: ../../..\nnames: [cat]\n", "is neither"),
        ("train: labels\nnames: [cat]\n", "no image in labels"),
        ("train: images/train\nnames: [cat]\nkpt_shape: [17, 3]\n", "keypoints are not read"),
        ("train: out.txt\nnames: [cat]\n", r"\.\./\.\./x\.jpg listed; images below"),
        ("train: gone.txt\nnames: [cat]\n", r"1 image missing: images/train/z\.jpg"),
        ("train: images/train\nnames: [[a], {b: c}, null]\n", "`names`: list; dict; NoneType; different"),
        ("!!python/object/apply:os.system ['touch /tmp/never']", "not YAML"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(yolo: Path, content: str, expected: str) -> None:
    text(yolo / "data.yaml", content)
    text(yolo / "out.txt", "../../x.jpg\n")
    text(yolo / "gone.txt", "images/train/z.jpg\n")
    with pytest.raises(UsageError, match=expected):
        convert_yolo(yolo, "train")


def test_aliases_are_not_unfolded(yolo: Path) -> None:
    """A few lines of YAML can stand for a text of any length."""
    bomb = ["b0: &b0 [x, x, x, x, x, x, x, x, x, x]"]
    bomb += [f"b{k}: &b{k} [{', '.join([f'*b{k - 1}'] * 10)}]" for k in range(1, 12)]
    rest = {"train": "images/train", "names": "[cat]"}
    for name, expected in (
        ("names", "`names`: list"),
        ("nc", "`nc` is no number"),
        ("train", "nothing of 'train'"),
    ):
        text(
            yolo / "data.yaml", "\n".join([*bomb, *(f"{k}: {v}" for k, v in (rest | {name: "*b11"}).items())])
        )
        with pytest.raises(UsageError, match=expected):
            convert_yolo(yolo, "train")
    text(yolo / "data.yaml", "\n".join([*bomb, "path: *b11", "train: images/train", "names: [cat, dog]"]))
    assert convert_yolo(yolo, "train").annotations.is_file()


def test_links_may_not_lead_out_unless_allowed(yolo: Path) -> None:
    secret = text(yolo.parent / "secret.txt", "0 0.5 0.5 0.2 0.2")
    (yolo / "labels/train/b.txt").symlink_to(secret)
    with pytest.raises(UsageError, match=r"1 link out of .*labels/train/b\.txt"):
        convert_yolo(yolo, "train")
    assert len(objects(document(convert_yolo(yolo, "train", follow_symlinks=True)))["b"]) == 1
    (yolo / "data.yaml").unlink()
    with pytest.raises(UsageError, match=r"holds no data\.yaml"):
        convert_yolo(yolo, "train")


# The file that is written.


def test_it_is_made_anew_only_when_a_source_changed(yolo: Path) -> None:
    """And then beside the old file, on which a run may be under way."""
    first = convert_yolo(yolo, "train")
    before = first.annotations.stat().st_mtime_ns, first.annotations.read_bytes()
    assert convert_yolo(yolo, "train") == first
    os.utime(yolo / "labels/train/a.txt")
    assert convert_yolo(yolo, "train") == first
    assert (first.annotations.stat().st_mtime_ns, first.annotations.read_bytes()) == before
    text(yolo / "labels/train/b.txt", "1 0.5 0.5 0.2 0.2")
    assert len(objects(document(convert_yolo(yolo, "train")))["b"]) == 1
    (yolo / "images/train/a.jpg").unlink()
    assert len(document(convert_yolo(yolo, "train"))["images"]) == 2
    image(yolo / "images/train/b.jpg", (2 * WIDTH, HEIGHT))
    assert document(convert_yolo(yolo, "train"))["images"][0]["width"] == 2 * WIDTH
    last = convert_yolo(yolo, "train")
    assert (first.annotations.stat().st_mtime_ns, first.annotations.read_bytes()) == before
    assert last.text.splitlines()[-1] == "  kept 3 files beside it, made of the same split in another state"
    assert "beside it" not in convert_yolo(yolo, "val").text


def test_voc_is_made_anew_too(kit: Path) -> None:
    first = convert_voc(kit, "train")
    assert convert_voc(kit, "train") == first
    assert objects(document(convert_voc(kit, "train", one_based=False)))["a"][0][1] == [1, 1, 99, 79]
    text(kit / "ImageSets/Main/train.txt", "a\n")
    assert len(document(convert_voc(kit, "train"))["images"]) == 1


def test_a_file_of_somebody_else_is_not_touched(yolo: Path) -> None:
    for content in ('{"images": []}', "[", ""):
        theirs = text(convert_yolo(yolo, "train").annotations, content)
        with pytest.raises(UsageError, match=r"yolo_train-\w+\.json: was not made from .*; remove it"):
            convert_yolo(yolo, "train")
        assert theirs.read_text() == content
        theirs.unlink()


def test_what_cannot_be_written_beside_the_data_goes_to_the_cache(yolo: Path, tmp_path: Path) -> None:
    text(yolo / "annotations", "a file where the folder should be")
    with pytest.raises(
        UsageError, match=r"cannot be written .*make the folder writable, .*data\.cache=FOLDER"
    ):
        convert_yolo(yolo, "train")
    converted = convert_yolo(yolo, "train", cache=tmp_path / "cache")
    assert converted.annotations.is_relative_to(tmp_path / "cache")
    assert len(read_coco(converted.annotations, converted.images)) == 3
    assert convert_yolo(yolo, "train", cache=tmp_path / "cache") == converted


def test_an_interrupted_write_leaves_nothing(yolo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert_yolo(yolo, "train")
    assert list((yolo / "annotations").iterdir()) == []


@pytest.mark.slow
def test_two_processes_at_once_end_with_one_whole_file(yolo: Path) -> None:
    for k in range(300):
        image(yolo / f"images/train/n{k}.jpg", (8, 8))
    code = "import sys; from tasks.data.convert import convert_yolo; convert_yolo(sys.argv[1], 'train')"
    command = [sys.executable, "-c", code, str(yolo)]
    writers = [subprocess.Popen(command, cwd=Path(__file__).parents[1]) for _ in range(2)]
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    converted = convert_yolo(yolo, "train")
    assert list((yolo / "annotations").iterdir()) == [converted.annotations]
    assert len(document(converted)["images"]) == 303


# The datamodules.


def test_a_run_converts_each_split_once_and_says_so_once(
    yolo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lightning prepares the data anew for every stage, while files may be edited."""
    asked = []
    monkeypatch.setattr(
        converted_data, "convert_yolo", lambda *a, **k: asked.append(a[1]) or convert_yolo(*a, **k)
    )
    data = YoloData(str(yolo), num_workers=0)
    data.prepare_data()
    before = data.annotation_file("val")
    text(yolo / "labels/val/d.txt", "")
    data.prepare_data()
    data.setup("fit")
    data.prepare_data()
    assert asked == ["train", "val"]
    assert capsys.readouterr().out.count("as a COCO file") == 2
    assert data.annotation_file("val") == before == data.annotations("val").path
    assert len(data.annotations("val").ids) == 1


def test_a_process_that_has_not_prepared_the_data_finds_them(
    yolo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = YoloData(str(yolo), num_workers=0)
    first.prepare_data()
    capsys.readouterr()
    monkeypatch.setattr(converted_data.rank_zero_only, "rank", 1)
    second = YoloData(str(yolo), num_workers=0)
    assert second.paths("train") == first.paths("train")
    assert capsys.readouterr().out == ""


def test_images_that_are_measured_have_a_limit(yolo: Path, kit: Path) -> None:
    with pytest.raises(UsageError, match=r"more than 99 pixels.*data\.max_pixels"):
        YoloData(str(yolo), max_pixels=99, num_workers=0).prepare_data()
    text(kit / "Annotations/b.xml", xml(size=""))
    with pytest.raises(UsageError, match=r"b\.jpg: .*more than 99 pixels"):
        VocData(str(kit), max_pixels=99, num_workers=0).prepare_data()


# Round trips of real data through hotcoco's exporters.


def test_real_boxes_survive_voc(real_data: Path, tmp_path: Path) -> None:
    coco = COCO(str(real_data / "bccd/annotations/instances_val.json"))
    coco.to_voc(str(tmp_path))
    (tmp_path / "JPEGImages").symlink_to(real_data / "bccd/val")
    text(
        tmp_path / "ImageSets/Main/val.txt",
        "\n".join(Path(i["file_name"]).stem for i in coco.dataset["images"]),
    )
    content = document(convert_voc(tmp_path, "val", follow_symlinks=True))
    assert objects(content) == objects(coco.dataset)
    assert sum(map(len, objects(content).values())) == 1138


def test_real_boxes_survive_yolo(real_data: Path, tmp_path: Path) -> None:
    coco = COCO(str(real_data / "bccd/annotations/instances_val.json"))
    coco.to_yolo(str(tmp_path / "labels/val"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images/val").symlink_to(real_data / "bccd/val")
    names = (tmp_path / "labels/val/data.yaml").read_text()
    text(tmp_path / "data.yaml", f"val: images/val\n{names}")
    converted = convert_yolo(tmp_path, "val", follow_symlinks=True)
    assert objects(document(converted)) == objects(coco.dataset)
    assert len(read_coco(converted.annotations, converted.images, follow_symlinks=True)) == 87
