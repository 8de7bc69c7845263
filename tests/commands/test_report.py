"""`sleeptrain report` from the folders of runs to the page."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from sleeptrain.cli import main
from sleeptrain.report.page import FOLDER, POLICY, digest
from sleeptrain.train.logging.metrics import read_metrics
from tests.hostile import HOSTILE, IN_FILE_NAMES, SURROGATE, is_harmless
from tests.report.made import accuracy, attempt, evaluation, grid, make_run, step

ROOT = Path(__file__).resolve().parents[2]
SIZES = ["data.rule110.width=6", "data.rule110.validation_samples=16", "data.batch=8", "model.dim=16"]
TINY = [*SIZES, "model.ffn_dim=16", "train.tokens=280", "train.eval_every=2", "wandb.mode=disabled", "train.threads=1"]


def read_page(path: Path) -> ElementTree.Element:
    """The page, if it is well-formed and loads nothing."""
    text = path.read_text()
    root = ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))
    assert {element.tag for element in root.iter()}.isdisjoint({"link", "iframe", "object", "base"})
    code = {script.text for script in root.iter("script") if script.get("type") != "application/json"}
    assert code == {f"//\n{(FOLDER / 'page.js').read_text()}//"} and f'content="{POLICY}"' in text
    said = re.sub(r"http://www\.w3\.org/[\w/]+", "", text)  # the names of SVG's elements, which nobody loads
    assert not re.search(r"(?i)https?:|url\((?!#)|@import|javascript:|srcset", said)
    for element in root.iter():
        for name, value in element.attrib.items():
            assert name not in ("src", "onload") and (name != "href" or re.fullmatch(r"#.+|[\w.%-]+\.png", value))
    return root


def entries(page: ElementTree.Element) -> list[str]:
    """The entries of all lists but legends."""
    lists = [part for part in page.iter("ul") if part.get("class") != "keys"]
    return [entry.text or "" for part in lists for entry in part.iter("li")]


def cells(page: ElementTree.Element, title: str) -> list[dict[str, str]]:
    """The rows of the table under a heading."""
    body = page.find("body")
    assert body is not None
    parts = list(body)
    at = next(i for i, part in enumerate(parts) if part.tag == "h3" and part.text == title)
    table = next(part for part in parts[at:] if part.tag == "div")
    header = [cell.text or "" for cell in table.iter("th")]
    rows = [[cell.text or "" for cell in row.iter("td")] for row in table.iter("tr")]
    return [dict(zip(header, row, strict=True)) for row in rows if row]


def test_the_page_holds_the_numbers_and_all_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = grid(tmp_path / "<runs>")
    assert main(["report", str(root), "--title", "N & <M>"]) == 0
    out = root / "report"
    assert capsys.readouterr().out.splitlines() == [
        "Rule 110, 4 runs",
        "N=1: 60.0 % (50.0 to 70.0 %), 2 seeds",
        "N=2: 85.0 % (80.0 to 90.0 %), 2 seeds",
        "N=2 is 25.0 points ahead of N=1 at equal steps",
        str(out / "index.html"),
    ]
    page = read_page(out / "index.html")
    assert page.findtext("head/title") == "N & <M>"
    ends = {row["runs"]: row for row in cells(page, "Last values")}
    assert ends["N=1"]["Held-out accuracy"] == "60.0 % (50.0 to 70.0 %)" and ends["N=1"]["step"] == "10"
    assert ends["N=2"]["Held-out accuracy, kept awake (N=1)"] == "25.0 % (25.0 to 25.0 %)"
    assert ends["guessing: majority"]["Held-out accuracy"] == "60.0 %"
    every = cells(page, "Every run")
    assert [row["Held-out accuracy"] for row in every] == ["50.0 %", "70.0 %", "80.0 %", "90.0 %"]
    assert [row["train.seed"] for row in every] == ["0", "1", "0", "1"]
    assert {(row["steps"], row["tokens"], row["state"], row["code"]) for row in every} == {
        ("10", "1,680", "finished", "v1")
    }
    assert {row["wall time"] for row in every} == {"0 min 10 s"}
    pictures = [(link.get("href"), link.get("data-sha256")) for link in page.iter("a") if link.get("data-sha256")]
    files = sorted(out.glob("*.png"))
    assert sorted(pictures) == [(path.name, digest(path.read_bytes())) for path in files] and len(files) == 5
    commands = (page.findtext("body/pre") or "").splitlines()
    assert len(commands) == 4 and "experiment=rule110 run.name=n2-1" in commands[3] and "train.seed=1" in commands[3]


def test_runs_that_cannot_be_read_are_listed_at_the_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good", [], [step(1)])
    (make_run(tmp_path / "bad", [], [step(1)]) / "config.yaml").unlink()
    assert main(["report", str(tmp_path)]) == 0
    reason = f"{tmp_path / 'bad'} is the folder of a run that has no config.yaml; bring it back, or name the other runs"
    assert f"NOT READABLE and left out: {reason}" in capsys.readouterr().out.splitlines()
    assert entries(read_page(tmp_path / "report" / "index.html")) == [reason]


@pytest.mark.slow
def test_tasks_have_sections_of_their_own_and_nothing_is_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "a", [], [step(1), accuracy(1, 0.5)])
    make_run(tmp_path / "b", ["experiment=depo_small"], [step(3)], "failed", reason="<lost> a disk")
    missing = ["experiment=gsm_small", "data.gsm_infinite.tokenizer=absent"]
    make_run(tmp_path / "c", missing, [step(1), evaluation(1, {"1": [None, 2.0]}, accuracy={"1": 0.5})])
    make_run(tmp_path / "d", ["experiment=stdlib", "sleep.curriculum=[]"], [])
    monkeypatch.chdir(tmp_path)
    assert main(["report", "a", "b", "c", "d"]) == 0
    page = read_page(Path("report/index.html"))
    assert [part.text for part in page.iter("h2")] == ["Rule 110", "Depo", "GSM-Infinite", "Text"]
    listed = entries(page)
    assert len(listed) == 1 and "b: FAILED at step 3" in listed[0] and "<lost> a disk" in listed[0]
    text = "".join(page.itertext())
    assert "no evaluation yet" in text and "FLOPs not known" in text and "absent" in text
    assert "b: FAILED at step 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["empty"], ["empty holds no run"]),
        (["absent"], ["absent is no folder"]),
        (["r", "--out", "r/metrics.jsonl"], ["is a file", "--out"]),
        (["r", "--out", "r"], ["r holds", "--out"]),
        (["r", "--out", "o" * 300], ["cannot be read or written: File name too long", "--out"]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    make_run(Path("r"), [], [step(1)])
    before = sorted(tmp_path.rglob("*"))
    assert main(["report", *arguments]) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.count("\n") == 1 and all(word in output.err for word in words), output.err
    assert sorted(tmp_path.rglob("*")) == before


def test_help_needs_neither_torch_nor_matplotlib() -> None:
    code = (
        "import sys; from sleeptrain.cli import main; main(['report', '--help']); "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0 and "--out FOLDER" in done.stdout


def test_recorded_flops_are_reported_without_torch(tmp_path: Path) -> None:
    """Loading torch takes a third of the time of a short report."""
    records = [attempt(1, 0, 100.0), step(1, flops=5), accuracy(1, 0.5) | {"flops": 5}]
    folder = make_run(tmp_path / "r", [], records)
    code = f"import sys; from sleeptrain.cli import main; assert main(['report', {str(folder)!r}]) == 0; "
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert done.returncode == 0 and "FLOPs not known" not in done.stdout, done.stderr


@pytest.mark.slow
def test_a_sweep_prints_the_command_that_reports_on_it(tmp_path: Path) -> None:
    """A user starts two processes: the sweep, then the command that it has printed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sleeptrain", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    sweep = run("train", "-m", "experiment=rule110", "sleep.passes=1,2", "data.rule110.steps=1,2", *TINY)
    assert sweep.returncode == 0, sweep.stderr
    line = sweep.stderr.strip().splitlines()[-1]
    assert line == "all in one page: sleeptrain report runs/multirun/rule110"
    done = run(*shlex.split(line.partition("sleeptrain ")[2]))
    assert done.returncode == 0, done.stderr
    page = read_page(tmp_path / "runs/multirun/rule110/report/index.html")
    ends = {row["runs"]: row for row in cells(page, "Last values")}
    for n in "12":
        for t in "12":
            [folder] = (tmp_path / "runs/multirun/rule110").glob(f"*steps={t},sleep.passes={n}")
            last = read_metrics(folder / "metrics.jsonl")[-1]["eval"]
            row = ends[f"N={n}, t={t}"]
            assert row["Held-out accuracy"] == f"{100 * last['accuracy'][n]:.1f} %"
            majority = f"{100 * last['guessing']['majority']:.1f} %"
            assert ends[f"guessing: majority, t={t}"]["Held-out accuracy"] == majority
    every = cells(page, "Every run")
    assert {row["state"] for row in every} == {"finished"} and len(every) == 4
    assert {row["training FLOPs"] for row in every if row["N"] == "1"} < {row["training FLOPs"] for row in every}


def test_hostile_names_harm_neither_a_terminal_nor_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    records = [attempt(1, 0, 100.0, SURROGATE), step(1), accuracy(1, 0.5, **{SURROGATE: 0.5})]
    records.append(evaluation(2, {"1": [1.0]}, sets={SURROGATE: {"loss": {"1": [1.0]}}}, accuracy={"1": 0.5}))
    records[-1]["eval"]["metrics"] = {"1": {SURROGATE: 0.5, "bits": 0.4}}
    root = tmp_path / IN_FILE_NAMES
    path = HOSTILE.replace("\0", "")  # no path can hold a null character
    for number in range(2):
        changed = ["train.seed=1", f"sleep.passes={number + 1}"]
        folder = make_run(root / str(number), changed, records, "failed", reason=SURROGATE)
        settings = yaml.safe_load((folder / "config.yaml").read_text())
        settings["run"] |= {"init_from": f"{number}{path}", "name": f"rule110/{path}"}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        folder.rename(root / f"{number}{IN_FILE_NAMES}")
    (make_run(root / "bad", [], [step(1)]) / "metrics.jsonl").write_text("{}\n{}\n")
    (root / "bad").rename(root / f"bad{IN_FILE_NAMES}")
    assert main(["report", str(root), "--out", str(tmp_path / "out"), "--title", SURROGATE]) == 0
    out, err = capfd.readouterr()
    assert is_harmless(out) and is_harmless(err) and "\\x1b]0;owned\\x07" in out
    page = read_page(tmp_path / "out" / "index.html")
    assert "".join(page.itertext()).count("\\x1b]0;owned\\x07") > 5
    assert is_harmless("".join(page.itertext()))
