"""The tests that need a GPU: the kernels against fp64, and all others that are marked `gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from gpu_parts import Note, Options
from gpu_parts.page import table

ROOT = Path(__file__).resolve().parents[2]
KERNELS, ANY_DEVICE = "tests/kernels", "tests/gpu"
MOST_WORKERS = 8  # kernels are compiled on the CPU, one at a time in each process
MOST_FAILURES = 20  # that the page names


def run(options: Options, note: Note) -> list[str]:
    """Run a suite in a process. What has ended when its time is up is counted."""
    paths = [KERNELS] if options.subject == "kernels" else marked()
    record = ROOT / "runs" / f".gpu_report-{os.getpid()}.jsonl"
    record.parent.mkdir(exist_ok=True)
    end = time.monotonic() + options.seconds - 10
    process = subprocess.Popen(_command(paths, record), cwd=ROOT, env=_environment())
    try:
        while process.poll() is None and time.monotonic() < end:
            time.sleep(1.0)
            note(summary(record))
        ended = process.poll()
        if ended is None:
            process.kill()
            process.wait()
        found = summary(record) | {"files": len(paths), "exit": ended}
        note(found)
        return problems(found, options.device)
    finally:
        record.unlink(missing_ok=True)


def marked() -> list[str]:
    """The folder of tests that run on any device, and the other files with tests that are marked `gpu`: not all files
    need be imported. The kernels' are a suite of their own."""
    paths = sorted((ROOT / "tests").rglob("test_*.py"))
    names = [path.relative_to(ROOT).as_posix() for path in paths if "@pytest.mark.gpu" in path.read_text()]
    return [ANY_DEVICE, *(name for name in names if not name.startswith((KERNELS, ANY_DEVICE)))]


def _command(paths: list[str], record: Path) -> list[str]:
    workers = max(min(os.cpu_count() or 1, MOST_WORKERS), 1)
    options = ["-p", "no:cacheprovider", "-p", "gpu_parts.recording", "--record", str(record), "-q", "-m", "gpu"]
    return [sys.executable, "-m", "pytest", *options, "-n", str(workers), *paths]


def _environment() -> dict[str, str]:
    folders = [str(ROOT), str(ROOT / "tools"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}


def summary(record: Path) -> dict[str, Any]:
    """Counts, failures, reasons of skips, and the largest error of each kernel on each back end."""
    tests = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    errors: dict[str, dict[str, float]] = {}
    for test in tests:
        for kernel, backend, value in test.get("errors", []):
            of_kernel = errors.setdefault(kernel, {})
            of_kernel[backend] = _larger(of_kernel.get(backend, 0.0), value)
    return {
        "counts": dict(Counter(test["outcome"] for test in tests)),
        "failures": [{"test": test["test"], "why": test["why"]} for test in tests if test["outcome"] == "failed"],
        "skips": dict(Counter(test["why"] for test in tests if test["outcome"] == "skipped")),
        "errors": errors,
    }


def _larger(a: float, b: float) -> float:
    """The larger one; NaN if one is."""
    return b if b > a or b != b else a


def problems(found: dict[str, Any], device: str) -> list[str]:
    wrong = [f"{failed} tests fail"] if (failed := len(found["failures"])) else []
    if found["exit"] is None:
        wrong.append(f"the time was up after {sum(found['counts'].values())} tests")
    elif found["exit"] not in (0, 1):
        wrong.append(f"pytest ended with {found['exit']}")
    if device == "cuda" and not found["counts"].get("passed"):
        wrong.append("no test has passed")
    return wrong


def lines(result: dict[str, Any]) -> list[str]:
    counts = result["counts"]
    text = [", ".join(f"{number} {outcome}" for outcome, number in sorted(counts.items())) or "no test has ended"]
    if result["errors"]:
        backends = sorted({name for of_kernel in result["errors"].values() for name in of_kernel})
        rows = [
            [kernel, *(f"{of_kernel[name]:.1e}" if name in of_kernel else "" for name in backends)]
            for kernel, of_kernel in sorted(result["errors"].items())
        ]
        text += [
            "",
            "The largest errors against fp64, outputs and gradients, those of states too, each relative to the ",
        ]
        text[-1] += "largest element of its tensor:"
        text += ["", *table(["kernel", *backends], rows)]
    if failures := result["failures"]:
        text += ["", *table(["failed", "why"], [[f["test"], f["why"]] for f in failures[:MOST_FAILURES]])]
    if skips := result["skips"]:
        text += ["", *table(["skipped", "why"], [[str(number), why] for why, number in skips.items()])]
    return text
