"""The flag `--allow-older`."""

from __future__ import annotations

from argparse import ArgumentParser

from sleeptrain.checkpoint.older import add_older


def test_the_flag_allows_an_older_checkpoint() -> None:
    parser = ArgumentParser()
    add_older(parser)
    assert not parser.parse_args([]).allow_older and parser.parse_args(["--allow-older"]).allow_older
    assert "take the newest whole one and say so" in " ".join(parser.format_help().split())
