"""The rounds of a 2B model on packed text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.data.batch import Batch
from sleeptrain.plan.roofline.rounds import RoundRecords
from sleeptrain.plan.workload import Workload, workloads
from sleeptrain.sleep.rounds import plan_batch

MORE = (
    "train.residual=bf16", "sleep.curriculum=[]", "sleep.passes=3", "data.sequence=4096", "data.batch=1",
)  # fmt: skip


def packed_batch(tokens: int) -> Batch:
    """A row whose documents have 900 tokens; one goes on at each end of a window."""
    ids, yes = torch.zeros(1, tokens, dtype=torch.long), torch.tensor([True])
    return Batch(ids, ids, torch.arange(tokens).div(900, rounding_mode="floor")[None], yes, yes)


@cache
def counted_2b() -> tuple[Config, Workload, Batch, RoundRecords]:
    config = compose(["experiment=pretrain_2b", *MORE])
    batch = packed_batch(config.data.sequence)
    [workload] = workloads(config, 1)
    rounds = tuple(plan_batch(batch, config.sleep.window, config.sleep.passes, config.sleep))
    workload = replace(workload, rounds=rounds, stretches=(rounds,))
    return config, workload, batch, RoundRecords(config, workload.settings)
