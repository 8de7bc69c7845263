from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from sleeptrain.data.hf_tokenizer import HuggingFaceTokenizer, of_library
from sleeptrain.data.tokenizer import load_tokenizer
from sleeptrain.errors import DataError
from tests.data.texts import make_texts

BOS, EOS, OTHER = "<|begin|>", "<|end|>", "<|other|>"


def make(folder: Path, config: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A byte-level BPE that adds BOS and EOS, truncates and pads, unless its caller switches that off."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=310,
        special_tokens=[BOS, EOS, OTHER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(make_texts(40), trainer)
    model.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=[(BOS, 0), (EOS, 1)])
    model.enable_truncation(8)
    model.enable_padding(length=16)
    description = json.loads(model.to_str())
    description.update(changes)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(description))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "hf", {"bos_token": BOS, "eos_token": {"content": EOS, "lstrip": False}})


def test_text_is_decoded_unchanged_and_makes_no_control_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 310)
    for text in [*make_texts(20), f"a{EOS}b", BOS + EOS + OTHER, "  é漢😀\r\n", "", "x" * 5000]:
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode([0, *ids, 1]) == text
    assert len(tokenizer.encode("return")) < 6


def test_text_makes_no_eos_that_lacks_the_special_mark(tmp_path: Path) -> None:
    made = json.loads((make(tmp_path / "a") / "tokenizer.json").read_text())
    added = [token | {"special": False} for token in made["added_tokens"]]
    tokenizer = load_tokenizer(make(tmp_path / "b", {"eos_token": EOS}, added_tokens=added))
    assert tokenizer.eos_id not in tokenizer.encode(f"a{EOS}b")


def test_eos_that_text_can_spell_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match="text that spells 'r' would give the token itself"):
        load_tokenizer(folder, eos_token="r")


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_folder_or_file(folder: Path, name: str) -> None:
    assert load_tokenizer(folder / name).eos_id == 1


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({"eos_token": EOS}, {}, (None, 1)),
        ({"eos_token": EOS, "bos_token": None}, {}, (None, 1)),
        ({"eos_token": EOS, "bos_token": BOS, "add_bos_token": False}, {}, (None, 1)),
        ({"eos_token": EOS, "bos_token": BOS, "add_bos_token": False}, {"bos_token": BOS}, (0, 1)),
        ({"eos_token": EOS, "bos_token": BOS}, {"bos_token": ""}, (None, 1)),
        ({"eos_token": EOS, "bos_token": BOS}, {"eos_token": OTHER}, (0, 2)),
        (None, {"eos_token": OTHER}, (None, 2)),
    ],
)
def test_the_ids_of_bos_and_eos(tmp_path: Path, config: dict | None, options: dict, expected: tuple) -> None:
    tokenizer = load_tokenizer(make(tmp_path / "hf", config), **options)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files.items():
        (copy / name).write_bytes(content)
    again = load_tokenizer(copy)
    assert (again.bos_id, again.eos_id, again.hash) == (*expected, tokenizer.hash)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"special_tokens_map.json": {"eos_token": EOS}}, (None, 1)),
        ({"special_tokens_map.json": {"eos_token": {"content": EOS}, "bos_token": {"content": BOS}}}, (0, 1)),
        ({"tokenizer_config.json": {"eos_token": EOS}, "special_tokens_map.json": {"bos_token": BOS}}, (0, 1)),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": EOS},
          "special_tokens_map.json": {"bos_token": BOS}}, (None, 1)),
        ({"tokenizer_config.json": {"eos_token": OTHER}, "special_tokens_map.json": {"eos_token": EOS}}, (None, 2)),
        ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 1}}, (None, 1)),
        ({"config.json": {"eos_token_id": 1, "bos_token_id": 0}}, (None, 1)),
        ({"config.json": {"text_config": {"eos_token_id": [1, 2]}}, "generation_config.json": {"eos_token_id": 2}},
         (None, 1)),
        ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [2, 1]}}, (None, 2)),
    ],
)  # fmt: skip
def test_bos_and_eos_are_read_from_each_file(tmp_path: Path, files: dict, expected: tuple) -> None:
    folder = make(tmp_path / "hf")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_id, tokenizer.eos_id) == expected
    copy = tmp_path / "copy"
    copy.mkdir()
    for name, content in tokenizer.files.items():
        (copy / name).write_bytes(content)
    assert load_tokenizer(copy).hash == tokenizer.hash, "two files say it all"


def test_the_hash_covers_all_that_changes_ids(folder: Path) -> None:
    found = {load_tokenizer(folder).hash, load_tokenizer(folder, eos_token=OTHER).hash}
    found |= {load_tokenizer(folder, bos_token="").hash, load_tokenizer(folder, bos_token=OTHER).hash}
    path = folder / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert len(found | {load_tokenizer(folder).hash}) == 5


def test_lone_surrogate(folder: Path) -> None:
    with pytest.raises(DataError, match="surrogate"):
        load_tokenizer(folder).encode("a\ud800")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, {}, r"names no EOS: not in tokenizer_config\.json, special_tokens_map\.json, .*write one .*eos_token"),
        ({"config.json": '{"eos_token_id": true}'}, {}, "names no EOS"),
        ({"generation_config.json": '{"eos_token_id": [99999]}'}, {}, "names no EOS"),
        ({"special_tokens_map.json": "["}, {"eos_token": EOS}, r"special_tokens_map\.json is not JSON"),
        ({}, {"eos_token": "<none>"}, "has no token '<none>'; .* eos_token .*--eos-token"),
        ({}, {"eos_token": EOS, "bos_token": "<none>"}, "has no token '<none>'; .*--bos-token"),
        ({"tokenizer.json": "{}"}, {"eos_token": EOS}, "not a Hugging Face tokenizer"),
        ({"tokenizer.json": "junk"}, {"eos_token": EOS}, r"tokenizer\.json is not JSON"),
        ({"tokenizer_config.json": "["}, {"eos_token": EOS}, r"tokenizer_config\.json is not JSON"),
        ({"tokenizer_config.json": "[]"}, {"eos_token": EOS}, r"tokenizer_config\.json is not a JSON object"),
    ],
)
def test_unfit_files(tmp_path: Path, files: dict, options: dict, message: str) -> None:
    folder = make(tmp_path / "hf")
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(folder / "tokenizer.json", **options)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.json"):
        load_tokenizer(tmp_path / "absent.json")


class PanicException(BaseException):
    """Like the library's own class, which it does not export. `except Exception` does not catch it."""


@pytest.mark.parametrize("method", ["encode", "decode"])
def test_a_panic_of_the_library_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def panic(*_: object, **__: object) -> None:
        raise PanicException("called `Option::unwrap()`\non a `None` value")

    tokenizer = load_tokenizer(folder)

    class Panics:
        encode = decode = panic

    monkeypatch.setattr(tokenizer, "_tokenizer", Panics())
    with pytest.raises(DataError, match=r"tokenizer .* cannot .*: called `Option::unwrap\(\)` on a `None` value; take"):
        getattr(tokenizer, method)("a" if method == "encode" else [1])


def test_a_panic_while_it_is_read_is_a_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panics:
        @staticmethod
        def from_str(_: str) -> None:
            raise PanicException("index out of bounds")

    monkeypatch.setattr(tokenizers, "Tokenizer", Panics)
    with pytest.raises(DataError, match="is not a Hugging Face tokenizer: index out of bounds; take its files"):
        load_tokenizer(folder)


def test_an_interrupt_is_not_an_error_of_the_tokenizer() -> None:
    stop = KeyboardInterrupt()
    assert of_library(stop, "x") is stop
    assert isinstance(of_library(PanicException("a"), "x"), DataError)
    assert isinstance(of_library(ValueError("a"), "x"), DataError)
