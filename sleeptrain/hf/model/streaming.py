"""Print text while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from sleeptrain.data.continued import ContinuedText
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.terminal import printable


class TextOut(BaseStreamer):
    """Writes the text that each token adds, in complete characters, without the prompt.

    before: see `ContinuedText`. ends: ids that end a text; they are not printed.
    """

    def __init__(
        self, tokenizer: Tokenizer, out: TextIO, before: Sequence[int] | None, ends: Sequence[int] = ()
    ) -> None:
        self._text, self._out, self._ends = ContinuedText(tokenizer, before), out, ends
        self._shown = printable if out.isatty() else str  # files and programs get the text unchanged
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._write(self._text.add([id for id in value.flatten().tolist() if id not in self._ends]))

    def end(self) -> None:
        self._write(self._text.end() + "\n")

    def _write(self, text: str) -> None:
        self._out.write(self._shown(text))
        self._out.flush()
