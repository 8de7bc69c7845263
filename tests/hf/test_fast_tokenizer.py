"""SentencePiece models as fast tokenizers: the same ids for any text, or a refusal."""

from __future__ import annotations

import json
import random
import sys
import sysconfig
from pathlib import Path

import pytest
import tokenizers
import transformers

from sleeptrain.data.hf_tokenizer import CONFIG_JSON, TOKENIZER_JSON, HuggingFaceTokenizer
from sleeptrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.fast_tokenizer import SAMPLE, convert, fast_files
from tests.data.texts import default_sentencepiece


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """Real text: modules of Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


@pytest.fixture(scope="module")
def bpe(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(sources[:10], 1500, tmp_path_factory.mktemp("bpe") / "tokenizer.model")


def test_the_same_ids_on_a_corpus(bpe: SentencePieceTokenizer, sources: list[str]):
    fast, _ = convert(bpe)
    for text in sources:
        assert fast.encode(text, add_special_tokens=False).ids == bpe.encode(text)


def test_the_same_ids_of_random_characters(bpe: SentencePieceTokenizer):
    """Also of those that the vocabulary lacks, of SentencePiece's own symbols, and of names of control tokens."""
    fast, _ = convert(bpe)
    draw = random.Random(0)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "a",
        "the",
        "=",
        "\u2581",
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "é",
        "漢",
        "😀",
        "\x00",
        "\u0301",
    ]
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randint(0, 30)))
        assert fast.encode(text, add_special_tokens=False).ids == bpe.encode(text), text
        assert fast.decode(bpe.encode(text)) == bpe.decode(bpe.encode(text)), text


def test_what_is_written_is_what_was_compared(bpe: SentencePieceTokenizer, tmp_path: Path):
    for name, content in fast_files(bpe).items():
        (tmp_path / name).write_bytes(content)
    again = HuggingFaceTokenizer(tmp_path / TOKENIZER_JSON)
    assert (again.vocab_size, again.bos_id, again.eos_id) == (bpe.vocab_size, bpe.bos_id, bpe.eos_id)
    assert again.encode(SAMPLE) == bpe.encode(SAMPLE)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_JSON))
    assert written.encode("a b").ids == [bpe.bos_id, *bpe.encode("a b")]
    # A Hugging Face tokenizer goes along as it is.
    assert fast_files(again) == again.files


@pytest.mark.parametrize("settings", [{}, {"remove_extra_whitespaces": False}, {"add_dummy_prefix": False}], ids=str)
def test_text_comes_back_without_the_space_that_is_put_before_it(settings, tmp_path: Path):
    """Also with transformers' own class of it, where ids that only the model has give nothing."""
    ours = default_sentencepiece(tmp_path / "tokenizer.model", **settings)
    fast, config = convert(ours)
    (tmp_path / TOKENIZER_JSON).write_text(fast.to_str())
    (tmp_path / CONFIG_JSON).write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat", " the cat", "€ and a dog", "cat"):
        ids = ours.encode(text)
        assert fast.decode(ids) == ours.decode(ids)
        more = [*theirs(text).input_ids, ours.vocab_size + 5, *ours.encode("cat"), ours.vocab_size]
        known = [*ids, *ours.encode("cat")]
        assert theirs.decode(more, skip_special_tokens=True) == ours.decode(known)


def test_a_text_whose_ids_differ_is_refused(bpe: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch):
    encode = bpe.encode
    monkeypatch.setattr(bpe, "encode", lambda text: [*encode(text), 5] if text == "other" else encode(text))
    fast_files(bpe)
    with pytest.raises(DataError, match="ids of 'other' differ"):
        fast_files(bpe, ["other"])


def test_without_protobuf_the_way_out_is_named(bpe: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    with pytest.raises(ConfigError, match=r"protobuf; install it with pip install 'sleeptrain\[hf\]'"):
        fast_files(bpe)


def test_control_tokens_keep_their_ids(sources: list[str], tmp_path: Path):
    tokenizer = train_tokenizer(sources[:4], 800, tmp_path / "t.model", control_tokens=["<sleep>", "<wake>"])
    fast, config = convert(tokenizer)
    assert {name: fast.token_to_id(name) for name in tokenizer.control_tokens} == tokenizer.control_tokens
    assert fast.get_vocab_size() == tokenizer.vocab_size
    assert (config["bos_token"], config["eos_token"], config["pad_token"], config["unk_token"]) == (
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
    )


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize("normalization", ["identity", "nmt_nfkc"])
def test_other_kinds_agree_on_plain_text_or_are_refused(sources, model_type, normalization, tmp_path: Path):
    """Equally good cuts of unigram models, and some rules of normalisers, are decided otherwise: never silently."""
    tokenizer = train_tokenizer(sources[:4], 800, tmp_path / "t.model", model_type, normalization)
    fast, _ = convert(tokenizer)
    text = "The quick brown fox: it's read, forgotten and dreamt of (twice)."
    assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    same = fast.encode(SAMPLE, add_special_tokens=False).ids == tokenizer.encode(SAMPLE)
    if same:
        fast_files(tokenizer)
    else:
        with pytest.raises(DataError, match="cannot be converted"):
            fast_files(tokenizer)
