"""Every refusal names the setting and a layout that works; that layout is then accepted."""

from __future__ import annotations

from typing import Any

import pytest

from sleeptrain.config import Config
from sleeptrain.config.schema import CurriculumStage
from sleeptrain.errors import ConfigError
from sleeptrain.parallel.layout_check import check_layout
from tests.configs import change


def config(changes: dict[str, Any]) -> Config:
    return change(Config(), {"model.layers": ["attention", "gated_deltanet", "mamba2"]} | changes)


ACCEPTED: list[tuple[dict[str, Any], int, int]] = [
    ({}, 1, 1),
    ({}, 8, 8),
    ({"parallel.tensor": 2}, 8, 4),
    ({"parallel.tensor": 4}, 4, 1),  # two key-value heads and one group, shared by the ranks
    ({"parallel.tensor": 2, "parallel.pipeline": 2}, 8, 2),
    ({"parallel.pipeline": 3}, 3, 1),
    ({"parallel.zero": 3, "parallel.tensor": 2}, 4, 2),
    ({"parallel.zero": 0}, 4, 4),
    ({"parallel.zero": 2, "parallel.pipeline": 2}, 4, 2),
    ({"parallel.tensor": 2, "parallel.sequence": True}, 2, 1),
    ({"parallel.tensor": 8, "model.layers": ["mamba2"]}, 8, 1),  # heads of unused mixers do not count
    ({"model.vocab_size": 17, "parallel.tensor": 2}, 2, 1),  # the vocabulary is padded
    ({"train.micro_batch": 2}, 4, 4),
    ({"parallel.shard_replicas": 2, "parallel.tensor": 2}, 8, 4),
    ({"parallel.shard_replicas": 1}, 1, 1),
]


@pytest.mark.parametrize(("changes", "world", "data"), ACCEPTED)
def test_accepts_and_counts_the_replicas(changes: dict[str, Any], world: int, data: int):
    assert check_layout(config(changes), world) == data


RULE110: dict[str, Any] = {
    "data.source": "rule110",
    "data.rule110.width": 8,
    "sleep.window": 8,
    "parallel.tensor": 2,
    "parallel.sequence": True,
}

# settings, processes, words of the message, settings that the message proposes, processes then
REFUSED: list[tuple[dict[str, Any], int, list[str], dict[str, Any], int]] = [
    (
        {"parallel.shard_replicas": 3},
        4,
        ["parallel.shard_replicas (3)", "the number of replicas (4)", "one of 1, 2, 4"],
        {"parallel.shard_replicas": 2},
        4,
    ),
    (
        {"parallel.shard_replicas": 2, "parallel.zero": 2},
        4,
        ["parallel.shard_replicas (2)", "parallel.zero=2", "use parallel.zero=1"],
        {"parallel.shard_replicas": 2, "parallel.zero": 1},
        4,
    ),
    (
        {"parallel.tensor": 3, "data.batch": 6},
        6,
        ["parallel.tensor (3)", "model.attention.num_heads (4)", "model.gated_deltanet.num_v_heads (4)", "can be 1, 2"],
        {"parallel.tensor": 2, "data.batch": 6},
        6,
    ),
    (
        {"parallel.tensor": 2, "model.ffn_dim": 385},
        2,
        ["model.ffn_dim (385)", "can be 1"],
        {"parallel.tensor": 1, "model.ffn_dim": 385},
        2,
    ),
    (
        {"parallel.tensor": 4, "model.attention.head_dim": 33},
        4,
        ["model.attention.num_kv_heads (2) of head_dim 33", "can be 1, 2"],
        {"parallel.tensor": 2, "model.attention.head_dim": 33},
        4,
    ),
    (
        {"parallel.tensor": 4, "model.mamba2.state_dim": 6},
        4,
        ["model.mamba2.num_groups (1) of state_dim 6", "can be 1, 2"],
        {"parallel.tensor": 2, "model.mamba2.state_dim": 6},
        4,
    ),
    *(
        (
            {"parallel.tensor": 2, setting: value},
            2,
            ["parallel.tensor (2)", f"{setting} ({str(value).lower()})", "can be 1"],
            {"parallel.tensor": 1, setting: value},
            2,
        )
        for setting, value in (("model.attention.post_norm", True), ("model.attention.qk_norm", "all"))
    ),
    ({"parallel.pipeline": 4}, 4, ["parallel.pipeline (4)", "(3)", "=3"], {"parallel.pipeline": 3}, 3),
    (
        {"parallel.tensor": 2, "parallel.pipeline": 2},
        6,
        ["parallel.tensor (2)", "parallel.pipeline (2)", "processes (6)", "start 8"],
        {"parallel.tensor": 2, "parallel.pipeline": 2},
        8,
    ),
    ({"parallel.zero": 4}, 1, ["parallel.zero", "not 4"], {"parallel.zero": 1}, 1),
    (
        {"parallel.zero": 3, "parallel.pipeline": 2},
        2,
        ["parallel.zero=3", "parallel.pipeline=2", "parallel.zero=1"],
        {"parallel.zero": 1, "parallel.pipeline": 2},
        2,
    ),
    (
        {"parallel.zero": 3, "sleep.recompute": "selective"},
        2,
        ["parallel.zero=3", "sleep.recompute=selective", "sleep.recompute=pass"],
        {"parallel.zero": 3, "sleep.recompute": "pass"},
        2,
    ),
    (
        {"parallel.zero": 3, "train.compile": True},
        2,
        ["parallel.zero=3", "train.compile=false", "parallel.zero=1"],
        {"parallel.zero": 3},
        2,
    ),
    (
        {"parallel.zero": 0, "parallel.tensor": 2},
        2,
        ["parallel.zero=0", "parallel.tensor=2", "parallel.zero=1"],
        {"parallel.zero": 1, "parallel.tensor": 2},
        2,
    ),
    ({"data.batch": 6}, 4, ["data.batch (6)", "4 replicas", "data.batch=8"], {"data.batch": 8}, 4),
    (
        {"train.micro_batch": 4},
        4,
        ["data.batch (8)", "train.micro_batch (4)", "data.batch=16"],
        {"train.micro_batch": 4, "data.batch": 16},
        4,
    ),
    (
        {"sleep.curriculum": [CurriculumStage(5, batch=6)]},
        4,
        ["sleep.curriculum[0].batch (6)", "sleep.curriculum[0].batch=8"],
        {"sleep.curriculum": [CurriculumStage(5, batch=8)]},
        4,
    ),
    *(
        ({"train.cuda_graphs": True, **wrong}, world, ["train.cuda_graphs=true", *said], {"train.cuda_graphs": True}, 2)
        for wrong, world, said in [
            ({"parallel.tensor": 2}, 2, ["parallel.tensor=2"]),
            ({"parallel.pipeline": 2}, 2, ["parallel.pipeline=2"]),
            ({"parallel.zero": 3, "sleep.recompute": "pass"}, 1, ["parallel.zero=3", "sleep.recompute=pass"]),
            ({"parallel.zero": 0}, 2, ["parallel.zero=0"]),
            ({"sleep.stop": "change", "sleep.passes": 2}, 1, ["sleep.stop=change", "set these"]),
            ({"sleep.bptt_passes": 1, "sleep.passes": 2}, 1, ["sleep.bptt_passes=1", "an empty sleep.bptt_passes"]),
            ({"optim.frozen": ["embedding.weight"]}, 2, ["optim.frozen"]),
        ]
    ),
    ({"parallel.sequence": True}, 2, ["parallel.sequence", "parallel.tensor"], {"parallel.sequence": False}, 2),
    (
        {"parallel.sequence": True, "parallel.tensor": 2, "sleep.window": 127},
        2,
        ["parallel.sequence", "sleep.window=127", "multiples of 2"],
        {"parallel.sequence": True, "parallel.tensor": 2, "sleep.window": 128},
        2,
    ),
    (
        {"parallel.sequence": True, "parallel.tensor": 2, "data.sequence": 1025},
        2,
        ["parallel.sequence", "one of 1 tokens of a row of 1025 (data.sequence)"],
        {"parallel.sequence": True, "parallel.tensor": 2, "data.sequence": 1024},
        2,
    ),
    *(
        (
            {"sleep.stop": "change", "sleep.passes": 2, f"parallel.{name}": value},
            2,
            ["sleep.stop=change", f"parallel.{name}={value}", "parallel.zero=0 or 1"],
            {"sleep.stop": "change", "sleep.passes": 2, "parallel.zero": 1},
            2,
        )
        for name, value in (("tensor", 2), ("pipeline", 2), ("zero", 2))
    ),
    (
        {"sleep.bptt_passes": 1, "sleep.passes": 2, "parallel.pipeline": 2},
        2,
        ["sleep.bptt_passes=1", "parallel.pipeline=2", "leave sleep.bptt_passes empty"],
        {"sleep.bptt_passes": 1, "sleep.passes": 2, "parallel.tensor": 2},
        2,
    ),
    (
        # the answers of the task fill their own window
        RULE110 | {"data.rule110.strings": 3},
        2,
        ["parallel.sequence", "sleep.window=8 leaves one of 3 tokens of a row of 27 (data.rule110)"],
        RULE110 | {"data.rule110.strings": 4},
        2,
    ),
    (
        {"parallel.split_head": True, "parallel.pipeline": 3, "parallel.tensor": 2, "model.vocab_size": 4},
        6,
        ["parallel.split_head=true", "3 stages", "model.vocab_size (4)", "only 2 tokens"],
        {"parallel.split_head": False, "parallel.pipeline": 3, "parallel.tensor": 2, "model.vocab_size": 4},
        6,
    ),
]


@pytest.mark.parametrize(("changes", "world", "words", "better", "processes"), REFUSED)
def test_refuses_and_proposes(
    changes: dict[str, Any], world: int, words: list[str], better: dict[str, Any], processes: int
):
    with pytest.raises(ConfigError) as refusal:
        check_layout(config(changes), world)
    message = str(refusal.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    check_layout(config(better), processes)
