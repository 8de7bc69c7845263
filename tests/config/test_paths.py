"""A path that cannot be used ends a command with code 2 and one line that names the setting."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sleeptrain.cli import main
from sleeptrain.config.compose import compose
from sleeptrain.config.paths import naming_settings
from sleeptrain.config.validate import validate
from sleeptrain.errors import ConfigError, DataError
from tests.train.test_trainer import settings

LONG = "x" * 300


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("sleeptrain: ") and message.count("\n") == 1, message
    return message


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A file system that is read-only."""
    folder = tmp_path / "closed"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a file system can be mounted by root only")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize("place", ["file", "file/below", "link", LONG])
def test_a_root_that_is_no_folder(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    message = refusal(["train", *settings(tmp_path / place)], capsys)
    assert f"run.root={tmp_path / place}: the run folder cannot be made or written: {tmp_path}" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


def test_a_root_that_is_read_only(read_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(["train", *settings(read_only)], capsys)
    assert message.endswith(f"the run folder cannot be made or written: {read_only}/r: Read-only file system\n")


def test_a_run_whose_records_are_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r" / "metrics.jsonl").mkdir(parents=True)
    assert "metrics.jsonl is no plain file" in refusal(["train", *settings(tmp_path)], capsys)


@pytest.mark.parametrize("setting", ["run.init_from", "data.gsm_infinite.tokenizer"])
def test_a_path_of_another_setting(tmp_path: Path, setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if setting == "run.init_from" else ["data=gsm_infinite", "sleep.window=2000"]
    message = refusal(["train", *settings(tmp_path / "runs", *more, f"{setting}={tmp_path / LONG}")], capsys)
    assert f"sleeptrain: {setting}: {tmp_path}/xxx" in message and message.endswith("File name too long\n")
    assert list(tmp_path.iterdir()) == []


def test_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / LONG
    for arguments in (["evaluate", str(place)], ["convert", "export", str(place), str(tmp_path / "out")]):
        assert "File name too long" in refusal(arguments, capsys)


def test_the_innermost_setting_is_named(tmp_path: Path) -> None:
    config = compose([*settings(tmp_path), f"data.shards.sources=[{{train: {tmp_path}/a}}]"])
    with (
        pytest.raises(DataError, match=r"^data\.shards\.sources\[0\]\.train: .*/a/index: Permission denied$"),
        naming_settings(config),
    ):
        raise PermissionError(13, "Permission denied", f"{tmp_path}/a/index")
    with pytest.raises(OSError, match="broken"), naming_settings(config):
        raise OSError(5, "broken", str(tmp_path))


def test_a_null_character(tmp_path: Path) -> None:
    config = compose(settings(tmp_path))
    config.run.name = "a\0b"

    with pytest.raises(ConfigError, match=r"run\.name holds a null character"):
        validate(config)
