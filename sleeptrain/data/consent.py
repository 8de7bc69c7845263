"""Consent to the data locations of an untrusted run: without the caller's consent only local files are read."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import replace

from sleeptrain.config.environment import has_variables
from sleeptrain.config.overrides import shell_command
from sleeptrain.config.schema import DataConfig
from sleeptrain.data.pipes import PIPE
from sleeptrain.errors import ConfigError
from sleeptrain.terminal import shown

FLAG = "--allow-source"


def add_consent(parser: ArgumentParser) -> None:
    """Add the flag by which a caller names the sources that may be used."""
    parser.add_argument(
        FLAG,
        action="append",
        default=[],
        metavar="LOCATION",
        help="a command or URL of the run's data.shards.sources that may be used, as the refusal shows it; or the "
        "beginning of URLs, up to a /",
    )


def with_consent(data: DataConfig, allowed: Sequence[str], origin: str) -> DataConfig:
    """The data settings, with the caller's cache for remote shards. Needs consent to each location that is not local.

    allowed: the locations that the caller allows. origin: where the settings come from, for the message. Raises
    ConfigError, with the flag to add for each refused location.
    """
    if data.source != "shards":
        return data
    locations = [place for source in data.shards.sources for place in (source.train, source.validation) if place]
    require_consent(locations, allowed, origin)
    return replace(data, shards=replace(data.shards, cache=""))


def require_consent(locations: Sequence[str], allowed: Sequence[str], origin: str) -> None:
    """Raises ConfigError unless each location is local or allowed. The arguments are those of `with_consent`."""
    refused = [place for place in locations if needs_consent(place) and not _is_allowed(place, allowed)]
    if refused:
        ways_out = [shell_command(FLAG, _as_shown(place)) for place in dict.fromkeys(refused)]
        raise ConfigError(
            f"the settings of {origin}, which may come from somebody else, run commands, ask other machines or read "
            "environment variables; check each location, and add the flag for those that you allow:",
            ways_out,
        )


def needs_consent(location: str) -> bool:
    """True if reading the location runs a command, asks another machine or reads an environment variable."""
    return location.startswith(PIPE) or "://" in location or has_variables(location)


def _as_shown(location: str) -> str:
    return shown(location, keep="")


def _is_allowed(location: str, allowed: Sequence[str]) -> bool:
    if location in allowed or _as_shown(location) in allowed:
        return True
    # The location decides where a variable's value is sent, so a prefix is not enough: it must be allowed in full.
    if has_variables(location) or ".." in location or "::" in location:
        return False
    return any("://" in start and start.endswith("/") and location.startswith(start) for start in allowed)
