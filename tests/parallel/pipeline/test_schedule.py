"""The schedule: every task once and after its inputs, no deadlock, bubble and memory as documented.

The rules are written a second time here, from the text of the loop, and the ranks' lists are run against them.
"""

from __future__ import annotations

from collections import Counter, deque

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sleeptrain.errors import ConfigError
from sleeptrain.parallel.pipeline.graph import Kind, Message
from sleeptrain.parallel.pipeline.schedule import (
    Backward,
    Forward,
    HeadBackward,
    HeadForward,
    Receive,
    Schedule,
    Send,
    schedule,
)
from sleeptrain.parallel.pipeline.simulate import simulate
from sleeptrain.parallel.pipeline.stages import PipelineStages
from sleeptrain.parallel.pipeline.task_costs import Costs
from tests.parallel.pipeline.cases import any_plans, any_stages, even_stages, plan

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60, database=None)
MODES = [
    dict(blocking_receives=blocking, rendezvous_sends=rendezvous)
    for blocking in (False, True)
    for rendezvous in (False, True)
]


def layers_run(r, stages: PipelineStages) -> set[int]:
    """The layers from the embedding or the core's first one to the loss, the core's last one or the last state."""
    layers = set(range(0 if r.pass_index == 1 else stages.core[0], len(stages.layers) if r.coda else stages.core[1]))
    if r.state_only:
        stateful = {i for i in layers if stages.sliding or stages.layers[i] != "attention"}
        layers = {i for i in layers if i <= max(stateful, default=-1)}
    return layers


def ranks_of(r, stages: PipelineStages) -> list[int]:
    layers = layers_run(r, stages)
    return [s for s in range(stages.num_stages) if layers & set(range(stages.bounds[s], stages.bounds[s + 1]))]


def core_ranks(stages: PipelineStages) -> list[int]:
    first, last = stages.core
    return [s for s in range(stages.num_stages) if stages.bounds[s] < last and stages.bounds[s + 1] > first]


def fed_by(rounds, index: int) -> list[int]:
    """The rounds whose output a sleep pass reads: the pass before over the same window, for any of its rows."""
    r = rounds[index]
    return [
        i
        for i, other in enumerate(rounds)
        if r.feeds_back
        and other.window == r.window
        and other.pass_index == r.pass_index - 1
        and set(other.rows) & set(r.rows)
    ]


def trained(rounds) -> list[int]:
    """The rounds with a gradient: those after the last loss reach no loss."""
    return [i for i in range(len(rounds)) if any(r.loss for r in rounds[i:])]


class Execution:
    """Runs the lists with blocking receives, and checks before every task that its inputs are on its rank."""

    def __init__(self, made: Schedule):
        self.made, self.stages = made, made.stages
        self.links: dict[tuple[int, int], deque] = {}
        # (rank, "made" or "got", kind, sequence, round that made it, round that reads it)
        self.present: set[tuple] = set()
        self.done: list[set] = [set() for _ in made.ranks]
        core = core_ranks(self.stages)
        self.first_core, self.last_core = core[0], core[-1]
        *self.others, self.last = range(len(made.ranks))

    def run(self) -> None:
        remaining = [deque(actions) for actions in self.made.ranks]
        while any(remaining):
            before = sum(map(len, remaining))
            for rank, actions in enumerate(remaining):
                while actions and self.act(rank, actions[0]):
                    actions.popleft()
            assert sum(map(len, remaining)) < before, "deadlock"
        assert not any(self.links.values()), "sent and not received"
        assert not any(what == "got" for _, what, *_ in self.present), "received and not read"

    def act(self, rank: int, action) -> bool:
        if isinstance(action, Send):
            assert (rank, "made", *action.message) in self.present, f"rank {rank} has nothing to send: {action}"
            self.links.setdefault((rank, action.peer), deque()).append(action.message)
        elif isinstance(action, Receive):
            link = self.links.get((action.peer, rank))
            if not link:
                return False
            assert link.popleft() == action.message, "received in another order than sent"
            self.present.add((rank, "got", *action.message))
        else:
            assert action not in self.done[rank], "done twice"
            run = {
                Forward: self.forward,
                Backward: self.backward,
                HeadForward: self.head_forward,
                HeadBackward: self.head_backward,
            }
            run[type(action)](rank, action.micro_batch, action.round)
            self.done[rank].add(action)
        return True

    def got(self, rank: int, kind: Kind, seq: int, source: int, reader: int) -> None:
        """The rank has received the message, and no other task has read it."""
        self.present.remove((rank, "got", kind, seq, source, reader))

    def forward(self, rank: int, seq: int, index: int) -> None:
        rounds = self.made.plans[seq]
        ranks = ranks_of(rounds[index], self.stages)
        assert rank in ranks
        if rank != ranks[0]:
            self.got(rank, Kind.FEATURES, seq, index, index)
        for source in fed_by(rounds, index) if rank == ranks[0] else ():
            if self.last_core == self.first_core:
                assert Forward(seq, source) in self.done[rank]
            else:
                self.got(rank, Kind.FEATURES, seq, source, index)
        for earlier in range(index):
            assert rank not in ranks_of(rounds[earlier], self.stages) or Forward(seq, earlier) in self.done[rank]
        self.makes(rank, Kind.FEATURES, seq, index)
        if rank == self.last and rounds[index].loss:
            self.makes_of_head(rank, Kind.HEAD_INPUT, seq, index, self.others)

    def backward(self, rank: int, seq: int, index: int) -> None:
        rounds = self.made.plans[seq]
        ranks = ranks_of(rounds[index], self.stages)
        assert Forward(seq, index) in self.done[rank] and index in trained(rounds)
        if self.stages.split_head and rank == self.last and rounds[index].loss:
            assert HeadBackward(seq, index) in self.done[rank]
        if rank != ranks[-1]:
            self.got(rank, Kind.GRADIENT, seq, index, index)
        for reader in trained(rounds):
            has_ranks = bool(ranks_of(rounds[reader], self.stages))
            if rank == self.last_core and has_ranks and index in fed_by(rounds, reader):
                if self.last_core == self.first_core:
                    assert Backward(seq, reader) in self.done[rank]
                else:
                    self.got(rank, Kind.GRADIENT, seq, reader, index)
            if reader > index and rank in ranks_of(rounds[reader], self.stages):
                assert Backward(seq, reader) in self.done[rank], "the state's gradient is not there"
        self.makes(rank, Kind.GRADIENT, seq, index)

    def head_forward(self, rank: int, seq: int, index: int) -> None:
        """The last rank joins the statistics of all parts, its own included, to the loss."""
        if rank == self.last:
            assert Forward(seq, index) in self.done[rank]
            for part in self.others:
                self.present.remove((rank, "got", Kind.STATISTICS, seq, index, part))
            self.makes_of_head(rank, Kind.LOG_SUMS, seq, index, self.others)
        else:
            self.present.remove((rank, "got", Kind.HEAD_INPUT, seq, index, rank))
            self.makes_of_head(rank, Kind.STATISTICS, seq, index, [rank])

    def head_backward(self, rank: int, seq: int, index: int) -> None:
        """The last rank sums the gradients of all parts, its own included."""
        assert HeadForward(seq, index) in self.done[rank]
        if rank == self.last:
            for part in self.others:
                self.present.remove((rank, "got", Kind.HEAD_GRADIENT, seq, index, part))
        else:
            self.present.remove((rank, "got", Kind.LOG_SUMS, seq, index, rank))
            self.makes_of_head(rank, Kind.HEAD_GRADIENT, seq, index, [rank])

    def makes_of_head(self, rank: int, kind: Kind, seq: int, index: int, parts) -> None:
        self.present |= {(rank, "made", kind, seq, index, part) for part in parts}

    def makes(self, rank: int, kind: Kind, seq: int, index: int) -> None:
        """Record what the rank can send from now on: to itself as the input of another round, or along the round."""
        for other in range(len(self.made.plans[seq])):
            self.present.add((rank, "made", kind, seq, index, other))


def tasks_of(seq: int, index: int, r, has_backward: bool, stages: PipelineStages) -> list:
    tasks = [Forward(seq, index), *([Backward(seq, index)] if has_backward else [])]
    return tasks + ([HeadForward(seq, index), HeadBackward(seq, index)] if stages.split_head and r.loss else [])


@PROPERTY
@given(any_plans(), any_stages(), st.none() | st.integers(1, 6))
def test_every_task_is_done_once_and_after_its_inputs(plans, stages, max_live_micro_batches):
    made = schedule(plans, stages, max_live_micro_batches=max_live_micro_batches)
    Execution(made).run()
    for rank, actions in enumerate(made.ranks):
        expected = Counter(
            task
            for seq, rounds in enumerate(plans)
            for i, r in enumerate(rounds)
            if rank in ranks_of(r, stages)
            for task in tasks_of(seq, i, r, i in trained(rounds), stages)
        )
        assert Counter(a for a in actions if not isinstance(a, Send | Receive)) == expected


@PROPERTY
@given(any_plans(), any_stages(), st.none() | st.integers(1, 6), st.sampled_from([Costs(), Costs(0.7, 1.1, 0.3)]))
def test_no_deadlock_whichever_side_blocks(plans, stages, max_live_micro_batches, costs):
    made = schedule(plans, stages, costs, max_live_micro_batches)
    finishes = [simulate(made, costs, **mode).finish for mode in MODES]
    assert finishes[0] == min(finishes)


@PROPERTY
@given(any_plans(), any_stages(), st.none() | st.integers(1, 6))
def test_both_ranks_of_a_pair_run_its_messages_in_one_order(plans, stages, max_live_micro_batches):
    """As NCCL needs it, where a pair has one stream: the simulation raises ScheduleError for another order."""
    made = schedule(plans, stages, max_live_micro_batches=max_live_micro_batches)
    costs = Costs(message=0.1)
    assert simulate(made, costs, pair_streams=True).finish >= simulate(made, costs).finish


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 4), (4, 8), (8, 8), (8, 16), (4, 7)])
@pytest.mark.parametrize("passes", [1, 2, 4])
def test_streams_of_pairs_cost_less_than_a_point_of_bubble(stages, micro_batches, passes):
    """Over the ideal, in which a message is on its way from its send on. A message takes 2 % of a forward."""
    costs = Costs(message=0.02 * Costs().forward * 2)  # stages of two layers
    made = schedule([plan(4, passes)] * micro_batches, even_stages(stages), costs)
    ideal, real = simulate(made, costs), simulate(made, costs, pair_streams=True)
    assert real.bubble - ideal.bubble < 0.01


@PROPERTY
@given(any_plans(), any_stages(), st.none() | st.integers(1, 6))
def test_sends_to_a_rank_are_in_the_order_of_its_receives(plans, stages, max_live_micro_batches):
    made = schedule(plans, stages, max_live_micro_batches=max_live_micro_batches)
    for a, from_a in enumerate(made.ranks):
        for b, at_b in enumerate(made.ranks):
            sent = [x.message for x in from_a if isinstance(x, Send) and x.peer == b]
            assert sent == [x.message for x in at_b if isinstance(x, Receive) and x.peer == a]
            assert a != b or not sent


@PROPERTY
@given(any_plans(), any_stages(), st.none() | st.integers(1, 6))
def test_live_rounds_stay_within_those_of_a_group(plans, stages, max_live_micro_batches):
    simulation = simulate(schedule(plans, stages, max_live_micro_batches=max_live_micro_batches))
    fed_back = any(r.feeds_back and ranks_of(r, stages) for rounds in plans for r in rounds)
    width = len(core_ranks(stages)) if fed_back else 1
    group = max_live_micro_batches or min(len(plans), 2 * width - 1)
    for rank, peak in enumerate(simulation.peak_live_rounds):
        alive = sorted(sum(rank in ranks_of(rounds[i], stages) for i in trained(rounds)) for rounds in plans)
        assert peak <= sum(alive[-group:]) + stages.num_stages - width + 2 * stages.split_head


@example(4, 1, 2, 1, (2, 3), "none")
@PROPERTY
@given(
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([(1, 1), (1, 2), (1, 3), (2, 3)]),
    st.sampled_from(["features", "none"]),
)
def test_the_bubble_is_the_bound(num_stages, times, windows, passes, times_of_a_layer, feedback):
    """Balanced stages, m a multiple of p: (p - 1) / (m R), and no more than p R rounds alive."""
    num_sequences = num_stages * times
    rounds = plan(windows, passes, feedback)
    costs = Costs(*times_of_a_layer)
    simulation = simulate(schedule([rounds] * num_sequences, even_stages(num_stages), costs), costs)
    assert simulation.bubble == pytest.approx((num_stages - 1) / (num_sequences * len(rounds)), rel=1e-12)
    streams = feedback == "none" or passes == 1 or windows == 1
    most = len(rounds) + num_stages - 1 if streams else num_stages * len(rounds)
    assert max(simulation.peak_live_rounds) <= most


@pytest.mark.parametrize("num_sequences", [5, 6, 7, 9, 10, 11])
def test_the_bound_holds_from_p_sequences_on(num_sequences):
    rounds = plan(3, 4)
    simulation = simulate(schedule([rounds] * num_sequences, even_stages(4)))
    assert simulation.bubble == pytest.approx(3 / (num_sequences * len(rounds)), rel=1e-12)
    assert max(simulation.peak_live_rounds) <= 7 * len(rounds)


def test_memory_does_not_grow_with_the_sequences():
    peaks = [simulate(schedule([plan(3, 4)] * m, even_stages(4))).peak_live_rounds for m in (8, 16, 64)]
    assert peaks[0] == peaks[1] == peaks[2]


def test_without_feedback_one_sequence_fills_the_pipeline():
    rounds = plan(3, 4, "none")
    assert simulate(schedule([rounds], even_stages(4))).bubble == pytest.approx(3 / len(rounds), rel=1e-12)
    assert simulate(schedule([plan(3, 4)], even_stages(4))).bubble > 1.5


@pytest.mark.parametrize("passes", [1, 3])
def test_a_shared_head_leaves_the_bubble_near_the_bound(passes):
    """A head of five layers: on the last of four stages of two it would be idle time of others."""
    rounds, costs = plan(4, passes), Costs(head=5)
    whole, shared = (
        simulate(schedule([rounds] * 8, even_stages(4, split_head=split), costs), costs) for split in (False, True)
    )
    bound = 3 / (8 * len(rounds))
    assert shared.bubble < 1.5 * bound < whole.bubble


def test_a_lower_limit_costs_time_and_saves_memory():
    made = [schedule([plan(3, 4)] * 8, even_stages(4), max_live_micro_batches=limit) for limit in (1, 2, 4)]
    few, half, all_of_ring = [simulate(s) for s in made]
    assert few.bubble > half.bubble > all_of_ring.bubble
    num_rounds = len(plan(3, 4))
    assert [max(s.peak_live_rounds) for s in (few, half, all_of_ring)] == [num_rounds, 2 * num_rounds, 4 * num_rounds]


def test_more_live_micro_batches_hide_the_time_of_messages():
    costs = Costs(message=2.0)
    tight, wide = [
        simulate(schedule([plan(3, 4)] * 16, even_stages(4), max_live_micro_batches=n), costs) for n in (4, 8)
    ]
    assert wide.bubble < tight.bubble


def test_rounds_that_only_prepare_the_next_step_have_no_backward():
    rounds = plan(2, 3, goes_on=True)  # wake sleep sleep, wake with the last loss, sleep sleep
    made = schedule([rounds], even_stages(2))
    for actions in made.ranks:
        assert [a.round for a in actions if isinstance(a, Forward)] == [0, 1, 2, 3, 4, 5]
        assert [a.round for a in actions if isinstance(a, Backward)] == [3, 2, 1, 0]


def test_one_stage_sends_nothing():
    (actions,) = schedule([plan(2, 2)] * 3, even_stages(1)).ranks
    assert all(isinstance(a, Forward | Backward) for a in actions)


def test_two_ranks_one_sequence_by_hand():
    """A window of two passes and one that predicts; the second pass reads features that come back from rank 1."""
    features = [Message(Kind.FEATURES, 0, *rounds) for rounds in ((0, 0), (0, 1), (1, 1), (2, 2))]
    gradients = [Message(Kind.GRADIENT, 0, *rounds) for rounds in ((2, 2), (1, 1), (1, 0), (0, 0))]
    assert schedule([plan(2, 2)], even_stages(2)).ranks[0] == (
        *(Forward(0, 0), Send(1, features[0]), Receive(1, features[1])),
        *(Forward(0, 1), Send(1, features[2]), Forward(0, 2), Send(1, features[3])),
        *(Receive(1, gradients[0]), Backward(0, 2), Receive(1, gradients[1]), Backward(0, 1), Send(1, gradients[2])),
        *(Receive(1, gradients[3]), Backward(0, 0)),
    )


def test_no_sequences():
    assert schedule([], even_stages(2)).ranks == ((), ())


def test_the_same_plans_give_the_same_schedule():
    assert schedule([plan(3, 2)] * 5, even_stages(3)) == schedule([plan(3, 2)] * 5, even_stages(3))


def test_no_sequence_in_flight_is_refused():
    with pytest.raises(ConfigError, match="max_live_micro_batches is 0"):
        schedule([plan(1, 1)], even_stages(2), max_live_micro_batches=0)
