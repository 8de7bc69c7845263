"""Missing and impossible fields of `state.json` are named, though its checksum is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.checkpoint.folder import CONFIG, STATE, entries, find_damage, read_state, write_manifest
from sleeptrain.checkpoint.state_schema import OF_A_RUN, fault
from sleeptrain.errors import DataError

WHOLE: dict[str, Any] = {
    "step": 4,
    "tokens": 224,
    "samples": 32,
    "skipped": 0,
    "spikes": {"stage": [0], "losses": [1.5, float("nan")], "norms": [2]},
    "rollbacks": {"total": 0, "undone": 0, "base": 0, "furthest": 0, "in_vain": 0},
    "data": {"position": 32, "cuts": [[1, 0]], "seed": 3},
    "tokenizer": None,
    "wandb_id": None,
    "shape": {"passes": 2, "window": 6, "batch": 8},
    "owes_evaluation": False,
    "versions": {"torch": "2"},
}


def test_states_of_a_run_and_of_an_import_are_complete() -> None:
    assert fault(WHOLE, OF_A_RUN) is None
    assert fault({"step": 0, "tokens": 0, "shape": None}, ()) is None
    assert fault(WHOLE | {"later": "unknown"}, OF_A_RUN) is None
    assert fault(WHOLE | {"flops": 10**24}, OF_A_RUN) is None and fault(WHOLE | {"flops": None}, OF_A_RUN) is None


@pytest.mark.parametrize("name", ["step", "tokens", "shape", *OF_A_RUN])
def test_a_missing_field_is_named(name: str) -> None:
    assert fault({n: value for n, value in WHOLE.items() if n != name}, OF_A_RUN) == f"it has no {name}"


IMPOSSIBLE: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in ("step", "tokens", "samples", "skipped")
        for value in (-1, 1.5, True, "4", 2**63, None)
    ),
    *(("flops", value) for value in (-1, 1.5, "4", 10**40)),
    *(("shape", WHOLE["shape"] | {"window": value}) for value in (0, -1, None, "6")),
    ("shape", {"passes": 2}),
    ("shape", []),
    ("spikes", {"stage": [], "losses": [None], "norms": []}),
    ("spikes", {"stage": 0, "losses": [], "norms": []}),
    ("spikes", {"losses": [], "norms": []}),
    ("rollbacks", WHOLE["rollbacks"] | {"more": 1}),
    ("rollbacks", WHOLE["rollbacks"] | {"base": -1}),
    ("data", None),
    ("data", {"position": "4"}),
    ("data", {"cuts": [[0, 1]]}),
    ("data", {"cuts": [3]}),
    ("tokenizer", 3),
    ("wandb_id", []),
    ("owes_evaluation", 0),
    ("versions", {"torch": 2}),
]


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE, ids=[f"{n}-{v!r}"[:40] for n, v in IMPOSSIBLE])
def test_an_impossible_field_is_named(name: str, value: Any) -> None:
    found = fault(WHOLE | {name: value}, OF_A_RUN)
    assert found is not None and found.startswith(f"its {name} is ")


def test_long_values_are_shown_in_part() -> None:
    assert len(fault(WHOLE | {"step": "x" * 10_000}, OF_A_RUN) or "") < 100


def test_an_impossible_state_with_a_right_checksum_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("")
    (tmp_path / STATE).write_text(json.dumps(WHOLE | {"tokens": -1}))
    write_manifest(tmp_path, entries([tmp_path / CONFIG, tmp_path / STATE]))
    assert find_damage(tmp_path) is None
    with pytest.raises(DataError, match=r"state\.json does not fit this version .*: its tokens is -1; use another"):
        read_state(tmp_path, OF_A_RUN)
