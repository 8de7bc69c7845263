"""Text while it is generated."""

from __future__ import annotations

from typing import TextIO

import torch
from transformers.generation.streamers import BaseStreamer

from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.terminal import printable

UNFINISHED = "\ufffd"  # how a character is decoded whose last byte has not come yet


class TextOut(BaseStreamer):
    """Writes what is new of the text at each token, whole characters only; the prompt is not repeated."""

    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._shown = printable if out.isatty() else str  # what goes to a file or a program is as the model writes it
        self._ids: list[int] = []
        self._written = 0
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._ids += value.flatten().tolist()
        text = self._tokenizer.decode(self._ids)
        if not text.endswith(UNFINISHED):
            self._write(text)

    def end(self) -> None:
        self._write(self._tokenizer.decode(self._ids) + "\n")

    def _write(self, text: str) -> None:
        self._out.write(self._shown(text[self._written :]))
        self._out.flush()
        self._written = len(text)
