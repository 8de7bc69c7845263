"""Run a benchmark: python tools/bench.py NAME [--json] [--quick].

With --json the last line of the output is a JSON object {"bench", "rows", "versions", "machine", "method"}; a row is
{"name", "value", "unit", "goal", "better", "ok"}. The exit code is 0 if the benchmark ran, even if it missed a goal.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import NAMES, Row, load

from sleeptrain.terminal import say, say_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--quick", action="store_true", help="fewer repeats: a rougher number sooner")
    options = parser.parse_args()
    _quiet_packages()
    benchmark = load(options.name)
    report = describe(options.name, benchmark.run(options.quick), benchmark.METHOD)
    if options.json:
        say_json(json.dumps(report))
    else:
        say(table(report), flush=True)


def _quiet_packages() -> None:
    """Silence megatron-core, which warns each process about optional packages that are not installed."""
    notice = "Transformer Engine and Apex are not installed"
    warnings.filterwarnings("ignore", notice)
    os.environ["PYTHONWARNINGS"] = f"ignore:{notice}"  # for the processes that a benchmark starts


def describe(name: str, rows: list[Row], method: str) -> dict[str, Any]:
    return {
        "bench": name,
        "rows": [asdict(row) | {"ok": row.ok} for row in rows],
        "versions": {"python": platform.python_version()}
        | {package: _version(package) for package in ("sleeptrain", "torch", "transformers")},
        "machine": {"processor": processor(), "cores": os.cpu_count(), "system": platform.platform()},
        "method": method,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's model name on Linux; elsewhere what `platform` knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def table(report: dict[str, Any]) -> str:
    rows = report["rows"]
    width = max(len(row["name"]) for row in rows)
    lines = [f"{report['bench']}: {report['method']}", f"{report['machine']['processor']}, {report['versions']}"]
    for row in rows:
        sign = ">=" if row["better"] == "higher" else "<="
        goal = "" if row["goal"] is None else f"   goal {sign} {row['goal']:g} {'met' if row['ok'] else 'MISSED'}"
        lines.append(f"{row['name']:<{width}}  {row['value']:10.2f} {row['unit']:<3}{goal}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
