"""A saved position belongs to the data and the settings that it was saved with."""

from __future__ import annotations

from typing import Any

import pytest

from sleeptrain.data.position import check_position
from sleeptrain.errors import DataError


def test_other_fields_of_a_position_do_not_matter() -> None:
    check_position({"seed": 0, "rows": [1, 2], "step": 7}, {"rows": [1, 2], "seed": 0})


@pytest.mark.parametrize(("state", "shown"), [({"seed": 0, "rows": 3}, "3"), ({"seed": 0}, "None")])
def test_the_first_difference_is_named(state: dict[str, Any], shown: str) -> None:
    with pytest.raises(DataError, match=f"^the saved position in the data has rows={shown}, this run has rows=4: "):
        check_position(state, {"seed": 0, "rows": 4, "more": 1})
