"""`sleeptrain` with a fault, as a script. Spawned workers run the script again as their main module."""

from __future__ import annotations

import sys

import tests.watch.faults  # noqa: F401  # installs the fault of the environment
from sleeptrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
