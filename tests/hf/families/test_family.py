"""Every family equals transformers' own class: weights under mapped names, logits, gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from sleeptrain.checkpoint.compatibility import check_compatible
from sleeptrain.checkpoint.fit import WEIGHTS, check_start
from sleeptrain.checkpoint.read import Form
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError
from sleeptrain.hf.families import FAMILIES, expressing, family_of
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.train.init_from import Renumbered
from tests.hf.models import MODELS, ZERO_CENTRED, disturbed, native
from tests.hf.published_settings import JET_2B, OURO_1_4B, QWEN3_5_2B
from tests.models import VOCABULARY, tiny_config
from tests.sleep.oracle import causal_layout

each_model = pytest.mark.parametrize(("model_type", "config"), MODELS.values(), ids=list(MODELS))


@each_model
def test_same_logits_and_gradients(model_type: str, config: ModelConfig, tmp_path: Path):
    torch.manual_seed(0)
    family, ours = family_of(model_type), disturbed(config)
    theirs = native(family, ours, tmp_path)
    tokens = torch.randint(VOCABULARY, (2, 70))
    x, _ = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(70))
    logits, expected = ours.logits(x), theirs(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    direction = torch.randn_like(logits)
    (logits * direction).sum().backward()
    (expected * direction).sum().backward()
    mine = {name: p.grad for name, p in ours.named_parameters()}
    gradients = dict(family.to_ours(config, saved_gradients(theirs, tmp_path / "gradients").__getitem__))
    assert set(mine) == set(gradients)
    for name, gradient in gradients.items():
        error = (mine[name] - gradient).norm() / gradient.norm()
        assert error < 1e-3, f"{name}: relative error {error:.1e}"


def saved_gradients(theirs: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """Gradients under the names in transformers' files."""
    for parameter in theirs.parameters():
        parameter.data = parameter.grad
    return saved(theirs, folder)


def saved(theirs: PreTrainedModel, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers writes. For OLMo it would cut convolutions into equal thirds, which is wrong."""
    olmo = theirs.config.model_type == "olmo_hybrid"
    theirs.save_pretrained(folder, save_original_format=not olmo)
    found = load_file(folder / "model.safetensors")
    return olmo_names(found, theirs.config) if olmo else found


def olmo_names(found: dict[str, torch.Tensor], config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Renames OLMo's tensors as on the hub."""
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    named = {}
    for name, tensor in found.items():
        linear = config.layer_types[int(name.split(".")[2])] == "linear_attention" if ".layers." in name else False
        if linear and name.endswith("conv1d.weight"):
            parts = zip("qkv", tensor.split([keys, keys, values]), strict=True)
            named |= {name.replace("conv1d", f"{part}_conv1d"): t for part, t in parts}
        elif linear:
            hub = name.replace("input_layernorm", "attention_layer_norm")
            named[hub.replace("post_attention_layernorm", "feedforward_layer_norm")] = tensor
        else:
            named[name] = tensor
    return named


@pytest.mark.parametrize(("model_type", "config"), ZERO_CENTRED.values(), ids=list(ZERO_CENTRED))
def test_zero_centred_norms_become_plain_ones_with_the_same_logits(model_type, config, tmp_path):
    family, ours = family_of(model_type), disturbed(config)
    parameters = dict(ours.named_parameters())
    theirs = dict(family.to_theirs(config, parameters.__getitem__))
    plain = Hybrid(family.from_config(family.to_config(config)))
    assert plain.config.norm == "plain"
    plain.load_state_dict(dict(family.to_ours(plain.config, theirs.__getitem__)))
    tokens = torch.randint(VOCABULARY, (2, 70))
    with torch.no_grad():
        logits = [m.logits(m.run(m.embed(tokens), m.empty_state(), causal_layout(70))[0]) for m in (ours, plain)]
        assert torch.equal(*logits)
        expected = native(family, ours, tmp_path)(tokens).logits
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5)


@each_model
def test_weights_there_and_back_are_equal_bit_for_bit(model_type: str, config: ModelConfig):
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
    kinds = ("attention", "gated_deltanet", "jet", "mamba2")
    unused = {kind: getattr(config, kind) for kind in kinds if kind not in config.layers}
    assert dataclasses.replace(found, **unused) == config


@each_model
def test_shapes_are_those_that_transformers_saves(model_type: str, config: ModelConfig, tmp_path: Path):
    family = family_of(model_type)
    theirs = saved(native(family, disturbed(config), tmp_path), tmp_path / "theirs")
    assert family.their_shapes(config) == {family.canonical(n): tuple(t.shape) for n, t in theirs.items()}


def test_settings_that_a_family_lacks_are_refused():
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
    native = {n: f.architecture for n, f in FAMILIES.items() if f.in_transformers}
    assert len(native) >= 4 and len(native) < len(FAMILIES)
    assert all(getattr(transformers, name).config_class.model_type == n for n, name in native.items())


PLAIN = ["model.attention.gate=false", "model.attention.qk_norm=none", "model.attention.partial_rotary_factor=1"]


@pytest.mark.parametrize(
    ("settings", "first"),
    [
        (["model=small"], "qwen3_5_text"),
        (["model=hybrid_2b"], "qwen3_5_text"),
        (["model=transformer_tiny"], "qwen3_5_text"),
        (["model=mamba2_tiny", *PLAIN], "granitemoehybrid"),
        (["model=transformer_tiny", *PLAIN], "granitemoehybrid"),
    ],
)
def test_models_of_the_configuration_have_a_family(settings: list[str], first: str):
    config = compose(["experiment=stdlib", "sleep=wake", *settings])
    assert expressing(config.model)[0].model_type == first


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        ("jet_nemotron_2b", JET_2B),
        ("ouro_1_4b_jet", OURO_1_4B),
        ("hybrid_2b", transformers.AutoConfig.for_model(**QWEN3_5_2B).to_dict()),
    ],
)
def test_models_of_the_configuration_fit_an_import_of_published_models(settings: str, published: dict):
    model = compose(["experiment=stdlib", "sleep=wake", f"model={settings}"]).model
    imported = family_of(published["model_type"]).from_config(published)
    with torch.device("meta"):
        weights = {name: tuple(p.shape) for name, p in Hybrid(imported).named_parameters()}
    forms = {WEIGHTS + name: Form(shape, torch.float32) for name, shape in weights.items()}
    inserted = model.mixer_only
    numbered = Renumbered(SimpleNamespace(forms=forms, read=None), inserted, len(model.layers))  # type: ignore[arg-type]
    check_start(numbered.forms, model, [f"blocks.{block}.*" for block in inserted])
    check_compatible(imported, model, inserted)
