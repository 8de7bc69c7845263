"""Command-line options that replace the stop rule of a run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from typing import Any

from sleeptrain.config.schema.sleep import STOP_RULES

NAMES = ("stop", "stop_threshold", "stop_gate", "min_passes")


def add_stop_options(root: ArgumentParser) -> None:
    """Add an option for each setting of `sleep` in NAMES."""
    root.add_argument("--stop", choices=("fixed", *STOP_RULES), help="default: sleep.stop of the run")
    root.add_argument("--stop-gate", metavar="FILE", help="default: sleep.stop_gate of the run")
    root.add_argument("--stop-threshold", type=float, metavar="X", help="default: sleep.stop_threshold of the run")
    root.add_argument("--min-passes", type=int, metavar="N", help="default: sleep.min_passes of the run")


def stop_settings(options: Namespace) -> dict[str, Any]:
    """The settings of `sleep` that were given, by name."""
    return {name: value for name in NAMES if (value := getattr(options, name)) is not None}
