"""Rounds of a batch under a stop rule: after each pass every row goes on or stops, and the plan follows.

The passes that the rule chose are returned. A plan made from them (`plan_rounds`) has the same results with no rule, so
training plans with them, and its loop, gradients and costs are those of any plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from sleeptrain.data.batch import Batch
from sleeptrain.model.hybrid import Hybrid
from sleeptrain.model.state import FastWeights
from sleeptrain.sleep.features import Features, select
from sleeptrain.sleep.inputs import RoundInputs, inputs_of_rounds
from sleeptrain.sleep.loop import LoopSettings, ReadLogits, RoundContext, run_on_rows, window_loss
from sleeptrain.sleep.round_layouts import RoundLayouts, carried_documents
from sleeptrain.sleep.rounds import Round, windows_of
from sleeptrain.sleep.stop_rule import Passed, StopRule, pooled

# Called with a window, its rows that may go on, and what a rule reads of them.
OnPassed = Callable[[int, tuple[int, ...], Passed], None]


@dataclass(frozen=True)
class RuledRounds:
    """The rounds of a batch, and the stop rule that ends the sleep of its rows.

    rounds: planned with the most passes; rows leave the plan as the rule says.
    batch, settings, read_logits, retained_BC: as in `run_rounds`.
    on_passed: as in `StoppedLoop`.
    """

    batch: Batch
    rounds: Sequence[Round]
    settings: LoopSettings
    rule: StopRule
    read_logits: ReadLogits | None = None
    retained_BC: torch.Tensor | None = None
    on_passed: OnPassed | None = None

    def reporting(self, on_round: Callable[[Round], None]) -> RuledRounds:
        """The same, with a call before each round."""
        return replace(self, settings=replace(self.settings, on_round=on_round))


@dataclass(frozen=True)
class Stopped:
    """The results of a batch's rounds under a stop rule.

    losses: the summed cross entropy of each window that predicts.
    state: the memory after the last window.
    passes_KB: the passes of each row in each window of the batch, by window; 1 where the row does not sleep.
    scores: {(window, pass): (rows, their scores)} of all decisions.
    rounds: those that ran, each with its rows.
    """

    losses: dict[int, torch.Tensor]
    state: FastWeights
    passes_KB: list[list[int]]
    scores: dict[tuple[int, int], tuple[tuple[int, ...], list[float]]]
    rounds: list[Round]

    @property
    def num_decisions(self) -> int:
        """Decisions, each of a row after a pass."""
        return sum(len(rows) for rows, _ in self.scores.values())


def deciding_rounds(rounds: Sequence[Round]) -> list[Round]:
    """The rounds that must run to decide all passes: none after the last sleep pass, and none predicts."""
    last = max((index for index, r in enumerate(rounds) if not r.is_wake), default=-1)
    return [replace(r, loss=False) for r in rounds[: last + 1]]


@torch.no_grad()
def run_until_stopped(model: Hybrid, ruled: RuledRounds, state: FastWeights) -> Stopped:
    """Runs rounds without gradients until the rule stops them. state: the memory before the first round."""
    batch, rounds, settings, retained_BC = ruled.batch, ruled.rounds, ruled.settings, ruled.retained_BC
    if retained_BC is None:
        retained_BC = carried_documents(rounds, state)
    layouts = RoundLayouts(batch, model, settings.boundary.sliding_window, retained_BC)
    num_rows, num_tokens = batch.tokens_BT.shape
    num_windows = -(-num_tokens // max((r.stop - r.start for r in rounds), default=num_tokens))
    passes_KB = [[1] * num_rows for _ in range(num_windows)]

    def inputs_of(r: Round) -> RoundInputs:
        return inputs_of_rounds(batch, [r], layouts, model.device)[0]

    context = RoundContext(model, settings, ruled.read_logits)
    loop = StoppedLoop(context, num_rows, inputs_of, ruled.rule, ruled.on_passed)
    for group in windows_of(rounds):
        state = loop.window(group, state, passes_KB[group[0].window])
    return Stopped(loop.losses, state, passes_KB, loop.scores, loop.rounds)


class StoppedLoop:
    """Runs windows of `num_rows` rows under a stop rule.

    inputs_of: the inputs of a round, which may have fewer rows than were planned.
    on_passed: called with the window, the rows and what the rule reads of them, before each decision.
    losses, scores, rounds: of all rounds so far, as in `Stopped`.
    """

    def __init__(
        self,
        context: RoundContext,
        num_rows: int,
        inputs_of: Callable[[Round], RoundInputs],
        rule: StopRule,
        on_passed: OnPassed | None = None,
    ) -> None:
        self._context, self._num_rows, self._inputs_of, self._rule = context, num_rows, inputs_of, rule
        self._on_passed = on_passed
        self.losses: dict[int, torch.Tensor] = {}
        self.scores: dict[tuple[int, int], tuple[tuple[int, ...], list[float]]] = {}
        self.rounds: list[Round] = []

    def window(self, rounds: Sequence[Round], boundary_state: FastWeights, passes_B: list[int]) -> FastWeights:
        """The memory after a window. passes_B: the passes of each row are written into it."""
        state, features = boundary_state, list[Features]()
        for r in rounds:
            if r.is_wake:
                # Nobody knows yet which rows this pass is the last of: the coda runs for all, and features are kept.
                output, state = self._round(replace(r, coda=True), [], state, boundary_state)
                features.append(output)
        sleeps = [r for r in rounds if not r.is_wake]
        if not sleeps:
            return state
        rows, inputs = sleeps[0].rows, self._inputs_of(sleeps[0])
        passed = passed_rows(1, select(features, rows, inputs), inputs, boundary_state, state, rows)
        return self.sleep(sleeps, features, passed, state, boundary_state, passes_B)

    def sleep(
        self,
        rounds: Sequence[Round],
        features: Sequence[Features],
        passed: Passed,
        state: FastWeights,
        boundary_state: FastWeights,
        passes_B: list[int],
    ) -> FastWeights:
        """The memory after the sleep passes of a window.

        rounds: passes 2..N. features, passed: of the wake pass; `passed` has the rows of the first round.
        """
        most, awake = rounds[-1].pass_index, rounds[0].rows
        awake, last = self._decide(rounds[0].window, awake, passed, None, most)
        for r in rounds:
            if not awake:
                break
            is_last = r.pass_index == most
            r = replace(_of_rows(r, awake), coda=True, state_only=is_last)
            for row in awake:
                passes_B[row] = r.pass_index
            before = state
            output, state = self._round(r, features, state, boundary_state)
            features = [output]
            if not is_last:
                passed = passed_rows(r.pass_index, output, self._inputs_of(r), before, state, awake)
                awake, last = self._decide(r.window, awake, passed, last, most)
        return state

    def _round(
        self, r: Round, previous: Sequence[Features], state: FastWeights, boundary_state: FastWeights
    ) -> tuple[Features, FastWeights]:
        inputs = self._inputs_of(r)
        self.rounds.append(r)
        output, state, x_ND = run_on_rows(self._context, self._num_rows, r, inputs, previous, state, boundary_state)
        if x_ND is not None:
            loss = window_loss(self._context, x_ND, r, inputs)
            self.losses[r.window] = self.losses[r.window] + loss if r.window in self.losses else loss
        return output, state

    def _decide(
        self, window: int, rows: tuple[int, ...], passed: Passed, last: Passed | None, most: int
    ) -> tuple[tuple[int, ...], Passed]:
        """The rows that go on, and what the next decision reads of them."""
        scores_R = self._rule.scores(passed, last, most)
        if self._on_passed is not None:
            self._on_passed(window, rows, passed)
        stops = self._rule.stops(scores_R, passed.pass_index).tolist()
        self.scores[window, passed.pass_index] = (rows, scores_R.tolist())
        kept = [i for i, stop in enumerate(stops) if not stop]
        index_R = torch.tensor(kept, device=scores_R.device, dtype=torch.long)
        return tuple(rows[i] for i in kept), passed.rows(index_R)


def passed_rows(
    pass_index: int,
    features: Features,
    inputs: RoundInputs,
    before: FastWeights,
    after: FastWeights,
    rows: tuple[int, ...],
) -> Passed:
    """What a rule reads of these rows. inputs: of a sleep pass over them, whose tokens are read."""
    assert features.output_RLD is not None and features.core_input_RLD is not None
    step_RLD = features.output_RLD - features.core_input_RLD
    if inputs.layout.valid_RL is not None:
        step_RLD = torch.where(inputs.layout.valid_RL.unsqueeze(-1), step_RLD, 0)
    mean_RD = pooled(features.output_RLD, inputs.layout.valid_RL)
    rows_R = torch.tensor(rows, device=step_RLD.device)
    return Passed(pass_index, step_RLD, mean_RD, before.rows(rows_R), after.rows(rows_R))


def _of_rows(r: Round, rows: tuple[int, ...]) -> Round:
    if rows == r.rows:
        return r
    work = None if r.work is None else tuple(r.work[r.rows.index(row)] for row in rows)
    return replace(r, rows=rows, work=work)
