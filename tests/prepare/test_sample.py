from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sleeptrain.prepare.inputs import named_inputs
from sleeptrain.prepare.sample import sample
from sleeptrain.prepare.split import side
from sleeptrain.prepare.units import Unit, plan_units
from tests.data.texts import make_texts

TEXTS = [*make_texts(300), "  \n"]
GOOD = TEXTS[:-1]


def units(path: Path, unit_bytes: int = 2000) -> list[Unit]:
    return plan_units(named_inputs([str(path)]), "text", unit_bytes)


def test_all_of_a_small_training_side_and_nothing_else(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(TEXTS)
    train = [text for text in GOOD if side(text, 0.3) == "train"]
    assert list(sample(units(path), "text", 0.3)) == train
    held_out = list(sample(units(path), "text", 0.3, wanted="validation"))
    assert sorted(held_out + train) == sorted(GOOD)


def test_a_large_corpus_gives_a_share_from_everywhere(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(TEXTS)
    assert len(units(path)) > 50
    taken = list(sample(units(path), "text", 1e-9, characters=20_000))
    assert 19_000 < sum(map(len, taken)) <= 20_000
    places = [next(i for i, text in enumerate(TEXTS) if text.startswith(part)) for part in taken]
    assert min(places) < 20 and max(places) > 280 and len({place // 30 for place in places}) == 10


def test_never_more_units_than_it_may_open(write_jsonl: Callable[..., Path], monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr("sleeptrain.prepare.sample.SAMPLE_UNITS", 4)
    chosen = units(write_jsonl(TEXTS))
    opened: list[int] = []
    for unit in chosen:
        monkeypatch.setitem(unit.__dict__, "slices", Watched(unit.slices, unit.number, opened))
    list(sample(chosen, "text", 0.3))
    assert len(opened) in (3, 4) and max(opened) > len(chosen) / 2


class Watched(tuple):
    """The slices of a unit; it records that they are read."""

    def __new__(cls, slices: tuple, number: int, opened: list[int]) -> Watched:
        watched = super().__new__(cls, slices)
        watched.note = lambda: opened.append(number)  # type: ignore[attr-defined]
        return watched

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.note()  # type: ignore[attr-defined]
        return super().__iter__()


def test_with_max_documents_only_the_first_are_looked_at(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(["", "bad", *GOOD])
    expected = [text for text in ["bad", *GOOD][:40] if side(text, 0.3) == "train"]
    assert list(sample(units(path), "text", 0.3, max_documents=40)) == expected


def test_no_more_characters_than_the_limit(write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(["a" * 1000, "b" * 1000])
    assert [len(text) for text in sample(units(path, 10**6), "text", 1e-9, characters=1500)] == [1000, 500]
