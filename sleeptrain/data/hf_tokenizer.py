"""Hugging Face tokenizers (`tokenizer.json`), for continued pretraining of open checkpoints."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from sleeptrain.errors import DataError
from sleeptrain.kinds import is_text
from sleeptrain.small_files import JSON_BYTES, parse_json, read_bounded

TOKENIZER_JSON = "tokenizer.json"
CONFIG_JSON = "tokenizer_config.json"
SPECIAL_JSON = "special_tokens_map.json"
ID_FILES = ("config.json", "generation_config.json")


class HuggingFaceTokenizer:
    """A `Tokenizer` from a `tokenizer.json`, with the BOS and EOS that the files beside it name.

    EOS comes from `tokenizer_config.json`, else from `special_tokens_map.json`, else from `eos_token_id` in
    `config.json` or `generation_config.json` (the first id of a list). BOS comes from the first two files only, because
    many models name a `bos_token_id` with which none of their texts begins. There is no BOS if neither file names one,
    or with `add_bos_token: false`. `bos_token` (empty: none) and `eos_token` override the files.

    Truncation, padding and tokens around a text are not applied, even if `tokenizer.json` asks for them. The normaliser
    of the file decides if text is restored exactly. Raises DataError: no such file, not a tokenizer, no EOS, or a BOS
    or EOS that is none of its tokens.
    """

    def __init__(self, path: Path, bos_token: str | None = None, eos_token: str | None = None) -> None:
        self._path = path = Path(path)
        content = _read(path)
        description = _parse_object(path, content)
        config = _read_sibling(path, CONFIG_JSON)
        special = _read_sibling(path, SPECIAL_JSON)
        bos = named(config if "bos_token" in config else special, "bos_token")
        eos = named(config, "eos_token") or named(special, "eos_token") or _eos_by_id(path, description)
        if config.get("add_bos_token") is False:
            bos = None
        if bos_token is not None:
            bos = bos_token or None
        eos = eos if eos_token is None else eos_token
        if eos is None:
            raise DataError(
                f"tokenizer {path} names no EOS: not in {', '.join((CONFIG_JSON, SPECIAL_JSON, *ID_FILES))} beside it; "
                f"write one of its tokens as eos_token into {CONFIG_JSON} (tools/prepare.py also takes --eos-token)"
            )
        self._tokenizer = _load(path, description, {bos, eos} - {None})
        self.vocab_size: int = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id: int | None = None if bos is None else self._id(bos, path, "bos_token")
        self.eos_id: int = self._id(eos, path, "eos_token")
        self.hash: str = hashlib.sha256(content + f"bos {self.bos_id} eos {self.eos_id}".encode()).hexdigest()
        ends = {"bos_token": bos, "eos_token": eos}
        config["add_bos_token"] = bos is not None
        config |= {name: token for name, token in ends.items() if token and token != named(config, name)}
        self.files = {TOKENIZER_JSON: content, CONFIG_JSON: (json.dumps(config, indent=2) + "\n").encode()}

    def _id(self, token: str, path: Path, name: str) -> int:
        way_out = f"name one of its tokens as {name} in {CONFIG_JSON} (tools/prepare.py: --{name.replace('_', '-')})"
        id = self._tokenizer.token_to_id(token)
        if id is None:
            raise DataError(f"tokenizer {path} has no token {token!r}; {way_out}")
        if id in self.encode(token):
            raise DataError(f"tokenizer {path}: text that spells {token!r} would give the token itself; {way_out}")
        return id

    def encode(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise DataError("the text holds a lone surrogate; decode it with the right encoding") from error
        except BaseException as error:
            raise of_library(error, f"tokenizer {self._path} cannot encode a text") from error

    def decode(self, ids: Iterable[int]) -> str:
        try:
            return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)
        except BaseException as error:
            raise of_library(error, f"tokenizer {self._path} cannot decode ids") from error


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, JSON_BYTES)
    except OSError as error:
        raise DataError(f"tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"tokenizer {path} cannot be read: {error}") from error


def _parse_object(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = parse_json(content)
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is not a JSON object")
    return value


def _read_sibling(path: Path, name: str) -> dict[str, Any]:
    """The JSON object in another file of the tokenizer's folder; empty if there is no such file."""
    other = path.with_name(name)
    return _parse_object(other, _read(other)) if other.exists() else {}


def named(config: dict[str, Any], name: str) -> str | None:
    """The text of a token in a configuration, where it is a string or an object with `content`; None if missing."""
    token = config.get(name)
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _eos_by_id(path: Path, description: dict[str, Any]) -> str | None:
    """The token of `eos_token_id` in the files of a model, or in their `text_config`; None if there is none."""
    for name in ID_FILES:
        config = _read_sibling(path, name)
        text_config = config.get("text_config")
        for settings in (config, text_config if isinstance(text_config, dict) else {}):
            ids = settings.get("eos_token_id")
            first = ids[0] if isinstance(ids, list) and ids else ids
            if type(first) is int:
                tokenizer = _from_description(path, description)
                return tokenizer.id_to_token(first) if 0 <= first < 2**32 else None
    return None


def _from_description(path: Path, description: dict[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    except BaseException as error:
        raise of_library(error, f"tokenizer {path} is not a Hugging Face tokenizer") from error


def of_library(error: BaseException, what: str) -> BaseException:
    """The exception to raise instead of an error of the tokenizers library.

    The library has no error type of its own. Some errors are panics of its Rust code, which `except Exception` does not
    catch.
    """
    if isinstance(error, Exception) or type(error).__name__ == "PanicException":
        return DataError(f"{what}: {' '.join(str(error).split())}; take its files from where they come from again")
    return error


def added_tokens(description: dict[str, Any]) -> list[dict[str, Any]]:
    """The `added_tokens` of a `tokenizer.json`. Raises DataError if they are no list of tokens."""
    tokens = description.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(t, dict) and is_text(t.get("content")) for t in tokens):
        raise DataError(f"added_tokens of {TOKENIZER_JSON} are no list of tokens, each an object with its content")
    return tokens


def all_text_is_ordinary(description: dict[str, Any], ends: Collection[str | None]) -> dict[str, Any]:
    """The description with the tokens `ends` marked as special, because only special tokens can be ignored in text."""
    tokens = added_tokens(description)
    marked = [token | {"special": token.get("special", False) or token["content"] in ends} for token in tokens]
    return description | {"added_tokens": marked}


def _load(path: Path, description: dict[str, Any], ends: Collection[str | None]) -> tokenizers.Tokenizer:
    """The tokenizer, set up so that text which spells `ends` or another special token is encoded as ordinary text."""
    tokenizer = _from_description(path, all_text_is_ordinary(description, ends))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer
