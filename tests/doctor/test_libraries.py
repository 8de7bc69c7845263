"""An installed package that does not do what a run needs is red. Its version does not matter."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from sleeptrain.doctor import kernel, libraries
from sleeptrain.doctor.finding import FAILED, OK, SKIPPED, Case, Finding
from tests.doctor.cases import alone, found
from tests.locks import declared

pytestmark = pytest.mark.timeout(180)
CHECKS = ["text", "formats", "generation", "harness", "wandb"]


def test_installed_packages_pass_their_checks(tmp_path: Path) -> None:
    findings = found(CHECKS, tmp_path)
    assert {name: (f.state, f.found) for name, f in findings.items() if f.state != OK} == {}


@pytest.mark.parametrize(
    ("check", "module"),
    [
        (libraries.check_generation, "transformers"),
        (libraries.check_harness, "lm_eval"),
        (libraries.check_formats, "pyarrow"),
        (libraries.check_fla, "fla"),
    ],
)
def test_packages_that_are_not_installed_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: Callable[[Case], Finding], module: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    finding = check(alone(tmp_path))
    assert finding.state == SKIPPED and "not installed" in finding.found


def test_a_changed_call_of_forward_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release of transformers that calls a model with arguments that it does not know."""
    from sleeptrain.hf.model.modeling import SleepForCausalLM

    monkeypatch.setattr(SleepForCausalLM, "forward", lambda self, input_ids: None)
    finding = found(["generation"], tmp_path)["generation"]
    assert finding.state == FAILED and "Error: " in finding.found and "sleeptrain[hf]" in finding.cure


def test_other_tokens_than_a_forward_gives_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sleeptrain.hf.model.modeling import SleepForCausalLM

    def generate(self, input_ids, max_new_tokens, **rest):
        return torch.cat([input_ids, torch.zeros(1, max_new_tokens, dtype=torch.long)], dim=1)

    monkeypatch.setattr(SleepForCausalLM, "generate", generate)
    finding = libraries.check_generation(alone(tmp_path))
    assert finding.state == FAILED and "where forward gives" in finding.found and finding.cure


def test_a_shard_with_other_texts_than_written_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import webdataset

    write = webdataset.TarWriter.write
    monkeypatch.setattr(
        webdataset.TarWriter, "write", lambda self, sample: write(self, {**sample, "npy": sample["npy"][::-1]})
    )
    with pytest.raises(Exception, match=r"damaged|checksum|sha|crc"):  # the doctor reports the exception as a failure
        libraries.check_text(alone(tmp_path))


def test_a_damaged_wandb_is_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would go on without it and log a line. The check is a failure."""
    broken = ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", broken)
    finding = libraries.check_wandb(alone(tmp_path))
    assert finding.state == FAILED and "wandb" in finding.found and "wandb.mode=disabled" in finding.cure
    assert libraries.check_wandb(alone(tmp_path, "wandb.mode=disabled")).state == SKIPPED


@pytest.mark.parametrize(
    ("version", "capability", "is_red"),
    [
        ("3.6.0", (9, 0), True),
        ("3.7.0+gitf797708c.nv26.06", (9, 0), True),
        ("3.7.1+gitf797708c.nv26.7", (9, 0), False),
        ("3.8.0", (9, 0), False),
        ("3.6.0", (8, 0), False),
    ],
)
def test_a_triton_without_gradients_on_hopper(
    monkeypatch: pytest.MonkeyPatch, version: str, capability: tuple[int, int], is_red: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(kernel, "requirements", lambda extra: [r for r in declared(extra) if r.name == "triton"])
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__=version))
    finding = kernel.judge_triton()
    assert (finding is not None) == is_red
    if finding is not None:
        assert finding.state == FAILED and version in finding.found and "torch 2.13" in finding.cure
