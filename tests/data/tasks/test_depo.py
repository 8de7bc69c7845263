from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from sleeptrain.config.schema import DepoConfig
from sleeptrain.data.batch import IGNORE, PAD, Batch
from sleeptrain.data.tasks import depo
from sleeptrain.data.tasks.depo import Depo
from sleeptrain.data.tasks.task import Answered
from sleeptrain.errors import ConfigError

PAPER = DepoConfig()
SMALL = DepoConfig(nodes=9, hops=4, symbols=5, max_word=2, queries=4)
WINDOWS = replace(SMALL, windows=3)  # each with room for six edges of four tokens


class Read:
    """The edges, questions and positions of targets of a row, read token by token."""

    def __init__(self, config: DepoConfig, batch: Batch, row: int) -> None:
        self.config = config
        tokens = batch.tokens_BT[row].tolist()
        self.context = 72 if config is WINDOWS else 2 * config.nodes * config.max_word
        self.pads = batch.documents_BT[row].tolist().count(PAD)
        marker = 2 * config.symbols + config.hops + 1
        words = self.words([t for t in tokens[: self.context] if t not in (0, marker + 1)])
        self.edges = list(zip(words[::2], words[1::2], strict=True))
        self.questions, self.answers = [], []
        at = self.context
        while at < len(tokens) and tokens[at]:
            hops = tokens[at] - 2 * config.symbols
            assert 1 <= hops <= config.hops
            start = tokens.index(marker, at)
            [origin] = self.words(tokens[at + 1 : start])
            end = start + 1
            while tokens[end] <= config.symbols:
                end += 1
            self.questions.append((hops, origin, tuple(tokens[start + 1 : end + 1])))
            self.answers += range(start, end + 1)
            at = end + 1

    def words(self, tokens: list[int]) -> list[tuple[int, ...]]:
        """Cuts after each token that ends a word."""
        found, word = [], list[int]()
        for token in tokens:
            assert 1 <= token <= 2 * self.config.symbols
            word.append(token)
            if token > self.config.symbols:
                found.append(tuple(word))
                word = []
        assert not word
        return found


@pytest.mark.parametrize("config", [PAPER, SMALL, replace(SMALL, max_word=1, symbols=24), WINDOWS])
@pytest.mark.parametrize("held_out", [False, True])
def test_answers_are_those_of_a_walk_over_the_edges(config: DepoConfig, held_out: bool) -> None:
    task = Depo(config)
    batch = task.held_out(0, 30) if held_out else task.rows(3, 0, 30)
    for row in range(30):
        read = Read(config, batch, row)
        following = dict(read.edges)
        assert len(following) == len(read.edges) == len(set(following.values())), "every node has one successor"
        assert config.min_nodes <= len(following) <= config.nodes and not (held_out and len(following) < config.nodes)
        node = first = next(iter(following))
        for step in range(1, len(following) + 1):
            node = following[node]
            assert (node == first) == (step == len(following)), "one cycle through all nodes"
        assert len(read.questions) == min(config.queries, len(following))
        assert len({origin for _, origin, _ in read.questions}) == len(read.questions)
        for hops, origin, answer in read.questions:
            for _ in range(hops):
                origin = following[origin]
            assert origin == answer


@pytest.mark.parametrize("config", [PAPER, SMALL])
def test_loss_is_on_the_marker_and_the_answer_and_pads_are_on_the_left(config: DepoConfig) -> None:
    batch = Depo(config).rows(0, 0, 20)
    assert batch.tokens_BT.shape[1] == (360 if config is PAPER else 36 + 4 * 6)
    for row in range(20):
        read = Read(config, batch, row)
        predicted = (batch.targets_BT[row] != IGNORE).nonzero().flatten().tolist()
        assert predicted == [at - 1 for at in read.answers]
        assert batch.targets_BT[row][predicted].tolist() == batch.tokens_BT[row][read.answers].tolist()
        valid = (batch.documents_BT[row] != PAD).nonzero().flatten().tolist()
        assert valid == list(range(valid[0], valid[-1] + 1)) and valid[0] <= read.context <= valid[-1]
        assert batch.documents_BT[row, read.context - 1] != PAD, "the context ends where the questions begin"
        assert (batch.tokens_BT[row] == 0).tolist() == (batch.documents_BT[row] == PAD).tolist()


def test_hops_sizes_starts_and_lengths_have_their_distributions() -> None:
    batch = Depo(PAPER).rows(1, 0, 1500)
    reads = [Read(PAPER, batch, row) for row in range(1500)]
    hops = Counter(hops for read in reads for hops, _, _ in read.questions)
    total = hops.total()
    assert set(hops) == set(range(1, 17))
    assert max(abs(count / total - 1 / 16) for count in hops.values()) < 0.008
    sizes = Counter(len(read.edges) for read in reads)
    weights = {n: 1 / (n + math.sqrt(75)) for n in range(3, 76)}
    expected = sum(n * w for n, w in weights.items()) / sum(weights.values())
    assert sum(n * count for n, count in sizes.items()) / 1500 == pytest.approx(expected, rel=0.06)
    singles = [len(word) == 1 for read in reads if len(read.edges) < 6 for word, _ in read.edges]
    assert sum(singles) / len(singles) == pytest.approx(0.5, abs=0.05)
    places = [[edge[0] for edge in r.edges].index(r.questions[0][1]) / (len(r.edges) - 1) for r in reads]
    assert sum(places) / 1500 == pytest.approx(0.5, abs=0.03), "what is asked for stands anywhere"


def test_held_out_hops_are_powers_of_two_equally_often() -> None:
    batch = Depo(PAPER).held_out(0, 400)
    hops = Counter(hops for row in range(400) for hops, _, _ in Read(PAPER, batch, row).questions)
    assert set(hops) == {1, 2, 4, 8, 16} and min(hops.values()) > 0.17 * 4000


def test_metrics_against_a_count_by_hand() -> None:
    """Two questions of each row are wrong: one in its marker only, one in its word. A marker costs 1."""
    task = Depo(SMALL)
    batch = task.held_out(0, 6)
    predicted_BT, loss_BT = batch.targets_BT.clone(), torch.zeros(batch.targets_BT.shape)
    right, total = Counter[int](), Counter[int]()
    losses: dict[int, list[float]] = {k: [] for k in (1, 2, 4)}
    for row in range(6):
        read = Read(SMALL, batch, row)
        at = iter(read.answers)
        for number, (hops, _, answer) in enumerate(read.questions):
            marker, *word = [next(at) - 1 for _ in range(1 + len(answer))]
            loss_BT[row, marker], loss_BT[row, word] = 1.0, float(hops)
            losses[hops] += [1.0, *[float(hops)] * len(word)]
            if number == 0:
                predicted_BT[row, marker] = 1
            if number == 1:
                predicted_BT[row, word[-1]] = 0
            total[hops] += 1
            right[hops] += number != 1
    found = task.metrics([Answered(part, predicted_BT[s], loss_BT[s]) for part, s in (
        (batch.rows(0, 4), slice(0, 4)), (batch.rows(4, 6), slice(4, 6))
    )])  # fmt: skip
    assert found["accuracy"] == 0.75
    assert found["accuracy_by_hops"] == pytest.approx({f"k={k}": right[k] / total[k] for k in sorted(total)})
    assert found["loss_by_hops"] == pytest.approx({f"k={k}": sum(losses[k]) / len(losses[k]) for k in sorted(total)})


def test_windows_of_a_row_have_few_and_many_edges() -> None:
    """Edges, then ends up to the window's end: no pad, which would part the document."""
    task, end = Depo(WINDOWS), 2 * 5 + 4 + 2
    batch = task.rows(0, 0, 60)
    assert task.vocab_size == end + 1 and batch.tokens_BT.shape[1] == 72 + 4 * 6
    counts = list[tuple[int, ...]]()
    for row, tokens in enumerate(batch.tokens_BT.tolist()):
        read, of_row = Read(WINDOWS, batch, row), list[int]()
        for first in (0, 24, 48):
            window = tokens[first : first + 24]
            inside = window[: window.index(end)] if end in window else window
            assert set(window[len(inside) :]) <= {end} and 0 not in inside
            of_row.append(sum(token > WINDOWS.symbols for token in inside) // 2)
        assert sum(of_row) == len(read.edges) and max(of_row) <= 6
        assert [edge for edges in task.edges_of_windows(tokens) for edge in edges] == read.edges
        assert [len(edges) for edges in task.edges_of_windows(tokens)] == of_row
        counts.append(tuple(of_row))
    assert bool((batch.documents_BT[:, :72] != PAD).all())
    assert {n for of_row in counts for n in of_row} == set(range(7)) and len(set(counts)) > 25
    means = [sum(of_row[k] for of_row in counts) / 60 for k in range(3)]
    assert max(means) - min(means) < 1.2, "no window has more than another"
    assert Depo(SMALL).identity().keys() == task.identity().keys() - {"data.depo.windows"}


def test_scores_by_the_edges_of_windows() -> None:
    """Answers are right where the window with the edge to the answer has less than four edges."""
    task = Depo(WINDOWS)
    batch = task.held_out(0, 8)
    predicted_BT, total, passes_BK = batch.targets_BT.clone(), Counter[int](), torch.full((8, 4), torch.nan)
    for row, tokens in enumerate(batch.tokens_BT.tolist()):
        read, windows = Read(WINDOWS, batch, row), task.edges_of_windows(tokens)
        passes_BK[row, :3] = torch.tensor([1.0 + len(edges) for edges in windows])
        at = iter(read.answers)
        for _, _, answer in read.questions:
            _, *word = [next(at) - 1 for _ in range(1 + len(answer))]
            [edges] = [len(edges) for edges in windows if answer in [to for _, to in edges]]
            total[edges] += 1
            if edges >= 4:
                predicted_BT[row, word[0]] = 0
    found = task.metrics([Answered(batch, predicted_BT, torch.zeros(batch.targets_BT.shape), passes_BK)])
    assert found["accuracy_by_edges"] == {f"edges={n}": float(n < 4) for n in sorted(total)}
    by_edges = found["passes_by_edges"]
    assert len(by_edges) > 3 and all(by_edges[f"edges={n}"] == n + 1 for n in range(7) if f"edges={n}" in by_edges)
    without = task.metrics([Answered(batch, predicted_BT, torch.zeros(batch.targets_BT.shape))])
    assert without == {name: value for name, value in found.items() if name != "passes_by_edges"}


def test_the_plateau_of_a_model_that_knows_only_the_nodes() -> None:
    """A uniform guess over the other nodes costs ln 74 for each answer of held-out rows, 1.66 nats for each target."""
    task = Depo(PAPER)
    batch = task.held_out(0, 100)
    answers = [q for row in range(100) for q in Read(PAPER, batch, row).questions]
    targets = int((batch.targets_BT != IGNORE).sum())
    lines = task.guessing()
    assert lines["nodes_loss"] == pytest.approx(len(answers) * math.log(74) / targets, rel=0.01)
    assert lines["nodes_loss"] == pytest.approx(1.656, abs=0.01)
    assert lines["nodes_accuracy"] == 1 / 74


def test_the_plateau_where_hops_go_around_the_cycle() -> None:
    """In a cycle of 4 nodes, the question of k = 4 leads back to its start. To answer it, a model needs no edge."""
    lines = Depo(DepoConfig(nodes=4, hops=4, symbols=50, max_word=1)).guessing()
    assert lines["nodes_loss"] == pytest.approx(2 / 3 * math.log(3) / 2)
    assert lines["nodes_accuracy"] == pytest.approx(1 / 3 + 2 / 3 / 3)


def test_too_few_cycles_to_hold_some_out_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depo, "is_held_out", lambda content: False)
    with pytest.raises(ConfigError, match=r"data\.depo\.nodes=9.*too few"):
        Depo(SMALL)


def test_names_that_make_one_cycle_only_are_refused_before_training() -> None:
    with pytest.raises(ConfigError, match=r"data\.depo\.nodes=2, .*too few"):
        Depo(DepoConfig(nodes=2, min_nodes=2, hops=1, symbols=4, max_word=1, queries=1))


def test_text() -> None:
    assert Depo(SMALL).text([0, 3, 7, 6, 11, 14, 15, 10]) == "3- 2 1 +1: +4: = 5"
