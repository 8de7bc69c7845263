"""The comparison of passes on Rule 110, with runs of a second each."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sleeptrain.train.logging.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[2]

SMALL = [
    "data.rule110.width=6",
    "data.rule110.steps=1",
    "data.rule110.validation_samples=16",
    "data.batch=8",
    "model.dim=16",
    "model.ffn_dim=16",
    f"train.tokens={4 * 8 * 7}",
    "train.eval_every=2",
    "wandb.mode=disabled",
]


def compare(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "tools/rule110.py",
        "--passes",
        "1",
        "2",
        "--seeds",
        "2",
        "--root",
        str(root),
        *SMALL,
        *more,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.slow
def test_trains_each_number_of_passes_and_reports_on_them(tmp_path):
    tmp_path = tmp_path / "my runs, a=b é's"
    done = compare(tmp_path)
    assert done.returncode == 0, done.stderr
    page = tmp_path / "report" / "index.html"
    assert page.stat().st_size > 10_000
    ends = {n: [] for n in (1, 2)}
    for n, values in ends.items():
        for seed in (0, 1):
            records = [r for r in read_metrics(tmp_path / f"n{n}-seed{seed}" / "metrics.jsonl") if "eval" in r]
            assert [r["step"] for r in records] == [2, 4]
            values.append(100 * records[-1]["eval"]["accuracy"][str(n)])
    one, two = (sum(values) / 2 for values in ends.values())
    assert f"N=2 is {abs(two - one):.1f} points {'ahead of' if two >= one else 'behind'} N=1" in done.stdout
    assert f"N=1: {one:.1f} % ({min(ends[1]):.1f} to {max(ends[1]):.1f} %), 2 seeds" in done.stdout
    shutil.rmtree(page.parent)
    assert compare(tmp_path, "--report").stdout == done.stdout[done.stdout.index("Rule 110, 4 runs") :]
    assert page.stat().st_size > 10_000


def test_a_report_waits_for_all_runs(tmp_path):
    done = compare(tmp_path, "--report")
    assert (done.returncode, done.stdout) == (0, f"0 of 4 runs in {tmp_path} are finished: nothing to report yet\n")
    assert not list(tmp_path.iterdir())


def test_a_run_that_fails_is_named(tmp_path):
    done = compare(tmp_path, "optim.muon_lr=-1")
    assert done.returncode == 2
    assert "rule110: n" in done.stderr and "optim.muon_lr" in done.stderr
