"""The held-out contents: an eighth of all, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest

from sleeptrain.data.tasks.split import SHARE, are_held_out, is_held_out


def test_the_split_is_the_same_for_ever() -> None:
    """After a change, a run that goes on would train on rows that were held out before."""
    assert [i for i in range(40) if is_held_out(str(i).encode())] == [17, 18, 19, 25, 29, 30, 39]
    assert are_held_out(np.arange(40, dtype=np.uint64)[:, None]).nonzero()[0].tolist() == [6, 29, 33, 38]


def test_an_eighth_is_held_out() -> None:
    words_BW = np.arange(80_000, dtype=np.uint64).reshape(-1, 2)
    assert are_held_out(words_BW).mean() == pytest.approx(1 / SHARE, abs=0.005)
    assert (are_held_out(words_BW) != are_held_out(words_BW[:, ::-1])).any(), "the order of the words counts"
    assert np.mean([is_held_out(str(i).encode()) for i in range(20_000)]) == pytest.approx(1 / SHARE, abs=0.01)
