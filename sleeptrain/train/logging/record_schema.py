"""What a record of a run may hold: what is read of it later is there and of its kind."""

from __future__ import annotations

from typing import Any

from sleeptrain.kinds import (
    Check,
    dict_of,
    has,
    is_count,
    is_number,
    is_positive,
    is_text,
    is_time,
    list_of,
    or_none,
)

# Costs are counted step by step, and pass by pass.
MOST_STEPS, MOST_PASSES = 10**7, 10**4


def is_record(value: Any) -> bool:
    """Whether it is one at all: what a run that goes on reads of it."""
    return (
        isinstance(value, dict)
        and is_count(value.get("step"))
        and all(_has_number(value[name]) for name in ("rollback", "attempt") if name in value)
    )


def faults(record: dict[str, Any]) -> list[str]:
    """What a report needs, and the record lacks or has of another kind."""
    found = [] if record["step"] <= MOST_STEPS else [f"step of at most {MOST_STEPS:,}"]
    found += _lacking(record, {"tokens": is_count, "time": is_time})
    if "loss" in record:
        found += _lacking(record, _OF_TRAINING)
    for name, check in _PARTS.items():
        if name in record and not check(record[name]):
            found.append(_WORDS.get(name, name))
    return found


def _lacking(record: dict[str, Any], checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if not check(record.get(name))]


def _is_passes(value: Any) -> bool:
    return is_positive(value) and value <= MOST_PASSES


def _is_evaluation(found: Any) -> bool:
    if not isinstance(found, dict) or not _is_loss(found.get("loss")):
        return False
    return all(check(found[name]) for name, check in _OF_EVALUATION.items() if name in found)


def _is_loss(found: Any) -> bool:
    return _by_passes(_is_windows)(found) and len(found) > 0


def _is_windows(found: Any) -> bool:
    return list_of(or_none(is_number))(found) and len(found) > 0


def _by_passes(check: Check) -> Check:
    """A value for each number of passes, which is written as a text."""

    def is_one(found: Any) -> bool:
        return dict_of(check)(found) and all(n.isascii() and n.isdigit() and _is_passes(int(n[:9])) for n in found)

    return is_one


def _is_metric(found: Any) -> bool:
    return is_number(found) or dict_of(or_none(is_number))(found)


_has_number = has({"number": is_count})
_OF_TRAINING: dict[str, Check] = {"loss": is_number, "passes": _is_passes, "window": is_positive, "batch": is_positive}
_OF_EVALUATION: dict[str, Check] = {
    "accuracy": _by_passes(is_number),
    "metrics": _by_passes(dict_of(or_none(_is_metric))),
    "sets": dict_of(has({"loss": _is_loss})),
    "guessing": dict_of(or_none(_is_metric)),
}
_PARTS: dict[str, Check] = {
    "eval": _is_evaluation,
    "norms": has(dict.fromkeys(("features", "S"), dict_of(or_none(is_number)))),
    "attempt": has({"code": is_text, "number": is_count}),
    **dict.fromkeys(("skipped", "rollbacks"), is_count),
}
_WORDS = {"eval": "eval.loss by passes", "norms": "norms.features and norms.S", "attempt": "attempt.code"}
