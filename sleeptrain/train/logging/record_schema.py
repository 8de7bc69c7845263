"""Checks of a record of a run: the fields that are read later are present and have the right type."""

from __future__ import annotations

from typing import Any

from sleeptrain.kinds import (
    Check,
    dict_of,
    has,
    is_count,
    is_flops,
    is_number,
    is_positive,
    is_text,
    is_time,
    list_of,
    or_none,
)

# Reports count costs step by step and pass by pass; these limits bound the time that takes.
MOST_STEPS, MOST_PASSES = 10**7, 10**4


def is_record(value: Any) -> bool:
    """True if the value is a record: it has the fields that a resumed run reads."""
    return (
        isinstance(value, dict)
        and is_count(value.get("step"))
        and all(_has_number(value[name]) for name in ("rollback", "attempt") if name in value)
    )


def faults(record: dict[str, Any]) -> list[str]:
    """The fields that a report needs and that the record lacks or has with another type."""
    names = [] if record["step"] <= MOST_STEPS else [f"step of at most {MOST_STEPS:,}"]
    names += _failing(record, {"tokens": is_count, "time": is_time})
    if "loss" in record:
        names += _failing(record, _OF_TRAINING)
    for name, check in _PARTS.items():
        if name in record and not check(record[name]):
            names.append(_WORDS.get(name, name))
    return names


def _failing(record: dict[str, Any], checks: dict[str, Check]) -> list[str]:
    return [name for name, check in checks.items() if not check(record.get(name))]


def _is_passes(value: Any) -> bool:
    return is_positive(value) and value <= MOST_PASSES


def _is_evaluation(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_loss(value.get("loss")):
        return False
    return all(check(value[name]) for name, check in _OF_EVALUATION.items() if name in value)


def _is_loss(value: Any) -> bool:
    return _by_passes(_is_windows)(value) and len(value) > 0


def _is_windows(value: Any) -> bool:
    return list_of(or_none(is_number))(value) and len(value) > 0


def _by_passes(check: Check) -> Check:
    """Check a dict with a value for each number of passes, whose keys are these numbers as text."""

    def is_by_passes(value: Any) -> bool:
        return dict_of(check)(value) and all(n.isascii() and n.isdigit() and _is_passes(int(n[:9])) for n in value)

    return is_by_passes


def _is_metric(value: Any) -> bool:
    return is_number(value) or dict_of(or_none(is_number))(value)


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
    "flops": is_flops,
}
_WORDS = {"eval": "eval.loss by passes", "norms": "norms.features and norms.S", "attempt": "attempt.code"}
