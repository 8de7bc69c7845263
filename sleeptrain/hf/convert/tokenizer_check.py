"""Check that transformers gives the ids of training with an exported tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sleeptrain.data.hf_tokenizer import TOKENIZER_JSON, added_tokens, of_library
from sleeptrain.data.tokenizer import SPACE_SYMBOL, Tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.corpus import Document, as_read
from sleeptrain.hf.convert.native import quiet, transformers_module
from sleeptrain.small_files import parse_json

WAY_OUT = "name a Hugging Face tokenizer with the same ids (--tokenizer), or use --no-tokenizer"

SAMPLE = (
    "".join(f"{' ' * n}x{'=' * n}" for n in range(1, 81)) + "\n"
    "The quick brown fox jumps over the lazy dog. It's 3.14159 o'clock, isn't it?\n"
    "def f(x: int) -> int:\n    if x < 2:\n\t\treturn x  # ====--====\n    return f(x - 1) + f(x - 2)\n\n\n"
    "    https://example.org/a_b/c%20d?e=f&g=h  \t \r\n{'k': [1, 22, 333, 4444]} ......!!! ????  \x00\x07\x1b\n"
    "naïve café Ærøskøbing Straße ÀÉÎÕÜ ﬁ ½ № ① Ⅷ ａｂｃ e\u0301 \u200b\u00a0\u3000\ufeff\n"
    "Быстрая лиса 速い茶色の狐 빠른 여우 سريع חתול ἀλώπηξ गति ᚠᛇᚻ 𝔘𝔫𝔦 😀👩‍👩‍👧🏽 \U0010ffff\n"
    f"{SPACE_SYMBOL} a{SPACE_SYMBOL}b {SPACE_SYMBOL}{SPACE_SYMBOL}c <s></s><unk><pad><0x0A><0xE2> ▂▁▂\n"
)


def check_tokenizer(folder: Path, tokenizer: Tokenizer, documents: Iterable[Document] = ()) -> None:
    """Compare the tokenizer that transformers loads from `folder` with the one of the data.

    documents: documents of the run's data. A built-in sample and the names of added tokens are compared first. Raises
    DataError: the ids of a text differ, with or without BOS, or those of BOS and EOS.
    """
    theirs = _theirs(folder)
    ends = (theirs.bos_token_id, theirs.eos_token_id)
    if ends != (tokenizer.bos_id, tokenizer.eos_id):
        raise DataError(
            f"the tokenizer cannot be exported: its BOS and EOS have the ids {ends[0]} and {ends[1]}, those of the "
            f"data {tokenizer.bos_id} and {tokenizer.eos_id}; {WAY_OUT}"
        )
    for document in (*_samples(folder, tokenizer), *documents):
        bare = document.ids[1:] if document.ids[:1] == [tokenizer.bos_id] else document.ids
        for expected, special in ((document.ids, True), (bare, False)):
            actual = theirs(document.text, add_special_tokens=special, verbose=False).input_ids
            if actual != expected:
                raise DataError(_difference(document.text, expected, actual))


def _samples(folder: Path, tokenizer: Tokenizer) -> Iterator[Document]:
    added = added_tokens(parse_json((folder / TOKENIZER_JSON).read_bytes()))
    names = " ".join(f"a{token['content']}b" for token in added)
    for text in (SAMPLE, *SAMPLE.splitlines(), names):
        yield as_read(text, tokenizer)


def _difference(text: str, expected: list[int], actual: list[int]) -> str:
    index = next(i for i, (a, b) in enumerate(zip([*expected, -1], [*actual, -1], strict=False)) if a != b)
    return (
        f"the tokenizer cannot be exported: the ids that transformers gives {text[:40]!r} differ from those of "
        f"training from the {index + 1}th on; {WAY_OUT}"
    )


def _theirs(folder: Path) -> Any:
    transformers = transformers_module()
    try:
        with quiet(transformers):
            return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except BaseException as error:
        raise of_library(
            error, f"the tokenizer cannot be exported, transformers does not read it; {WAY_OUT}"
        ) from error
