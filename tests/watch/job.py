"""`sleeptrain` with a fault: run as a script, which workers that are spawned run again as their main module."""

from __future__ import annotations

import sys

import tests.watch.faults  # noqa: F401  # installs what the environment asks for
from sleeptrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
