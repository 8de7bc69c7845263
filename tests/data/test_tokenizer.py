from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from sleeptrain.data.tokenizer import (
    MODEL_NAME,
    SPACE_SYMBOL,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from sleeptrain.errors import DataError
from tests.data.texts import make_texts

WHITESPACE = ["", " ", "  x  ", "\t\tx", "\n", "\r\n\r", "\u200b", "\u3000"]
RESERVED = [
    SPACE_SYMBOL,
    f"a{SPACE_SYMBOL * 2} b{SPACE_SYMBOL}",
    "\u2585",
    " \u2047 ",
    "<s></s><unk><pad><0x41>",
    "\0a",
]
HARD = [*WHITESPACE, *RESERVED, "\ufffd", "\ufeffx", "a\u0301", "ﬁ", "é漢字😀"]


@pytest.mark.parametrize("text", HARD)
def test_hard_text_is_decoded_unchanged(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_any_text_is_decoded_unchanged(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    pieces = [*HARD, "self", "return", "    "]
    for _ in range(2000):
        parts = [rng.choice(pieces) if rng.random() < 0.8 else chr(rng.randrange(0xD800)) for _ in range(8)]
        text = "".join([*parts, chr(rng.randrange(0xE000, 0x110000))])
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)


def test_decode_takes_arrays_and_leaves_control_ids_out(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("  value"), tokenizer.eos_id]
    assert tokenizer.decode(np.array(ids, np.uint16)) == "  value"


def test_learns_merges_also_of_indents(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("    ")) == 1
    assert len(tokenizer.encode("self")) < 4


def test_the_same_documents_give_the_same_model(texts: list[str], tokenizer: Tokenizer, tmp_path: Path) -> None:
    again = train_tokenizer(texts, 320, tmp_path / "other-name.model")
    assert again.hash == tokenizer.hash == hashlib.sha256((tmp_path / "other-name.model").read_bytes()).hexdigest()
    assert again.vocab_size == 320
    assert train_tokenizer(make_texts(40, seed=1), 320, tmp_path / "c.model").hash != tokenizer.hash


def test_all_of_a_long_document_is_learnt(tmp_path: Path) -> None:
    text = "alpha " * 1000 + "x" * 20_000 + " zeta" * 3000
    tokenizer = train_tokenizer([text], 290, tmp_path / "long.model")
    assert len(tokenizer.encode(" zeta")) == 1


@pytest.mark.parametrize(("vocab_size", "side"), [(100, "small"), (5000, "large")])
def test_wrong_vocab_size_names_the_bound(texts: list[str], tmp_path: Path, vocab_size: int, side: str) -> None:
    with pytest.raises(DataError, match=f"vocab_size {vocab_size} is too {side}") as raised:
        train_tokenizer(texts, vocab_size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())
    bound = re.search(r"set at (?:least|most) (\d+)", str(raised.value))
    assert bound
    assert train_tokenizer(texts, int(bound[1]), tmp_path / "t.model").vocab_size == int(bound[1])


@pytest.mark.parametrize("vocab_size", [0, -5])
def test_senseless_vocab_size(texts: list[str], tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(DataError, match=f"vocab_size {vocab_size}"):
        train_tokenizer(texts, vocab_size, tmp_path / "t.model")


def test_no_text(tmp_path: Path) -> None:
    for documents in ([], [""]):
        with pytest.raises(DataError, match="no text"):
            train_tokenizer(documents, 300, tmp_path / "t.model")


def test_training_is_silent(texts: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(texts, 320, tmp_path / "t.model")
    assert capfd.readouterr() == ("", "")


def test_lone_surrogate(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizer.encode("a\ud800")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.model"):
        load_tokenizer(tmp_path / "absent.model")
    for content, message in [(b"", "is empty"), (b"junk" * 10, "not a SentencePiece model")]:
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / "bad.model")


def foreign(texts: list[str], path: Path, **options: object) -> Path:
    """A model that was not made by `train_tokenizer`."""
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_writer=file, vocab_size=320, model_type="bpe", minloglevel=2,
            hard_vocab_limit=False, **options,
        )  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("options", "message"), [({"eos_id": -1, "byte_fallback": True}, "no EOS"), ({}, "no byte fallback")]
)
def test_unfit_models(texts: list[str], tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_tokenizer(foreign(texts, tmp_path / "foreign.model", **options))


def test_foreign_models(texts: list[str], tmp_path: Path) -> None:
    without_bos = load_tokenizer(foreign(texts, tmp_path / "a.model", bos_id=-1, byte_fallback=True))
    assert without_bos.bos_id is None and without_bos.eos_id > 0
    # It puts a space before a text: before every part of it, if a caller encoded the text in parts.
    prefixing = load_tokenizer(foreign(texts, tmp_path / "b.model", byte_fallback=True))
    assert prefixing.decode(prefixing.encode(f"a{SPACE_SYMBOL}b")) == "a b"


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_both_model_types_decode_text_unchanged(texts: list[str], tmp_path: Path, model_type: str) -> None:
    models = [train_tokenizer(texts, 290, tmp_path / f"{i}.model", model_type) for i in range(2)]
    assert models[0].hash == models[1].hash
    assert [models[0].decode(models[0].encode(text)) for text in [*texts, *HARD]] == [*texts, *HARD]
    kinds = {name: train_tokenizer(texts, 290, tmp_path / "t.model", name).hash for name in ("bpe", "unigram")}
    assert kinds["bpe"] != kinds["unigram"]


@pytest.mark.parametrize(("normalization", "expected"), [("identity", "ﬁ①"), ("nfkc", "fi1"), ("nmt_nfkc", "fi1")])
def test_normalization_is_in_the_model(texts: list[str], tmp_path: Path, normalization: str, expected: str) -> None:
    model = train_tokenizer(texts, 320, tmp_path / "t.model", normalization=normalization)
    assert model.decode(model.encode("ﬁ①")) == expected


CONTROL = ["<|im_start|>", "<|im_end|>", "<|reserved_0|>"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_control_tokens_never_come_from_text(texts: list[str], tmp_path: Path, model_type: str) -> None:
    spelt = ["".join(CONTROL), *CONTROL, *(f"a{token} b" for token in CONTROL), "</s><s><pad>"]
    model = train_tokenizer([*texts, *spelt * 50], 310, tmp_path / "t.model", model_type, control_tokens=CONTROL)
    assert [model.control_tokens[token] for token in CONTROL] == [4, 5, 6]
    assert {model.bos_id, model.eos_id} < set(model.control_tokens.values())
    for text in spelt:
        ids = model.encode(text)
        assert not set(ids) & set(model.control_tokens.values())
        assert model.decode([4, *ids, 6]) == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_tokens": ["<s>"]}, "control token '<s>' is taken"),
        ({"control_tokens": ["<0x41>"]}, "control token '<0x41>' is taken"),
        ({"control_tokens": ["<a>", "<a>"]}, "control token '<a>' is taken"),
        ({"control_tokens": [""]}, "control token '' is empty"),
        ({"model_type": "word"}, "model_type 'word' is none of bpe, unigram"),
        ({"normalization": "nfd"}, "normalization 'nfd' is none of identity"),
    ],
)
def test_settings_that_make_no_sense(texts: list[str], tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        train_tokenizer(texts, 320, tmp_path / "t.model", **settings)
    assert not list(tmp_path.iterdir())


def test_load_by_name(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other-name.model").write_bytes(tokenizer.files["tokenizer.model"])
    for path in (tmp_path, tmp_path / "tokenizer.model", tmp_path / "other-name.model"):
        assert load_tokenizer(path).hash == tokenizer.hash
    with pytest.raises(DataError, match="has its own BOS and EOS"):
        load_tokenizer(tmp_path, eos_token="</s>")


def test_a_model_whose_pieces_are_no_text_is_refused(texts: list[str], tmp_path: Path) -> None:
    """The format's own reader takes any bytes for a piece."""
    path = tmp_path / "t.model"
    content = train_tokenizer(texts, 320, path).files[MODEL_NAME]
    symbol = SPACE_SYMBOL.encode()
    assert content.count(symbol) > 5
    path.write_bytes(content.replace(symbol, symbol[:2] + b"\xff"))
    with pytest.raises(
        DataError, match=r"t\.model is (damaged: its pieces are no text|not a SentencePiece model)"
    ) as found:
        load_tokenizer(path)
    assert "\n" not in str(found.value)


def test_a_file_that_is_not_plain_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    with pytest.raises(DataError, match="is no plain file"):
        load_tokenizer(tmp_path)
