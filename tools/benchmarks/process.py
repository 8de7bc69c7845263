"""What a command costs in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The kernel's own record of the peak, since the one that the parent gets starts from the parent's.
PROGRAM = """
import importlib, re, sys, time

module, *arguments = sys.argv[1:]
code = importlib.import_module(module).main(arguments)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(f"measured {time.process_time()} {peak}")
sys.exit(code)
"""


def measure(module: str, arguments: Sequence[object]) -> tuple[float, int]:
    """(seconds of CPU time, the start included, and the greatest resident size in bytes) of `module.main(arguments)`.

    Raises CalledProcessError where it fails.
    """
    command = [sys.executable, "-c", PROGRAM, module, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found = re.search(r"^measured (\S+) (\d+)$", done.stdout, re.M)
    assert found is not None, done.stdout
    return float(found[1]), int(found[2]) * 1024
