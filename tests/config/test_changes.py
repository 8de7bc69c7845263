"""What a run may change when it goes on."""

from __future__ import annotations

import pytest

from sleeptrain.config.changes import check_changes, on_resume
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.errors import ConfigError


def config(*overrides: str) -> Config:
    return compose(["experiment=rule110", *overrides])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("optim.muon_rl", "'optim.muon_rl' is no setting; did you mean 'optim.muon_lr'?"),
        ("muon_lr", "'muon_lr' is no setting; did you mean 'optim.muon_lr'?"),
        ("optim", "'optim' is no setting; it has optim.muon_lr, "),
        ("model.dim", "model.dim cannot change in a run"),
        ("data.seed", "data.seed cannot change in a run"),
    ],
)
def test_a_name_that_cannot_be_allowed_is_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.allow_changes") as refused:
        config(f"run.allow_changes=[{name}]")
    assert words in str(refused.value)


def test_free_changes_need_no_permission() -> None:
    assert check_changes(config(), config("train.log_every=3", "run.root=elsewhere"), "r") == [
        "train.log_every: 20 -> 3"
    ]


@pytest.mark.parametrize("other", ["model.dim=32", "sleep.passes=3", "train.seed=7"])
def test_other_changes_are_refused_one_line_each(other: str) -> None:
    new = config(other, "optim.muon_lr=0.5", "run.allow_changes=[optim.muon_lr]")
    with pytest.raises(ConfigError, match=r"^r holds a run with other settings") as refused:
        check_changes(config(), new, "r")
    [line] = refused.value.details
    name, _, value = other.partition("=")
    assert line.startswith(f"{name}: ") and line.endswith(f" -> {value}")
    assert ("run.allow_changes" in str(refused.value)) == (name != "model.dim"), "no way that leads nowhere is shown"


def test_allowing_one_setting_allows_no_other() -> None:
    new = config("optim.adamw_lr=0.5", "optim.muon_lr=0.5", "run.allow_changes=[optim.muon_lr]")
    with pytest.raises(ConfigError) as refused:
        check_changes(config(), new, "r")
    assert [line.partition(":")[0] for line in refused.value.details] == ["optim.adamw_lr"]


def test_a_setting_says_by_itself_whether_it_may_change() -> None:
    assert (
        on_resume("model.norm") == on_resume("model.jet.norm_eps") == on_resume("data.gsm_infinite.max_ops") == "fixed"
    )
    assert on_resume("model.norm_eps") == on_resume("model.norm_between_passes") == "named"
    assert on_resume("model.layers[1]") == "fixed" and on_resume("checkpoint.keep") == "free"
