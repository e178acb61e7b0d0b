"""Predictions for images of every form, and the command line that writes them."""

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from small_checkpoints import changed, made

from resnext_backbones import UsageError
from tasks import predict
from tasks.drawing.pictures import PAPER, class_colour, save_png
from tasks.load import load_task
from tasks.prediction import files as prediction_files
from tasks.prediction import given as given_images
from tasks.prediction.arguments import chosen_images
from tasks.prediction.files import Pictures
from tasks.prediction.predictions import Objects
from tasks.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def checkpoint(tiny_shapes):
    return lambda kind: made(kind, tiny_shapes).folder


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return load_task(checkpoint("boxes"), "cpu")


def picture(path: Path, height: int = 40, width: int = 60, seed: int = 0, **settings) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **settings)
    return str(path)


@pytest.fixture
def files(tmp_path):
    return [picture(tmp_path / "images" / f"{k}.png", 40 + k, 60 - k, seed=k) for k in range(5)]


def same(a, b) -> bool:
    return torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and a.size == b.size


# The predictor.


def test_an_image_may_come_in_any_form(predictor, files):
    expected = predictor.predict(files, 3)
    opened = [Image.open(file) for file in files]
    arrays = [np.asarray(image.convert("RGB")) for image in opened]
    tensors = [torch.tensor(array).permute(2, 0, 1) for array in arrays]
    mixed = [files[0], Path(files[1]), opened[2], arrays[3], tensors[4]]
    for images in (opened, arrays, tensors, mixed, tuple(mixed)):
        found = predictor.predict(images, 3)
        assert all(map(same, found, expected))
    assert [one.name for one in predictor.predict(mixed)] == [*files[:2], "image 2", "image 3", "image 4"]
    assert expected[1].size == (41, 59)
    assert len(predictor.predict(files[0])) == 1
    assert predictor.predict([]) == []


def test_images_are_decoded_by_workers_and_streamed_from_a_generator(predictor, files):
    expected = predictor.predict(files, 2)
    assert all(map(same, predictor.predict(files, 2, workers=2), expected))
    drawn = []

    def stream():
        for file in files:
            drawn.append(file)
            yield file

    found = predictor.iterate(stream(), 2)
    assert same(next(found), expected[0])
    assert len(drawn) == 2  # not all of them at once
    rest = list(found)
    assert all(map(same, rest, expected[1:]))
    assert [one.index for one in rest] == [1, 2, 3, 4]


def test_how_images_are_batched_changes_next_to_nothing(predictor, files):
    for alone, together in zip(predictor.predict(files, 1), predictor.predict(files, 5), strict=True):
        torch.testing.assert_close(alone.scores, together.scores, rtol=0, atol=1e-4)


def test_grey_palette_and_turned_images(predictor, tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    exif = picture(tmp_path / "a.jpg", 40, 60, exif=turned)
    (found,) = predictor.predict(exif)
    assert found.size == (60, 40)
    assert same(*predictor.predict([exif, Image.open(exif)]))
    assert found.draw(exif).height > found.draw(exif).width
    grey = Image.fromarray(np.arange(2400, dtype=np.uint8).reshape(40, 60))
    for image in (grey, grey.convert("1"), grey.convert("P"), grey.convert("LA"), grey.convert("CMYK")):
        assert predictor.predict(image)[0].size == (40, 60)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((40, 60), np.uint8),
        np.zeros((40, 60, 3), np.float32),
        np.zeros((3, 40, 60), np.uint8),
        np.zeros((0, 60, 3), np.uint8),
        np.zeros((2, 40, 60, 3), np.uint8),
        torch.zeros(40, 60, 3, dtype=torch.uint8),
        torch.zeros(3, 40, 60),
        Image.new("F", (60, 40)),
        Image.fromarray(np.zeros((40, 60), np.uint16)),
    ],
)
def test_what_is_not_eight_bits_of_rgb_is_refused(predictor, image):
    with pytest.raises(UsageError, match="image 1: "):
        predictor.predict([np.zeros((40, 60, 3), np.uint8), image])


def test_a_folder_is_no_image(predictor, tmp_path):
    with pytest.raises(UsageError, match="a folder; give its images"):
        predictor.predict(tmp_path)


def test_damaged_images_are_named_or_handed_over(predictor, files, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 half an image")
    images = [files[0], str(tmp_path / "broken.jpg"), str(tmp_path / "gone.png"), files[1]]
    with pytest.raises(UsageError, match=r"broken\.jpg"):
        predictor.predict(images)
    for workers in (0, 1):
        faults: dict[int, str] = {}
        found = list(predictor.iterate(images, 1, workers=workers, on_fault=faults.__setitem__))
        assert [one.index for one in found] == [0, 3]
        assert list(faults) == [1, 2]
        assert "broken.jpg" in faults[1]
        assert "no such image file" in faults[2]


def test_scores_are_a_threshold(predictor, files):
    (every,) = predictor.predict(files[0])
    score = every.scores[len(every.scores) // 2].item()
    (some,) = predictor.predict(files[0], score=score)
    assert some.scores.tolist() == [s for s in every.scores.tolist() if s >= score]
    assert 0 < len(some.scores) < len(every.scores)
    assert len(some.names) == len(some.scores)
    assert len(every.at_least(1.1).boxes) == 0


@pytest.mark.parametrize("kind", ["boxes", "masks", "keypoints", "semantic", "classes"])
def test_every_kind_is_drawn(checkpoint, kind, files):
    (found,) = load_task(checkpoint(kind), "cpu").predict(files[1])
    drawn = found.draw(files[1])
    plain = np.asarray(Image.open(files[1]).resize((59 * 9, 41 * 9), Image.Resampling.BICUBIC))
    assert drawn.width >= 59 * 9
    inner = np.asarray(drawn)[: 41 * 9, : 59 * 9]
    assert (inner != plain).any() or kind == "classes"
    with pytest.raises(UsageError, match="draws on an image of"):
        found.draw(files[2])


def with_data(run: Path, folder: Path, **settings: int) -> Path:
    """A copy of a run's checkpoint with other settings of its data."""
    config = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["record"]["config"]
    return changed(run, folder, config={**config, "data": {**config["data"], **settings}})


def test_files_are_drawn_on_as_they_were_read(checkpoint, tmp_path):
    Image.fromarray(np.full((480, 480), 2048, np.uint16)).save(tmp_path / "deep.png")
    (found,) = load_task(with_data(checkpoint("boxes"), tmp_path, bit_depth=12), "cpu").predict(
        tmp_path / "deep.png"
    )
    drawn = np.asarray(found.draw(tmp_path / "deep.png", score=1.1))
    assert np.unique(drawn).tolist() == pytest.approx([2048 / 4095 * 255], abs=1)


def test_keypoints_are_drawn_in_the_middle_of_the_pixels_they_name():
    pose = torch.tensor([[[20.0, 10.0, 1.0]]])
    box, one = torch.tensor([[40.0, 30.0, 50.0, 40.0]]), torch.ones(1)
    found = Objects(0, "a", (48, 64), ("cat",), {}, box, one, one.long(), keypoints=pose)
    drawn = np.asarray(found.draw(torch.full((3, 48, 64), 90, dtype=torch.uint8)))
    factor = 8  # to 480 pixels at least
    assert drawn.shape[:2] == (48 * factor, 64 * factor)
    rows, columns = np.nonzero((drawn == PAPER).all(axis=2))
    assert (columns.mean(), rows.mean()) == pytest.approx((20.5 * factor, 10.5 * factor), abs=1)


def test_a_silent_worker_ends_it(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # when it ends the workers
    predictor = load_task(with_data(checkpoint("boxes"), tmp_path, worker_timeout=1), "cpu")
    monkeypatch.setattr(given_images, "decode", lambda *_, **__: time.sleep(20))  # a folder that went offline
    with pytest.raises(UsageError, match="timed out after 1 seconds: take fewer workers"):
        predictor.predict(files[0], workers=1)


# The command line.


def run(*words, code: int = 0) -> str:
    """What it says, standard output and error together."""
    said = io.StringIO()
    with redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", said)
        assert predict.main(["--device", "cpu", "--batch-size", "2", *map(str, words)]) == code, (
            said.getvalue()
        )
    return said.getvalue()


def below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_detections_are_written_as_coco_results(checkpoint, files, tmp_path):
    run_folder = checkpoint("masks")
    ids = [7, 90, 3, 44, 5, 61]
    names = ["a", "b", "c", "d", "e", "f"]
    categories = [{"id": i, "name": name} for i, name in zip(ids, names, strict=True)]
    path = changed(run_folder, tmp_path, categories=categories)
    out = tmp_path / "out"
    said = run(path, tmp_path / "images", "--output", out, "--score", "0.9")
    assert "predicted 5 images" in said
    assert str(out) in said
    assert below(out) == ["images.json", *(f"pictures/{k}.png" for k in range(5)), "predictions.json"]

    expected = load_task(path, "cpu").predict(files, 2)
    results = json.loads((out / "predictions.json").read_text())
    truth = COCO(str(out / "images.json"))
    assert len(truth.loadRes(results).anns) == len(results) == sum(len(one.boxes) for one in expected)
    by_name = {image["file_name"]: image for image in truth.imgs.values()}
    for file, found in zip(files, expected, strict=True):
        image = by_name[Path(file).name]
        assert (image["height"], image["width"]) == found.size
        mine = [r for r in results if r["image_id"] == image["id"]]
        assert [r["category_id"] for r in mine] == [ids[label - 1] for label in found.labels.tolist()]
        assert [r["score"] for r in mine] == found.scores.tolist()
        for r, (x1, y1, x2, y2), code in zip(mine, found.boxes.tolist(), found.rles, strict=True):
            assert r["bbox"] == pytest.approx([x1, y1, x2 - x1, y2 - y1])
            np.testing.assert_array_equal(rle.decode(r["segmentation"]), rle.decode(code))
            assert isinstance(r["segmentation"]["counts"], str)
    assert {c["id"]: c["name"] for c in truth.loadCats(ids)} == dict(zip(ids, names, strict=True))


def test_keypoints_are_written_flat_with_their_skeleton(checkpoint, files, tmp_path):
    run(checkpoint("keypoints"), files[0], "--output", tmp_path / "out", "--no-pictures")
    assert below(tmp_path / "out") == ["images.json", "predictions.json"]
    (found,) = load_task(checkpoint("keypoints"), "cpu").predict(files[0])
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    for result, points in zip(results, found.keypoints.flatten(1).tolist(), strict=True):
        assert result["keypoints"] == points
    (category, *_) = json.loads((tmp_path / "out/images.json").read_text())["categories"]
    assert 3 * len(category["keypoints"]) == len(results[0]["keypoints"])
    assert [[a - 1, b - 1] for a, b in category["skeleton"]] == [list(edge) for edge in found.edges]


def test_class_maps_are_png_files_of_the_images_size(checkpoint, files, tmp_path):
    out = tmp_path / "out"
    run(checkpoint("semantic"), *files[:2], "--output", out)
    assert below(out) == ["classes.txt", "classes/0.png", "classes/1.png", "pictures/0.png", "pictures/1.png"]
    expected = load_task(checkpoint("semantic"), "cpu").predict(files[:2], 2)
    for k, found in enumerate(expected):
        written = Image.open(out / f"classes/{k}.png")
        assert written.mode == "P"
        np.testing.assert_array_equal(np.asarray(written), found.classes.numpy())
        colours = np.reshape(written.getpalette(), (-1, 3))
        assert found.class_names[0] == "background"
        for label in range(1, len(found.class_names)):  # as the objects of the class
            assert tuple(colours[label]) == class_colour(label)
    assert (out / "classes.txt").read_text().splitlines() == list(expected[0].class_names)


def test_classes_are_a_table(checkpoint, files, tmp_path):
    run(checkpoint("classes"), *files[:2], "--output", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/predictions.csv").open()))
    for row, found in zip(rows, load_task(checkpoint("classes"), "cpu").predict(files[:2], 2), strict=True):
        assert row["file"] == Path(found.name).name
        assert row["prediction"] == found.top[0]
        assert float(row["score"]) == pytest.approx(found.top[1], abs=1e-6)
        assert float(row["score_2"]) <= float(row["score"])


def test_the_others_are_predicted_where_one_is_damaged(checkpoint, files, tmp_path):
    (tmp_path / "images/2.png").write_bytes(b"")
    said = run(checkpoint("boxes"), tmp_path / "images", "--output", tmp_path / "out", code=1)
    assert "2.png: the file is empty" in said
    assert "predicted 4 of 5 images" in said
    assert "1 could not be read" in said
    images = json.loads((tmp_path / "out/images.json").read_text())["images"]
    assert [image["file_name"] for image in images] == ["0.png", "1.png", "3.png", "4.png"]
    assert len(below(tmp_path / "out/pictures")) == 4


@pytest.mark.parametrize(
    ("reason", "code", "named"),
    [(KeyboardInterrupt(), 130, ""), (UsageError("out of memory"), 2, "of memory")],
)
def test_what_is_done_when_it_ends_early_is_kept(
    checkpoint, files, tmp_path, monkeypatch, reason, code, named
):
    found, calls = Predictor._found, []

    def second_batch_fails(self, batch):
        calls.append(1)
        if len(calls) == 2:
            raise reason
        return found(self, batch)

    monkeypatch.setattr(Predictor, "_found", second_batch_fails)
    said = run(checkpoint("boxes"), *files, "--output", tmp_path / "out", code=code)
    assert "stopped: predicted 2 of 5 images" in said
    assert named in said
    assert below(tmp_path / "out") == ["images.json", "pictures/0.png", "pictures/1.png", "predictions.json"]
    results = json.loads((tmp_path / "out/predictions.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    assert len(json.loads((tmp_path / "out/images.json").read_text())["images"]) == 2


@pytest.mark.parametrize(
    ("reason", "code", "named"),
    [(KeyboardInterrupt(), 130, ""), (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left")],
)
def test_results_are_kept_where_the_last_pictures_are_not_written(
    checkpoint, files, tmp_path, monkeypatch, reason, code, named
):
    def last_fails(picture, path):
        if path.name == "4.png":
            raise reason
        save_png(picture, path)

    monkeypatch.setattr(prediction_files, "save_png", last_fails)
    out = tmp_path / "out"
    assert named in run(checkpoint("boxes"), *files, "--output", out, "--workers", "1", code=code)
    results = json.loads((out / "predictions.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2, 3, 4, 5}
    assert len(json.loads((out / "images.json").read_text())["images"]) == 5
    assert below(out / "pictures") == ["0.png", "1.png", "2.png", "3.png"]


def test_no_thread_is_left_where_a_picture_is_not_written(predictor, files, tmp_path, monkeypatch):
    def full(picture, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prediction_files, "save_png", full)
    pictures, chosen = Pictures(tmp_path / "out", 0.5, 1), chosen_images(files)
    (found,) = predictor.predict(files[0])
    pictures.add(found, chosen)
    with pytest.raises(OSError, match="No space"):
        pictures.finish()
    with pytest.raises(RuntimeError, match="after shutdown"):
        pictures.add(found, chosen)


def test_a_ctrl_c_while_an_image_is_written_waits_until_it_is():
    done = []

    def write():
        with predict._whole():
            os.kill(os.getpid(), signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        write()
    assert done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_no_file_of_somebody_else_is_overwritten(checkpoint, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("boxes", "boxes-2"):
        said = run(checkpoint("boxes"), files[0], "--no-pictures")
        assert f"predictions/{name}\n" in said
        assert below(tmp_path / "predictions" / name) == ["images.json", "predictions.json"]
    last = checkpoint("boxes") / "checkpoints/last.ckpt"
    assert "predictions/boxes-3\n" in run(last, files[0], "--no-pictures")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    assert "is not empty" in run(last, files[0], "--output", "full", code=2)
    assert below(tmp_path / "full") == ["mine.txt"]
    assert "mine.txt" in run(last, files[0], "--output", "full/mine.txt", code=2)


def test_images_of_one_name_in_different_folders_do_not_meet(checkpoint, tmp_path):
    for name in ("a/x.png", "a/x.jpg", "b/x.png", "b/deep/x.png", "b/y.bmp"):
        picture(tmp_path / "images" / name)
    out = tmp_path / "out"
    run(checkpoint("classes"), tmp_path / "images", "--output", out)
    assert below(out / "pictures") == ["a/x.jpg.jpg", "a/x.png.png", "b/deep/x.png", "b/x.png", "b/y.png"]
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert [row["file"] for row in rows] == ["a/x.jpg", "a/x.png", "b/x.png", "b/y.bmp", "b/deep/x.png"]
    assert Image.open(out / "pictures/a/x.jpg.jpg").format == "JPEG"


def test_files_folders_and_patterns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("in/a.png", "in/b.JPG", "in/.hidden.png", "in/sub/c.tif", "in/.git/d.png", "e[1].png"):
        picture(tmp_path / name, format="PNG")
    (tmp_path / "in/notes.txt").write_text("")
    picture(tmp_path / "no_ending", format="PNG")

    def names(*words):
        chosen = chosen_images(words)
        return [chosen.relative(k) for k in range(len(chosen.files))]

    assert names("in") == ["a.png", "b.JPG", "sub/c.tif"]
    assert names("in/a.png") == ["a.png"]
    assert names("in/a.png", "e[1].png") == ["in/a.png", "e[1].png"]
    assert names("in/*") == ["a.png", "b.JPG"]
    assert names("in/**/*.tif", "in") == ["sub/c.tif", "a.png", "b.JPG"]
    assert names("in/s*") == ["sub/c.tif"]
    assert names("no_ending") == ["no_ending"]
    skipped = chosen_images(["in", "in/a.png"]).skipped
    assert [text.split(":")[0] for text in skipped] == [
        "skipped 1 file with another ending than an image's",
        "skipped 1 hidden file",
        "skipped 1 image, named more than once",
    ]
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in", target_is_directory=True)
    assert names("in") == ["a.png", "b.JPG", "sub/c.tif"]
    for words, reason in (
        (["gone"], "gone: there is no such file or folder"),
        (["gone/*.jpg"], "no file matches"),
        (["in/notes.txt"], "no image in it"),
        (["in", "gone.png"], "gone.png"),
    ):
        with pytest.raises(UsageError, match=reason.replace("*", r"\*")):
            chosen_images(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: RUN, IMAGE"),
        (["RUN"], "required: IMAGE"),
        (["RUN", "a.png", "--score", "2"], "2 is not in 0…1"),
        (["RUN", "a.png", "--score", "high"], "--score"),
        (["RUN", "a.png", "--batch-size", "0"], "a whole number of at least 1 is wanted"),
        (["RUN", "a.png", "--wrokers", "1"], "--wrokers"),
    ],
)
def test_slips_in_options_are_one_line(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_mistakes_are_one_line(checkpoint, files, tmp_path):
    for words in (
        [tmp_path / "no-run", files[0]],
        [checkpoint("boxes"), tmp_path / "gone.png"],
        [checkpoint("boxes"), files[0], "--device", "cuda:99"],
    ):
        said = run(*words, "--output", tmp_path / "out", code=2)
        assert said.startswith("python -m tasks.predict: ")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_comes_without_torch():
    code = """
import sys
from tasks.predict import main
try:
    main(["--help"])
finally:
    print([name for name in ("torch", "lightning", "PIL", "rich") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for word in ("--score", "predictions.json", "examples:", "Exit codes"):
        assert word in done.stdout
    assert done.stdout.strip().endswith("[]")
