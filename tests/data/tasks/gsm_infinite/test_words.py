"""The vocabulary of generated problems."""

from __future__ import annotations

import pytest

from sleeptrain.errors import DataError
from tests.data.tasks.gsm_infinite.made import TOKENIZER, problems


def test_words_are_a_vocabulary_of_their_own() -> None:
    text = problems(1)[0].prompt
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text and min(ids) > 0 and max(ids) < TOKENIZER.vocab_size < 256
    assert TOKENIZER.encode(" 907") == [*TOKENIZER.encode("9"), *TOKENIZER.encode("0"), *TOKENIZER.encode("7")]
    assert TOKENIZER.eos_id not in ids
    with pytest.raises(DataError, match=r"'lions'.*data\.gsm_infinite\.tokenizer"):
        TOKENIZER.encode("the number of lions")
