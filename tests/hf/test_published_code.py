"""Families that transformers lacks, compared with a copy of their published code: logits, names, shapes, bits."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sleeptrain.checkpoint.fit import WEIGHTS
from sleeptrain.checkpoint.read import TensorFiles
from sleeptrain.config.schema import ModelConfig
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.check import TOLERANCE, check, our_logits
from sleeptrain.hf.convert.importing import import_folder
from sleeptrain.hf.families import family_of
from sleeptrain.hf.model.modeling import SleepForCausalLM
from sleeptrain.hf.published import PUBLISHED, load_published, published_logits
from sleeptrain.model.hybrid import Hybrid
from tests.hf.published.small import REFERENCES, SMALL, folder_of, imported, reference
from tests.hf.published_settings import OURO_1_4B
from tests.sleep.oracle import causal_layout

each = pytest.mark.parametrize("model_type", REFERENCES)


@each
def test_every_tensor_of_the_published_model_is_known(model_type: str):
    published, _ = REFERENCES[model_type]
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in PUBLISHED[model_type](published).named_parameters()}
    family = family_of(model_type)
    config = family.from_config(published)
    assert family.their_shapes(config) == expected
    with torch.device("meta"):
        total = sum(p.numel() for p in Hybrid(config).parameters())
    assert total == {"jet_nemotron": 1_964_806_208, "ouro": 1_434_650_624}[model_type]


@each
def test_weights_there_and_back_are_equal_bit_for_bit(model_type: str):
    theirs, settings = reference(model_type)
    family, weights = family_of(model_type), theirs.state_dict()
    config = family.from_config(settings)
    ours = dict(family.to_ours(config, weights.__getitem__))
    back = dict(family.to_theirs(config, ours.__getitem__))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) or "early_exit_gate" in name for name in weights)
    again = dict(family.to_ours(config, back.__getitem__))
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


@each
def test_settings_there_and_back(model_type: str):
    family = family_of(model_type)
    for settings in (REFERENCES[model_type][0], reference(model_type)[1]):
        config = family.from_config(settings)
        written = family.to_config(config)
        assert family.from_config(written) == config
        for key in settings.keys() - {"efficient_attention_config", "sliding_window", "total_ut_steps"}:
            assert written.get(key, settings[key]) == settings[key], key


@each
def test_a_folder_becomes_a_checkpoint(model_type: str, tmp_path: Path):
    theirs = folder_of(model_type, tmp_path / "theirs")
    result = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert result.error < TOLERANCE and result.model_type == model_type
    files = TensorFiles(tmp_path / "ours")
    found = {name.removeprefix(WEIGHTS): files.tensor(name) for name in files.forms}
    expected = dict(family_of(model_type).to_ours(result.config, theirs.state_dict().__getitem__))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@each
def test_same_logits_over_windows_and_passes(model_type: str, tmp_path: Path):
    folder_of(model_type, tmp_path / "theirs")
    theirs, ours = load_published(tmp_path / "theirs", family_of(model_type)).double(), imported(model_type)[1].double()
    tokens = torch.randint(17, (2, 37), generator=torch.Generator().manual_seed(1))
    for windows, passes in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        window = -(-37 // windows)
        expected = our_logits(ours, tokens, window, passes)
        error = (published_logits(theirs, tokens, window, passes) - expected).abs().max().item()
        assert error <= 1e-12, f"{windows=} {passes=}: {error:.1e}"
    # Ouro keeps nothing from one window to the next.
    assert torch.equal(expected, our_logits(ours, tokens, window, 1)) == (model_type == "ouro")


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("jet_nemotron", "blocks.0.mixer.A_log"),
        ("jet_nemotron", "blocks.3.mixer.kernel_out.bias"),
        ("jet_nemotron", "blocks.2.mixer.q_proj.bias"),
        ("ouro", "blocks.1.mlp_post_norm.weight"),
        ("ouro", "head.weight"),
    ],
)
def test_one_wrong_tensor_fails_the_check(model_type: str, name: str, tmp_path: Path):
    folder_of(model_type, tmp_path / "theirs")
    _, ours = imported(model_type)
    weights = {n: p.detach().clone() for n, p in ours.named_parameters()}
    assert check(ours.config, weights.__getitem__, tmp_path / "theirs", family_of(model_type), 64) < TOLERANCE
    weights[name].flatten()[0] += 0.1
    with pytest.raises(DataError, match="the check failed: over 4 windows of 3 passes"):
        check(ours.config, weights.__getitem__, tmp_path / "theirs", family_of(model_type), 64)


@each
@torch.no_grad()
def test_a_folder_is_read_and_generates_without_a_checkpoint(model_type: str, tmp_path: Path):
    theirs = folder_of(model_type, tmp_path / "theirs")
    ours = Hybrid(family_of(model_type).from_config(json.loads((tmp_path / "theirs" / "config.json").read_text())))
    ours.load_state_dict(dict(family_of(model_type).to_ours(ours.config, theirs.state_dict().__getitem__)))
    model = SleepForCausalLM.from_pretrained(tmp_path / "theirs")
    ids = torch.randint(1, SMALL["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(ids, window=4).logits, our_logits(ours, ids, 4, 1), rtol=0, atol=1e-5)
    output = model.generate(ids, max_new_tokens=9, do_sample=False, window=4, pad_token_id=0)
    torch.testing.assert_close(output[:, 11:], model(output, window=4, use_cache=False).logits[:, 10:-1].argmax(-1))


@each
def test_missing_and_unexpected_tensors_are_listed(model_type: str, tmp_path: Path):
    name = "model.layers.1.self_attn.q_proj.weight"
    folder_of(model_type, tmp_path / "theirs", **{name: None, "model.layers.9.odd": torch.zeros(1)})
    with pytest.raises(DataError, match="1 missing, 1 unexpected") as refused:
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert f"missing: {name}" in refused.value.details and "unexpected: model.layers.9.odd" in refused.value.details
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("model_type", "change", "message"),
    [
        ("jet_nemotron", {"efficient_attention_config": {}}, "config.json has no jet, which jet_nemotron needs"),
        ("jet_nemotron", {"efficient_attention_config": None}, "a value is missing or of a wrong kind"),
        ("jet_nemotron", {"efficient_attention_config": {"jet": {"num_heads": 2}}}, "has no head_dim"),
        ("jet_nemotron", {"layer_types": None}, "a value is missing or of a wrong kind"),
        ("jet_nemotron", {"hidden_size": "abc"}, "config.json"),
        ("jet_nemotron", {"num_attention_heads": 0}, "config.json"),
        ("ouro", {"layer_types": 3}, "a value is missing or of a wrong kind"),
        ("ouro", {"num_hidden_layers": "2"}, "a value is missing or of a wrong kind"),
        ("ouro", {"head_dim": "wide"}, "config.json"),
        ("ouro", {"rope_theta": None}, "a value is missing or of a wrong kind"),
        ("ouro", {"num_hidden_layers": 0}, "model.layers must list at least one mixer"),
        ("ouro", {"sleep": {"passes": 4}}, "a plain transformer cannot sleep"),
    ],
)
def test_malformed_settings_are_refused(model_type: str, change: dict[str, Any], message: str, tmp_path: Path):
    folder_of(model_type, tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    with pytest.raises((ConfigError, DataError), match=message):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [place.name for place in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("jet_nemotron", {"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling"),
        ("jet_nemotron", {"layer_types": ["deltanet"]}, "deltanet"),
        ("ouro", {"layer_types": ["sliding_attention"]}, "sliding_attention"),
        ("ouro", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_a_model_that_sleeptrain_lacks_is_refused(model_type: str, change: dict[str, Any], named: str):
    with pytest.raises(ConfigError, match=named):
        family_of(model_type).from_config(REFERENCES[model_type][0] | change)


def test_settings_that_a_family_cannot_express_are_named():
    jet, ouro = (family_of(name).from_config(reference(name)[1]) for name in REFERENCES)
    assert set(family_of("ouro").lacks(jet)) >= {"model.layers with jet", "model.sandwich_norms=False".lower()}
    assert set(family_of("jet_nemotron").lacks(ouro)) >= {"model.sandwich_norms=true", "model.attention.qkv_bias=false"}
    inserted = dataclasses.replace(ouro, layers=["attention", "jet", "attention"], mixer_only=[1])
    assert "model.mixer_only=[1]" in family_of("ouro").lacks(inserted)
    assert "model.norm_between_passes=true" in family_of("qwen3_5_text").lacks(ouro)


def test_six_jet_layers_add_less_than_a_tenth_to_ouro_and_change_nothing_at_first():
    config = family_of("ouro").from_config(OURO_1_4B)
    grown = with_jet(config, 6, heads=8, keys=128, values=256, kernel=256)
    with torch.device("meta"):
        before, after = (sum(p.numel() for p in Hybrid(c).parameters()) for c in (config, grown))
    assert 1.05 < after / before < 1.10
    _, small = imported("ouro")
    ours = Hybrid(with_jet(small.config, 1, heads=2, keys=4, values=6, kernel=5))
    ours.init_weights(0)
    weights = {name.replace("blocks.2.", "blocks.3."): w for name, w in small.state_dict().items()}
    ours.load_state_dict(weights, strict=False)
    tokens = torch.randint(17, (2, 12))
    x, state = ours.run(ours.embed(tokens), ours.empty_state(), causal_layout(12))
    y, _ = small.run(small.embed(tokens), small.empty_state(), causal_layout(12))
    assert torch.equal(x, y) and state[2].S_BHKV.abs().sum() > 0


def with_jet(config: ModelConfig, number: int, heads: int, keys: int, values: int, kernel: int) -> ModelConfig:
    """Inserts a Jet mixer at equal distances; among three blocks, one mixer after the second."""
    each = max(len(config.layers) // number, 2) if number > 1 else 2
    layers, alone = list[str](), list[int]()
    for i, kind in enumerate(config.layers):
        layers.append(kind)
        if (i + 1) % each == 0 and len(alone) < number:
            alone.append(len(layers))
            layers.append("jet")
    jet = dataclasses.replace(config.jet, num_heads=heads, head_k_dim=keys, head_v_dim=values, kernel_dim=kernel)
    return dataclasses.replace(config, layers=layers, mixer_only=alone, jet=jet)
