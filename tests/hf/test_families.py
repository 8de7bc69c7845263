"""Every family against transformers' own classes: same weights under mapped names, same logits, same gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers

from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import FAMILIES, family_of
from sleeptrain.model.hybrid import Hybrid
from tests.hf.models import MODELS, disturbed, native
from tests.models import VOCABULARY, tiny_config
from tests.sleep.oracle import causal_layout

each_model = pytest.mark.parametrize(("model_type", "config"), MODELS.values(), ids=list(MODELS))


@each_model
def test_same_logits_and_gradients(model_type: str, config: ModelConfig):
    torch.manual_seed(0)
    family, ours = family_of(model_type), disturbed(config)
    theirs = native(family, ours)
    tokens = torch.randint(VOCABULARY, (2, 70))
    x, _ = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(70))
    logits, expected = ours.logits(x), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    gradients = dict(theirs.named_parameters())
    mine = dict(family.to_theirs(config, {n: p.grad for n, p in ours.named_parameters()}.__getitem__))
    assert set(mine) == set(gradients)
    for name, parameter in gradients.items():
        error = (mine[name] - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


@each_model
def test_there_and_back_bit_for_bit(model_type: str, config: ModelConfig):
    family, ours = family_of(model_type), dict(disturbed(config).named_parameters())
    theirs = dict(family.to_theirs(config, ours.__getitem__))
    back = dict(family.to_ours(config, theirs.__getitem__))
    assert list(back) == list(dict.fromkeys(back))
    assert set(back) == set(ours)
    assert all(torch.equal(back[name], ours[name]) for name in ours)


@each_model
def test_settings_there_and_back(model_type: str, config: ModelConfig):
    family = family_of(model_type)
    complete = transformers.AutoConfig.for_model(**family.to_config(config)).to_dict()
    found = family.from_config(complete)
    kinds = {"attention": "attention", "gated_deltanet": "gated_deltanet", "mamba2": "mamba2"}
    unused = {kind: getattr(config, kind) for kind in kinds if kind not in config.layers}
    assert dataclasses.replace(found, **unused) == config


@each_model
def test_shapes_are_those_of_their_class(model_type: str, config: ModelConfig):
    family = family_of(model_type)
    theirs = {name: tuple(p.shape) for name, p in native(family, Hybrid(config)).named_parameters()}
    assert family.their_shapes(config) == theirs


def test_what_a_family_lacks_is_refused():
    with pytest.raises(ConfigError, match=r"qwen3_5_text cannot express model\.layers with mamba2"):
        family_of("qwen3_5_text").to_config(tiny_config(["mamba2"]))
    ungated = tiny_config(["attention"])
    ungated.attention = dataclasses.replace(ungated.attention, gate=False)
    with pytest.raises(ConfigError, match=r"model\.attention\.gate=false"):
        family_of("qwen3_next").to_config(ungated)


def test_an_unknown_family_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'qwen3_next'"):
        family_of("qwen3_nxt")


def test_families_are_known_by_their_own_names():
    assert all(getattr(transformers, f.architecture).config_class.model_type == n for n, f in FAMILIES.items())
