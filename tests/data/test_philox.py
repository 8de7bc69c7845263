"""Random numbers that are functions of a seed, a stream and a counter."""

from __future__ import annotations

from sleeptrain.data.philox import WORDS_PER_COUNT, named_stream, random_order, random_words


def test_the_counter_counts_groups_of_words() -> None:
    words = random_words(3 * WORDS_PER_COUNT, 5, 6)
    assert random_words(WORDS_PER_COUNT, 5, 6, counter=2).tolist() == words[2 * WORDS_PER_COUNT :].tolist()
    assert not set(words.tolist()) & set(random_words(12, 6, 5).tolist())


def test_random_numbers_are_the_same_for_ever() -> None:
    """A change here would send every resumed run to other data."""
    assert random_order(8, seed=0, stream=0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert random_order(8, seed=1, stream=2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert sorted(random_order(100, seed=-1, stream=0).tolist()) == list(range(100))
    assert random_words(2, 0, 0, counter=1).tolist() == random_words(6, 0, 0).tolist()[4:]
    assert named_stream("shards", "text", 3) == 1991755387551993769
    assert len({named_stream("a", 1), named_stream("a", "1"), named_stream("a1"), named_stream("a", 1, 0)}) == 4
