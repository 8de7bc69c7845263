"""What `sleeptrain data` answers, and which questions it refuses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.config import save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import Config, ShardSource
from sleeptrain.data.batch import PAD
from sleeptrain.data.shards import TokenShards
from sleeptrain.data.source import ShardsSource
from sleeptrain.data.tokenizer import Tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def config(shards: TokenShards, tokenizer: Tokenizer, tmp_path: Path) -> Config:
    settings = ["experiment=stdlib", "data.batch=2", "data.sequence=50", "sleep.window=25", "sleep.curriculum=[]"]
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    config = compose([*settings, f"data.shards.tokenizer={tmp_path / 'tokenizer.model'}"])
    config.data.shards.sources = [ShardSource("text", str(tmp_path / "shards"))]
    return config


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Path:
    """The folder of a run that has no checkpoint yet."""
    (tmp_path / "run").mkdir()
    save_resolved(config, tmp_path / "run" / "config.yaml")
    return tmp_path / "run"


def answer(capsys: Capture, *words: str) -> list[str]:
    assert main(["data", *words]) == 0
    return capsys.readouterr().out.splitlines()


def test_each_row_of_a_step_has_its_documents(run: Path, capsys: Capture) -> None:
    lines = [json.loads(line) for line in answer(capsys, "which", str(run), "--step", "2", "--json")]
    assert {line["row"] for line in lines} == {0, 1} and {line["source"] for line in lines} == {"text"}
    for row in (0, 1):
        places = [line["at"] for line in lines if line["row"] == row]
        assert places[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(places))
    one = answer(capsys, "which", str(run), "--step", "2", "--row", "1")
    assert len(one) == sum(line["row"] == 1 for line in lines) and all(line.startswith("row 1  ") for line in one)


def test_the_text_is_that_of_the_batch(run: Path, config: Config, tokenizer: Tokenizer, capsys: Capture) -> None:
    source = ShardsSource(config.data)
    source.batch(2)
    marks = (tokenizer.bos_id, tokenizer.eos_id, PAD)
    tokens = [token for token in source.batch(2).tokens_BT[0].tolist() if token not in marks]
    lines = answer(capsys, "which", str(run), "--step", "2", "--row", "0", "--text", "--json")
    text = "".join(json.loads(line)["text"] for line in lines)
    assert "".join(text.split()) == "".join(tokenizer.decode(tokens).split()) != ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "0"], "--step 0: the first step of a run is 1"),
        (["--step", "1", "--row", "2"], "--row 2: step 1 has the rows 0 to 1"),
        (["--step", "1", "--row", "-1"], "--row -1: step 1 has the rows 0 to 1"),
    ],
)
def test_unknown_steps_and_rows_are_refused(run: Path, capsys: Capture, words: list[str], message: str) -> None:
    assert main(["data", "which", str(run), *words]) == 2
    assert capsys.readouterr().err == f"sleeptrain: {message}\n"


def test_tasks_have_no_documents(tmp_path: Path, capsys: Capture) -> None:
    save_resolved(compose(["experiment=rule110"]), tmp_path / "config.yaml")
    assert main(["data", "which", str(tmp_path), "--step", "1"]) == 2
    assert "reads data.source=rule110; only shards have documents" in capsys.readouterr().err
    assert main(["data", "describe", "experiment=rule110"]) == 2
    assert "data.source=rule110 reads no files: there is nothing to describe" in capsys.readouterr().err


def test_data_is_described_by_the_settings_of_a_run(shards: TokenShards, tmp_path: Path, capsys: Capture) -> None:
    def settings(place: Path) -> list[str]:
        sources = f"data.shards.sources=[{{name: text, train: {place}, validation: {place}}}]"
        return ["describe", "experiment=stdlib", sources, "data.shards.tokenizer=''"]

    text = "\n".join(answer(capsys, *settings(tmp_path / "shards")))
    assert "text" in text and f"{shards.num_documents:,}" in text
    assert main(["data", *settings(tmp_path / "nowhere")]) == 2
    assert f"{tmp_path / 'nowhere'}: no such folder of token shards" in capsys.readouterr().err
