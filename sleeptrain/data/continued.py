"""Decodes ids that continue other ids.

Many tokenizers (SentencePiece by default) add a space in front of every text and remove it when they decode. So ids
from the middle of a text lose their first space if they are decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # the decoded text of a character whose last byte is still missing
_ANY_TEXT = "a"


class ContinuedText:
    """A decoder that returns the text that new ids add to earlier ids, in whole characters.

    before: the earlier ids; None if they are unknown but their text is not empty.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] | None) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._begins = before is not None and not tokenizer.decode(before)
        self._before = list(before) if self._begins and before is not None else tokenizer.encode(_ANY_TEXT)

    def add(self, ids: Sequence[int]) -> str:
        """The characters that `ids` complete."""
        text = self._decode([*self._pending, *ids])
        if len(ids) > 1 and UNFINISHED in text:  # some decoders drop a whole character next to an unfinished one
            return "".join(self.add([id]) for id in ids)
        self._pending += ids
        if not text or text.endswith(UNFINISHED):
            return ""
        if self._begins:
            self._begins, self._before = False, self._tokenizer.encode(_ANY_TEXT)
        self._pending = []
        return text

    def end(self) -> str:
        """The text of the pending ids after the last `add`: one or more U+FFFD for an unfinished character."""
        text, self._pending = self._decode(self._pending), []
        return text

    def _decode(self, ids: list[int]) -> str:
        prefix, text = self._tokenizer.decode(self._before), self._tokenizer.decode([*self._before, *ids])
        return text[len(prefix) :] if text.startswith(prefix) else self._tokenizer.decode(ids)


def continued_text(tokenizer: Tokenizer, before: Sequence[int] | None, ids: Sequence[int]) -> str:
    """The text that `ids` add to the text of `before` (None: an unknown text that is not empty)."""
    text = ContinuedText(tokenizer, before)
    return text.add(ids) + text.end()
