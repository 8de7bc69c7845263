"""The ids that transformers gives, compared with those of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer, load_tokenizer
from sleeptrain.errors import DataError
from sleeptrain.hf.convert.corpus import as_read
from sleeptrain.hf.convert.fast_tokenizer import fast_files
from sleeptrain.hf.convert.tokenizer_check import check_tokenizer
from tests.data.test_hf_tokenizer import BOS, EOS, OTHER, make
from tests.hf.convert.folders import write


def test_a_text_whose_ids_differ_is_refused(
    bpe: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    write(tmp_path, fast_files(bpe))
    check_tokenizer(tmp_path, bpe, [as_read("other", bpe)])
    with pytest.raises(DataError, match=r"the ids that transformers gives 'other' differ .* from the 1th on"):
        check_tokenizer(tmp_path, bpe, [as_read("other", bpe, begins=False)])
    encode = bpe.encode
    monkeypatch.setattr(bpe, "encode", lambda text: [*encode(text), 5] if text == "other" else encode(text))
    with pytest.raises(DataError, match=r"the ids that transformers gives 'other' differ .*--no-tokenizer"):
        check_tokenizer(tmp_path, bpe, [as_read("other", bpe)])


# A copied tokenizer: its configuration, the template of its post-processor, and the options of tools/prepare.py.
NAMED = {"bos_token": BOS, "eos_token": EOS}


def test_other_bos_and_eos_than_in_the_data_are_refused(tmp_path: Path):
    of_data = load_tokenizer(make(tmp_path / "hf", NAMED))
    other = load_tokenizer(make(tmp_path / "hf", NAMED), eos_token=OTHER)
    with pytest.raises(DataError, match="its BOS and EOS have the ids 0 and 2, those of the data 0 and 1"):
        check_tokenizer(write(tmp_path / "out", fast_files(other)), of_data)
