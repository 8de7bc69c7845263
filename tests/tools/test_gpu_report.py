"""The report that a GPU makes: parts that fail or take too long, the fields, the page, and the whole of it on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gpu_parts import PARTS, MissingError, Options, Part, attention, child, page, rounds, schedule, speed, suites
from gpu_parts.trained import random_rows, step_config
from torch.autograd import DeviceType

from sleeptrain.distributed.gpus import GPUS
from sleeptrain.plan.roofline.kinds import Kind
from sleeptrain.sleep.curriculum import StepShape

TOOL = Path(__file__).resolve().parents[2] / "tools" / "gpu_report.py"
STATUSES = {"ok", "failed", "cut", "missing", "not run"}
SAYS = (
    "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'status': %r, 'reason': '', 'result': {'x': 1}})); %s"
)


def outcomes(tmp_path: Path, codes: list[tuple[str, float]], seconds: float = 60.0) -> list[dict[str, Any]]:
    """The outcomes of parts with these programs (with the file as argument) and seconds."""
    parts = [Part(f"part {i}", "", budget) for i, (_, budget) in enumerate(codes)]

    def command(part: Part, budget: float, file: Path) -> list[str]:
        return [sys.executable, "-c", codes[parts.index(part)][0], str(file)]

    return schedule.run_parts(parts, command, tmp_path, seconds, lambda line: None)


def test_a_part_that_fails_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    codes = [
        (SAYS % ("ok", ""), 20.0),
        (SAYS % ("running", "print('out of luck'); sys.exit(3)"), 20.0),
        ("raise SystemExit('no import')", 20.0),
        (SAYS % ("failed", ""), 20.0),
    ]
    found = outcomes(tmp_path, codes, 90.0)
    assert [part["status"] for part in found] == ["ok", "failed", "failed", "failed"]
    assert "ended with 3" in found[1]["reason"] and "out of luck" in found[1]["reason"]
    assert found[1]["result"] == {"x": 1}, "what it had noted is kept"
    assert "no import" in found[2]["reason"]


def test_the_budget_cuts_a_part_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that never ends, and one of its own that it leaves: both are killed."""
    monkeypatch.setattr(schedule, "LEAST", 0.5)
    never = "import subprocess, time; subprocess.Popen(['sleep', '1000']); time.sleep(1000)"
    found = outcomes(tmp_path, [(SAYS % ("running", never), 3.0), (SAYS % ("ok", ""), 0.1)], seconds=3.2)
    assert [part["status"] for part in found] == ["cut", "not run"]
    assert "killed after 3 s" in found[0]["reason"] and found[0]["result"] == {"x": 1}
    assert found[1]["reason"] == "the time was up" and found[1]["result"] == {}


def test_parts_get_what_earlier_ones_did_not_use(tmp_path: Path) -> None:
    found = outcomes(tmp_path, [(SAYS % ("ok", ""), 20.0), (SAYS % ("ok", ""), 20.0)], seconds=60.0)
    assert found[0]["budget"] == pytest.approx(40.0, abs=1.0)
    assert 20.0 < found[1]["budget"] <= 60.0


def run_of(tmp_path: Path, run: Any) -> dict[str, Any]:
    child.run_part(SimpleNamespace(run=run), Options("cpu", 9.0), tmp_path / "o.json")  # type: ignore[arg-type]
    outcome: dict[str, Any] = json.loads((tmp_path / "o.json").read_text())
    return outcome


def test_the_outcome_of_a_part_is_kept(tmp_path: Path) -> None:
    def fails(options: Options, note: Any) -> list[str]:
        note({"a": 1})
        assert json.loads((tmp_path / "o.json").read_text())["status"] == "running"
        raise ValueError("bad\nworse")

    def lacks(options: Options, note: Any) -> list[str]:
        raise MissingError("a package")

    found = run_of(tmp_path, fails)
    assert (found["status"], found["reason"], found["result"]) == ("failed", "ValueError: bad", {"a": 1})
    assert run_of(tmp_path, lacks)["status"] == "missing"
    assert run_of(tmp_path, lambda options, note: ["x", "y"])["reason"] == "x; y"
    assert run_of(tmp_path, lambda options, note: [])["status"] == "ok"


def event(
    name: str, us: float = 0.0, parent: Any = None, device: DeviceType = DeviceType.CPU, kernels: Any = ()
) -> Any:
    span = SimpleNamespace(start=us, end=us + 10.0)
    return SimpleNamespace(
        name=name, cpu_parent=parent, device_type=device, kernels=kernels, time_range=span, self_cpu_time_total=us
    )


def test_the_time_of_kernels_by_kind_with_idle_time_and_waits() -> None:
    gemm, scan = SimpleNamespace(name="nvjet", duration=7.0), SimpleNamespace(name="chunk_h", duration=5.0)
    rule = event("sleeptrain::gated_delta_rule")
    events = [
        event("aten::mm", kernels=[gemm]),
        event("aten::cumsum", parent=rule, kernels=[scan]),
        event("cudaLaunchKernel"),
        event("cudaStreamSynchronize"),
        event("nvjet", 0.0, device=DeviceType.CUDA),
        event("chunk_h", 5.0, device=DeviceType.CUDA),
        event("chunk_h", 40.0, device=DeviceType.CUDA),
    ]
    found = rounds.summary(events, on_device=True)
    assert found["kinds"] == pytest.approx({"matrix products": 7e-6, "recurrence": 5e-6})
    assert (found["seconds"], found["busy"]) == pytest.approx((50e-6, 25e-6))
    assert (found["launches"], found["waits"]) == (1, {"cudaStreamSynchronize": 1})


def test_what_was_counted_stands_beside_what_was_measured() -> None:
    rows = rounds.beside({"a": 0.001, "c": 0.003}, {"a": 0.002, "b": 0.004})
    assert rows == [["a", "1.00", "2.00", "2.00"], ["b", "", "4.00", ""], ["c", "3.00", "", ""]]


def test_the_count_has_the_kinds_of_a_profile() -> None:
    config = step_config("hybrid_2b", small=True)
    batch, shape = random_rows(config.model, 2, 16), StepShape(2, 16, 2)
    found = rounds.counted(config, batch, shape, GPUS["H200"])
    assert set(rounds.COUNTED) == set(Kind)
    assert set(found) == set(rounds.COUNTED.values()) <= {name for name, _ in rounds.KINDS}
    assert all(seconds > 0 for seconds in found.values())


@pytest.mark.parametrize(
    ("operators", "wrong"),
    [
        (["aten::_scaled_dot_product_flash_attention"], ""),
        (["aten::_scaled_dot_product_attention_math", "aten::_scaled_dot_product_flash_attention"], "makes all scores"),
        ([], "no fused operator"),
    ],
)
def test_attention_that_is_not_fused_is_named(operators: list[str], wrong: str) -> None:
    found = attention.verdict(operators)
    assert wrong in found and bool(found) == bool(wrong)


def test_tests_are_counted_from_what_has_ended(tmp_path: Path) -> None:
    """By the plugin, over a file with a test of each outcome; NaN is the largest error."""
    suite = tmp_path / "test_it.py"
    suite.write_text(
        "import pytest\n"
        "def test_a(record_property): record_property('error', ['rule', 'fla', 0.25])\n"
        "def test_b(record_property): record_property('error', ['rule', 'fla', float('nan')])\n"
        "def test_c(): assert False, 'broken'\n"
        "def test_d(): pytest.skip('no device')\n"
        "@pytest.mark.xfail(strict=True)\ndef test_e(): assert False\n"
        "@pytest.fixture\ndef bad(): raise ValueError('set-up')\n"
        "def test_f(bad): pass\n"
    )
    record = tmp_path / "record"
    options = [
        "-p",
        "no:cacheprovider",
        "-p",
        "gpu_parts.recording",
        "--record",
        str(record),
        "-q",
        "--rootdir",
        str(tmp_path),
    ]
    command = [sys.executable, "-m", "pytest", *options, "-c", "/dev/null", str(suite)]
    subprocess.run(command, env=suites._environment(), cwd=tmp_path, capture_output=True, timeout=120, check=False)
    found = suites.summary(record) | {"exit": 1}
    assert found["counts"] == {"passed": 3, "failed": 2, "skipped": 1}
    assert [f["test"].split("::")[1] for f in found["failures"]] == ["test_c", "test_f"]
    assert "broken" in found["failures"][0]["why"] and found["skips"] == {"Skipped: no device": 1}
    assert str(found["errors"]["rule"]["fla"]) == "nan"
    assert suites.problems(found, "cuda") == ["2 tests fail"]
    assert suites.problems(found | {"failures": [], "exit": None}, "cuda") == ["the time was up after 6 tests"]
    assert suites.problems({"failures": [], "exit": 0, "counts": {"skipped": 3}}, "cuda") == ["no test has passed"]
    assert "| rule | nan |" in "\n".join(suites.lines(found))


def test_all_tests_for_a_gpu_are_found() -> None:
    """Those that pytest collects: here by the marks of whole files, there by name."""
    assert suites.marked() == [
        "tests/gpu",
        "tests/ops/test_document_attention.py",
        "tests/optim/test_muon.py",
        "tests/sleep/graphs/test_capture.py",
        "tests/sleep/test_round_layouts.py",
    ]


def test_rows_in_the_order_of_their_worth_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory: the next mode of recomputation. Another error: a row that says so. Then the rows without time."""
    import torch

    calls: list[str] = []
    clock = iter([0.0, 1.0, 2.0, 99.0])

    def measure(trained: Any, sizes: speed.Sizes, device: torch.device, peak: float | None) -> dict[str, Any]:
        calls.append(trained.config.sleep.recompute)
        if len(calls) < 3:
            raise torch.OutOfMemoryError("full")
        if len(calls) == 4:
            raise ZeroDivisionError("a kernel\nand more")
        return {"tokens_per_second": 1.0}

    sleep = SimpleNamespace(recompute="")
    trained = SimpleNamespace(
        config=SimpleNamespace(sleep=sleep), model=torch.nn.Linear(2, 2), optim=SimpleNamespace(zero_grad=lambda: None)
    )
    monkeypatch.setattr(speed, "_measure", measure)
    monkeypatch.setattr(speed, "timed", lambda function, device: (0.0, trained))
    monkeypatch.setattr(speed, "peak_flops", lambda device: None)
    monkeypatch.setattr(speed, "_table", lambda small: [speed.Sizes(16, n, 2, 48) for n in (1, 2, 3)])
    monkeypatch.setattr(speed, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    noted: dict[str, Any] = {}
    problems = speed.run(Options("cpu", 50.0, "m"), noted.update)
    first, second, third = noted["rows"]
    assert first["recompute"] == "block"
    assert calls == ["none", "selective", "block", "block"], "what had too many positions is not tried with more"
    assert second["failed"] == "ZeroDivisionError: a kernel" and problems == ["L=16 N=2: ZeroDivisionError: a kernel"]
    assert third["not_run"] == "the time was up"


def test_a_row_that_takes_too_long_is_stopped() -> None:
    with pytest.raises(speed.TimeLimitError, match="stopped after"), speed.limit(0.05):
        while True:
            pass


def test_each_figure_of_the_paper_has_a_row() -> None:
    assert set(speed.PAPER) == set(speed.ORDER) and len(speed.ORDER) == len(set(speed.ORDER))
    assert all(speed.TOKENS % window == 0 for window, _ in speed.ORDER)


def test_the_parts_fit_in_ten_minutes() -> None:
    assert sum(part.seconds for part in PARTS) <= 600


def whole(folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Run the tool on the CPU: (exit code, report.json, report.md)."""
    command = [sys.executable, str(TOOL), "--device", "cpu", "--out", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert (folder / "report.json").exists(), done.stderr
    return done.returncode, json.loads((folder / "report.json").read_text()), (folder / "report.md").read_text()


def check(report: dict[str, Any], text: str) -> None:
    assert set(report) == {"version", "started", "seconds", "limit", "commit", "device", "small", "parts"}
    for part in report["parts"]:
        assert set(part) == {"name", "status", "reason", "seconds", "budget", "result"}
        assert part["status"] in STATUSES and f"| {part['name']} |" in text
    assert "are not complete" not in text


def test_a_report_of_one_part(tmp_path: Path) -> None:
    code, report, text = whole(tmp_path, "--only", "environment")
    check(report, text)
    assert code == 0 and [part["name"] for part in report["parts"]] == ["environment"]
    assert report["parts"][0]["status"] == "ok" and "| torch |" in text


def test_attention_on_a_cpu() -> None:
    noted: dict[str, Any] = {}
    assert attention.run(Options("cpu", 60.0), noted.update) == []
    assert len(noted["cases"]) == 3 and all(case["operators"] for case in noted["cases"].values())
    assert "a block, packed documents" in "\n".join(attention.lines(noted))


def test_a_part_whose_results_are_not_complete_has_a_page_all_the_same() -> None:
    parts = [
        {"name": "environment", "status": "cut", "reason": "", "seconds": 1.0, "budget": 1.0, "result": {"cores": 2}}
    ]
    fields = {"version": 1, "started": "", "seconds": 1.0, "limit": 1.0, "commit": "", "device": "cpu", "small": True}
    assert "are not complete" in page.to_page({**fields, "parts": parts})


@pytest.mark.slow
def test_all_parts_on_a_cpu(tmp_path: Path) -> None:
    code, report, text = whole(tmp_path)
    check(report, text)
    assert [part["name"] for part in report["parts"]] == [part.name for part in PARTS]
    statuses = {part["name"]: part["status"] for part in report["parts"]}
    peer = statuses.pop("flash-linear-attention's model")
    assert set(statuses.values()) == {"ok"} and peer in ("ok", "missing") and code == 0
    for part in report["parts"]:
        if part["name"].startswith("speed"):
            assert [row["passes"] for row in part["result"]["rows"]] == [1, 2]
            assert all(row["tokens_per_second"] > 0 and row["flops"] > 0 for row in part["result"]["rows"])
    assert "measured / counted" in text and "paper, Ouro" in text
