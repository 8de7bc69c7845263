"""Answers of Depo by the windows that hold the edges of their path."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from sleeptrain.config.schema import DepoConfig
from sleeptrain.data.tasks.task import Answered
from sleeptrain.errors import DataError
from tests.train.test_trainer import run
from tools.depo_paths import Paths


@pytest.mark.parametrize("max_word", [1, 2])
def test_answers_are_grouped_by_the_windows_of_their_edges(max_word: int):
    """Only answers whose second edge is in an earlier window are right; the test reads the text in its own way."""
    config = DepoConfig(nodes=6, hops=2, symbols=12, max_word=max_word, queries=3)
    window = 6 * max_word
    task = Paths(config, window, 2)
    batch = task.held_out(0, 200)
    predicted, wanted = batch.targets_BT.clone(), dict[tuple[int, int], int]()
    for row, tokens in enumerate(batch.tokens_BT.tolist()):
        words = list[tuple[str, int]]()
        for at, token in enumerate(tokens[: 2 * window]):
            if at and tokens[at - 1] in range(1, 13):
                words[-1] = (words[-1][0] + f" {token}", at // window + 1)
            elif token:
                words.append((str(token), at // window + 1))
        after = {node: edge for (node, _), edge in zip(words[::2], words[1::2], strict=True)}
        text = " " + " ".join(map(str, tokens[2 * window :]))
        for question in text.split(" 26 ")[1:]:  # +2
            middle, first = after[question.split(" 27")[0]]
            answer, second = after[middle]
            wanted[first, second] = wanted.get((first, second), 0) + 1
            if (first, second) != (2, 1):
                start = 2 * window + len(text[: text.index(f" 26 {question}")].split())
                stop = start + len(question.split(" 27")[0].split()) + len(answer.split())
                predicted[row, stop] = 0
    found = task.metrics([Answered(batch, predicted, torch.zeros(batch.targets_BT.shape))])
    assert len(wanted) == 4
    assert found["paths"] == {path: (float(path == (2, 1)), count) for path, count in sorted(wanted.items())}
    assert found["accuracy"] == wanted[2, 1] / sum(wanted.values())


def test_hops_that_no_question_has_are_refused() -> None:
    task = Paths(DepoConfig(nodes=6, hops=4, symbols=12, max_word=1, queries=3), 6, 3)
    batch = task.held_out(0, 20)
    with pytest.raises(DataError, match=r"--hops 3: no held-out question"):
        task.metrics([Answered(batch, batch.targets_BT, torch.zeros(batch.targets_BT.shape))])


@pytest.mark.slow
def test_a_run_is_judged(tmp_path):
    model = ["model.dim=16", "model.ffn_dim=16", "sleep.passes=2", "data.depo.nodes=6", "sleep.window=6"]
    depo = ["data=depo", "data.depo={nodes: 6, hops: 2, symbols: 12, max_word: 1, queries: 1, validation_samples: 64}"]
    run(tmp_path, *depo, *model, "data.batch=16", "train.tokens=200")
    command = [sys.executable, "tools/depo_paths.py", str(tmp_path / "r")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    assert done.stdout.startswith("N=2, 2 hops: ") and done.stdout.count("  windows ") == 4
    run(tmp_path / "other")
    refused = subprocess.run([*command[:2], str(tmp_path / "other" / "r")], capture_output=True, text=True, timeout=240)
    assert refused.returncode == 2 and "only Depo has paths" in refused.stderr
