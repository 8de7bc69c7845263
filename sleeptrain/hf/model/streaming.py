"""Text while it is generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from sleeptrain.data.continued import ContinuedText
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.terminal import printable


class TextOut(BaseStreamer):
    """Writes what each token adds to the text, whole characters only; the prompt is not repeated.

    before: as `ContinuedText` takes it. ends: ids that end a text and are no part of it.
    """

    def __init__(
        self, tokenizer: Tokenizer, out: TextIO, before: Sequence[int] | None, ends: Sequence[int] = ()
    ) -> None:
        self._text, self._out, self._ends = ContinuedText(tokenizer, before), out, ends
        self._shown = printable if out.isatty() else str  # what goes to a file or a program is as the model writes it
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
