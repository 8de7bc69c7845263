"""`sleeptrain calibrate` on a finished run: its numbers are those of `sleeptrain evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.config.compose import compose
from sleeptrain.train.trainer import train
from tests.commands.test_evaluate import CASES, TINY, evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    config = compose([*CASES["rule110"], *TINY, "sleep.passes=3", f"run.root={root}", "run.name=r"])
    assert train(config) == 0
    return root / "r"


def test_rules_are_compared_and_a_threshold_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    options = ["--thresholds", "3", "--budget", "2.5", "--fit-gate", "--fit-batches", "2"]
    assert main(["calibrate", str(run), *options]) == 0
    out = capsys.readouterr().out
    folder = run / "calibration"
    found = json.loads((folder / "calibration.json").read_text())
    assert found["rules"].keys() == {"change", "acceleration", "gate"}
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    by_passes = evaluated(capsys, str(run), "--passes", "1", "2", "3")["eval"]["accuracy"]
    assert [p["value"] for p in found["fixed"]] == pytest.approx(list(by_passes.values()))
    for rule in ("change", "gate"):
        [chosen] = [line for line in out.splitlines() if line.startswith(f"sleep.stop={rule}")]
        threshold = chosen.split()[1].partition("=")[2]
        flags = ["--stop", rule, "--stop-threshold", threshold, "--stop-gate", str(folder / "gate.safetensors")]
        again = evaluated(capsys, str(run), "--passes", "3", *flags)["eval"]
        assert 1 <= again["passes"]["3"] <= 2.6, "the printed threshold has four digits"


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--passes", "1"], "--passes of 2 or more"),
        (["--thresholds", "1"], "--thresholds must be at least 2"),
        (["--fit-gate", "--fit-batches", "0"], "--fit-batches of at least 1"),
        (["--rules", "gate"], "--fit-gate"),
    ):
        capsys.readouterr()
        assert main(["calibrate", str(run), "--out", str(tmp_path), *flags]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
