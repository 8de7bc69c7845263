"""The settings of somebody else's run read only local files, unless the caller allows more by name."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from sleeptrain.checkpoint.write import write
from sleeptrain.cli import main
from sleeptrain.config import load_resolved, save_resolved
from sleeptrain.config.compose import compose
from sleeptrain.config.schema import DataConfig, ShardsConfig, ShardSource
from sleeptrain.data.consent import with_consent
from sleeptrain.data.shards import TokenShards, write_shards
from sleeptrain.data.storage import Cache, Retries
from sleeptrain.data.tokenizer import Tokenizer
from sleeptrain.errors import ConfigError, DataError
from tests.checkpoint.test_folder import flip
from tests.checkpoint.worlds import alone, nothing
from tests.hostile import HOSTILE, is_harmless

PIPE = "pipe:aws s3 cp s3://b/t/shard-{0..1}.tar -"


def data(*locations: str, cache: str = "") -> DataConfig:
    return DataConfig(
        shards=ShardsConfig(sources=[ShardSource(f"s{i}", place) for i, place in enumerate(locations)], cache=cache)
    )


def refusal(found: DataConfig, *allowed: str) -> list[str]:
    """The arguments that would allow the refused places; empty where none is refused."""
    try:
        with_consent(found, allowed, "runs/r")
    except ConfigError as error:
        assert "runs/r" in str(error)
        return [shlex.split(line)[1] for line in error.details]
    return []


@pytest.mark.parametrize(
    "place", [PIPE, "s3://b/t", "file:///etc", "${oc.env:HOME}/x", "memory://a", "simplecache::s3://b/t"]
)
def test_places_other_than_local_files_are_refused_and_may_be_allowed(place: str) -> None:
    assert refusal(data("local/train", place, place)) == [place]
    assert refusal(data(place), place) == []
    assert refusal(data(place), "*", "s3", "pipe:") == [place]


def test_the_flags_that_a_refusal_shows_allow_its_places() -> None:
    places = [f"{PIPE}\n#\x1b[2K\u202e", "https://me:hush@host/x?sig=abc"]
    words = refusal(data(*places))
    assert "hush" not in "".join(words) and "\x1b" not in "".join(words) and "\n" not in "".join(words)
    assert refusal(data(*places), *words) == []


def test_urls_may_be_allowed_by_their_beginning() -> None:
    assert refusal(data("s3://b/t", "s3://b/v"), "s3://b/") == []
    for place in (
        "s3://bc/t",
        "s3://b/../c",
        "s3://b/${oc.env:KEY}/t",
        "s3://b/a::https://c/",
        "pipe:s3://b/{0..1}.tar",
    ):
        assert refusal(data(place), "s3://b/", "pipe:") == [place]


def test_copies_go_to_the_callers_own_cache() -> None:
    assert with_consent(data("train", cache="/home/me"), [], "r").shards.cache == ""


@pytest.fixture
def run(shards: TokenShards, tmp_path: Path) -> Path:
    """Somebody else's run. Its command writes the caller's key into a file."""
    folder = tmp_path / "run"
    config = compose(
        ["experiment=stdlib", "data.batch=2", "data.sequence=50", "data.shards.tokenizer=''", "sleep.window=25"]
    )
    mark = f"pipe:echo ${{oc.env:SLEEPTRAIN_TEST_KEY}} >> {tmp_path}/mark; "
    mark += f"cat {tmp_path}/shards/shard-{{000000..000001}}.tar"
    config.data.shards.sources = [ShardSource("text", mark, str(tmp_path / "shards"))]
    folder.mkdir()
    save_resolved(config, folder / "config.yaml")
    return folder


def test_a_command_of_a_run_is_not_run_unless_it_is_allowed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLEEPTRAIN_TEST_KEY", "hush-4711")
    monkeypatch.setenv("SLEEPTRAIN_CACHE", str(tmp_path / "cache"))
    command = ["data", "which", str(run), "--step", "1"]
    assert main(command) == 2
    err = capsys.readouterr().err
    assert not (tmp_path / "mark").exists() and "hush" not in err
    words = shlex.split(err.splitlines()[1])
    assert words[0] == "--allow-source" and "${oc.env:SLEEPTRAIN_TEST_KEY}" in words[1]
    assert main([*command, *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[0])["source"] == "text"
    assert set((tmp_path / "mark").read_text().split()) == {"hush-4711"}


def test_no_message_of_the_storage_shows_a_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLEEPTRAIN_TEST_KEY", "hush-4711")
    again = Retries(attempts=2, first_wait=0)
    for place in (
        "pipe:echo ${oc.env:SLEEPTRAIN_TEST_KEY} is wrong >&2; false shard-{0..1}.tar",
        "file:///nowhere/${oc.env:SLEEPTRAIN_TEST_KEY}",
        "file:///nowhere/me:hush-4712@x/${oc.env:SLEEPTRAIN_TEST_KEY}",
        "${oc.env:SLEEPTRAIN_TEST_KEY}/shards",
    ):
        with pytest.raises(DataError) as error:
            TokenShards(place, cache=Cache(tmp_path), retries=again)
        assert "hush-4711" not in str(error.value) + caplog.text
        assert "SLEEPTRAIN_TEST_KEY" in str(error.value)


def test_a_damaged_checkpoint_is_not_used_to_find_the_documents_of_a_step(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_resolved(run / "config.yaml")
    config.data.shards.sources[0].train = str(tmp_path / "shards")
    save_resolved(config, run / "config.yaml")
    for step, rows in ((3, 2), (12, 5)):
        state = {"step": step, "tokens": 0, "shape": None, "data": {"cuts": [[rows, 12]]}}
        documents = {"state.json": json.dumps(state).encode(), "config.yaml": b""}
        write(run / "checkpoints" / f"step-{step:08d}", {"a": torch.zeros(1)}, documents, alone(), nothing)
    command = ["data", "which", str(run), "--step", "2"]
    assert main(command) == 0
    assert "row 4" in capsys.readouterr().out
    flip(run / "checkpoints" / "step-00000012" / "state.json", 0.5)
    assert main(command) == 0
    output = capsys.readouterr()
    assert "row 4" not in output.out and "step-00000012 is damaged (the checksum of state.json" in output.err


def test_texts_and_names_are_shown_harmlessly(
    run: Path, tmp_path: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    write_shards(tmp_path / "hostile", [HOSTILE * 20] * 20, tokenizer, name="h")
    config = load_resolved(run / "config.yaml")
    config.data.shards.tokenizer = str(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer.files["tokenizer.model"])
    config.data.shards.sources = [ShardSource(HOSTILE, str(tmp_path / "hostile"), str(tmp_path / "hostile"))]
    save_resolved(config, run / "config.yaml")
    command = ["data", "which", str(run), "--step", "1", "--row", "0", "--text"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert is_harmless(output) and output.count("\\x1b]0;owned\\x07") > 1
    assert main([*command, "--json"]) == 0
    first = json.loads(capsys.readouterr().out.splitlines()[0])
    assert first["source"] == HOSTILE and "\x1b[31m" in first["text"]
