"""Jet-Nemotron's settings, and the order of its kernels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf import families
from sleeptrain.hf.convert.importing import import_folder
from sleeptrain.hf.families.family import renamed
from sleeptrain.hf.families.jet_nemotron import JetNemotron
from tests.hf.published.small import folder_of
from tests.hf.published_settings import JET_2B
from tests.models import tiny_config

_GENERATOR = "dynamic_conv1d.kernel_generator.w2"
_UNSORTED = {f"kernel_out.{part}": f"{_GENERATOR}.{part}" for part in ("weight", "bias")}

FAMILY = JetNemotron()


def test_an_import_that_mixes_up_channels_and_taps_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder_of("jet_nemotron", tmp_path / "theirs")
    unsorted = lambda _, ours, theirs: renamed(ours, theirs, families.jet_nemotron._JET | _UNSORTED)  # noqa: E731
    monkeypatch.setattr(families.jet_nemotron, "_jet_mappings", unsorted)
    with pytest.raises(DataError, match="the check failed"):
        import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_published_settings_are_read() -> None:
    config = FAMILY.from_config(JET_2B)
    assert config.layers.count("jet") == 24
    assert [config.layers[i] for i in (14, 20)] == ["attention", "sliding_attention"]
    assert (config.attention.sliding_window, config.attention.qkv_bias, config.norm) == (1152, True, "plain")
    assert (config.jet.head_v_dim, config.jet.kernel_dim, config.jet.norm_eps) == (256, 384, 1e-5)
    assert FAMILY.from_config(FAMILY.to_config(config)) == config


@pytest.mark.parametrize(("keys", "values"), [(96, 256), (12, 32), (10, 3), (7, 61), (11, 15)])
def test_a_width_of_values_is_read_back_from_its_expansion(keys: int, values: int) -> None:
    config = tiny_config(["jet"], norm="plain")
    config.jet = replace(config.jet, num_heads=2, head_k_dim=keys, head_v_dim=values, kernel_dim=2 * values)
    assert FAMILY.from_config(FAMILY.to_config(config)).jet == config.jet


def test_a_fraction_of_a_dimension_is_refused() -> None:
    jet = JET_2B["efficient_attention_config"]["jet"] | {"expand_v": 1.01}
    with pytest.raises(ConfigError, match=r"expand_v=1\.01 of head_dim=96 is not a whole number of dimensions"):
        FAMILY.from_config(JET_2B | {"efficient_attention_config": {"jet": jet}})


def test_a_generator_with_a_width_that_no_reduction_gives_is_refused() -> None:
    config = tiny_config(["jet"], norm="plain")
    config.jet = replace(config.jet, num_heads=2, head_v_dim=10, kernel_dim=7)
    assert FAMILY.lacks(config) == {"model.jet.kernel_dim=7": "it must be 20 divided by a whole number"}


def test_rows_of_the_kernel_generator_go_from_tap_to_channel_and_back() -> None:
    config = tiny_config(["jet"], norm="plain")
    taps, channels = config.jet.conv_size, config.jet.num_heads * config.jet.head_v_dim
    [mapping] = [m for m in FAMILY.mappings(config) if m.ours == ("blocks.0.mixer.kernel_out.bias",)]
    ours = torch.arange(taps * channels)
    [theirs] = mapping.to_theirs(ours)
    assert theirs.view(channels, taps)[5, 1] == ours.view(taps, channels)[1, 5]
    assert torch.equal(mapping.to_ours(theirs)[0], ours)
