"""What a GPU says of this package in ten minutes: python tools/gpu_report.py [--out FOLDER] [--minutes M].

It writes FOLDER/report.json and FOLDER/report.md (docs/gpu.md), a log of each part beside them, and needs no network.
Without a CUDA device, or with --device cpu, all parts run with small sizes on the CPU. The exit code is 0 if all parts
are ok, or miss only packages that are not ours, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_parts import PARTS, Options, Part, load
from gpu_parts.schedule import run_parts

from sleeptrain.files import write_whole
from sleeptrain.terminal import say

ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    if options.part is not None:
        return _child(options)
    start, clock = time.strftime("%Y-%m-%d %H:%M:%S %z"), time.monotonic()
    device = options.device or ("cuda" if _has_cuda() else "cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    parts = [part for part in PARTS if not options.only or part.name in options.only]

    def command(part: Part, seconds: float, file: Path) -> list[str]:
        flags = ["--part", part.name, "--device", device, "--seconds", str(seconds), "--out", str(file)]
        return [sys.executable, str(Path(__file__).resolve()), *flags]

    seconds = options.minutes * 60 - (time.monotonic() - clock)
    outcomes = run_parts(parts, command, options.out, seconds, lambda line: say(line, flush=True))
    report = {
        "version": 1,
        "started": start,
        "seconds": round(time.monotonic() - clock, 1),
        "limit": options.minutes * 60,
        "commit": _commit(),
        "device": device,
        "small": device == "cpu",
        "parts": outcomes,
    }
    return _write(report, options.out)


def _write(report: dict[str, Any], folder: Path) -> int:
    from gpu_parts.page import to_page  # imports torch, which need not wait for the parts

    write_whole(folder / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    write_whole(folder / "report.md", to_page(report).encode())
    say(f"{folder / 'report.md'}")
    return int(any(part["status"] not in ("ok", "missing") for part in report["parts"]))


def _child(options: argparse.Namespace) -> int:
    from gpu_parts.child import run_part

    [part] = [part for part in PARTS if part.name == options.part]
    run_part(load(part.module), Options(options.device, options.seconds, part.subject), options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_report", help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=10.0, help="of all parts; default: %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda where there is a CUDA device")
    parser.add_argument("--only", nargs="+", choices=[part.name for part in PARTS], metavar="PART", help="these parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # of the processes that this one starts
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    return parser


def _has_cuda() -> bool:
    """Asked in another process: this one must not hold memory of the GPU."""
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    os.chdir(ROOT)
    sys.exit(main())
