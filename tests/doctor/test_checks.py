"""Each check of the list can be loaded, and runs in one of the groups at most."""

from __future__ import annotations

import pytest

from sleeptrain.doctor.checks import CHECKS, MEETING, OF_RANKS, OF_TEXT, ON_DEVICE, Check


@pytest.mark.parametrize("name", CHECKS)
def test_the_function_of_every_check_is_loaded(name: str) -> None:
    assert CHECKS[name].load().__name__ == f"check_{name}"


def test_a_missing_function_cannot_be_loaded() -> None:
    with pytest.raises(AttributeError, match="check_nothing"):
        Check("limits:check_nothing", 60, "").load()


def test_groups_are_of_checks_and_share_none() -> None:
    grouped = ON_DEVICE + OF_TEXT + OF_RANKS
    assert set(grouped) <= set(CHECKS) and len(set(grouped)) == len(grouped)
    assert OF_RANKS[0] == MEETING, "the others of several processes are left out where this one fails"
