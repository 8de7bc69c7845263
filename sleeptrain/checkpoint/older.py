"""The flag of commands that take the newest checkpoint of a run, and may be told to take one before it."""

from __future__ import annotations

from argparse import ArgumentParser


def add_older(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="where the newest checkpoint of the run is damaged, take the newest whole one and say so",
    )
