"""Settings of NCCL, as far as a machine without GPUs shows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

from sleeptrain.config.schema import Config
from sleeptrain.distributed import launch
from sleeptrain.distributed.launch import Place
from sleeptrain.distributed.meeting import Limit
from sleeptrain.distributed.nccl import PIPELINE_CTAS, communicator_settings, recorded, set_defaults


def test_a_users_variables_win() -> None:
    environment = {"NCCL_MAX_P2P_NCHANNELS": "16"}
    set_defaults(environment, 1800)
    assert environment == {"NCCL_MAX_P2P_NCHANNELS": "16", "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "3600"}
    other: dict[str, str] = {}
    set_defaults(other, 60)
    assert other == {"NCCL_MAX_P2P_NCHANNELS": str(PIPELINE_CTAS), "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "480"}


def test_megatron_gives_the_groups_of_the_pipeline_few_ctas(monkeypatch: pytest.MonkeyPatch, imported: None) -> None:
    """By megatron-core's own reading of the file, with a stand-in for the options of a build with CUDA."""
    from megatron.core import parallel_state

    class Options(SimpleNamespace):
        def __init__(self, **priority: Any) -> None:
            super().__init__(config=SimpleNamespace(), **priority)

    monkeypatch.setattr(dist, "ProcessGroupNCCL", SimpleNamespace(Options=Options), raising=False)
    with communicator_settings() as path, open(path) as file:
        groups = yaml.safe_load(file)
    options = parallel_state.get_nccl_options("pp", groups)
    assert vars(options.config) == {"min_ctas": 1, "max_ctas": PIPELINE_CTAS} and options.is_high_priority_stream
    assert parallel_state.get_nccl_options("dp", groups) is None


def test_nccl_does_not_start_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """With `device_id` all messages of a rank would share one stream, for which the schedule is not made."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(launch, "meet", lambda *_: None)
    monkeypatch.setattr(launch, "_make_world", lambda *_, **__: SimpleNamespace(sum=lambda *_: None))
    monkeypatch.setattr(dist, "init_process_group", lambda *backend, **options: calls.append(options))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("NCCL_MAX_P2P_NCHANNELS", "3")  # restored, with what the call sets beside it
    monkeypatch.setenv("TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC", "7")
    launch._meet(Config(), Place(0, 2), torch.device("cuda", 0), Limit())
    assert len(calls) == 1 and calls[0]["world_size"] == 2 and "device_id" not in calls[0]


def test_variables_of_communication_are_recorded_and_no_others() -> None:
    environment = {
        "NCCL_DEBUG": "INFO",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": "x",
        "HOME": "/",
    }
    assert recorded(environment) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "1"}
