"""Small settings of each task, and comparisons of batches."""

from __future__ import annotations

import torch

from sleeptrain.config.schema import DataConfig, DepoConfig, GsmInfiniteConfig, Rule110Config
from sleeptrain.data.batch import Batch
from sleeptrain.data.tasks.build import build_task
from sleeptrain.data.tasks.task import Task

SMALL = {
    "rule110": DataConfig(source="rule110", rule110=Rule110Config(width=11, strings=3, steps=9, validation_samples=50)),
    "depo": DataConfig(
        source="depo",
        depo=DepoConfig(nodes=9, hops=4, symbols=5, max_word=2, queries=4, validation_samples=50),
    ),
    "gsm_infinite": DataConfig(
        source="gsm_infinite",
        gsm_infinite=GsmInfiniteConfig(max_ops=3, min_tokens=150, max_tokens=220, validation_samples=50),
    ),
}


def small_task(name: str) -> Task:
    return build_task(SMALL[name])


def equal(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in Batch.__dataclass_fields__)


def join(batches: list[Batch]) -> Batch:
    return Batch(*(torch.cat([getattr(batch, name) for batch in batches]) for name in Batch.__dataclass_fields__))
