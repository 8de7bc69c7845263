"""SentencePiece tokenizer that gives back any text exactly: byte-pair encoding, identity normalisation, byte fallback.

T. Kudo and J. Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for
Neural Text Processing", 2018 (arXiv 1808.06226).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from sleeptrain.errors import DataError
from sleeptrain.files import write_whole

PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
# SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 of the text itself would come back as a space.
SPACE_SYMBOL = "\u2581"
# The trainer skips sentences longer than its limit, so documents are handed over in parts.
SENTENCE_CHARACTERS = 4096


def train_tokenizer(documents: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Train on `documents` and write the model to `out`; the same documents give the same bytes.

    Raises DataError when `vocab_size` is too small or too large for the documents, or these hold no text.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * SENTENCE_CHARACTERS,
            num_threads=1,
            minloglevel=2,
            pad_id=PAD_ID,
            unk_id=UNK_ID,
            bos_id=BOS_ID,
            eos_id=EOS_ID,
        )
    except RuntimeError as error:
        raise _explained(error, vocab_size) from error
    write_whole(out, model.getvalue())
    return Tokenizer(out)


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), SENTENCE_CHARACTERS):
            yield text[start : start + SENTENCE_CHARACTERS]


def _explained(error: RuntimeError, vocab_size: int) -> DataError:
    message = str(error)
    if small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return DataError(f"vocab_size {vocab_size} is too small for these documents: set at least {small[1]}")
    if large := re.search(r"too high .* a value <= (\d+)", message):
        return DataError(
            f"vocab_size {vocab_size} is too large for these documents: set at most {large[1]}, or give more text"
        )
    if "sentences_.empty()" in message:
        return DataError("the tokenizer has no text to train on: every document is empty")
    return DataError(f"the tokenizer cannot be trained with vocab_size {vocab_size}: {message}")


def _load(path: Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    if not model:  # SentencePiece takes it for a model and complains at every use
        raise DataError(f"tokenizer {path} is empty; make it anew with tools/prepare.py")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(f"tokenizer {path} is not a SentencePiece model; make it anew with tools/prepare.py") from error


class Tokenizer:
    """A SentencePiece model with BOS and EOS.

    vocab_size: number of ids. bos_id, eos_id: the ids around a document. hash: sha256 of the model file, hexadecimal.
    Raises DataError: no such file, not a SentencePiece model, or a model without BOS, EOS or byte fallback.
    """

    def __init__(self, path: Path) -> None:
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"tokenizer {path}: {error.strerror}; make it with tools/prepare.py") from error
        self._model = _load(path, model)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.hash: str = hashlib.sha256(model).hexdigest()
        self._space_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"tokenizer {path} has no BOS or no EOS; documents could not be told apart")
        if self._model.unk_id() in self._space_symbol:
            raise DataError(f"tokenizer {path} has no byte fallback; text would not come back as it was")

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS; `decode` gives the text back exactly.

        Raises DataError for a lone surrogate, which is no Unicode text.
        """
        first, *rest = text.split(SPACE_SYMBOL)
        try:
            ids = self._model.encode(first)
            for part in rest:
                ids += self._space_symbol + self._model.encode(part)
        except RuntimeError as error:
            raise DataError("the text holds a lone surrogate; decode it with the right encoding") from error
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids (pad, BOS, EOS) give nothing."""
        return self._model.decode([int(id) for id in ids])
