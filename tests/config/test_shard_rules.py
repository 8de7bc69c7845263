"""Refusals of sources of shards and of their mixture name the setting."""

from __future__ import annotations

import pytest

from sleeptrain.config.schema import MixtureStage, ShardsConfig, ShardSource
from sleeptrain.config.shard_rules import check_mixture, check_sources
from sleeptrain.errors import ConfigError

TEXT, CODE = ShardSource("text", "a", "b", 0.7), ShardSource("code", "c", "", 0.3)


def mixture(*stages: MixtureStage, sources: tuple[ShardSource, ...] = (TEXT, CODE)) -> ShardsConfig:
    return ShardsConfig(sources=list(sources), curriculum=list(stages))


def test_one_source_with_held_out_shards_is_enough() -> None:
    check_sources([TEXT, CODE])
    check_mixture(mixture(MixtureStage(5, {"code": 1.0}), MixtureStage(6, {"text": 0.0, "code": 2.0})))


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], r"^data\.shards\.sources must list at least one source .*data=stdlib"),
        ([TEXT, TEXT], r"^data\.shards\.sources\[1\]\.name must be one that no other source has: 'text'$"),
        ([ShardSource("", "a", "b")], r"^data\.shards\.sources\[0\]\.name .*''$"),
        ([TEXT, ShardSource("x", "", "b")], r"^data\.shards\.sources\[1\]\.train must be set"),
        ([CODE], r"^data\.shards\.sources\[0\]\.validation must be set"),
    ],
)
def test_sources_that_are_refused(sources: list[ShardSource], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sources(sources)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([MixtureStage(0, {"text": 1})], r"curriculum\[0\]\.tokens \(0\) must be greater than 0: sort the stages"),
        ([MixtureStage(9, {"text": 1}), MixtureStage(9, {"code": 1})], r"curriculum\[1\]\.tokens \(9\) .* than 9"),
        ([MixtureStage(9, {"txt": 1})], r"curriculum\[0\]\.weights: unknown source 'txt'; did you mean 'text'\?"),
        ([MixtureStage(9, {"text": -1})], r"curriculum\[0\]\.weights\.text must be a finite number and at least 0"),
        ([MixtureStage(9, {"text": 0})], r"curriculum\[0\]\.weights: at least one weight must be greater than 0"),
    ],
)
def test_stages_that_are_refused(stages: list[MixtureStage], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_mixture(mixture(*stages))


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_of_sources_are_shares(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"^data\.shards\.sources\[0\]\.weight must be a finite number"):
        check_mixture(mixture(sources=(ShardSource("text", "a", "b", weight),)))
