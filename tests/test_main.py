"""The table of networks, as people see it and as programs read it."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from resnext_backbones import VARIANTS
from resnext_backbones.__main__ import main

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_module_lists_every_network_uncut() -> None:
    command = [sys.executable, "-m", "resnext_backbones"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert set(VARIANTS) <= set(lines)
    assert lines["resnext50_32x4d"][1:7] == ["32", "4", "25,028,904", "4.230", "224²", "77.8"]
    assert " ".join(lines["resnext50_32x4d"][7:]) == "arXiv 1611.05431, table 3"
    assert lines["resnext29_8x64d"][1:7] == ["8", "64", "34,426,698", "5.387", "32²", "96.35"]
    assert lines["resnext152_32x8d"][6:] == ["–", "–"]
    assert "…" not in done.stdout


def test_patterns_choose(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet101", "resnext101_*4d", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    expected = ["resnet101", "resnext101_4x24d", "resnext101_8x14d", "resnext101_32x4d"]
    expected += ["resnext101_2x64d", "resnext101_64x4d"]
    assert [row["network"] for row in rows] == expected
    assert rows[0]["parameters"] == 44_549_160


def test_csv_has_the_same_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet18", "resnet34", "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["network"], row["parameters"], row["top1"]) for row in rows] == [
        ("resnet18", "11689512", "69.758"),
        ("resnet34", "21797672", "73.314"),
    ]


def test_equal_complexity_reports_the_whole_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--equal", "1", "32", "--json"]) == 0
    one, many = json.loads(capsys.readouterr().out)
    assert (one["cardinality"], one["base_width"], one["parameters"]) == (1, 64, 25_557_032)
    assert (many["cardinality"], many["base_width"], many["parameters"]) == (32, 4, 25_028_904)
    assert one["weights"] == 69_632
    assert one["macs_ratio"] == 1
    assert many["macs_ratio"] == pytest.approx(4.230 / 4.089, abs=3e-4)


def test_equal_without_numbers_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--equal"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert [row[:3] for row in rows if row[0].isdigit()] == [
        *(["1", "64", "64"], ["2", "40", "80"], ["4", "24", "96"], ["8", "14", "112"]),
        *(["16", "8", "128"], ["32", "4", "128"], ["64", "2", "128"]),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["resnext50_32x4"], "no network is called resnext50_32x4; did you mean resnext50_32x4d"),
        (["zzz"], "no network is called zzz; there are resnet18, "),
        (["--equal", "0"], "cardinality=0 must be"),
        (["--equal", "500"], "less than half a channel"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert err.count("\n") == 1
    assert not out


@pytest.mark.slow
@pytest.mark.parametrize("module", ["resnext_backbones", "resnext_backbones.cost"])
def test_a_reader_who_has_seen_enough(module: str) -> None:
    words = "resnet18 --size 32 --steps 1 --inference-only" if module.endswith("cost") else ""
    shell = f"{sys.executable} -m {module} {words} --csv | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["0"]


@pytest.mark.slow
def test_a_full_disk_is_one_line() -> None:
    shell = f"{sys.executable} -m resnext_backbones resnet18 > /dev/full"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "python -m resnext_backbones: cannot write the output: No space left on device; give it another place"
    ]


def test_a_narrow_terminal_breaks_no_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["resnext50_32x4d"]) == 0
    assert "resnext50_32x4d" in capsys.readouterr().out


def test_names_and_equal_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resnet50", "--equal", "2"]) == 2
    assert "leave one of them out" in capsys.readouterr().err
