"""GPUs as a driver reports them. No test here needs one."""

from __future__ import annotations

import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sleeptrain.doctor import device
from sleeptrain.doctor.finding import FAILED, OK, SKIPPED
from tests.doctor.cases import alone

# The parts of the output of `nvidia-smi -q -x` for one GPU that are read.
HEALTHY = """
<gpu id="00000000:19:00.0">
  <uuid>GPU-a</uuid>
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <fb_memory_usage><total>81559 MiB</total><reserved>551 MiB</reserved><used>1 MiB</used><free>81007 MiB</free></fb_memory_usage>
  <ecc_errors>
    <volatile><sram_correctable>7</sram_correctable><dram_uncorrectable>0</dram_uncorrectable></volatile>
    <aggregate><dram_uncorrectable>12</dram_uncorrectable></aggregate>
  </ecc_errors>
  <remapped_rows><remapped_row_pending>No</remapped_row_pending><remapped_row_failure>No</remapped_row_failure></remapped_rows>
  <gpu_recovery_action>None</gpu_recovery_action>
  <clocks_event_reasons>
    <clocks_event_reasons_gpu_idle>Active</clocks_event_reasons_gpu_idle>
    <clocks_event_reasons_hw_slowdown>Not Active</clocks_event_reasons_hw_slowdown>
    <clocks_event_reasons_hw_thermal_slowdown>Not Active</clocks_event_reasons_hw_thermal_slowdown>
  </clocks_event_reasons>
</gpu>
"""  # noqa: E501
ILL = [
    ("<free>81007 MiB", "<free>50000 MiB", "only 48.8 of 79.6 GiB"),
    ("<dram_uncorrectable>0<", "<dram_uncorrectable>3<", "3 uncorrectable memory errors"),
    ("pending>No", "pending>Yes", "remapped row pending"),
    ("failure>No", "failure>Yes", "remapped row failure"),
    ("action>None", "action>Reboot", "asks for: Reboot"),
    ("hw_thermal_slowdown>Not Active", "hw_thermal_slowdown>Active", "hw thermal slowdown"),
    ("hw_slowdown>Not Active", "hw_slowdown>Active", "hw slowdown"),
]


def report(*gpus: str) -> str:
    return f"<nvidia_smi_log><driver_version>590.44</driver_version>{''.join(gpus)}</nvidia_smi_log>"


def test_healthy_gpus() -> None:
    finding = device.judge_gpus(report(HEALTHY, HEALTHY), ["GPU-a", "GPU-b"])
    assert finding.state == OK and finding.found == "2 of NVIDIA H100 80GB HBM3, driver 590.44"


def test_gpus_that_this_process_does_not_see_are_ignored() -> None:
    used = HEALTHY.replace("<free>81007 MiB", "<free>50000 MiB").replace("GPU-a", "GPU-b")
    assert device.judge_gpus(report(used, HEALTHY), ["GPU-a"]).state == OK
    assert device.judge_gpus(report(used, HEALTHY), ["GPU-b"]).found.startswith("GPU 0: only")
    assert device.judge_gpus(report(used, HEALTHY), ["GPU-of-a-part"]).state == FAILED


def test_values_that_a_driver_does_not_report_count_as_good() -> None:
    assert device.judge_gpus(report("<gpu><product_name>Tesla</product_name></gpu>"), ["GPU-c"]).state == OK


@pytest.mark.parametrize(("good", "bad", "words"), ILL)
def test_a_bad_gpu_is_named(good: str, bad: str, words: str) -> None:
    assert good in HEALTHY
    finding = device.judge_gpus(report(HEALTHY, HEALTHY.replace(good, bad)), ["GPU-a"])
    assert finding.state == FAILED and finding.found.startswith("GPU 1: ") and words in finding.found
    assert finding.cure


def test_older_drivers_report_throttling_under_another_name() -> None:
    old = HEALTHY.replace("event_reasons", "throttle_reasons").replace("slowdown>Not Active", "slowdown>Active")
    assert "hw slowdown" in device.judge_gpus(report(old), ["GPU-a"]).found


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A driver with the output that a test sets, and torch as on that machine."""
    says = SimpleNamespace(code=0, out=report(HEALTHY), hangs=False)

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        if says.hangs:
            raise subprocess.TimeoutExpired(command, 60)
        return subprocess.CompletedProcess(command, says.code, says.out, "")

    monkeypatch.setattr(device, "has_driver", lambda: True)
    monkeypatch.setattr(device.subprocess, "run", run)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: SimpleNamespace(uuid="a"))
    return says


def test_the_report_of_the_driver_is_read(tmp_path: Path, driver: SimpleNamespace) -> None:
    assert device.check_gpus(alone(tmp_path)).state == OK
    driver.code, driver.out = 15, "Unable to determine the device handle for GPU0000:19:00.0: GPU is lost."
    finding = device.check_gpus(alone(tmp_path))
    assert finding.state == FAILED and "GPU is lost" in finding.found and "--exclude" in finding.cure
    driver.hangs = True
    assert device.check_gpus(alone(tmp_path)).state == FAILED


def test_a_machine_without_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_driver", lambda: False)
    assert device.check_gpus(alone(tmp_path)).state == SKIPPED
    assert device.check_gpus(alone(tmp_path, "train.device=cpu")).state == SKIPPED
    finding = device.check_gpus(alone(tmp_path, "train.device=cuda"))
    assert finding.state == FAILED and "train.device" in finding.cure


def test_torch_without_cuda_beside_a_driver(tmp_path: Path, driver: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = device.check_torch(alone(tmp_path))
    assert finding.state == FAILED and finding.cure == "make GPU=1 install"
    assert device.check_torch(alone(tmp_path, "train.device=cpu")).state == OK


def test_a_driver_too_old_for_torch(tmp_path: Path, driver: SimpleNamespace, monkeypatch) -> None:
    def is_available() -> bool:
        warnings.warn("The NVIDIA driver on your system is too old (found version 11040).", stacklevel=1)
        return False

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    finding = device.check_torch(alone(tmp_path))
    assert finding.state == FAILED and "too old" in finding.found and "CUDA 13.0" in finding.cure
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device.check_torch(alone(tmp_path)).state == OK  # hidden on purpose
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    finding = device.check_torch(alone(tmp_path))
    assert (finding.state, finding.details["devices"]) == (OK, 1)
