"""A vocabulary for generated problems: one token for every word of the three wordings, digit and punctuation mark."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable

from sleeptrain.data.tasks.gsm_infinite.wording import ANSWER, WORDINGS
from sleeptrain.errors import DataError

PIECE = re.compile(r"[A-Za-z]+|\d|[^\sA-Za-z\d]")
PAD, END = "<pad>", "<end>"


class WordTokenizer:
    """A tokenizer of a few hundred words, so that a small model need not learn spelling. A number is its digits.

    eos_id: the token that ends an answer. hash: sha256 of the vocabulary.
    """

    def __init__(self) -> None:
        texts = [ANSWER, "0123456789", *(text for wording in WORDINGS for text in wording.texts())]
        words = sorted({word for text in texts for word in PIECE.findall(text)})
        self._words = [PAD, END, *words]
        self._ids = {word: index for index, word in enumerate(self._words)}
        self.vocab_size = len(self._words)
        self.eos_id = 1
        self.hash = hashlib.sha256(" ".join(self._words).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises DataError for a word that no wording has."""
        try:
            return [self._ids[word] for word in PIECE.findall(text)]
        except KeyError as error:
            raise DataError(
                f"{error} is none of the generated problems' words; problems from files need a tokenizer of text: set "
                "data.gsm_infinite.tokenizer"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """The words of `ids`, with spaces between them but not inside numbers. Pads and end tokens have no text."""
        words = " ".join(self._words[id] for id in ids if id > self.eos_id)
        return re.sub(r"(?<=\d) (?=\d)| (?=[.:?])", "", words)
