"""Sentences say equations, and are read back."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from sleeptrain.data.tasks.gsm_infinite.wording import FARM, HARBOUR, LIBRARY, WORDINGS
from tests.data.tasks.gsm_infinite.made import problems


@pytest.mark.parametrize("wording", [FARM, LIBRARY, HARBOUR])
def test_every_sentence_is_read_back(wording) -> None:
    assert len(set(wording.items)) == len(set(wording.places)) == 24
    for kind in wording.templates:
        equation = wording.example(kind, (3, 5))
        assert wording.read(wording.say(equation)) == equation
    assert wording.read_question(wording.ask((23, 23))) == (23, 23)


def test_all_turns_of_all_wordings_are_used() -> None:
    turns = Counter()
    for problem in problems(60):
        [wording] = [w for w in WORDINGS if w.name == problem.wording]
        for sentence in re.findall(r"[^.]+\.", problem.context):
            turns[problem.wording, wording.read(sentence.strip()).kind] += 1
    assert len(turns) == 18 and min(turns.values()) > 20
