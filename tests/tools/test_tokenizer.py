"""The tokenizer tool: its model and its output."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from sleeptrain.data.tokenizer import SentencePieceTokenizer
from sleeptrain.prepare.split import side

SCRIPT = Path(__file__).parents[2] / "tools" / "tokenizer.py"
TEXTS = [f"def name_{i % 17}(value):\n    return value + {i}\n# é {chr(0x4E00 + i)}" for i in range(200)]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizer_tool", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return ["--input", str(path), "--out", str(tmp_path / "t.model"), "--validation-share", "0.3"]


def held_out_figures(model: SentencePieceTokenizer) -> tuple[int, int, int]:
    """Bytes, tokens and single-byte tokens of the held-out side."""
    texts = [text for text in TEXTS if side(text, 0.3) == "validation"]
    ids = [id for text in texts for id in model.encode(text)]
    return sum(len(text.encode()) for text in texts), len(ids), sum(map(model.is_byte, ids))


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_makes_a_model_and_measures_it(
    tool: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str
) -> None:
    more = ["--vocab-size", "440", "--model-type", model_type, "--control-tokens", "<|a|>", "--reserved", "2"]
    assert tool.main([*arguments, *more]) == 0
    model = SentencePieceTokenizer(tmp_path / "t.model")
    assert [model.control_tokens[f"<|{name}|>"] for name in ("a", "reserved_0", "reserved_1")] == [4, 5, 6]
    first, control, held_out = capsys.readouterr().out.splitlines()
    assert f"440 ids, {model_type}, normalization identity" in first
    assert "<|reserved_1|> 6" in control
    num_bytes, num_tokens, num_single = held_out_figures(model)
    assert num_single > 10
    expected = f"{num_bytes:,} bytes, {num_bytes / num_tokens:.3f} a token, {num_single / num_tokens:.3%} of"
    assert expected in held_out


def test_normalization_is_printed(tool: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*arguments, "--vocab-size", "440", "--normalization", "nmt_nfkc"]) == 0
    assert "normalization nmt_nfkc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--vocab-size", "90000"], "vocab_size 90000 is too large"),
        (["--vocab-size", "500", "--control-tokens", "<s>"], "control token '<s>' is taken"),
        (["--vocab-size", "500", "--characters", "0"], "--characters 0: too small"),
        (["--vocab-size", "500", "--reserved", "-1"], "--reserved -1: too small"),
        (["--vocab-size", "500", "--validation-share", "2"], "--validation-share 2.0"),
        (["--vocab-size", "500", "--out", "tokenizer"], "ends in .model"),
        (["--vocab-size", "500", "--text-field", "body"], "no text to train on"),
    ],
)
def test_errors_are_one_line(
    tool: ModuleType, arguments: list[str], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert tool.main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tokenizer: ") and message in error and error.count("\n") == 1


def test_runs_as_a_command(arguments: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--vocab-size", "440"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert re.search(r"held out +[\d,]+ bytes", result.stdout)
