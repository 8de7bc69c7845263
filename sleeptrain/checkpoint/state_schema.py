"""The schema of a checkpoint's `state.json`: required fields and their kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sleeptrain.kinds import (
    Check,
    dict_of,
    exactly,
    is_bool,
    is_count,
    is_flops,
    is_number,
    is_positive,
    is_text,
    list_of,
    or_none,
)

# Fields of every checkpoint, also of an import.
ALWAYS = ("step", "tokens", "shape")
# Further fields that a run needs to resume.
OF_A_RUN = ("samples", "skipped", "spikes", "rollbacks", "data", "wandb_id", "owes_evaluation")
SHOWN = 60


def fault(state: Mapping[str, Any], required: Sequence[str]) -> str | None:
    """The first fault in the content of a `state.json`, in words; None if it has none.

    required: the names of required fields besides `ALWAYS`.
    """
    for name in (*ALWAYS, *required):
        if name not in state:
            return f"it has no {name}"
    for name, check in _CHECKS.items():
        if name in state and not check(state[name]):
            text = repr(state[name])
            return f"its {name} is {text if len(text) <= SHOWN else text[:SHOWN] + '…'}"
    return None


def _is_data(value: Any) -> bool:
    """Checks position and cuts. The reader of the data compares the other fields, which say what the position is in."""
    if not isinstance(value, dict):
        return False
    return is_count(value.get("position", 0)) and list_of(_is_cut)(value.get("cuts", []))


def _is_cut(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and is_positive(value[0]) and is_count(value[1])


_CHECKS: dict[str, Check] = {
    **dict.fromkeys(("step", "tokens", "samples", "skipped"), is_count),
    "flops": or_none(is_flops),
    "shape": or_none(exactly(dict.fromkeys(("passes", "window", "batch"), is_positive))),
    "spikes": exactly(dict.fromkeys(("stage", "losses", "norms"), list_of(is_number))),
    "rollbacks": exactly(dict.fromkeys(("total", "undone", "base", "furthest", "in_vain"), is_count)),
    "data": _is_data,
    **dict.fromkeys(("tokenizer", "wandb_id"), or_none(is_text)),
    "owes_evaluation": is_bool,
    "versions": dict_of(is_text),
}
