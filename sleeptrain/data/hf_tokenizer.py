"""Hugging Face tokenizers (`tokenizer.json`), for going on with the pretraining of open checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tokenizers

from sleeptrain.errors import DataError

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with BOS and EOS as the `tokenizer_config.json` beside it names them; a `Tokenizer`.

    `bos_token` (empty: none) and `eos_token` take the place of the configuration's. There is no BOS where the
    configuration names none or says `add_bos_token: false`. What the file says of truncation, padding and tokens added
    around a text is not applied. Whether text comes back exactly depends on the file's own normaliser. Raises
    DataError: no such file, not a tokenizer, no EOS, or a BOS or EOS that is none of its tokens.
    """

    def __init__(self, path: Path, bos_token: str | None = None, eos_token: str | None = None) -> None:
        path = Path(path)
        content = _read(path)
        config_path = path.with_name(CONFIG_JSON)
        config = _parsed(config_path, _read(config_path)) if config_path.exists() else {}
        if bos_token is not None:
            config |= {"bos_token": bos_token or None, "add_bos_token": bool(bos_token)}
        if eos_token is not None:
            config["eos_token"] = eos_token
        bos, eos = _named(config, "bos_token"), _named(config, "eos_token")
        if config.get("add_bos_token") is False:
            bos = None
        if eos is None:
            raise DataError(f"tokenizer {path} names no EOS in {CONFIG_JSON}; name one of its tokens with --eos-token")
        self._tokenizer = _load(path, content, {bos, eos} - {None})
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.bos_id: int | None = None if bos is None else self._id(bos, path, "--bos-token")
        self.eos_id: int = self._id(eos, path, "--eos-token")
        ends = f"bos {self.bos_id} eos {self.eos_id}"
        self.hash: str = hashlib.sha256(content + ends.encode()).hexdigest()
        self.files = {TOKENIZER_JSON: content, CONFIG_JSON: (json.dumps(config, indent=2) + "\n").encode()}

    def _id(self, token: str, path: Path, option: str) -> int:
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise DataError(f"tokenizer {path} has no token {token!r}; name one of its tokens with {option}")
        if id in self.encode(token):
            raise DataError(f"tokenizer {path}: text that spells {token!r} would give the token itself; name another")
        return id

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError("the text holds a lone surrogate; decode it with the right encoding") from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror}") from error


def _parsed(path: Path, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} is not a JSON object")
    return found


def _named(config: dict[str, Any], name: str) -> str | None:
    """The text of a token, which a configuration writes as a string or as an object with its content."""
    token = config.get(name)
    return token.get("content") if isinstance(token, dict) else token


def _load(path: Path, content: bytes, ends: set[str | None]) -> tokenizers.Tokenizer:
    """The tokenizer, set up so that all text is ordinary text, that of `ends` and other special tokens too."""
    description = _parsed(path, content)
    for token in description.get("added_tokens") or ():
        # Only a token marked as special can be kept from being found in text.
        token["special"] = token.get("special", False) or token["content"] in ends
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises no type of its own
        raise DataError(f"tokenizer {path} is not a Hugging Face tokenizer: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
