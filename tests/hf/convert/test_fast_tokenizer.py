"""Tokenizers that transformers reads give the ids of training for any text, or are refused."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import processors
from transformers import AutoTokenizer

from sleeptrain.data.hf_tokenizer import CONFIG_JSON, TOKENIZER_JSON, HuggingFaceTokenizer
from sleeptrain.data.tokenizer import SentencePieceTokenizer, load_tokenizer, train_tokenizer
from sleeptrain.errors import ConfigError, DataError
from sleeptrain.hf.convert.fast_tokenizer import convert, fast_files
from sleeptrain.hf.convert.tokenizer_check import SAMPLE, check_tokenizer
from tests.data.test_hf_tokenizer import BOS, EOS, OTHER, make
from tests.data.texts import default_sentencepiece
from tests.hf.convert.folders import write


def test_the_same_ids_on_a_corpus(bpe: SentencePieceTokenizer, sources: list[str]):
    fast, _ = convert(bpe)
    for text in sources:
        assert fast.encode(text, add_special_tokens=False).ids == bpe.encode(text)


def test_the_same_ids_of_random_characters(bpe: SentencePieceTokenizer):
    """Some are not in the vocabulary, some are symbols of SentencePiece, some make names of control tokens."""
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


def test_the_written_tokenizer_is_the_compared_one(bpe: SentencePieceTokenizer, tmp_path: Path):
    for name, content in fast_files(bpe).items():
        (tmp_path / name).write_bytes(content)
    again = HuggingFaceTokenizer(tmp_path / TOKENIZER_JSON)
    assert (again.vocab_size, again.bos_id, again.eos_id) == (bpe.vocab_size, bpe.bos_id, bpe.eos_id)
    assert again.encode(SAMPLE) == bpe.encode(SAMPLE)
    written = tokenizers.Tokenizer.from_file(str(tmp_path / TOKENIZER_JSON))
    assert written.encode("a b").ids == [bpe.bos_id, *bpe.encode("a b")]
    # A Hugging Face tokenizer that agrees with training is copied unchanged.
    assert fast_files(again)[TOKENIZER_JSON] == again.files[TOKENIZER_JSON]
    check_tokenizer(tmp_path, bpe)
    check_tokenizer(tmp_path, again)


@pytest.mark.parametrize("settings", [{}, {"remove_extra_whitespaces": False}, {"add_dummy_prefix": False}], ids=str)
def test_text_is_decoded_without_the_space_before_it(settings, tmp_path: Path):
    """This holds for transformers' own class, too, in which ids that only the model has give no text."""
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


# A copied tokenizer: its configuration, the template of its post-processor, and the options of tools/prepare.py.
NAMED = {"bos_token": BOS, "eos_token": EOS}
COPIED: dict[str, tuple[dict[str, Any], str | None, dict[str, str]]] = {
    "named, and nothing adds it": (NAMED, None, {}),
    "named and added": (NAMED, f"{BOS} $A", {}),
    "--bos-token": ({"eos_token": EOS}, None, {"bos_token": OTHER}),
    "--bos-token against what is added": (NAMED, f"{BOS} $A", {"bos_token": OTHER}),
    "--bos-token ''": (NAMED, f"{BOS} $A", {"bos_token": ""}),
    "--bos-token '' against what is said": (NAMED | {"add_bos_token": True}, None, {"bos_token": ""}),
    "--bos-token against what is said": (NAMED | {"add_bos_token": False}, None, {"bos_token": BOS}),
    "not to be added, but added": (NAMED | {"add_bos_token": False}, f"{BOS} $A", {}),
    "EOS added after a text": (NAMED, f"{BOS} $A {EOS}", {}),
    "EOS to be added after a text": (NAMED | {"add_bos_token": True, "add_eos_token": True}, None, {}),
    "--eos-token": (NAMED, f"$A {EOS}", {"eos_token": OTHER}),
    "a class with ideas of its own": (NAMED | {"tokenizer_class": "LlamaTokenizer", "legacy": True}, f"{BOS} $A", {}),
    "a class that adds tokens": (NAMED | {"tokenizer_class": "Qwen2TokenizerFast", "pad_token": "<|none|>"}, None, {}),
    "special tokens found in text": (NAMED | {"split_special_tokens": False, "additional_special_tokens": [OTHER]},
                                     None, {}),
    "padded and cut off": (NAMED | {"padding_side": "left", "pad_token": EOS, "model_max_length": 4}, None, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", COPIED)
def test_a_copied_tokenizer_gives_the_ids_of_training(case: str, tmp_path: Path):
    """transformers and the `tokenizers` package alone give the same ids."""
    config, template, options = COPIED[case]
    processor = None
    if template is not None:
        ids = [(token, at) for at, token in enumerate((BOS, EOS)) if token in template]
        processor = json.loads(processors.TemplateProcessing(template, special_tokens=ids).__getstate__())
    ours = load_tokenizer(make(tmp_path / "hf", config, post_processor=processor), **options)
    folder = write(tmp_path / "out", fast_files(ours))
    check_tokenizer(folder, ours)
    theirs = AutoTokenizer.from_pretrained(folder)
    first = [] if ours.bos_id is None else [ours.bos_id]
    for text in (f"a{EOS}b{OTHER} {BOS}", "  return x\n", "", "x" * 50):
        assert theirs(text).input_ids == first + ours.encode(text)
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, len(theirs)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    alone = tokenizers.Tokenizer.from_file(str(folder / TOKENIZER_JSON))
    assert alone.encode("return x" * 9).ids == first + ours.encode("return x" * 9)
    assert theirs.padding_side == config.get("padding_side", "right")
    again = load_tokenizer(folder)
    assert (again.bos_id, again.eos_id, again.encode("a b")) == (ours.bos_id, ours.eos_id, ours.encode("a b"))


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
    """The two differ in equally good splits of unigram models and in some rules of normalisers, but never silently."""
    tokenizer = train_tokenizer(sources[:4], 800, tmp_path / "t.model", model_type, normalization)
    fast, _ = convert(tokenizer)
    text = "The quick brown fox: it's read, forgotten and dreamt of (twice)."
    assert fast.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    same = fast.encode(SAMPLE, add_special_tokens=False).ids == tokenizer.encode(SAMPLE)
    folder = write(tmp_path / "out", fast_files(tokenizer))
    if same:
        check_tokenizer(folder, tokenizer)
    else:
        with pytest.raises(DataError, match="cannot be exported"):
            check_tokenizer(folder, tokenizer)
