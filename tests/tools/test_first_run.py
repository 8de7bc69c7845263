"""`make train`: its stages, and what it does after a fault or an interruption."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sleeptrain.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "first_run.py"


@pytest.fixture
def first_run(monkeypatch: pytest.MonkeyPatch):
    """tools/first_run.py as a module."""
    monkeypatch.syspath_prepend(TOOL.parent)
    import first_run

    return first_run


@pytest.fixture
def calls(first_run, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the stages would run."""
    made: list[list[str]] = []
    monkeypatch.setattr(first_run, "_call", lambda command, log=None: made.append(command))
    return made


def finish(run: Path) -> None:
    """A run folder that is finished, with an evaluation."""
    run.mkdir(parents=True)
    status = {"state": "finished", "step": 4, "tokens": 8, "reason": None, "attempt": None}
    (run / "status.json").write_text(json.dumps(status))
    record = {"step": 4, "tokens": 8, "eval": {"accuracy": {"1": 0.5, "4": 0.75}}}
    (run / "metrics.jsonl").write_text(json.dumps(record) + "\n")


def test_a_call_that_goes_on_repeats_no_complete_stage(first_run, calls, tmp_path, capsys):
    story = first_run.FirstRun(tmp_path / "first", tmp_path / "data", brief=False)
    for run in (story.text, story.task(4), story.task(1)):
        finish(run)
    story.exported.mkdir()
    story.run()
    assert [command[2 if "tools" in command[1] else 3] for command in calls] == ["--stdlib", "generate", "report"]
    out = capsys.readouterr().out
    assert "trained with N=4: 50.0 % with N=1, 75.0 % with N=4 of held-out answers are right" in out


def test_a_run_that_was_interrupted_is_not_killed_again(first_run, calls, tmp_path):
    story = first_run.FirstRun(tmp_path / "first", tmp_path / "data", brief=False)
    for run in (story.task(4), story.task(1)):
        finish(run)
    whole = story.text / "checkpoints" / "step-00000050"
    whole.mkdir(parents=True)
    (whole / "manifest.json").touch()
    (story.text / "checkpoints" / "step-00000000").mkdir()
    story.run()
    assert [command[3] for command in calls[1:]] == ["train", "convert", "generate", "report"]


def test_a_training_that_fails_before_a_checkpoint_is_an_error(first_run, tmp_path, monkeypatch):
    story = first_run.FirstRun(tmp_path / "first", tmp_path / "data", brief=False)
    monkeypatch.setattr(story.__class__, "_text_command", lambda self: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(UserError, match="text ended with code 3"):
        story._train_and_kill()


def test_a_command_that_fails_is_named_with_its_log(first_run, tmp_path):
    with pytest.raises(UserError, match=r"code 5; see .*a\.log"):
        first_run._call([sys.executable, "-c", "raise SystemExit(5)"], tmp_path / "a.log")


@pytest.mark.slow
def test_the_whole_way(tmp_path):
    root = tmp_path / "my runs, a=b é's"
    command = [sys.executable, str(TOOL), "--brief", "--root", str(root), "--data", str(tmp_path / "data")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    stages = [line[:5] for line in done.stdout.splitlines() if line.startswith("[")]
    assert stages == [f"[{n}/7]" for n in range(1, 8)]
    assert "killed on purpose, with SIGKILL, after it had saved step-0000000" in done.stdout
    assert "checked: the logits of both models differ by" in done.stdout
    assert (root / "report" / "index.html").stat().st_size > 10_000
    assert not done.stderr, done.stderr
