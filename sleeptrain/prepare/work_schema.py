"""Checks of the JSON files of a work folder and of a result: each field that is read exists and has the right type."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sleeptrain.data.shard_index import is_shard
from sleeptrain.errors import DataError
from sleeptrain.kinds import Check, exactly, has, is_count, is_number, is_positive, is_text, list_of, or_none
from sleeptrain.prepare.split import SIDES
from sleeptrain.small_files import read_json

SHOWN = 60


def read_checked(path: Path, checks: Mapping[str, Check], way_out: str) -> dict[str, Any]:
    """The object in a JSON file. Fields without a check are ignored.

    Raises DataError, which ends in `way_out`, if a field with a check is missing or fails it.
    """
    content = read_json(path, way_out)
    for name, check in checks.items():
        if name not in content:
            raise DataError(f"{path} is not what it should be: it has no {name}; {way_out}")
        if not check(content[name]):
            text = repr(content[name])
            shown = text if len(text) <= SHOWN else text[:SHOWN] + "…"
            raise DataError(f"{path} is not what it should be: its {name} is {shown}; {way_out}")
    return content


def _is_settings(value: Any) -> bool:
    return isinstance(value, dict)


def _is_input(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and is_text(value[0])


_LEFT_OUT: Mapping[str, Check] = {"empty": is_count, "bad": is_count, "first_bad": or_none(is_text)}
_TALLY = dict.fromkeys(("documents", "tokens", "num_bytes", "longest"), is_count) | {"shards": list_of(is_shard)}
_SUMMARY = dict.fromkeys(("documents", "tokens", "bytes_per_token", "longest"), is_number)

PLAN_CHECKS: Mapping[str, Check] = {
    "settings": _is_settings,
    "inputs": list_of(_is_input),
    "units": lambda value: isinstance(value, list),  # only compared, never read
}
UNIT_CHECKS: Mapping[str, Check] = {
    "sides": exactly(dict.fromkeys(SIDES, exactly(_TALLY))),
    **_LEFT_OUT,
    "max_document_bytes": is_positive,
}
RECORD_CHECKS: Mapping[str, Check] = {
    "settings": _is_settings,
    "report": has({**dict.fromkeys(SIDES, exactly(_SUMMARY)), **_LEFT_OUT, "units": is_count}),
}
