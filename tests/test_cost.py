"""Counts against published and hand-computed ones; timings by their consistency, never by their size."""

import csv
import io
import json
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.ops import MultiScaleRoIAlign

import resnext_backbones
from resnext_backbones import FPN, UsageError, resnet18
from resnext_backbones.cost import Cost, Setting, Stepper, cost, rounds
from resnext_backbones.cost_cli import main
from resnext_backbones.counting import count

ROOT = Path(__file__).parents[1]
QUICK: dict[str, Any] = {"steps": 2, "warmup": 1}

# Multiply-adds in 10⁹ at 224 × 224: torchvision's documented "GFLOPS", which for these are multiply-adds;
# of 101_32x4d, which it lacks, computed from table 1 of arXiv 1611.05431.
PUBLISHED = {
    "resnet50": (25_557_032, 4.089),
    "resnext50_32x4d": (25_028_904, 4.230),
    "resnet101": (44_549_160, 7.801),
    "resnext101_32x4d": (44_177_704, 7.970),
    "resnext101_64x4d": (83_455_272, 15.460),
    "resnext101_32x8d": (88_791_336, 16.414),
}


class Small(nn.Module):
    """A convolution, a grouped one and a matrix product, of which the multiply-adds are counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.linear = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.grouped(self.norm(self.conv(images)).relu_())
        return self.linear(x.mean((2, 3)).view(-1, 12).clone())


SMALL_MACS = (
    8 * 12 * 8 * 3 * 9  # 16 × 24 pixels become 8 × 12; each of 8 channels sees 3 × 9 numbers
    + 8 * 12 * 12 * 2 * 9  # each of 12 channels sees its group's 2 × 9
    + 12 * 5
)
SMALL_PARAMETERS = (8 * 3 * 9 + 8) + (8 + 8) + (12 * 2 * 9 + 12) + (12 * 5 + 5)


class Probe(nn.Module):
    """Writes down how it was called; the list is shared with every copy."""

    def __init__(self, log: list[Any], note: Callable[["Probe", Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.log, self.note = log, note

    def __deepcopy__(self, memo: dict[int, Any]) -> "Probe":
        copied = Probe(self.log, self.note)
        copied.load_state_dict(self.state_dict())
        return copied

    def forward(self, images: Tensor) -> Tensor:
        self.log.append(self.note(self, images))
        return self.conv(images)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "state": {name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "gradients": [parameter.grad for parameter in model.parameters()],
        "layouts": [tuple(value.stride()) for value in model.state_dict().values()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0)


# Counting


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    with torch.device("meta"):
        net = getattr(resnext_backbones, name)(num_classes=1000)
    counts = count(net, (224, 224))
    parameters, gmacs = PUBLISHED[name]
    assert counts.parameters == parameters
    assert round(counts.macs / 1e9, 3) == gmacs


def test_a_body_is_counted_without_a_classifier() -> None:
    with torch.device("meta"):
        body, classifier = resnet18(), resnet18(num_classes=1000)
    difference = count(classifier, (64, 64)).macs - count(body, (64, 64)).macs
    assert difference == 512 * 1000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_by_hand(device: str) -> None:
    counts = count(Small().to(device), (16, 24))
    assert (counts.parameters, counts.macs) == (SMALL_PARAMETERS, SMALL_MACS)
    norm = "aten._native_batch_norm_legit_no_training"
    assert counts.uncounted == {norm: 1, "aten.relu_": 1, "aten.mean": 1}


def test_shared_parameters_count_once() -> None:
    first = nn.Conv2d(3, 3, 1, bias=False)
    assert count(nn.Sequential(first, first), (2, 2)).parameters == 9


def test_a_step_of_an_operator_is_counted_each_time() -> None:
    net = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Hardswish())
    assert count(net, (4, 4)).uncounted == {"aten.relu": 2, "aten.hardswish": 1}


def test_counting_changes_nothing() -> None:
    model = resnet18(num_classes=3).train()
    model.layer2.eval()
    before = snapshot(model)
    count(model, (32, 32))
    assert_same(before, snapshot(model))


def test_an_image_of_other_channels() -> None:
    assert count(nn.Conv2d(5, 2, 1), (3, 4), in_channels=5).macs == 3 * 4 * 5 * 2


# A detector: `forward` and `loss` say how it is called and what it learns from.


def detector() -> FasterRCNN:
    return FasterRCNN(
        FPN(resnet18(), out_channels=16),
        num_classes=3,
        min_size=64,
        max_size=64,
        rpn_pre_nms_top_n_test=20,
        rpn_post_nms_top_n_test=10,
        box_score_thresh=0.0,
        box_roi_pool=MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], output_size=7, sampling_ratio=2),
    )


def detect(model: nn.Module, images: Tensor) -> Any:
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1])}
    return model(list(images), [target] * len(images) if model.training else None)


def test_a_detector_is_measured_and_what_its_macs_leave_out_is_named() -> None:
    result = cost(
        detector(), (64, 64), 2, forward=detect, loss=lambda losses: sum(losses.values()), steps=1, warmup=1
    )
    assert {"torchvision.roi_align", "torchvision.nms"} <= set(result.uncounted)
    body_and_fpn = count(FPN(resnet18(), out_channels=16), (64, 64))
    assert result.macs > body_and_fpn.macs
    assert result.training is not None
    assert result.training.steps == 1


# Measuring


@pytest.fixture(scope="module")
def measured() -> tuple[Cost, dict[str, Any], dict[str, Any]]:
    model = resnet18(num_classes=10)
    before = snapshot(model)
    result = cost(model, (32, 48), 2, "cpu", steps=6, warmup=1)
    return result, before, snapshot(model)


def test_measuring_leaves_the_model_alone(measured: Any) -> None:
    _, before, after = measured
    assert_same(before, after)


def test_the_random_state_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Dropout())
    before = torch.get_rng_state()
    cost(model, (8, 8), **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_figures_belong_together(measured: Any) -> None:
    result, _, _ = measured
    for timing in (result.inference, result.training):
        assert 0 < timing.lower_ms <= timing.latency_ms <= timing.upper_ms
        assert timing.images_per_s == pytest.approx(2 / (timing.latency_ms / 1e3))
        assert timing.steps == 6
    weights = 4 * result.parameters
    assert weights < result.inference.peak_bytes < 2 * weights
    assert result.training.peak_bytes > 3 * weights  # weights, gradients, momentum
    assert result.macs == count(resnet18(num_classes=10), (32, 48)).macs


def test_the_setting_is_recorded(measured: Any) -> None:
    setting = measured[0].setting
    assert (setting.input_size, setting.batch_size, setting.device) == ((32, 48), 2, "cpu")
    assert (setting.precision, setting.memory_format) == ("float32", "channels_last")
    assert (setting.threads, setting.torch) == (torch.get_num_threads(), torch.__version__)
    assert setting.device_name


def test_as_dict_is_json(measured: Any) -> None:
    result = measured[0]
    read = json.loads(json.dumps(result.as_dict()))
    assert read["inference"]["latency_ms"] == result.inference.latency_ms
    assert read["setting"]["input_size"] == [32, 48]


def test_peak_memory_of_a_known_allocation() -> None:
    class Scratch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000))

        def forward(self, images: Tensor) -> Tensor:
            torch.empty(30_000_000, dtype=torch.uint8), torch.empty(20_000_000, dtype=torch.uint8)
            passing = torch.empty(50_000_000, dtype=torch.uint8)
            del passing
            return images * self.weight[0]

    result = cost(Scratch(), (10, 10), 4, training=False, **QUICK)
    assert result.inference is not None
    assert result.training is None
    images = 4 * 3 * 10 * 10 * 4
    assert result.inference.peak_bytes == 1000 * 4 + images + 50_000_000


def test_peak_memory_of_training_holds_weights_gradients_and_momentum() -> None:
    class Matrix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1000, 2000))

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, :1000] @ self.weight

    result = cost(Matrix(), (20, 20), 1, **QUICK)
    matrix = 1000 * 2000 * 4
    assert result.inference is not None
    assert result.training is not None
    assert matrix < result.inference.peak_bytes < 1.01 * matrix
    assert 3 * matrix < result.training.peak_bytes < 3.01 * matrix


def test_peak_memory_of_training_holds_what_backward_needs() -> None:
    model = resnet18().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 64, 64)
    saved = {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        kept = model(images)
    assert kept
    parameters = list(model.parameters())
    activations = sum(saved.values()) - sum(saved.get(p.untyped_storage().data_ptr(), 0) for p in parameters)
    weights_and_momentum = 2 * sum(p.nbytes for p in parameters)
    training = cost(model, (64, 64), 8, **QUICK).training
    assert training is not None
    # When backward begins, nothing of it is freed yet; gradients grow as activations go.
    least = weights_and_momentum + activations
    assert least < training.peak_bytes < 1.5 * least


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory_format", ["channels_last", "contiguous"])
def test_precision_and_memory_format_reach_the_network(precision: Any, memory_format: Any) -> None:
    log: list[Any] = []

    def note(probe: Probe, images: Tensor) -> tuple[bool, ...]:
        tensors = images, probe.conv.weight
        return torch.is_autocast_enabled("cpu"), *(
            x.is_contiguous(memory_format=torch.channels_last) for x in tensors
        )

    cost(Probe(log, note), (8, 8), 2, precision=precision, memory_format=memory_format, **QUICK)
    log = log[1:]  # counting
    last = memory_format == "channels_last"
    assert set(log) == {(precision == "bfloat16", last, last)}


def test_modes() -> None:
    log: list[Any] = []

    def note(probe: Probe, images: Tensor) -> tuple[bool, bool, int]:
        return probe.training, torch.is_grad_enabled(), len(images)

    cost(Probe(log, note), (8, 8), 2, **QUICK)
    counted, *steps = log
    assert counted == (False, False, 1)
    # Each mode: one to warm up, one to see the memory, two to be timed.
    assert steps == [(False, False, 2)] * 4 + [(True, True, 2)] * 4


def test_networks_take_turns() -> None:
    log: list[Any] = []
    setting = Setting((8, 8), steps=3, warmup=1)
    steppers = [Stepper(Probe(log, lambda probe, images, n=n: n), setting, name=n) for n in "ab"]
    log.clear()
    seen = [(mode, stepper.name, done) for mode, stepper, done in rounds(steppers)]
    assert "".join(log) == "aabb" + "ababab" + "aabb" + "ababab"
    inference = [(name, done) for mode, name, done in seen if mode == "inference" and done]
    assert inference == [(name, i / 3) for i in (1, 2, 3) for name in "ab"]


@pytest.mark.parametrize(("steps", "done"), [(30, 5), (3, 3)])
def test_a_spent_budget_ends_the_steps_but_not_before_five(steps: int, done: int) -> None:
    result = cost(nn.Conv2d(3, 2, 3), (8, 8), steps=steps, seconds=0, training=False)
    assert result.inference is not None
    assert result.inference.steps == done


def test_every_parameter_learns_and_all_steps_start_from_the_same_weights() -> None:
    for model in (resnet18(), resnet18(num_classes=4)):  # from maps as from logits
        stepper = Stepper(model, Setting((64, 64), 2, **QUICK))
        for _ in rounds([stepper]):
            pass
        pairs = zip(model.parameters(), stepper.model.parameters(), strict=True)
        assert all(torch.equal(before, after) for before, after in pairs)
        assert stepper.optimizer is not None
        assert len(stepper.optimizer.state) == len(list(model.parameters()))


# What the user can mend


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"input_size": (0, 32)}, "height=0"),
        ({"input_size": (32, -1)}, "width=-1"),
        ({"input_size": (32.5, 32)}, r"height=32\.5"),
        ({"input_size": 224}, "input_size=224"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"in_channels": 4}, "expected input.* to have 3 channels"),
        ({"device": "gpu"}, "device='gpu'"),
        ({"device": "meta"}, "device='meta'"),
        ({"device": "cuda:99"}, "device='cuda:99'"),
        ({"precision": "float16"}, "precision='float16'.*bfloat16"),
        ({"memory_format": "nhwc"}, "memory_format='nhwc'.*channels_last"),
        ({"steps": 0}, "steps=0"),
        ({"warmup": 0}, "warmup=0"),
        ({"seconds": float("nan")}, "seconds=nan"),
        ({"input_size": (10**7, 10**7)}, "out of memory"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_that_is_none(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named) as raised:
        cost(nn.Conv2d(3, 2, 3), **{"input_size": (8, 8), **arguments})
    assert "\n" not in str(raised.value)


def test_images_that_are_too_small_are_named() -> None:
    with pytest.raises(UsageError, match=r"Conv2d on 3×2×2.*Kernel size"):
        count(nn.Conv2d(3, 2, 3), (2, 2))
    with pytest.raises(UsageError, match=r"ResNeXt, training on 1×3×32×32.*more than 1 value"):
        cost(resnet18(), (32, 32), 1, **QUICK)


def test_a_network_without_weights_is_not_measured() -> None:
    with torch.device("meta"):
        model = resnet18()
    with pytest.raises(UsageError, match="meta"):
        cost(model, (32, 32))


def test_nothing_to_train() -> None:
    frozen = nn.Conv2d(3, 2, 3).requires_grad_(False)
    with pytest.raises(UsageError, match=r"^Conv2d: .*; measure inference only$"):
        cost(frozen, (8, 8), **QUICK)
    assert cost(frozen, (8, 8), training=False, **QUICK).training is None

    class Detached(nn.Conv2d):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).detach()

    with pytest.raises(UsageError, match="loss="):
        cost(Detached(3, 2, 3), (8, 8), **QUICK)


# The command line

TINY = ["--size", "32", "--batch", "2", "--steps", "2"]
NETS = """
from torch import nn

class Net(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)

class Interrupted(Net):
    calls = 0

    def forward(self, images):
        Interrupted.calls += 1
        if Interrupted.calls > 5:  # one to count, three to warm up, one for the memory
            raise KeyboardInterrupt
        return super().forward(images)

def nothing():
    return 3

def demanding(size):
    return Net()
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "nets_of_test_cost.py").write_text(NETS)
    monkeypatch.syspath_prepend(tmp_path)
    yield "nets_of_test_cost"
    sys.modules.pop("nets_of_test_cost", None)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet18", *TINY, "--precision", "bfloat16"]) == 0
    out = capsys.readouterr().out
    for words in ("params", "GMACs", "inference", "training", "ms (IQR)", "images/s", "peak"):
        assert words in out
    (row,) = [line for line in out.splitlines() if line.strip().startswith("resnet18")]
    assert row.split()[1:3] == ["11.69", "0.038"]
    for words in (
        "threads: 1",
        "batch: 2",
        "32 × 32",
        "PyTorch",
        "bfloat16",
        "channels last",
        "steps: 2",
        "relu_",
    ):
        assert words in out


def test_json_and_csv_say_the_same(capsys: pytest.CaptureFixture[str], nets: str) -> None:
    words = ["resnet18", f"{nets}.Net", "--body", *TINY]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert main([*words, "--csv"]) == 0
    lines = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["network"] for row in rows] == [line["network"] for line in lines] == words[:2]
    for row, line in zip(rows, lines, strict=True):
        assert (int(line["parameters"]), int(line["macs"])) == (row["parameters"], row["macs"])
        assert int(line["training_peak_bytes"]) == row["training"]["peak_bytes"]
        assert float(line["inference_latency_ms"]) > 0
        assert (line["input_size"], row["setting"]["input_size"]) == ("32x32", [32, 32])
        assert row["inference"]["steps"] == 2
    assert lines[0]["uncounted"].split()[-1] == "aten.relu_=17"
    assert rows[0]["parameters"] == 11_689_512 - 513_000  # --body: without fc
    assert rows[1]["macs"] == 30 * 30 * 4 * 3 * 9


def test_inference_only(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["resnet18", *TINY, "--inference-only"]
    assert main([*words, "--csv"]) == 0
    (line,) = csv.DictReader(io.StringIO(capsys.readouterr().out))
    assert line["training_latency_ms"] == ""
    assert line["inference_latency_ms"] != ""


def test_threads(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        assert main([f"{nets}.Net", *TINY, "--threads", str(before + 1), "--json"]) == 0
    finally:
        torch.set_num_threads(before)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["setting"]["threads"] == before + 1


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_others_networks_as_bodies(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "resnet18", "--body", "--size", "64", "--steps", "1", "--json"]) == 0
    theirs, ours = json.loads(capsys.readouterr().out)
    assert theirs["network"] == name
    assert (theirs["parameters"], theirs["macs"]) == (ours["parameters"], ours["macs"])


@pytest.mark.parametrize("y", ["top1", "gmacs"])
def test_plot(y: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "cost.png"
    words = ["resnet18", "resnext26_32x4d", *TINY, "--inference-only", "--plot", str(path), "--y", y]
    assert main(words) == 0
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    assert [p.name for p in tmp_path.iterdir()] == ["cost.png"]
    left_out = "resnext26_32x4d: not in the picture" in capsys.readouterr().err
    assert left_out == (y == "top1")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["resnext50_32x4"], "did you mean resnext50_32x4d"),
        (["torchvision:resnet5"], "resnet50"),
        (["no.such.Net"], "no.such.Net"),
        (["resnet18", "--size", "0"], "height=0"),
        (["resnet18", "--size", "1", "2", "3"], "--size 1 2 3"),
        (["resnet18", "--batch", "0"], "batch_size=0"),
        (["resnet18", "--threads", "0"], "--threads 0"),
        (["resnet18", "--device", "tpu"], "tpu"),
        (["resnet18", "--plot", "nowhere/x.png"], "nowhere/x.png"),
        (["resnet18", "--plot", "x.pdf"], "x.pdf"),
        (["resnext26_32x4d", "--plot", "x.png"], "--y gmacs"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(words: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--steps", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert named in err.strip().splitlines()[-1]
    assert err.strip().splitlines()[-1].startswith("python -m resnext_backbones.cost: ")


@pytest.mark.parametrize("attribute", ["nothing", "demanding", "absent"])
def test_what_makes_no_network(attribute: str, nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{nets}.{attribute}", *TINY]) == 2
    assert f"{nets}.{attribute}" in capsys.readouterr().err


def test_a_word_after_size_is_told_where_it_belongs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--size", "32", "resnet18"])
    assert "name networks first" in capsys.readouterr().err


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["resnet18", *TINY, "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install 'resnext-backbones[plot]'" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_measured(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{nets}.Net", f"{nets}.Interrupted", *TINY, "--json"]) == 130
    out, err = capsys.readouterr()
    whole, stopped = json.loads(out)
    assert whole["inference"]["steps"] == 1
    assert (stopped["inference"], whole["training"]) == (None, None)
    assert stopped["macs"] == whole["macs"]
    assert "interrupted" in err


def test_as_a_module_nothing_is_warned_of_and_nothing_heavy_is_loaded() -> None:
    code = """
import runpy, sys
import resnext_backbones
print(*({"rich", "matplotlib", "timm"} & set(sys.modules)))
sys.argv[1:] = ["resnet5"]
runpy.run_module("resnext_backbones.cost", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (2, [])
    (line,) = done.stderr.strip().splitlines()
    assert "did you mean resnet50" in line
