"""`sleeptrain calibrate` on a finished run: its numbers are those of `sleeptrain evaluate`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.cli import main
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.train import calibrate as calibrate_module
from sleeptrain.train import fit_gate
from sleeptrain.train.calibrate import Calibration
from sleeptrain.train.calibration_rows import Halves
from sleeptrain.train.fit_gate import Samples
from sleeptrain.train.trainer import train
from tests.commands.test_evaluate import CASES, TINY, evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    config = compose([*CASES["rule110"], *TINY, "sleep.passes=3", f"run.root={root}", "run.name=r"])
    assert train(config) == 0
    return root / "r"


def test_rules_are_compared_and_thresholds_are_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted, judged = list[Batch](), list[Batch]()
    gate_samples, calibrate = fit_gate.gate_samples, calibrate_module.calibrate

    def recorded(model: Hybrid, batches: Iterable[Batch], config: Config) -> Samples:
        fitted.extend(batches)
        return gate_samples(model, fitted, config)

    def with_rows(model: Hybrid, rows: Halves, *rest: Any) -> Calibration:
        judged.extend(rows.judged["rule110"])
        return calibrate(model, rows, *rest)

    monkeypatch.setattr(fit_gate, "STEPS", 100)
    monkeypatch.setattr(fit_gate, "gate_samples", recorded)
    monkeypatch.setattr(calibrate_module, "calibrate", with_rows)
    capsys.readouterr()
    options = ["--thresholds", "3", "--budget", "2.5", "--fit-gate", "--fit-batches", "2", "--rows", "24"]
    assert main(["calibrate", str(run), *options]) == 0
    out = capsys.readouterr().out
    folder = run / "calibration"
    found = json.loads((folder / "calibration.json").read_text())
    assert found["rows"] == {"calibration": 12, "judged": 12} and "judge them" in found["split"]
    assert found["judged"]["rules"].keys() == {"change", "acceleration", "gate"}
    assert "thresholds chosen on 12 held-out rows" in out
    assert (folder / "calibration.png").read_bytes().startswith(b"\x89PNG")
    contents = [{bytes(row) for b in batches for row in b.tokens_BT.numpy()} for batches in (fitted, judged)]
    assert len(contents[1]) == 12 and not contents[0] & contents[1], "no judged row fits the gate"
    by_passes = evaluated(capsys, str(run), "--passes", "1", "2", "3", "--batches", "3")["eval"]["accuracy"]
    both = zip(found["calibrated"]["fixed"], found["judged"]["fixed"], strict=True)
    assert [(a["value"] + b["value"]) / 2 for a, b in both] == pytest.approx(list(by_passes.values()))
    for rule in ("change", "gate"):
        choices = found["choices"][rule]
        printed = [line for line in out.splitlines() if line.startswith(f"sleep.stop={rule}")]
        assert len(printed) == len(choices) >= 1
        threshold = str(choices[0]["threshold"])
        flags = ["--stop", rule, "--stop-threshold", threshold, "--stop-gate", str(folder / "gate.safetensors")]
        again = evaluated(capsys, str(run), "--passes", "3", "--batches", "3", *flags)["eval"]
        passes = [choices[0][rows]["passes"] for rows in ("calibrated", "judged")]
        assert again["passes"]["3"] == pytest.approx(sum(passes) / 2) and passes[0] <= 2.5


def test_mistakes_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (["--passes", "1"], "--passes of 2 or more"),
        (["--thresholds", "1"], "--thresholds must be at least 2"),
        (["--fit-gate", "--fit-batches", "0"], "--fit-batches of at least 1"),
        (["--rules", "gate"], "--fit-gate"),
        (["--rows", "1"], "--rows must be at least 2"),
    ):
        capsys.readouterr()
        assert main(["calibrate", str(run), "--out", str(tmp_path), *flags]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert words in line
