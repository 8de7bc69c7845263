from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.kernels.tuning import run_one


class OutOfResources(Exception):
    pass


def launch(fits: set[int], last: bool) -> tuple[int, list[int]]:
    """(the configuration that ran, those that were tried) of 0, 1 and 2; the tuner keeps its list."""
    tried = []

    def run(self: SimpleNamespace) -> int:
        [configuration] = self.configs
        tried.append(configuration)
        if configuration not in fits:
            raise OutOfResources
        return configuration

    tuner = SimpleNamespace(configs=[0, 1, 2])
    try:
        return run_one(run, last)(tuner), tried
    finally:
        assert tuner.configs == [0, 1, 2]


def test_the_first_or_last_configuration_that_fits_runs() -> None:
    assert launch({0, 1, 2}, last=False) == (0, [0])
    assert launch({0, 1, 2}, last=True) == (2, [2])
    assert launch({0}, last=True) == (0, [2, 1, 0])


def test_where_none_fits_it_says_so() -> None:
    with pytest.raises(OutOfResources):
        launch(set(), last=False)
