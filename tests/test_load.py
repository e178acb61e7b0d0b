"""A network out of a checkpoint: the same as in training, and nothing else that the file might ask for."""

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from hydra.utils import get_object
from omegaconf import OmegaConf
from PIL import Image
from pycocotools import mask as rle
from small_checkpoints import KINDS, changed, made
from torch import nn
from torch.utils.data import DataLoader

from resnext_backbones import FeatureSpec, FrozenBatchNorm2d, UsageError
from tasks.load import ALLOWED, load_task


@pytest.fixture(scope="module")
def checkpoint(tiny_shapes):
    return lambda kind: made(kind, tiny_shapes)


def record_of(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)["record"]


def files_of(data) -> list[Path]:
    images = data.annotations("test")
    return [images.image_path(i) for i in range(len(images))]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_those_of_evaluation_to_the_last_bit(checkpoint, kind):
    run, task, data = checkpoint(kind)
    loader = DataLoader(data.prepared("test"), 3, collate_fn=type(data).collate)
    with torch.inference_mode():
        expected = [found for batch in loader for found in task.predict(batch)]
    predicted = load_task(run, "cpu").predict(files_of(data), batch_size=3)
    assert len(predicted) == len(expected) >= 5
    for one, wanted in zip(predicted, expected, strict=True):
        if kind == "semantic":
            assert torch.equal(one.classes, wanted)
            assert one.size == tuple(wanted.shape)
        elif kind == "classes":
            assert torch.equal(one.probabilities, wanted)
            assert one.top == (task.names[int(wanted.argmax())], float(wanted.max()))
        else:
            assert len(one.boxes) > 0
            for key in ("boxes", "scores", "labels"):
                assert torch.equal(getattr(one, key), wanted[key])
            assert one.rles == wanted.get("rles")
            assert one.names == [task.names[label - 1] for label in wanted["labels"].tolist()]
            if kind == "keypoints":
                assert torch.equal(one.keypoints, wanted["keypoints"])
                assert one.edges


def test_frozen_norms_are_frozen_again_without_the_weights_they_came_from(checkpoint):
    run, task, _ = checkpoint("frozen")
    config = record_of(run)["config"]
    assert not Path(config["backbone"]["weights"]).exists()
    body, trained = (t.model.backbone.body for t in (load_task(run, "cpu").task, task))
    norms = [type(module) for module in body.modules()]
    assert norms == [type(module) for module in trained.modules()]
    assert FrozenBatchNorm2d in norms
    assert not any(isinstance(module, nn.BatchNorm2d) for module in body.modules())


BIAS = "model.roi_heads.box_predictor.cls_score.bias"


def test_the_best_checkpoint_is_taken_else_the_last(checkpoint, tmp_path):
    run, _, _ = checkpoint("boxes")
    loaded = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    (tmp_path / "checkpoints").mkdir()
    best, last = tmp_path / "checkpoints/best.ckpt", tmp_path / "checkpoints/last.ckpt"
    for path, value in ((last, 1.0), (best, 2.0)):
        loaded["state_dict"][BIAS] = torch.full_like(loaded["state_dict"][BIAS], value)
        torch.save(loaded, path)

    def bias_of(path):
        return load_task(path, "cpu").task.state_dict()[BIAS][0].item()

    assert bias_of(tmp_path) == 2
    assert bias_of(last) == 1
    best.write_bytes(best.read_bytes()[:1000])
    with pytest.warns(UserWarning, match=r"best\.ckpt: not a whole checkpoint.* TAKING .*last\.ckpt INSTEAD"):
        assert bias_of(tmp_path) == 1
    best.unlink()
    assert bias_of(tmp_path) == 1
    with pytest.raises(UsageError, match=r"nothing-here: no such checkpoint"):
        load_task(tmp_path / "nothing-here")
    last.unlink()
    with pytest.raises(UsageError, match="holds no checkpoints"):
        load_task(tmp_path)


EVIL = {"_target_": "torch.utils.collect_env.run", "command": ["touch", "OUT"]}


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        ("backbone", EVIL, "backbone._target_=torch.utils.collect_env.run"),
        (
            "backbone",
            {"_target_": "resnext_backbones.load_weights"},
            "backbone._target_=resnext_backbones.load",
        ),
        ("backbone", {"_target_": ["resnext_backbones.resnet50"]}, "backbone._target_="),
        ("model", EVIL, "model._target_"),
        ("model", {"_target_": "resnext_backbones.resnet50"}, "model._target_=resnext_backbones.resnet50"),
        ("task", EVIL, "task._target_"),
        ("backbone.norm", EVIL, "backbone.norm._target_"),
        ("model.anchor_scales", [[EVIL]], r"model.anchor_scales\[0\]\[0\]._target_"),
        ("task.a", {"b": EVIL}, "task.a.b._target_"),
        ("model._partial_", True, "model._partial_"),
        ("model._args_", [1], "model._args_"),
        ("backbone._convert_", "all", "backbone._convert_"),
        ("backbone.depths", "${oc.env:HOME}", "backbone.depths"),
        ("backbone.${oc.env:HOME}", 1, "oc.env"),
        ("backbone.depths", torch.ones(2), "backbone.depths: a Tensor"),
    ],
)
def test_code_that_a_checkpoint_names_is_not_run(checkpoint, tmp_path, where, value, named):
    run, _, _ = checkpoint("boxes")
    config = copy.deepcopy(record_of(run)["config"])
    out = tmp_path / "out"
    evil = json.loads(json.dumps(value).replace("OUT", str(out))) if not torch.is_tensor(value) else value
    part, _, key = where.partition(".")
    if key:
        config[part][key] = evil
    else:
        config[part] |= evil
    with pytest.raises(UsageError, match=named) as error:
        load_task(changed(run, tmp_path, config=config), "cpu")
    assert "--trust" in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize("part", ALLOWED)
def test_every_network_of_the_configurations_may_be_loaded(part):
    files = sorted((ROOT / "configs" / part).glob("*.yaml"))
    assert files
    for file in files:
        config = OmegaConf.load(file)
        target = config.get(part, config)["_target_"] if file.stem != "custom" else None
        assert target is None or target in ALLOWED[part], file.name


def test_every_name_that_may_be_loaded_exists():
    for target in set().union(*ALLOWED.values()):
        assert callable(get_object(target))


class OwnBody(nn.Module):
    """A body that is not of this project, which its user trusts."""

    features = {f"c{k}": FeatureSpec(8, 2**k) for k in range(2, 6)}  # noqa: RUF012
    stages = {"stem": ("stem",)}  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)

    def forward(self, images):
        height, width = images.shape[-2:]
        return {
            f"c{k}": nn.functional.adaptive_avg_pool2d(
                self.stem(images), (-(-height // 2**k), -(-width // 2**k))
            )
            for k in range(2, 6)
        }


def test_trusted_code_is_run(checkpoint, tmp_path):
    run, task, data = checkpoint("classes")
    record = copy.deepcopy(record_of(run))
    record["config"]["backbone"] = {"_target_": f"{__name__}.OwnBody"}
    torch.manual_seed(0)
    model = type(task.model)(OwnBody(), len(record["categories"]))
    state = {f"model.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "record": record}, tmp_path / "own.ckpt")
    with pytest.raises(UsageError, match=r"OwnBody.*--trust"):
        load_task(tmp_path / "own.ckpt", "cpu")
    (found,) = load_task(tmp_path / "own.ckpt", "cpu", trust=True).predict(files_of(data)[:1])
    assert float(found.probabilities.sum()) == pytest.approx(1)


def test_pickled_code_is_not_run(tmp_path):
    out = tmp_path / "out"

    class Evil:
        def __reduce__(self):
            return Path.touch, (out,)

    torch.save({"state_dict": {}, "record": Evil()}, tmp_path / "evil.ckpt", pickle_module=pickle)
    with pytest.raises(UsageError, match="not a whole checkpoint"):
        load_task(tmp_path / "evil.ckpt")
    assert not out.exists()


def test_checkpoints_that_are_not_a_runs(checkpoint, tmp_path):
    run, _, _ = checkpoint("boxes")
    torch.save({"state_dict": {"w": torch.ones(1)}}, tmp_path / "foreign.ckpt")
    with pytest.raises(UsageError, match=r"foreign\.ckpt: holds no record"):
        load_task(tmp_path / "foreign.ckpt")
    record = record_of(run)
    for key, value, reason in (
        ("config", None, "holds no record"),
        ("config", {**record["config"], "model": 3, "trainer": []}, "lacks config.model, config.trainer"),
        ("categories", None, "lacks categories"),
        ("categories", [{"id": 1}], "lacks categories"),
        ("skeleton", {"names": ["nose"], "edges": [[0, 1]]}, "lacks a skeleton"),
        ("skeleton", {"names": ["nose"], "edges": [0]}, "lacks a skeleton"),
        ("config", {**record["config"], "data": {"image_size": "large"}}, "image_size=large"),
        ("config", {**record["config"], "data": {}}, "image_size=None"),
        ("config", {**record["config"], "data": {"max_pixels": "all"}}, "max_pixels=all"),
        ("config", {**record["config"], "data": {"worker_timeout": -1}}, "worker_timeout=-1"),
    ):
        with pytest.raises(UsageError, match=reason):
            load_task(changed(run, tmp_path, **{key: value}), "cpu")


def test_weights_that_do_not_fit_are_named_in_one_line(checkpoint, tmp_path):
    run, _, _ = checkpoint("boxes")
    loaded = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    name = "model.backbone.body.conv1.weight"
    for state, reason in (
        ({k: v for k, v in loaded["state_dict"].items() if k != name}, rf"1 missing \({name}\)"),
        ({**loaded["state_dict"], "model.x": torch.ones(1)}, r"1 unknown \(model.x\)"),
        ({**loaded["state_dict"], name: torch.ones(1)}, rf"1 of another shape \({name}\)"),
        ({**loaded["state_dict"], name: "text"}, r"1 of another shape"),
        ([], "lacks weights"),
    ):
        torch.save({**loaded, "state_dict": state}, tmp_path / "a.ckpt")
        with pytest.raises(UsageError, match=reason) as error:
            load_task(tmp_path / "a.ckpt", "cpu")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "xla", "meta"])
def test_devices_that_are_not_there(checkpoint, device):
    with pytest.raises(UsageError, match=f"device {device}"):
        load_task(checkpoint("boxes").folder, device)


@pytest.mark.parametrize(  # Lightning's names, with the short ones that it still takes
    ("dtype", "names"),
    [
        (None, ["32-true", "32", 32]),
        (torch.bfloat16, ["bf16-mixed", "bf16"]),
        (torch.float16, ["16-mixed", "16", 16]),
    ],
)
def test_precision_is_the_runs(checkpoint, tmp_path, dtype, names):
    run, _, _ = checkpoint("boxes")
    config = record_of(run)["config"]
    for asked in names:
        trainer = {**config["trainer"], "precision": asked}
        path = changed(run, tmp_path, config={**config, "trainer": trainer})
        assert load_task(path, "cpu").dtype == dtype


def test_a_strangers_checkpoint_does_not_let_decompression_bombs_in(checkpoint, tmp_path):
    run, _, data = checkpoint("boxes")
    config = record_of(run)["config"]

    def limited(pixels):
        return changed(run, tmp_path, config={**config, "data": {**config["data"], "max_pixels": pixels}})

    Image.new("1", (10_001, 10_000)).save(tmp_path / "bomb.png")
    with pytest.warns(UserWarning, match=r"max_pixels=1000000000000 is not followed.*--trust"):
        guarded = load_task(limited(10**12), "cpu")
    with pytest.raises(UsageError, match="more than 100000000 pixels"):
        guarded.predict(tmp_path / "bomb.png")
    assert load_task(limited(10**12), "cpu", trust=True).reading["max_pixels"] == 10**12
    with pytest.raises(UsageError, match="more than 100 pixels"):
        load_task(limited(100), "cpu").predict(files_of(data)[:1])


RUNS = {
    "bbox": ["task=detection"],
    "segm": ["task=instance_segmentation", "model.mask_channels=16"],
    "keypoints": ["task=keypoints", "model.keypoint_channels=16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_predictions_are_those_of_the_test_stage(start, kind):
    run = start(*RUNS[kind], "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    results = json.loads((run / f"predictions_test_{kind}.json").read_text())
    predictor = load_task(run, "cpu")
    root = Path(record_of(run)["config"]["data"]["root"])
    truth = json.loads((root / "annotations/instances_test.json").read_text())
    images = sorted(truth["images"], key=lambda image: image["id"])
    batch = int(next(word for word in SMALL if word.startswith("data.batch_size")).partition("=")[2])
    predicted = predictor.predict([root / "test" / image["file_name"] for image in images], batch)
    got = []
    for image, found in zip(images, predicted, strict=True):
        boxes = found.boxes.double().numpy()
        boxes[:, 2:] -= boxes[:, :2]
        shapes = {
            "bbox": boxes.tolist(),
            "segm": [rle.decode(code).tolist() for code in found.rles or []],
            "keypoints": [] if found.keypoints is None else found.keypoints.double().flatten(1).tolist(),
        }[kind]
        got += zip([image["id"]] * len(boxes), found.scores.double().tolist(), shapes, strict=True)
    field = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}[kind]
    wanted = [(r["image_id"], r["score"], r[field]) for r in results]
    if kind == "segm":
        wanted = [(i, score, np.asarray(rle.decode(code)).tolist()) for i, score, code in wanted]
    assert got == wanted
