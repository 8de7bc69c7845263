"""The option `--allow-older` of commands that read the newest checkpoint of a run."""

from __future__ import annotations

from argparse import ArgumentParser


def add_older(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="where the newest checkpoint of the run is damaged, take the newest whole one and say so",
    )
