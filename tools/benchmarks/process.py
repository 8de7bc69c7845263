"""Measure the cost of a command in a separate process."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Reads the peak from the kernel, since the peak that a parent gets of its child starts from the parent's size.
PROGRAM = """
import importlib, re, sys, time

module, *arguments = sys.argv[1:]
code = importlib.import_module(module).main(arguments)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(f"measured {time.process_time()} {peak}")
sys.exit(code)
"""


def measure(module: str, arguments: Sequence[object]) -> tuple[float, int]:
    """Run `module.main(arguments)`. Returns (CPU time in seconds, start included; peak resident size in bytes).

    Raises CalledProcessError if it fails.
    """
    command = [sys.executable, "-c", PROGRAM, module, *map(str, arguments)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    match = re.search(r"^measured (\S+) (\d+)$", result.stdout, re.M)
    assert match is not None, result.stdout
    return float(match[1]), int(match[2]) * 1024
