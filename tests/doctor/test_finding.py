"""The result of a check, in words and in values."""

from __future__ import annotations

from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, failed, ok, skipped


def test_a_finding_has_a_state_and_values() -> None:
    assert ok("3 GPUs", devices=3).to_json() == {"state": OK, "found": "3 GPUs", "cure": "", "details": {"devices": 3}}
    assert failed("full", "free space", free=0).to_json() == {
        "state": FAILED,
        "found": "full",
        "cure": "free space",
        "details": {"free": 0},
    }
    assert skipped("no settings").to_json() == {"state": SKIPPED, "found": "no settings", "cure": "", "details": {}}
