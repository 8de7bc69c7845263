"""Nobody else can have planted the folder of a local Slurm cluster."""

from __future__ import annotations

import os
from pathlib import Path

import local_slurm
import pytest
from local_slurm import Cluster, ClusterError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder like the system's temporary one: everybody may add files, only their owner may remove them."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    return shared


def of_somebody_else(monkeypatch: pytest.MonkeyPatch, *theirs: Path) -> None:
    lstat = Path.lstat

    def found(self: Path) -> os.stat_result:
        values = list(lstat(self))
        values[4] = 12345 if self in theirs else os.geteuid()
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", found)


def test_the_users_own_folder_is_taken(place: Path) -> None:
    (place / "mine").mkdir(mode=0o755)
    assert Cluster(place / "mine").folder == (place / "mine").resolve()
    assert Cluster(place / "not" / "yet").folder == (place / "not" / "yet").resolve()


def test_a_folder_or_a_link_of_somebody_else_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "planted").mkdir(mode=0o755)
    (place / "link").symlink_to("/etc")
    of_somebody_else(monkeypatch, place / "planted", place / "link")
    for folder in (place / "planted", place / "planted" / "below", place / "link", place / "link" / "below"):
        with pytest.raises(ClusterError, match=f"^{place}/(planted|link) may be changed by others"):
            Cluster(folder)


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    for folder in (tmp_path / "open", tmp_path / "open" / "below"):
        with pytest.raises(ClusterError, match="may be changed by others"):
            Cluster(folder)


def test_every_action_refuses_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A planted slurm.conf could name programs to run, also by `stop`."""
    (tmp_path / "slurm.conf").write_text("PlugStackConfig=/nowhere/evil\n")
    tmp_path.chmod(0o777)
    for action in (["start"], ["stop"], ["crash", "1"], ["node", "1"]):
        assert local_slurm.main(["--folder", str(tmp_path), *action]) == 1
        assert capsys.readouterr().err == (
            f"local_slurm: {tmp_path} may be changed by others: choose a --folder whose path only you can change\n"
        )


def test_the_default_is_in_no_shared_folder() -> None:
    assert not any(parent.stat().st_mode & 0o022 for parent in local_slurm.FOLDER.parents)
