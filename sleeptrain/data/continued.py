"""The text of ids that go on after others.

Many tokenizers put a space before every text and drop it again when they decode one (SentencePiece by default), so ids
from the middle of a text lose their first space where they are decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from sleeptrain.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # how a character is decoded whose last byte has not come yet
_ANY_TEXT = "a"


class ContinuedText:
    """What ids add to the text before them, in whole characters.

    before: the ids before them; None where only their text is known to be not empty.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] | None) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []
        self._begins = before is not None and not tokenizer.decode(before)
        self._before = list(before) if self._begins and before is not None else tokenizer.encode(_ANY_TEXT)

    def add(self, ids: Sequence[int]) -> str:
        """The characters that are whole now and were not before."""
        text = self._decoded([*self._pending, *ids])
        if len(ids) > 1 and UNFINISHED in text:  # some decoders give up a whole character beside a broken one
            return "".join(self.add([id]) for id in ids)
        self._pending += ids
        if not text or text.endswith(UNFINISHED):
            return ""
        if self._begins:
            self._begins, self._before = False, self._tokenizer.encode(_ANY_TEXT)
        self._pending = []
        return text

    def end(self) -> str:
        """What is left when no more ids come: of a character that is cut off one U+FFFD or several."""
        text, self._pending = self._decoded(self._pending), []
        return text

    def _decoded(self, ids: list[int]) -> str:
        start, whole = self._tokenizer.decode(self._before), self._tokenizer.decode([*self._before, *ids])
        return whole[len(start) :] if whole.startswith(start) else self._tokenizer.decode(ids)


def continued_text(tokenizer: Tokenizer, before: Sequence[int] | None, ids: Sequence[int]) -> str:
    """The text that `ids` add to that of `before` (None: some text)."""
    text = ContinuedText(tokenizer, before)
    return text.add(ids) + text.end()
