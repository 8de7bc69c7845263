"""Every refusal names the setting and the way out. Settings that fit each other are accepted."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import pytest
from omegaconf import MISSING

from sleeptrain.config import Config, validate
from sleeptrain.config.schema import CurriculumStage, MixtureStage, ShardsConfig, ShardSource
from sleeptrain.config.setting import Setting, declared_settings
from sleeptrain.errors import ConfigError
from tests.configs import change


def case_id(value: object) -> str:
    """A test id that is the same in every process, so that processes can share the tests."""
    return value.__name__ if isinstance(value, FunctionType) else str(value)[:60]


def shards() -> Config:
    config = Config()
    config.run.name = "test"
    config.train.tokens = 1000
    config.data.shards = ShardsConfig(sources=[ShardSource(train="train", validation="validation")])
    return config


def rule110() -> Config:
    config = shards()
    config.data.source = "rule110"
    config.data.shards = ShardsConfig()
    config.sleep.when = "unlabelled"
    config.sleep.window = config.data.rule110.width
    return config


def depo() -> Config:
    config = rule110()
    config.data.source, config.sleep.window = "depo", 75
    return config


def gsm() -> Config:
    config = rule110()
    config.data.source, config.sleep.window = "gsm_infinite", 2000
    return config


def stages(*triples: tuple[int, int | None, int | None, int | None]) -> list[CurriculumStage]:
    return [CurriculumStage(*each) for each in triples]


def sources(*weights: tuple[str, float]) -> list[ShardSource]:
    return [ShardSource(name, "train", "validation", weight) for name, weight in weights]


def mixture(*pairs: tuple[int, dict[str, float]]) -> list[MixtureStage]:
    return [MixtureStage(*pair) for pair in pairs]


ACCEPTED: list[tuple[Callable[[], Config], dict[str, Any]]] = [
    (shards, {}),
    (rule110, {}),
    (rule110, {"sleep.passes": 4, "sleep.when": "every"}),
    (rule110, {"sleep.window": 10}),  # half a string
    (rule110, {"sleep.window": 21}),  # the whole row
    (rule110, {"data.rule110.strings": 2, "sleep.window": 40, "data.rule110.label": 19}),
    (rule110, {"data.rule110.strings": 21, "sleep.window": 21}),
    (depo, {}),
    (depo, {"sleep.window": 100}),
    (depo, {"sleep.window": 360}),
    (depo, {"data.depo.nodes": 24, "data.depo.max_word": 1, "data.depo.min_nodes": 24, "sleep.window": 48}),
    (gsm, {}),
    (gsm, {"sleep.window": 3300, "sleep.eviction": "sliding"}),
    (gsm, {"data.gsm_infinite.train": "a.jsonl", "data.gsm_infinite.validation": "b.jsonl"}),
    (shards, {"sleep.passes": 4, "sleep.eviction": "sliding", "sleep.conv_state": "carry", "sleep.feedback": "none"}),
    (shards, {"sleep.passes": 4, "sleep.core": [1, 2]}),
    (shards, {"sleep.passes": 4, "model.layers": ["attention", "mamba2"]}),
    (shards, {"model.layers": ["attention"]}),  # a plain transformer that never sleeps
    (shards, {"sleep.passes": 1, "sleep.sample_passes": True, "sleep.bptt_windows": 1}),
    (shards, {"sleep.window": 100}),  # the last window of a sequence may be short
    (shards, {"sleep.curriculum": stages((1, 1, None, None), (10, 2, 256, None), (20, None, None, 16))}),
    # The base values are never used here, so no setting must fit them.
    (shards, {"data.shards.sources": sources(("a", 0.7), ("b", 0)), "data.shards.curriculum": mixture((5, {"b": 1}))}),
    (shards, {"model.attention.partial_rotary_factor": 0.25, "model.attention.head_dim": 24}),
    (shards, {"optim.schedule": "cosine", "optim.warmup_fraction": 0.9, "optim.decay_fraction": 0.2}),
    (shards, {"run.name": "multirun/test/sleep.passes=2"}),
    (shards, {"health.stall_after": 0, "health.lost_after": 3, "health.timeout": 4}),
]


def out_of_range(name: str, declared: Setting) -> list[tuple[Callable[[], Config], dict[str, Any], list[str]]]:
    """Values that a declaration does not allow, with words of the refusal."""
    if declared.choices:
        return [(shards, {name: "evry"}, [name, "evry", *declared.choices])]
    if declared.at_most is not None:
        return [
            (shards, {name: value}, [name, f"between {declared.at_least} and {declared.at_most}"])
            for value in (declared.at_least - 1, declared.at_most + 1)
        ]
    if declared.at_least is not None:
        return [(shards, {name: declared.at_least - 1}, [name, f"at least {declared.at_least}"])]
    return [] if declared.above is None else [(shards, {name: 0}, [name, "greater than 0"])]


# (base, changes, words that the message must hold)
REFUSED: list[tuple[Callable[[], Config], dict[str, Any], list[str]]] = [
    (shards, {"run.name": MISSING}, ["run.name", "experiment="]),
    (shards, {"train.tokens": MISSING}, ["train.tokens", "experiment="]),
    (shards, {"run.name": ""}, ["run.name"]),
    (shards, {"run.name": "../elsewhere"}, ["run.name", "../elsewhere"]),
    (shards, {"run.name": "/elsewhere"}, ["run.name", "/elsewhere"]),
    (shards, {"model.layers": []}, ["model.layers", "gated_deltanet"]),
    (shards, {"model.layers": ["attention", "mamba"]}, ["model.layers[1]", "'mamba'", "mamba2"]),
    (shards, {"model.attention.num_kv_heads": 3}, ["model.attention.num_heads (4)", "num_kv_heads (3)"]),
    (shards, {"model.gated_deltanet.num_k_heads": 3}, ["gated_deltanet.num_v_heads (4)", "num_k_heads (3)"]),
    (shards, {"model.mamba2.num_groups": 3}, ["mamba2.num_heads (8)", "num_groups (3)"]),
    (shards, {"model.attention.head_dim": 6}, ["partial_rotary_factor", "head_dim (6)", "even"]),
    (shards, {"model.layers": ["attention"] * 1025}, ["model.layers lists 1,025 blocks", "1,024"]),
    (shards, {"model.dim": 2**19 + 1}, ["model.dim (524289)", "524,288 at most"]),
    (shards, {"model.vocab_size": 2**31 + 1}, ["model.vocab_size (2147483649)", "2,147,483,648 at most"]),
    (shards, {"model.attention.partial_rotary_factor": 0.3}, ["partial_rotary_factor (0.3)", "9.6"]),
    (shards, {"sleep.passes": 2, "model.layers": ["attention"] * 2}, ["sleep.passes=2", "plain transformer", "sleep="]),
    (shards, {"sleep.passes": 2, "sleep.core": [0, 1]}, ["sleep.passes=2", "sleep.core"]),
    (
        shards,
        {"model.layers": ["attention"], "sleep.curriculum": stages((5, 2, None, None))},
        ["sleep.curriculum[0].passes=2", "plain transformer"],
    ),
    (shards, {"sleep.core": []}, ["sleep.core", "<= 4"]),
    (shards, {"sleep.core": [2, 2]}, ["sleep.core", "[2, 2]"]),
    (shards, {"sleep.core": [0, 5]}, ["sleep.core", "[0, 5]"]),
    (shards, {"sleep.core": [-1, 2]}, ["sleep.core", "[-1, 2]"]),
    (shards, {"sleep.core": [1, 2, 3]}, ["sleep.core", "[first, last)"]),
    (shards, {"sleep.curriculum": stages((9, 2, None, None), (5, 4, None, None))}, ["sleep.curriculum[1].tokens"]),
    (shards, {"sleep.curriculum": stages((5, 2, None, None), (5, 4, None, None))}, ["sleep.curriculum[1].tokens"]),
    (shards, {"sleep.curriculum": stages((-5, 2, None, None))}, ["sleep.curriculum[0].tokens", "-5"]),
    (shards, {"sleep.curriculum": stages((0, 2, None, None))}, ["sleep.curriculum[0].tokens", "sleep.passes"]),
    (shards, {"sleep.curriculum": stages((5, None, None, None))}, ["sleep.curriculum[0]", "changes nothing"]),
    (shards, {"sleep.curriculum": stages((5, 0, None, None))}, ["sleep.curriculum[0].passes", "0"]),
    (shards, {"sleep.curriculum": stages((5, None, 0, None))}, ["sleep.curriculum[0].window", "0"]),
    (shards, {"sleep.curriculum": stages((5, None, None, 0))}, ["sleep.curriculum[0].batch", "0"]),
    (shards, {"sleep.window": 2048}, ["sleep.window (2048)", "data.sequence (1024)"]),
    (shards, {"sleep.curriculum": stages((5, None, 2048, None))}, ["sleep.curriculum[0].window (2048)"]),
    (rule110, {"sleep.window": 19}, ["sleep.window (19)", "20 tokens", "data.rule110.width (20)", "21"]),
    (rule110, {"sleep.window": 128}, ["sleep.window (128)", "21"]),
    (rule110, {"data.rule110.strings": 6, "sleep.window": 5}, ["sleep.window (5)", "6 tokens of the answers"]),
    (rule110, {"data.rule110.strings": 21}, ["sleep.window (20)", "hold the 21 tokens of the answers"]),
    (rule110, {"data.rule110.label": 20}, ["data.rule110.label=20", "data.rule110.width=20"]),
    (depo, {"sleep.window": 70}, ["sleep.window (70)", "300 tokens", "data.depo.nodes (75)"]),
    (depo, {"sleep.window": 50}, ["sleep.window (50)", "60 tokens of the answers"]),
    (depo, {"data.depo.min_nodes": 76}, ["data.depo.min_nodes=76", "data.depo.nodes=75"]),
    (depo, {"data.depo.symbols": 11}, ["data.depo.symbols=11", "132 words", "data.depo.nodes=75"]),
    (gsm, {"sleep.window": 4000}, ["sleep.window (4000)", "data.gsm_infinite.max_tokens (3300)"]),
    (gsm, {"data.gsm_infinite.min_ops": 9}, ["data.gsm_infinite.min_ops=9", "data.gsm_infinite.max_ops=8"]),
    (gsm, {"data.gsm_infinite.min_tokens": 3301}, ["data.gsm_infinite.min_tokens=3301", "max_tokens=3300"]),
    (gsm, {"data.gsm_infinite.train": "a.jsonl"}, ["data.gsm_infinite.train", "data.gsm_infinite.validation"]),
    (rule110, {"sleep.curriculum": stages((5, None, 40, None))}, ["sleep.curriculum[0].window (40)"]),
    (shards, {"sleep.when": "unlabelled"}, ["sleep.when=unlabelled", "data.source=shards", "sleep.when=every"]),
    (shards, {"data.shards.sources": []}, ["data.shards.sources", "data=stdlib"]),
    (shards, {"data.shards.sources": [ShardSource(validation="v")]}, ["data.shards.sources[0].train"]),
    (shards, {"data.shards.sources": [ShardSource(train="t")]}, ["data.shards.sources[0].validation"]),
    (shards, {"data.shards.sources": sources(("a", 1), ("a", 1))}, ["data.shards.sources[1].name", "'a'"]),
    (shards, {"data.shards.sources": sources(("", 1))}, ["data.shards.sources[0].name"]),
    (shards, {"data.shards.sources": sources(("a", 1), ("b", -1))}, ["data.shards.sources[1].weight", "-1"]),
    (shards, {"data.shards.sources": sources(("a", float("nan")))}, ["data.shards.sources[0].weight", "nan"]),
    (shards, {"data.shards.sources": sources(("a", 0), ("b", 0))}, ["data.shards.sources", "greater than 0"]),
    (shards, {"data.shards.curriculum": mixture((0, {"text": 1}))}, ["data.shards.curriculum[0].tokens", "weights"]),
    (shards, {"data.shards.curriculum": mixture((9, {"text": 1}), (9, {"text": 1}))}, ["curriculum[1].tokens (9)"]),
    (shards, {"data.shards.curriculum": mixture((9, {"txt": 1}))}, ["curriculum[0].weights", "'txt'", "'text'"]),
    (shards, {"data.shards.curriculum": mixture((9, {"text": -1}))}, ["curriculum[0].weights.text", "-1"]),
    (shards, {"data.shards.curriculum": mixture((9, {}))}, ["data.shards.curriculum[0].weights", "greater than 0"]),
    (shards, {"train.micro_batch": 3}, ["train.micro_batch (3)", "data.batch (8)"]),
    (shards, {"train.micro_batch": 16}, ["train.micro_batch (16)", "data.batch (8)"]),
    (
        shards,
        {"train.micro_batch": 4, "sleep.curriculum": stages((5, None, None, 6))},
        ["train.micro_batch (4)", "sleep.curriculum[0].batch (6)"],
    ),
    (
        shards,
        {"sleep.stop": "acceleration", "sleep.feedback": "none"},
        ["sleep.stop=acceleration", "sleep.feedback=none"],
    ),
    (shards, {"sleep.stop": "gate"}, ["sleep.stop=gate needs sleep.stop_gate", "--fit-gate"]),
    (shards, {"sleep.stop": "change", "sleep.min_passes": 5}, ["sleep.min_passes (5)", "sleep.stop=change"]),
    (rule110, {"data.rule110.mixed_steps": [4]}, ["data.rule110.mixed_steps=[4]", "data.rule110.steps"]),
    (rule110, {"data.rule110.mixed_steps": [4, 8, 4]}, ["data.rule110.mixed_steps=[4, 8, 4]", "different"]),
    (rule110, {"data.rule110.mixed_steps": [0, 8]}, ["data.rule110.mixed_steps=[0, 8]", "from 1"]),
    (rule110, {"data.rule110.mixed_steps": [2, 8]}, ["sleep.window (20)", "(data.rule110.width + 1) (21)"]),
    (shards, {"health.timeout": 600}, ["health.stall_after (600 s)", "health.timeout (600 s)"]),
    (shards, {"health.lost_after": 3600}, ["health.lost_after (3600 s)", "health.timeout (1800 s)"]),
    (shards, {"health.on_spike": "rollback", "checkpoint.every": 0}, ["health.on_spike=rollback", "checkpoint.every"]),
    (shards, {"health.on_spike": "wait"}, ["health.on_spike", "wait"]),
    (shards, {"health.spike_window": 7}, ["health.spike_window", "8"]),
    (shards, {"optim.adamw_betas": [0.9]}, ["optim.adamw_betas", "two"]),
    (shards, {"optim.adamw_betas": [0.9, 1.0]}, ["optim.adamw_betas[1]", "1.0"]),
    (shards, {"optim.muon_momentum": 1.0}, ["optim.muon_momentum"]),
    (shards, {"optim.warmup_fraction": 0.9}, ["optim.warmup_fraction (0.9)", "optim.decay_fraction (0.2)"]),
    (shards, {"optim.muon_lr": float("nan")}, ["optim.muon_lr", "finite"]),
    (shards, {"optim.clip_norm": float("inf")}, ["optim.clip_norm", "finite"]),
    *(refused for name, _, declared in declared_settings(Config) for refused in out_of_range(name, declared)),
]


@pytest.mark.parametrize(("base", "changes"), ACCEPTED)
def test_accepts(base: Callable[[], Config], changes: dict[str, Any]) -> None:
    validate(change(base(), changes))


@pytest.mark.parametrize(("base", "changes", "words"), REFUSED, ids=case_id)
def test_refuses(base: Callable[[], Config], changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(change(base(), changes))
    message = str(refusal.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
