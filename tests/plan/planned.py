"""Plans of small runs."""

from __future__ import annotations

from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config
from sleeptrain.config.vocabulary import with_vocabulary
from sleeptrain.data.tasks.rule110 import FIRST_STEPS
from sleeptrain.distributed.gpus import find_gpu
from sleeptrain.plan.layout import Plan, make_plan

SMALL = ["data.rule110.width=6", "data.batch=8", "model.dim=16", "model.ffn_dim=16", f"train.tokens={12 * 8 * 7}"]


def rule110(*more: str) -> Config:
    return with_vocabulary(compose(["experiment=rule110", "sleep.passes=3", *SMALL, *more]), FIRST_STEPS)


def planned(config: Config, processes: int = 1, gpu: str | None = None) -> Plan:
    return make_plan(config, processes, None if gpu is None else find_gpu(gpu), 0.4)


def text(*more: str) -> Config:
    model = ["model.vocab_size=1000", "model.layers=[gated_deltanet,attention,mamba2,gated_deltanet]"]
    return compose(["experiment=stdlib", "sleep.curriculum=[]", "data.batch=16", *model, *more])
