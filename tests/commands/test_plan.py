"""The flags of `sleeptrain plan`, before, after and between the settings."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sleeptrain.cli import main

SMALL = ["experiment=rule110", "model.dim=16", "model.ffn_dim=16", "data.batch=8", "train.micro_batch=2"]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    output = capsys.readouterr()
    return code, output.out, output.err


def test_nothing_but_json_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "--json", *SMALL, "--processes", "4", "parallel.pipeline=2", "--gpu=h100")
    plan = json.loads(out)
    assert (code, err) == (0, "")
    assert plan["layout"] | {"processes": 4, "pipeline": 2, "replicas": 2} == plan["layout"]
    assert plan["gpu"]["name"] == "H100" and plan["gpu_hours"] == pytest.approx(4 * plan["seconds"] / 3600)
    [stage] = plan["stages"]
    assert [m["total"] for m in stage["memory"]] == [
        sum(v for k, v in m.items() if k != "total") for m in stage["memory"]
    ]


def test_every_key_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--json", *SMALL, "parallel.pipeline=2", "--gpu=h100")
    documented = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()

    def keys(value: object) -> set[str]:
        if isinstance(value, list):
            return set().union(*map(keys, value))
        return set(value).union(*map(keys, value.values())) if isinstance(value, dict) else set()

    missing = {key for key in keys(json.loads(out)) if f"`{key}`" not in documented}
    assert not missing


def test_the_picture_of_the_schedule(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.png"
    code, _, _ = run(capsys, *SMALL, "parallel.pipeline=2", "--plot", str(picture))
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG")


def test_flags_hold_for_each_job_of_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "-m", *SMALL, "sleep.passes=1,2", "--json", "--plot", str(tmp_path / "s.svg"))
    plans = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert code == 0 and [p["stages"][0]["passes"] for p in plans] == [1, 2]
    assert sorted(os.listdir(tmp_path)) == ["s-0.svg", "s-1.svg"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "h20"], "--gpu: unknown GPU 'h20'; did you mean 'H200'?"),
        (["--gpu"], "--gpu: expected one argument"),
        (["--processes", "0"], "--processes: must be a whole number of at least 1, not '0'"),
        (["--processes", "some"], "--processes: must be a whole number of at least 1, not 'some'"),
        (["--processes", "3", "parallel.pipeline=2"], "must divide the number of processes (3)"),
        (["--efficiency", "40"], "--efficiency: must be above 0 and at most 1, not '40'"),
        (["--plot", "schedule.gif"], "--plot schedule.gif: the name must end in .png, .pdf or .svg"),
        (["--plot", "nowhere/s.png"], "there is no folder nowhere"),
        (["--search", "--gpu", "H200"], "--search ranks layouts by time: give --processes N and --gpu NAME"),
        (["--search", "--gpu", "H200", "--processes", "3"], "a start on 3 processes allows no layout of this run: "),
        (["--gpus", "H200"], "unknown flag '--gpus'"),
    ],
)
def test_mistakes_are_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *SMALL, *flags)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    code, _, err = run(capsys, *SMALL, "--plot", str(tmp_path / "s.png"))
    assert code == 2 and "cannot be written" in err


def test_help_shows_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and all(flag in out for flag in ("--processes N", "--gpu NAME", "--json", "--plot FILE", "model:"))


def test_other_commands_do_not_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *SMALL, "--json"]) == 2
    assert "unknown flag '--json'" in capsys.readouterr().err
