"""Tokenizers: text to ids and back. SentencePiece models, and Hugging Face tokenizers by `hf_tokenizer`.

T. Kudo and J. Richardson, "SentencePiece: A simple and language independent subword tokenizer and detokenizer for
Neural Text Processing", 2018 (arXiv 1808.06226). Unigram: T. Kudo, "Subword Regularization", 2018 (arXiv 1804.10959).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import sentencepiece

from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON, HuggingFaceTokenizer
from sleeptrain.errors import DataError
from sleeptrain.files import write_whole
from sleeptrain.small_files import JSON_BYTES, read_bounded

MODEL_NAME = "tokenizer.model"
MODEL_TYPES = ("bpe", "unigram")
NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc")
PAD_ID, UNK_ID, BOS_ID, EOS_ID = range(4)
# SentencePiece writes a space as U+2581 inside its pieces, so a U+2581 in the text would be decoded as a space.
SPACE_SYMBOL = "\u2581"
# The trainer skips sentences longer than its limit, so it gets documents in parts.
SENTENCE_CHARACTERS = 4096


class Tokenizer(Protocol):
    """The interface of tokenizers for preparation and training.

    vocab_size: one more than the largest id.
    bos_id, eos_id: the ids around a document; bos_id is None if there is no BOS.
    hash: hexadecimal sha256 of everything that determines the ids of a text.
    files: the tokenizer's files, name to content. After they are written into one folder, `load_tokenizer` with the
    path of the first one makes the same tokenizer.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    hash: str
    files: dict[str, bytes]

    def encode(self, text: str) -> list[int]:
        """The ids of `text` without BOS and EOS. Text that spells a control token gets ordinary ids.

        Raises DataError for a lone surrogate, which is no Unicode text.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; control ids (pad, BOS, EOS) have no text."""


def load_tokenizer(path: Path, bos_token: str | None = None, eos_token: str | None = None) -> Tokenizer:
    """A SentencePiece model (`.model`), a Hugging Face `tokenizer.json`, or a folder that holds one of them.

    `bos_token` (empty: none) and `eos_token` override those of a Hugging Face tokenizer. Raises DataError: no such
    file, not a tokenizer, unfit for documents, or `bos_token` or `eos_token` for a SentencePiece model, which has its
    own.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (MODEL_NAME if not (path / TOKENIZER_JSON).exists() else TOKENIZER_JSON)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, bos_token, eos_token)
    if bos_token is not None or eos_token is not None:
        raise DataError(f"tokenizer {path}: a SentencePiece model has its own BOS and EOS; leave the options away")
    return SentencePieceTokenizer(path)


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    out: Path,
    model_type: str = "bpe",
    normalization: str = "identity",
    control_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Train on `documents` and write the model to `out`; the same documents and settings give the same bytes.

    model_type: one of MODEL_TYPES.
    normalization: one of NORMALIZATIONS, a rule of SentencePiece that the model stores and applies to all text. Only
    `identity` restores any text exactly.
    control_tokens: tokens with the ids from 4 on, in order. No text is encoded to them.
    Raises DataError if a setting is none of these, `vocab_size` is too small or too large for the documents, the
    documents hold no text, or a control token is empty or taken.
    """
    _check(model_type, MODEL_TYPES, "model_type")
    _check(normalization, NORMALIZATIONS, "normalization")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(documents),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name=normalization,
            control_symbols=_check_control_tokens(control_tokens),
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
        raise _explain(error, vocab_size) from error
    write_whole(out, model.getvalue())
    return SentencePieceTokenizer(out)


def _check(value: str, allowed: Sequence[str], name: str) -> None:
    if value not in allowed:
        raise DataError(f"{name} {value!r} is none of {', '.join(allowed)}")


def _check_control_tokens(control_tokens: Sequence[str]) -> list[str]:
    """The control tokens. Raises DataError if one is empty, doubled or a token that every trained model has."""
    taken = {"<pad>", "<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))}
    for token in control_tokens:
        if not token or token in taken:
            raise DataError(f"control token {token!r} is {'taken' if token else 'empty'}: name another")
        taken.add(token)
    return list(control_tokens)


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for start in range(0, len(text), SENTENCE_CHARACTERS):
            yield text[start : start + SENTENCE_CHARACTERS]


def _explain(error: RuntimeError, vocab_size: int) -> DataError:
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
    if not model:  # SentencePiece accepts an empty model and fails at every use
        raise DataError(f"tokenizer {path} is empty; make it anew with tools/prepare.py")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise DataError(f"tokenizer {path} is not a SentencePiece model; make it anew with tools/prepare.py") from error


class SentencePieceTokenizer:
    """A SentencePiece model with EOS and byte fallback; see `Tokenizer`.

    control_tokens: name to id of every control token. A model of `train_tokenizer` with identity normalisation restores
    any text exactly. Raises DataError: no such file, not a SentencePiece model, no EOS or no byte fallback.
    """

    def __init__(self, path: Path) -> None:
        try:
            model = read_bounded(Path(path), JSON_BYTES)
        except OSError as error:
            raise DataError(f"tokenizer {path}: {error.strerror}; make it with tools/prepare.py") from error
        except ValueError as error:
            raise DataError(f"tokenizer {path} cannot be read: {error}") from error
        self._model = _load(path, model)
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int | None = None if self._model.bos_id() < 0 else self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.hash: str = hashlib.sha256(model).hexdigest()
        self.files = {MODEL_NAME: model}
        self._space_symbol = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_SYMBOL.encode()]
        if self.eos_id < 0:
            raise DataError(f"tokenizer {path} has no EOS; documents could not be told apart")
        if self._model.unk_id() in self._space_symbol:
            raise DataError(f"tokenizer {path} has no byte fallback; text would not come back as it was")
        try:
            for id in range(self.vocab_size):
                self._model.id_to_piece(id)
            # A model with this prefix adds a space to every input, so a text must be encoded in one part.
            self._prefixes = "".join(self._model.encode("a", out_type=str)).startswith(SPACE_SYMBOL)
        except (RuntimeError, UnicodeDecodeError) as error:
            raise DataError(f"tokenizer {path} is damaged: its pieces are no text; make it anew") from error

    @property
    def control_tokens(self) -> dict[str, int]:
        ids = (id for id in range(self.vocab_size) if self._model.is_control(id))
        return {self._model.id_to_piece(id): id for id in ids}

    def is_byte(self, id: int) -> bool:
        """True if `id` stands for one byte of a character that the vocabulary lacks."""
        return self._model.is_byte(id)

    def encode(self, text: str) -> list[int]:
        first, *rest = [text] if self._prefixes else text.split(SPACE_SYMBOL)
        try:
            ids = self._model.encode(first)
            for part in rest:
                ids += self._space_symbol + self._model.encode(part)
        except RuntimeError as error:
            raise DataError("the text holds a lone surrogate; decode it with the right encoding") from error
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(id) for id in ids])
