"""From a record of operators to kernels: each operator by itself, or fused as a compiler does.

The rule, on the safe side of what torch's Inductor does:

1. Operators that compute the same from the same tensors run once. Results that nobody reads are not computed. Numbers
   that are written without reading anything (zeros, a range) are computed where they are used.
2. Products, attention, recurrences, kernels of other packages, look-ups in tables, joined tensors (cat) and sums of
   weight gradients are never fused.
3. An elementwise operator, a cast or a sum over the last dimension joins the kernel of an operator whose result it
   reads, or that reads a tensor which it reads too, if both iterate over as many elements, and if no third kernel would
   have to run between the two. Kernels that it reads from become one under the same conditions.
4. A sum ends a kernel: what reads it is another one. A sum over other dimensions than the last is a kernel of its own,
   and then one over parts.
5. A kernel reads each tensor from outside once, and writes the results that are used outside of it. It belongs to one
   block, and to its forward or its backward.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

from sleeptrain.plan.roofline.kinds import MADE, Kind
from sleeptrain.plan.roofline.record import Call, Use


@dataclass(frozen=True)
class Kernel:
    """Work on a GPU: a kernel, or those that an operator launches.

    kernels: that are launched. bytes: that are read and written. The other fields are those of `Call`.
    """

    kind: Kind
    kernels: float
    bytes: int
    flops: int = 0
    h200: float = 0.0
    narrow: bool = False
    wide: bool = False


def eager(calls: Sequence[Call]) -> list[Kernel]:
    """Each operator by itself."""
    return [_alone(call, sum(u.bytes for u in (*call.reads, *call.writes))) for call in calls]


def compiled(calls: Sequence[Call], used: Collection[int]) -> list[Kernel]:
    """The kernels of one block's forward or backward under the rule above.

    used: storages that others read: the block's results, and what its other half needs.
    """
    calls = _live(_unique(calls), used)
    groups = _grouped(calls)
    return [_kernel(group, calls, used) for group in groups if not group.inlined(calls, used)]


def _alone(call: Call, size: int) -> Kernel:
    return Kernel(call.kind, call.kernels, size, call.flops, call.h200, call.narrow, call.wide)


def _unique(calls: Sequence[Call]) -> list[Call]:
    """The calls without those that repeat another. Readers of a repeated result read the first one."""
    seen: dict[object, Call] = {}
    first: dict[int, int] = {}  # storage of a repeated result -> storage of the first one
    kept = []
    for call in calls:
        call = replace(call, reads=tuple(replace(u, storage=first.get(u.storage, u.storage)) for u in call.reads))
        known = None if call.identity is None else seen.get(call.identity)
        if known is None:
            seen[call.identity] = call
            kept.append(call)
        else:
            first |= {a.storage: b.storage for a, b in zip(call.writes, known.writes, strict=True)}
    return kept


def _live(calls: Sequence[Call], used: Collection[int]) -> list[Call]:
    """The calls whose results somebody reads."""
    needed, kept = set(used), []
    for call in reversed(calls):
        if any(w.storage in needed for w in call.writes):
            needed |= {u.storage for u in call.reads}
            kept.append(call)
    return kept[::-1]


@dataclass
class _Group:
    """Calls of one kernel.

    calls: their indices. before: bits of the groups that must run before. touched: storages that it reads or writes.
    sums: storages that hold its sums.
    """

    calls: list[int]
    elements: int
    fusible: bool
    before: int = 0
    touched: set[int] = field(default_factory=set)
    sums: set[int] = field(default_factory=set)
    merged: bool = False

    def add(self, index: int, call: Call) -> None:
        self.calls.append(index)
        written = {w.storage for w in call.writes}
        self.touched |= written | {u.storage for u in call.reads}
        if call.reduces:
            self.sums |= written

    def takes(self, call: Call) -> bool:
        """Rules 3 and 4, but for the order."""
        fits = self.fusible and call.fusible and call.reduces != "all" and call.elements == self.elements
        return fits and not any(u.storage in self.sums for u in call.reads)

    def inlined(self, calls: Sequence[Call], used: Collection[int]) -> bool:
        """True for numbers that only kernels of a compiler read."""
        if not all(calls[i].name in MADE and calls[i].fusible for i in self.calls):
            return False
        written = {w.storage for i in self.calls for w in calls[i].writes}
        readers = [c for c in calls if any(u.storage in written for u in c.reads)]
        return not written & set(used) and all(c.fusible for c in readers)


def _grouped(calls: Sequence[Call]) -> list[_Group]:
    groups: list[_Group] = []
    writer: dict[int, int] = {}  # storage -> group
    for index, call in enumerate(calls):
        at = _join(groups, writer, index, call)
        for w in call.writes:
            writer[w.storage] = at
    return [g for g in groups if not g.merged]


def _join(groups: list[_Group], writer: dict[int, int], index: int, call: Call) -> int:
    """Put a call into a group, or into a new one, and return the group's number."""
    made_from = {writer[u.storage] for u in (*call.reads, *call.writes) if u.storage in writer}
    reads = {u.storage for u in call.reads}
    sharing = [n for n, g in enumerate(groups) if not g.merged and g.fusible and reads & g.touched]
    before = _before(groups, made_from)
    for at in [*sorted(made_from, reverse=True), *reversed(sharing)]:
        others = made_from - {at}
        if groups[at].takes(call) and not any(groups[n].before >> at & 1 for n in others):
            groups[at].add(index, call)
            _run_before(groups, at, _before(groups, others))
            _merge_sources(groups, writer, at, others)
            return at
    fusible = call.fusible and call.reduces != "all"
    groups.append(_Group([], call.elements, fusible, before))
    groups[-1].add(index, call)
    return len(groups) - 1


def _before(groups: Sequence[_Group], numbers: Collection[int]) -> int:
    """Bits of these groups and of all that run before them."""
    bits = 0
    for n in numbers:
        bits |= groups[n].before | 1 << n
    return bits


def _run_before(groups: Sequence[_Group], at: int, bits: int) -> None:
    """Let these groups run before a group, and before those that run after it."""
    for n, g in enumerate(groups):
        if n == at or g.before >> at & 1:
            g.before |= bits


def _merge_sources(groups: list[_Group], writer: dict[int, int], at: int, sources: Collection[int]) -> None:
    """Merge groups that a call of the group `at` reads from into that group, where rule 3 lets them be one kernel."""
    for n in sources:
        a, b = groups[at], groups[n]
        between = any(g.before >> n & 1 and a.before >> m & 1 for m, g in enumerate(groups) if m not in (at, n))
        if not b.fusible or b.elements != a.elements or b.before >> at & 1 or between or a.sums or b.sums:
            continue
        a.calls, b.merged = sorted(a.calls + b.calls), True
        a.touched |= b.touched
        for storage, group in writer.items():
            writer[storage] = at if group == n else group
        for m, g in enumerate(groups):
            if m != at and g.before >> n & 1:
                g.before |= 1 << at
        a.before &= ~(1 << n)
        _run_before(groups, at, b.before)


def _kernel(group: _Group, calls: Sequence[Call], used: Collection[int]) -> Kernel:
    members = [calls[i] for i in group.calls]
    if len(members) == 1 and not members[0].fusible:
        return _alone(members[0], sum(u.bytes for u in {*members[0].reads, *members[0].writes}))
    inside = set(group.calls)
    elsewhere = {u.storage for i, c in enumerate(calls) if i not in inside for u in c.reads} | set(used)
    written = {w.storage for c in members for w in c.writes}
    made = {w.storage for c in calls if c.name in MADE and c.fusible for w in c.writes}
    read = {(u.storage, u.offset, u.bytes) for c in members for u in c.reads if u.storage not in written | made}
    stored: dict[int, Use] = {w.storage: w for c in members for w in c.writes if w.storage in elsewhere}
    kinds = {c.kind for c in members}
    kind = kinds.pop() if len(kinds) == 1 else Kind.ELEMENTWISE
    split = 2 if any(c.reduces == "all" for c in members) else 1
    return Kernel(kind, split, sum(size for *_, size in read) + sum(w.bytes for w in stored.values()))
