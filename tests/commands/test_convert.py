"""What `sleeptrain convert` prints of a conversion and of mistakes."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.commands import convert
from sleeptrain.hf.convert.exporting import Exported
from sleeptrain.hf.convert.importing import Imported
from tests.models import tiny_config


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["convert", "export", str(tmp_path / "none"), str(tmp_path / "hf")]) == 2
    assert capsys.readouterr().err.startswith("sleeptrain: ")
    assert main(["convert", "export", "a", "b", "--check-tokens", "3"]) == 2
    assert "--check-tokens 3" in capsys.readouterr().err
    assert main(["convert", "export", "a", "b", "--to", "llama"]) == 2


@pytest.mark.parametrize(
    ("tokenizer", "texts", "lines"),
    [
        (False, None, ["without a tokenizer"]),
        (True, 0, ["with its tokenizer", "a built-in sample only, because no data of the run can be read here"]),
        (True, 1, ["with its tokenizer", "a built-in sample and of 1 document of the run's data"]),
        (True, 9, ["with its tokenizer", "a built-in sample and of 9 documents of the run's data"]),
    ],
)
def test_an_export_prints_what_was_compared(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tokenizer: bool,
    texts: int | None,
    lines: list[str],
) -> None:
    received = list[object]()

    def export(*arguments: object) -> Exported:
        received.extend(arguments)
        return Exported("qwen3_5_text", 12_345, 1.23e-7, tokenizer, texts)

    monkeypatch.setattr(convert, "export", export)
    words = [
        "export",
        "run",
        "out",
        "--to",
        "qwen3_5_text",
        "--dtype",
        "bfloat16",
        "--no-tokenizer",
        "--stop",
        "change",
    ]
    assert convert.main([*words, "--check-tokens", "16"]) == 0
    assert received == [
        Path("run"),
        Path("out"),
        "qwen3_5_text",
        "bfloat16",
        None,
        False,
        16,
        False,
        {"stop": "change"},
    ]
    first, checked, *rest = capsys.readouterr().out.splitlines()
    assert first == f"out: qwen3_5_text, 12,345 parameters in bfloat16, {lines[0]}"
    assert checked == "checked: the logits of both models differ by 1.2e-07 of the largest"
    assert [line.partition("ids of ")[2] for line in rest] == lines[1:]


def test_an_import_prints_what_it_left_out_and_how_to_begin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unused = ["model.visual.a", "model.visual.b", "mtp.layers.0"]
    imported = Imported("qwen3_5_text", tiny_config(), unused, ["a remark"], True, 0.0)
    monkeypatch.setattr(convert, "import_folder", lambda *_: imported)
    assert convert.main(["import", "hf", "out"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "out: a checkpoint of a qwen3_5_text model"
    assert lines[2:5] == ["left out: 2 tensors of model.visual.*", "left out: 1 tensors of mtp.layers.*", "a remark"]
    assert "  model.dim=16" in lines and lines[-2] == "Begin a run with it:" and lines[-1].endswith(" ...")
    assert [word for word in shlex.split(lines[-1]) if "out" in word][1:] == [
        "model=out",
        "run.init_from=out",
        "data.shards.tokenizer=out",
    ]


def test_the_command_of_an_import_without_a_tokenizer_names_none() -> None:
    assert [word.partition("=")[0] for word in convert.begin_with(Path("out"), False)] == [
        "hydra.searchpath",
        "model",
        "run.init_from",
    ]
