"""The picture of a run, and the three lines beside it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "plot_run.py"


@pytest.fixture(scope="module")
def plot_run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plot_run", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def step(number: int, loss: float, passes: int = 1, window: int = 64) -> dict:
    return {"step": number, "tokens": number * 512, "loss": loss, "passes": passes, "window": window}


def evaluation(number: int, accuracy: bool = False, **losses: list) -> dict:
    found: dict = {"loss": {name.removeprefix("n"): values for name, values in losses.items()}}
    if accuracy:
        found["accuracy"] = {n: 0.5 for n in found["loss"]}
    return {"step": number, "tokens": number * 512, "eval": found, "time": 0.0}


def write(folder: Path, *records: dict) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


WHOLE = (
    *(step(n, 3 - n / 100, passes=1 if n < 50 else 4, window=64 if n < 20 else 128) for n in range(1, 100)),
    evaluation(40, n1=[3.0, 2.5, 2.5]),
    evaluation(60, n1=[3.0, 2.5, 2.5], n2=[3.0, 2.4, 2.4], n4=[3.0, 2.25, 2.25]),
    evaluation(120, n1=[3.0, 2.0, 2.0], n4=[3.0, 1.5, 1.75]),
)


def test_draws_and_tells(plot_run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plot_run.main([str(write(tmp_path, *WHOLE))]) == 0
    picture = tmp_path / "report.png"
    assert capsys.readouterr().out.splitlines() == [
        str(picture),
        "loss 2.0100 at step 99, 50,688 tokens",
        "windows 2..K: N=4 1.6250, N=1 2.0000",
        "with sleep: 0.3750 lower (relative -18.75%)",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.png"]


def test_the_curves_are_the_records(plot_run: ModuleType, tmp_path: Path) -> None:
    figure = plot_run.draw("night", *plot_run.read_run(write(tmp_path, *WHOLE)))
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    curves = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert set(panels) >= {"Loss", "Curriculum", "Held-out loss of windows 2..K", "Each window, last evaluation"}
    assert list(curves["training, each record"].get_ydata()) == [3 - n / 100 for n in range(1, 100)]
    assert list(curves["held out, all windows"].get_ydata()) == pytest.approx([8 / 3, 2.5, 6.25 / 3])
    asleep = curves["with sleep (N=4)"]
    assert list(asleep.get_xdata()) == [60 * 512, 120 * 512] and list(asleep.get_ydata()) == [2.25, 1.625]
    assert list(curves["without sleep (N=1)"].get_ydata()) == [2.5, 2.5, 2.0]
    assert list(curves["N=4"].get_ydata()) == [3.0, 1.5, 1.75]
    (passes,) = panels["Curriculum"].get_lines()
    assert passes.get_drawstyle() == "steps-pre" and sorted(set(passes.get_ydata())) == [1, 4]
    assert panels["Loss"].get_xlim()[1] > 120 * 512  # the evaluation behind the last training record is inside


@pytest.mark.parametrize(
    ("records", "lines"),
    [
        ((step(1, 2.0),), ["windows 2..K: N=1 not evaluated", "with sleep: not evaluated"]),
        ((step(1, 2.0), evaluation(1, n1=[2.0])), ["windows 2..K: N=1 2.0000", "with sleep: not evaluated"]),
        (
            (step(1, float("nan")), evaluation(1, n1=[2.0, 1.0], n2=[2.0, 1.25])),
            ["windows 2..K: N=2 1.2500, N=1 1.0000", "with sleep: 0.2500 HIGHER (relative +25.00%)"],
        ),
        (
            (step(1, 2.0), evaluation(1, accuracy=True, n1=[None, 2.0], n3=[None, float("nan")])),
            ["windows 2..K: N=3 nan, N=1 2.0000", "with sleep: nan"],
        ),
        ((step(1, 2.0), evaluation(1, n1=[2.0, None])), ["windows 2..K: N=1 not evaluated", "with sleep: not eval"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_little_or_odd_data(
    plot_run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], records: tuple, lines: list[str]
) -> None:
    assert plot_run.main([str(write(tmp_path, *records)), "--out", str(tmp_path / "other.png")]) == 0
    found = capsys.readouterr().out.splitlines()
    assert len(found) == 4
    assert all(line.startswith(start) for line, start in zip(found[2:], lines, strict=True)), found
    assert (tmp_path / "other.png").exists()


def test_smoothing_keeps_lines_straight(plot_run: ModuleType) -> None:
    line = [3.0 - n / 100 for n in range(200)]
    assert plot_run.smooth(line) == pytest.approx(line, abs=1e-12)
    assert plot_run.smooth([1.0, 5.0]) == [1.0, 5.0]
    noisy = [(-1.0) ** n for n in range(400)]
    assert max(map(abs, plot_run.smooth(noisy)[10:-10])) < 0.2


@pytest.mark.parametrize(
    ("records", "arguments", "message"),
    [
        (None, [], "holds no metrics.jsonl"),
        ((), [], "no training record yet"),
        ((evaluation(1, n1=[2.0]),), [], "no training record yet"),
        ((step(1, 2.0),), ["--out", "report.pdf"], "ends in .png"),
        ((step(1, 2.0),), ["--out", "absent/report.png"], "no folder absent"),
    ],
)
def test_errors_are_one_line(
    tmp_path: Path,
    plot_run: ModuleType,
    capsys: pytest.CaptureFixture[str],
    records: tuple | None,
    arguments: list[str],
    message: str,
) -> None:
    if records is not None:
        write(tmp_path, *records)
    assert plot_run.main([str(tmp_path), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not (tmp_path / "report.png").exists()


def test_runs_as_a_command(tmp_path: Path) -> None:
    write(tmp_path, *WHOLE)
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 4 and (tmp_path / "report.png").exists()
