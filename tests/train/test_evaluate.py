from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sleeptrain.data.ahead import never
from sleeptrain.data.batch import IGNORE, Batch
from sleeptrain.data.tasks.task import Answered
from sleeptrain.model import hybrid as hybrid_module
from sleeptrain.model.document_layout import first_of_document, window_layout
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.sleep.rounds import Round
from sleeptrain.train.evaluate import ModelRunner, Share, evaluate
from tests.models import VOCABULARY, random_batch, tiny_model
from tests.sleep.oracle import oracle_loss
from tests.sleep.test_step import config


def batches():
    """Batches with different numbers of targets, so that a mean of means would be wrong."""
    return [
        random_batch([[0] * 11, [0] * 3 + [1] * 8], seed=0, target_share=1.0),
        random_batch([[0] * 11], seed=1, target_share=0.3),
    ]


@pytest.mark.parametrize("passes", [1, 3])
def test_every_token_of_a_window_counts_the_same(passes):
    model, sources = tiny_model(), batches()
    losses = evaluate(model, {"text": sources}, config(), 4, [passes], task=None)["loss"][str(passes)]
    counts = [sum(int((b.targets_BT[:, s : s + 4] != IGNORE).sum()) for b in sources) for s in range(0, 11, 4)]
    total = sum(oracle_loss(model, b, 4, passes)[0] for b in sources)
    torch.testing.assert_close(sum(x * n for x, n in zip(losses, counts, strict=True)), float(total.detach()))


def test_a_window_without_targets_has_no_loss():
    batch = random_batch([[0] * 8])
    batch.targets_BT[:, :4] = IGNORE
    losses = evaluate(tiny_model(), {"text": [batch]}, config(), 4, [1, 2], task=None)["loss"]
    assert losses["1"][0] is None and losses["2"][0] is None and losses["2"][1] > 0


class Recording:
    """A task that records its arguments."""

    def __init__(self) -> None:
        self.calls: list[list[Answered]] = []

    def metrics(self, answered: Sequence[Answered]) -> dict[str, Any]:
        self.calls.append(list(answered))
        return {"accuracy": len(self.calls) / 4, "share": {"a": 0.5}}

    def guessing(self) -> dict[str, float]:
        return {"chance": 0.25}


@pytest.mark.parametrize(("when", "window"), [("unlabelled", 6), ("every", 4), ("unlabelled", 2)])
def test_a_task_gets_the_answer_of_the_model_at_each_target(when: str, window: int) -> None:
    """All targets of two batches, against logits of the plain recurrence over full rows, where nothing sleeps."""
    model, task = tiny_model(["gated_deltanet"]), Recording()
    sources = [
        random_batch([[b] * 6 for b in range(5)], target_share=0.4),
        random_batch([[b] * 6 for b in range(3)], seed=1, target_share=0.4),
    ]
    sources[0].targets_BT[1] = IGNORE
    settings = config(sleep__when=when, sleep__conv_state="carry")
    result = evaluate(model, {"task": sources}, settings, window, [1], task)  # type: ignore[arg-type]
    assert result["accuracy"] == {"1": 0.25} and result["metrics"] == {"1": {"share": {"a": 0.5}}}
    assert result["guessing"] == {"chance": 0.25}
    [answered] = task.calls
    assert [a.batch for a in answered] == sources
    for batch, a in zip(sources, answered, strict=True):
        with torch.no_grad():
            x, _ = model.run(
                model.embed(batch.tokens_BT),
                model.empty_state(),
                window_layout(batch.documents_BT, first_of_document(batch.documents_BT)),
            )
            logits_BTV = model.logits(x)
        wanted_BT = batch.targets_BT != IGNORE
        best_BT = torch.where(wanted_BT, logits_BTV.argmax(-1), IGNORE)
        assert torch.equal(a.predicted_BT, best_BT)
        assert torch.equal(a.right_BT, wanted_BT & (best_BT == batch.targets_BT))
        loss_BT = torch.zeros(batch.targets_BT.shape)
        loss_BT[wanted_BT] = F.cross_entropy(
            logits_BTV[wanted_BT], batch.targets_BT[wanted_BT], reduction="none"
        ).float()  # fmt: skip
        torch.testing.assert_close(a.loss_BT, loss_BT)


@pytest.mark.parametrize("when", ["every", "unlabelled"])
def test_logits_are_read_some_rows_at_a_time_with_equal_results(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answers() -> tuple[dict[str, Any], list[Answered]]:
        task = Recording()
        found = evaluate(tiny_model(), {"task": batches()}, config(sleep__when=when), 4, [2], task)  # type: ignore[arg-type]
        return found, task.calls[0]

    (whole, all_at_once), largest, logits = answers(), [0], Hybrid.logits
    monkeypatch.setattr(hybrid_module, "MOST_LOGITS", 2 * VOCABULARY)

    def watched(self: Hybrid, x_ND: torch.Tensor) -> torch.Tensor:
        largest[0] = max(largest[0], len(x_ND))
        return logits(self, x_ND)

    monkeypatch.setattr(Hybrid, "logits", watched)
    parts, in_parts = answers()
    assert largest == [2]
    torch.testing.assert_close(parts["loss"], whole["loss"])
    for a, b in zip(in_parts, all_at_once, strict=True):
        assert torch.equal(a.predicted_BT, b.predicted_BT)
        torch.testing.assert_close(a.loss_BT, b.loss_BT)


def test_each_number_of_passes_is_judged_by_itself() -> None:
    task, batch = Recording(), random_batch([[0] * 8])
    batch.targets_BT[:, :4] = IGNORE
    model = tiny_model()
    result = evaluate(model, {"task": [batch]}, config(sleep__when="unlabelled"), 4, [1, 3], task)  # type: ignore[arg-type]
    assert result["accuracy"] == {"1": 0.25, "3": 0.5}
    [one], [three] = task.calls
    assert not torch.equal(one.loss_BT, three.loss_BT)


def test_a_stop_rule_is_judged_with_the_passes_that_it_leaves() -> None:
    task, model = Recording(), tiny_model()
    batch = random_batch([[0] * 8, [0] * 2 + [1] * 6, [0] * 4 + [1] * 4])
    batch.targets_BT[:, :4] = IGNORE

    def with_rule(threshold: float) -> Any:
        stop = config(sleep__when="unlabelled", sleep__stop="change", sleep__stop_threshold=threshold)
        return evaluate(model, {"task": [batch]}, stop, 4, [1, 3], task)  # type: ignore[arg-type]

    fixed = evaluate(model, {"task": [batch]}, config(sleep__when="unlabelled"), 4, [1, 3], task)  # type: ignore[arg-type]
    assert "passes" not in fixed
    for threshold, like in ((0.0, "3"), (10.0, "1")):
        result = with_rule(threshold)
        assert result["passes"] == {"1": 1.0, "3": float(like)}
        assert result["loss"]["3"] == pytest.approx(fixed["loss"][like])
        passes_B = task.calls[-1][0].passes_B
        assert passes_B[:2].tolist() == [float(like)] * 2 and passes_B[2].isnan(), "row 2 has no window that sleeps"


def test_several_sets_are_separate_and_averaged_by_their_targets():
    model, (first, second) = tiny_model(), batches()
    both = evaluate(model, {"a": [first], "b": [second]}, config(), 4, [1, 2], task=None)
    for name, batch in (("a", first), ("b", second)):
        alone = evaluate(model, {name: [batch]}, config(), 4, [1, 2], task=None)
        assert "sets" not in alone
        assert both["sets"][name] == alone
    joined = evaluate(model, {"both": [first, second]}, config(), 4, [1, 2], task=None)
    for passes, losses in joined["loss"].items():
        assert both["loss"][passes] == pytest.approx(losses)


def _joined(source: list[Batch], size: int, in_step: bool = False) -> list[Any]:
    """The result and the batches run by each of `size` replicas, whose numbers are joined by hand."""
    posted: list[torch.Tensor] = []

    def post(numbers: torch.Tensor) -> torch.Tensor:
        posted.append(numbers)
        return numbers

    def replica(rank: int, join: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        share, stops, ran = Share(rank, size, True, in_step, join), [0], [0]

        def stop() -> bool:
            stops[0] += 1
            return False

        class Counted(ModelRunner):
            def window_losses(self, *arguments: Any) -> Any:
                ran[0] += 1
                return super().window_losses(*arguments)

        task = Recording()
        result = evaluate(model, {"a": source, "b": source[:1]}, config(), 4, [1, 2], task, Counted(model), stop, share)  # type: ignore[arg-type]
        answers = [(a.predicted_BT.tolist(), a.loss_BT.tolist()) for call in task.calls for a in call]
        return result, answers, stops[0], ran[0]

    model = tiny_model()
    for rank in range(size):
        replica(rank, post)
    total = torch.stack(posted).sum(0)
    return [replica(rank, lambda _: total) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_replicas_run_their_share_of_the_batches_and_get_the_same_result(size: int) -> None:
    source = [*batches(), *batches(), random_batch([[0] * 11], seed=5)]
    [(expected, answers, _, all_runs)] = _joined(source, 1)
    replicas = _joined(source, size)
    assert sum(ran for *_, ran in replicas) == all_runs == 2 * 6, "each batch is run once"
    assert len({stops for *_, stops, _ in replicas}) == 1, "all ask equally often whether the run stops"
    for result, found, *_ in replicas:
        assert found == answers
        for n in ("1", "2"):
            torch.testing.assert_close(result["loss"][n], expected["loss"][n], rtol=1e-14, atol=0)
            for name in ("a", "b"):
                torch.testing.assert_close(
                    result["sets"][name]["loss"][n], expected["sets"][name]["loss"][n], rtol=1e-14, atol=0
                )


def test_numbers_of_a_process_that_does_not_know_them_do_not_count() -> None:
    seen: list[torch.Tensor] = []

    def join(numbers: torch.Tensor) -> torch.Tensor:
        seen.append(numbers)
        return numbers

    evaluate(tiny_model(), {"a": batches()}, config(), 4, [1], None, share=Share(counts=False, join=join))
    [numbers] = seen
    assert len(numbers) == 3 and not bool(numbers.any())


def test_replicas_that_gather_weights_together_run_the_same_modules_in_turn() -> None:
    """Batches 0 to 3 have two kinds of rounds, and the last turn of two replicas has one batch."""
    predicts, sleeps, other = (
        Round(0, 0, 4, 1, (0,), loss=True),
        Round(0, 0, 4, 2, (0,)),
        Round(0, 0, 4, 1, (1,), loss=True),
    )
    plans = [[predicts], [other], [predicts], [predicts, sleeps], [predicts]]
    turns = [list(Share(rank, 2, in_step=True).turns(plans, never)) for rank in range(2)]
    assert turns[0] == [(0, True), (2, True), (3, False), (4, True)]
    assert turns[1] == [(1, True), (2, False), (3, True), (4, False)]
    assert [list(Share(rank, 2).turns(plans, never)) for rank in range(2)] == [
        [(0, True), (2, True), (4, True)],
        [(1, True), (3, True)],
    ]


@pytest.mark.parametrize("size", [2, 3])
def test_their_result_is_that_of_all_batches(size: int) -> None:
    source = [*batches(), *batches(), random_batch([[0] * 11], seed=5)]
    [(expected, answers, _, _)] = _joined(source, 1)
    for result, own, _, _ in _joined(source, size, in_step=True):
        assert own == answers
        torch.testing.assert_close(result["loss"], expected["loss"])
