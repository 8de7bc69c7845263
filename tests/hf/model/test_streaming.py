"""Text is printed while the model generates it."""

from __future__ import annotations

import io

import pytest
import torch

from sleeptrain.hf.model.streaming import TextOut
from sleeptrain.terminal import printable
from tests.hostile import HOSTILE


def test_characters_are_written_whole():
    class Bytes:
        def encode(self, text):  # type: ignore[no-untyped-def]
            return list(text.encode())

        def decode(self, ids):  # type: ignore[no-untyped-def]
            return bytes(ids).decode(errors="replace")

    out, written = io.StringIO(), []
    stream = TextOut(Bytes(), out, b"a")  # type: ignore[arg-type]
    stream.put(torch.tensor([[65, 66]]))
    for byte in "xé→".encode():
        stream.put(torch.tensor([byte]))
        written.append(out.getvalue())
    stream.end()
    assert written == ["x", "x", "xé", "xé", "xé", "xé→"]
    assert out.getvalue() == "xé→\n"


def test_control_sequences_of_the_model_are_escaped_for_a_terminal(monkeypatch: pytest.MonkeyPatch):
    """Text that goes to a file or a program is unchanged."""

    class Tokens:
        def encode(self, text: str) -> list[int]:
            return []

        def decode(self, ids: list[int]) -> str:
            return "".join(HOSTILE[id] for id in ids)

    for at_terminal in (True, False):
        out = io.StringIO()
        monkeypatch.setattr(out, "isatty", lambda at_terminal=at_terminal: at_terminal)
        stream = TextOut(Tokens(), out, None)  # type: ignore[arg-type]
        stream.put(torch.tensor([[1]]))
        for id in range(len(HOSTILE)):
            stream.put(torch.tensor([id]))
        stream.end()
        assert out.getvalue() == (printable(HOSTILE) if at_terminal else HOSTILE) + "\n"
