"""Damaged files, each a function of a seed: cut, flipped, nested, with fields lost, doubled, or of another kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

DEEP = 100_000
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**400, 1e308, float("nan"), float("inf"), "", "1", "${oc.env:HOME}",
    "\x1b[31m", "x" * 10_000, [], {}, [[]], [1, "a", None], {"a": {"b": []}}, [0] * 5000,
]  # fmt: skip
Mutation = Callable[[random.Random, bytes], bytes]


def cut(chance: random.Random, content: bytes) -> bytes:
    return content[: chance.randrange(len(content) + 1)]


def flip(chance: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 30))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def insert(chance: random.Random, content: bytes) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.randbytes(chance.choice((1, 8, 100))) + content[at:]


def double_a_part(chance: random.Random, content: bytes) -> bytes:
    first, last = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    return content[:last] + content[first:]


def change_value(chance: random.Random, content: bytes) -> bytes:
    """One to three values of a JSON tree become others, or vanish."""
    value = json.loads(content)
    for _ in range(chance.randint(1, 3)):
        places = list(_places(value))
        if not places:
            break
        holder, key = chance.choice(places)
        if chance.random() < 0.25:
            del holder[key]
        else:
            holder[key] = chance.choice(VALUES)
    return json.dumps(value).encode()


def change_kind(chance: random.Random, content: bytes) -> bytes:
    return json.dumps(chance.choice(VALUES)).encode()


def nest(chance: random.Random, content: bytes) -> bytes:
    """JSON, which is YAML too, deeper than any stack."""
    opening, closing = chance.choice(((b"[", b"]"), (b'{"a":', b"}")))
    deep = opening * DEEP + b"1" + closing * DEEP
    return chance.choice((deep, b'{"format": ' + deep + b"}", content[:-2] + b', "x": ' + deep + b"}"))


def _places(value: Any) -> Any:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


BYTES: tuple[Mutation, ...] = (cut, flip, flip, insert, double_a_part)
JSON: tuple[Mutation, ...] = (*BYTES, change_value, change_value, change_value, change_value, change_kind, nest)


def of_lines(one: Mutation) -> Mutation:
    """The mutation of one line of a file."""

    def change(chance: random.Random, content: bytes) -> bytes:
        lines = content.split(b"\n")
        at = chance.choice([number for number, line in enumerate(lines) if line])
        lines[at] = one(chance, lines[at])
        return b"\n".join(lines)

    return change


LINES: tuple[Mutation, ...] = (*BYTES, *(of_lines(each) for each in (change_value, change_value, change_kind, nest)))


def laughs(chance: random.Random, content: bytes) -> bytes:
    """YAML of aliases to aliases, and of one that is a part of itself."""
    rows = [b"a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [b"a%d: &a%d [%s]" % (n, n, b", ".join([b"*a%d" % (n - 1)] * 10)) for n in range(1, 12)]
    return chance.choice((b"\n".join(rows), b"run: &r {name: a, more: *r}\n", content + b"\nx: &x [*x]\n"))


def change_line(chance: random.Random, content: bytes) -> bytes:
    """A line of YAML gets another value, or is lost."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    if chance.random() < 0.3:
        del lines[at]
    else:
        lines[at] = lines[at].split(b":")[0] + b": " + json.dumps(chance.choice(VALUES)).encode()
    return b"\n".join(lines)


YAML: tuple[Mutation, ...] = (*BYTES, change_line, change_line, change_line, nest, laughs)
