"""A model's folder, and text and a tokenizer for others."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer, train_tokenizer
from tests.hf.convert.folders import native_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3.5 model as transformers saves it."""
    native_folder("qwen3_5_text", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def sources() -> list[str]:
    """Real text: modules of Python's standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return [path.read_text(encoding="utf-8", errors="ignore") for path in files]


@pytest.fixture(scope="session")
def bpe(sources: list[str], tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return train_tokenizer(sources[:10], 1500, tmp_path_factory.mktemp("bpe") / "tokenizer.model")
