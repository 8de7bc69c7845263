"""Refusals of hydra and omegaconf become one line that names the setting and the way out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hydra.errors import ConfigCompositionException, OverrideParseException
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from sleeptrain.config.compose import compose
from sleeptrain.config.explain import explain
from sleeptrain.errors import ConfigError


def refusal(overrides: Sequence[str]) -> str:
    with pytest.raises(ConfigError) as error:
        compose(overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_settings_of_a_mixer_from_another_package_are_added() -> None:
    error = ConfigKeyError("no such key")
    error.full_key, error.key = "model.mixers.linear.dim", "dim"
    assert str(explain(error)) == (
        "model.mixers.linear.dim: settings of a mixer from another package are added: write "
        "+model.mixers.linear.dim=..."
    )


def test_a_group_without_an_option_is_named() -> None:
    error = ValueError("Config group override must be a string or a list. Got NoneType")
    message = str(explain(error, ["model=null", "sleep.passes=2"]))
    assert message == "model=null: a group takes the name of one of its options, as in model=tiny"


def test_an_override_that_cannot_be_parsed_is_quoted_with_the_reason() -> None:
    error = OverrideParseException("a=[", "Error parsing override 'a=['\nmissing ']'.\nSee https://hydra.cc/x")
    assert str(explain(error)) == "cannot read 'a=[': missing ']'; settings are written as key=value"


def test_the_cause_of_a_composition_error_is_named() -> None:
    error, cause = ConfigCompositionException("Error merging override sleep.passes=many"), OmegaConfBaseException("bad")
    cause.full_key = "sleep.passes"
    error.__cause__ = cause
    assert str(explain(error)) == "sleep.passes: bad"


@pytest.mark.parametrize(("error", "line"), [(ValueError("one\n  two"), "one two"), (ValueError(), "ValueError")])
def test_any_other_error_is_one_line(error: Exception, line: str) -> None:
    assert str(explain(error)) == line


REFUSED = [
    ([], ["run.name", "train.tokens", "experiment="]),
    (["sleep.pases=4"], ["'sleep.pases'", "'sleep.passes'"]),
    (["+sleep.pases=4"], ["'sleep.pases'", "'sleep.passes'"]),
    (["passes=4"], ["'passes'", "'sleep.passes'"]),
    (["train.batch=4"], ["'train.batch'", "'data.batch'"]),
    (["optim.lr=1"], ["'optim.lr'", "'optim.muon_lr' or 'optim.adamw_lr'"]),
    (["modle=tiny"], ["'modle'", "'model'"]),
    (["run.foo=1"], ["'run.foo'", "name, root"]),
    (["foo=1"], ["'foo'", "run, model, sleep"]),
    (["sleep.curriculum=[{tokens:3,pases:2}]"], ["'pases'", "sleep.curriculum", "'passes'"]),
    (["model=tny"], ["model=tny", "'tiny'", "transformer_tiny"]),
    (["experiment=stlib"], ["experiment=stlib", "'stdlib'"]),
    (["model=null"], ["model=null"]),
    (["sleep=4"], ["sleep=4"]),
    (["+experiment=rule110"], ["experiment", "'+'"]),
    (["sleep.passes=many"], ["sleep.passes", "many"]),
    (["train.tokens=1e6"], ["train.tokens", "1000000.0", "1_000_000"]),
    (["train.tokens=null"], ["train.tokens", "null"]),
    (["optim.adamw_betas=[0.9,x]"], ["optim.adamw_betas[1]", "'x'"]),
    (["sleep.passes=1,2"], ["sleep.passes=1,2", "-m"]),
    (["sleep.passes=["], ["sleep.passes=[", "key=value"]),
    (["sleep.passes"], ["'sleep.passes'", "key=value"]),
    (["~sleep.passes"], ["sleep.passes"]),
    (["run.name=${nowhere}"], ["run.name", "nowhere"]),
    (["sleep.passes=0"], ["sleep.passes", "at least 1"]),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED, ids=[" ".join(overrides) for overrides, _ in REFUSED])
def test_refusals_of_overrides(overrides: list[str], words: list[str]) -> None:
    message = refusal([*(["experiment=stdlib"] if overrides else []), *overrides])
    assert [word for word in words if word not in message] == [], message
