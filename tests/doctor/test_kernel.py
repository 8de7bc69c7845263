from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sleeptrain import ops
from sleeptrain.doctor.finding import FAILED, OK
from sleeptrain.doctor.kernel import check_kernel
from tests.doctor.cases import alone

# Tests break the recurrences of a CPU, so they run on it, also on a machine with GPUs.
CPU = "train.device=cpu"


def test_the_recurrences_of_this_machine(tmp_path: Path) -> None:
    finding = check_kernel(alone(tmp_path, CPU))
    assert finding.state == OK and finding.found.startswith("chunked on cpu")


class Louder(torch.autograd.Function):
    """Keeps the values, and makes the gradient a hundredth larger."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient * 1.01


def gradient(position: int) -> Callable:
    def broken(op: Callable) -> Callable:
        def run(*tensors: torch.Tensor, initial_state: torch.Tensor):
            inputs = [*tensors, initial_state]
            inputs[position] = Louder.apply(inputs[position])
            return op(*inputs[:5], initial_state=inputs[5])

        return run

    return broken


def value(position: int) -> Callable:
    def broken(op: Callable) -> Callable:
        def run(*tensors: torch.Tensor, **options: torch.Tensor):
            outputs = list(op(*tensors, **options))
            outputs[position] = outputs[position] + 0.01 * outputs[position].detach().abs().max()
            return tuple(outputs)

        return run

    return broken


def not_a_number(op: Callable) -> Callable:
    return lambda *tensors, **options: tuple(x * float("nan") for x in op(*tensors, **options))


@pytest.mark.parametrize("name", ["gated_delta_rule", "ssd"])
@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (value(0), "output is"),
        (value(1), "state is"),
        (gradient(5), "gradient of initial state"),
        (gradient(3), "gradient of"),
        (not_a_number, "nan"),
    ],
)
def test_a_broken_recurrence_is_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable, words: str
) -> None:
    monkeypatch.setattr(ops, name, broken(getattr(ops, name)))
    finding = check_kernel(alone(tmp_path, CPU))
    assert finding.state == FAILED and finding.found.startswith(name) and words in finding.found
    assert finding.cure
