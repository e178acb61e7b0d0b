"""Runs on real files, unchanged."""

import json

from tasks.loggers import read_metrics


def test_coco_2017_files_train_and_test(start, real_data, capsys):
    root = real_data / "coco33"
    words = ["data=coco", f"data.root={root}", "data.train=train2017", "data.val=val2017"]
    folder = start("data.image_size=[96,160]", "trainer.max_epochs=1", data=words)
    printed = capsys.readouterr().out
    assert "data.test is not given" in printed
    assert "of 80 classes" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 <= summary["results"]["test/AP"] <= 1
    assert summary["results"]["test/AP"] == summary["results"]["best val/AP"]
    assert any("train/loss" in line for line in read_metrics(folder))


def test_blood_cells_name_the_boxes_without_area(start, real_data, capsys):
    words = [
        "data=coco",
        f"data.root={real_data / 'bccd'}",
        "data.train=train",
        "data.val=val",
        "data.test=test",
    ]
    folder = start("stages=check", "data.num_workers=2", data=words)
    printed = " ".join(capsys.readouterr().out.split())
    assert "dropped 1 annotation: box without area (id 2288)" in printed
    assert "kept 1 annotation: box without area (id 887)" in printed
    assert len(list(folder.rglob("*.png"))) == 3
