"""Before weights begin a new run, the settings are compared that names and shapes do not show."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.compatibility import NOT_COMPARED, check_compatible
from sleeptrain.checkpoint.folder import checkpoints
from sleeptrain.config.ranges import settings
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.model.hybrid import Hybrid
from tests.models import tiny_config
from tests.train.test_trainer import run

ALL = ["attention", "sliding_attention", "gated_deltanet", "jet", "mamba2"]
# Settings for which not every other value is allowed.
OTHERS: dict[str, Any] = {
    "norm": "plain",
    "attention.qk_norm": "none",
    "layers": [*ALL, "attention"],
    "mixer_only": [1],
    "attention.partial_rotary_factor": 0.25,
}


def changed(model: ModelConfig, name: str, value: Any) -> ModelConfig:
    """The model with another value of a setting below `model`."""
    model = deepcopy(model)
    *sections, last = name.split(".")
    section: Any = model
    for part in sections:
        section = getattr(section, part)
    setattr(section, last, value)
    return model


def another(name: str, value: Any) -> Any:
    return OTHERS[name] if name in OTHERS else not value if isinstance(value, bool) else value * 2 + 1


def each_setting() -> Iterator[tuple[str, ModelConfig]]:
    """(name, the model with another value) of every setting of a model with all mixers of this package."""
    model = tiny_config(ALL)
    for name, value in settings(model):
        if name == "mixers":
            continue
        yield name, changed(model, name, another(name, value))


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Hybrid(model).named_parameters()}


def test_every_setting_is_compared_or_shows_in_a_shape() -> None:
    """This holds for settings of later versions, too."""
    model, silent = tiny_config(ALL), set[str]()
    for name, other in each_setting():
        if name in NOT_COMPARED:
            silent |= {name} if shapes(other) == shapes(model) else set()
            continue
        with pytest.raises(ConfigError, match=r"the weights of run\.init_from") as refused:
            check_compatible(model, other)
        [line] = refused.value.details
        assert line.startswith(f"model.{name}: ")
    assert silent == {"init_std"}
    check_compatible(model, deepcopy(model))


def test_an_intended_change_is_allowed_by_name() -> None:
    model = tiny_config(ALL)
    other = changed(changed(model, "attention.rope_theta", 1e6), "norm_eps", 1e-5)
    with pytest.raises(ConfigError, match=r"run\.allow_changes=\[model\.norm_eps,model\.attention\.rope_theta\]"):
        check_compatible(model, other)
    with pytest.raises(ConfigError) as refused:
        check_compatible(model, other, allowed=["model.norm_eps"])
    assert refused.value.details == ("model.attention.rope_theta: 10000.0 -> 1000000.0",)
    check_compatible(model, other, allowed=["model.norm_eps", "model.attention.rope_theta"])
    with pytest.raises(ConfigError) as refused:
        check_compatible(model, changed(model, "norm", "plain"))
    assert "allow_changes" not in str(refused.value), "no way that leads nowhere is shown"


def test_heads_that_share_a_shape_are_compared() -> None:
    model = tiny_config(["attention"])
    model.attention = replace(model.attention, qk_norm="none")
    other = replace(model, attention=replace(model.attention, num_heads=8, num_kv_heads=4, head_dim=4))
    assert shapes(model) == shapes(other)
    with pytest.raises(ConfigError, match="take those that they were trained with"):
        check_compatible(model, other)


def test_only_mixers_that_both_have_are_compared() -> None:
    plain, grown = tiny_config(["attention"] * 2), tiny_config(["attention", "jet", "attention"])
    grown = changed(grown, "jet.num_heads", 2)
    check_compatible(plain, grown, inserted=[1])
    check_compatible(plain, changed(plain, "attention.sliding_window", 9))
    check_compatible(plain, changed(plain, "mixers", {"of_another_package": {"num_heads": 2}}))
    with pytest.raises(ConfigError):
        check_compatible(grown, changed(grown, "jet.num_heads", 4))


def test_sliding_attention_is_not_attention() -> None:
    model = tiny_config(["attention", "attention"])
    sliding = replace(model, layers=["attention", "sliding_attention"])
    assert shapes(model) == shapes(sliding)
    with pytest.raises(ConfigError) as refused:
        check_compatible(model, sliding)
    assert refused.value.details == ("model.layers[1]: attention -> sliding_attention",)
    assert "allow_changes" not in str(refused.value)
    grown = replace(model, layers=["attention", "jet", "sliding_attention"])
    with pytest.raises(ConfigError) as refused:
        check_compatible(model, grown, inserted=[1])
    assert refused.value.details == ("model.layers[2]: attention -> sliding_attention",)
    check_compatible(model, replace(model, layers=["sliding_attention", "attention", "attention"]), inserted=[0])


@pytest.mark.slow
def test_a_run_does_not_begin_with_weights_of_other_settings(tmp_path: Path) -> None:
    run(tmp_path / "old")
    init = f"run.init_from={tmp_path / 'old' / 'r'}"
    for other in ("model.norm=plain", "model.norm_eps=1e-2", "model.embedding_multiplier=7.0"):
        with pytest.raises(ConfigError) as refused:
            run(tmp_path / "new", init, other)
        [line] = refused.value.details
        assert line.startswith(other.partition("=")[0]) and not (tmp_path / "new" / "r").exists()
    longer = ("model.attention.rope_theta=5.0", "run.allow_changes=[model.attention.rope_theta]")
    run(tmp_path / "new", init, *longer)
    assert checkpoints(tmp_path / "new" / "r" / "checkpoints")
