"""The real wandb, offline: the tests read its own files back."""

import logging
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sleeptrain.config.schema import WandbConfig
from sleeptrain.errors import ConfigError
from sleeptrain.train.logging.wandb_log import WandbLogger, flatten
from tests.parallel.processes import PATIENCE

BLOCK = 32 * 1024
HEADER = 7  # of the file, and of each fragment (crc32 u32, length u16, type u8)
KEY = "0123456789" * 4


def fragments(content: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of a LevelDB log; a block ends with padding where no header fits."""
    at = HEADER
    while at + HEADER <= len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        if kind == 0:
            return
        yield kind, content[at + HEADER : at + HEADER + length]
        at += HEADER + length


def records(folder: Path) -> Iterator[Any]:
    """The protobuf records of every run file under a run folder, in the order of the runs."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime_ns):
        content = path.read_bytes()
        assert content.startswith(b":W&B")
        message = b""
        for kind, payload in fragments(content):
            message = payload if kind in (1, 2) else message + payload  # full, first, middle, last
            if kind in (1, 4):
                record = wandb_internal_pb2.Record()
                record.ParseFromString(message)
                yield record


def history(folder: Path) -> list[dict[str, str]]:
    rows = []
    for record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows.append(items | {"_step": str(record.history.step.num)})
    return rows


def run_in_process(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Train in a new process, because wandb's service and settings live as long as their process."""
    prelude = (
        "import sys\nfrom sleeptrain.config.schema import WandbConfig\n"
        "from sleeptrain.train.logging.wandb_log import WandbLogger\nfolder = sys.argv[1]\n"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_") and name != "NETRC"}
    kept |= {"HOME": str(folder / "home"), **environment}
    (folder / "home").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "-c", prelude + code, str(folder)],
        env=kept,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        stdin=subprocess.DEVNULL,
    )


TWO_STARTS = """
config = WandbConfig(mode="auto", project="dreams")
first = WandbLogger(config, folder, "night", {"model": {"dim": 128}, "sleep": {"passes": 4}}, None)
for step in range(1, 4):
    first.log({"step": step, "loss": 1 / step, "mfu": None, "window": 64}, step)
first.log({"step": 3, "eval": {"loss": {"1": [2.0, 1.5], "4": [2.0, 1.25]}}}, 3)
first.finish()
first.finish()
second = WandbLogger(config, folder, "night", {"model": {"dim": 128}}, first.run_id)
second.log({"step": 4, "loss": 0.125}, 4)
second.finish()
second.log({"step": 5, "loss": 0.0}, 5)
print(first.run_id, second.run_id)
"""


def test_offline_history_config_and_one_id_over_a_resume(tmp_path: Path) -> None:
    """Without a key `auto` is offline; a resumed run is the same run and goes on at its step."""
    result = run_in_process(TWO_STARTS, tmp_path)
    assert result.returncode == 0, result.stderr
    first_id, second_id = result.stdout.split()
    assert first_id == second_id
    assert result.stderr == ""

    rows = history(tmp_path)
    assert [row["_step"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["loss"]) for row in rows] == [1.0, 1 / 2, 1 / 3, 0.125]
    assert "mfu" not in rows[0] and rows[0]["step"] == "1" and rows[0]["window"] == "64"
    assert float(rows[2]["eval/loss/N4/window2"]) == 1.25 and float(rows[2]["eval/loss/N1/window2"]) == 1.5

    runs = [record.run for record in records(tmp_path) if record.WhichOneof("record_type") == "run"]
    assert {run.run_id for run in runs} == {first_id}
    assert {(run.project, run.display_name) for run in runs} == {("dreams", "night")}
    config = {update.key: update.value_json for run in runs for update in run.config.update}
    assert config["model"] == '{"dim":128}' or config["model"] == '{"dim": 128}'
    assert "passes" in config["sleep"]
    assert not (tmp_path / "home" / "wandb").exists()


SERVICE_DIES = """
import os, signal, subprocess, time
logger = WandbLogger(WandbConfig(mode="offline"), folder, "night", {}, None)
logger.log({"loss": 1.0}, 1)
children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True, text=True).stdout
(service,) = [line.split()[0] for line in children.splitlines() if "wandb" in line]
os.kill(int(service), signal.SIGKILL)
for step in range(2, 20):
    logger.log({"loss": 1.0}, step)
    time.sleep(0.02)
logger.finish()
print("trained on", logger.run_id is not None)
"""


@pytest.mark.skipif(not Path("/bin/ps").exists() and not Path("/usr/bin/ps").exists(), reason="needs ps")
def test_a_run_outlives_wandb(tmp_path: Path) -> None:
    result = run_in_process(SERVICE_DIES, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "trained on True\n"
    assert result.stderr.count("wandb failed and is off from here on") == 1


ONLINE = """
wandb_log = sys.modules["sleeptrain.train.logging.wandb_log"]
wandb_log.INIT_TIMEOUT = 2.0
logger = WandbLogger(WandbConfig(mode="online"), folder, "night", {}, "abc123")
logger.log({"loss": 1.0}, 1)
logger.finish()
print(logger.run_id)
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({}, "no key is configured"),
        ({"WANDB_API_KEY": "short"}, "not reachable"),
        # Port 9 of this machine answers nobody, as a server that is down.
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "not reachable"),
    ],
)
def test_online_that_fails_goes_on_offline_as_the_same_run(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    result = run_in_process(ONLINE, tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "abc123\n"
    assert result.stderr.count("logging offline") == 1 and reason in result.stderr
    assert [row["loss"] for row in history(tmp_path)] in (["1"], ["1.0"])
    assert {r.run.run_id for r in records(tmp_path) if r.WhichOneof("record_type") == "run"} == {"abc123"}


class FakeWandb:
    """Replaces the module: records its calls, and fails on request."""

    class Settings:
        model_fields = {"base_url": type("Field", (), {"default": "https://api.default.example"})}  # noqa: RUF012
        api_key: str | None = None
        base_url = "https://api.default.example"

        def __init__(self, **options: object):
            self.options = options

    def __init__(self, failing: tuple[str, ...] = ()):
        self.failing, self.calls = failing, []  # type: ignore[var-annotated]

    def setup(self) -> Any:
        return type("Setup", (), {"settings": self.Settings()})

    def init(self, mode: str, settings: Any, **arguments: object) -> Any:
        self.calls.append((mode, settings.options, arguments))
        if mode in self.failing:
            raise RuntimeError(f"no {mode}\nmore lines")
        return type("Run", (), {"log": lambda *a, **k: None, "finish": lambda *a: None})()

    def teardown(self) -> None:
        pass


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def start(monkeypatch: pytest.MonkeyPatch, fake: FakeWandb, mode: str, run_id: str | None = None) -> WandbLogger:
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    return WandbLogger(WandbConfig(mode=mode), "folder", "night", {}, run_id)


def write_netrc(folder: Path, text: str) -> None:
    (folder / "netrc").write_text(text)
    (folder / "netrc").chmod(stat.S_IRUSR | stat.S_IWUSR)


@pytest.mark.parametrize("host", ["api.default.example", "api.wandb.ai"])
def test_auto_is_online_with_a_key_in_the_netrc(clean: pytest.MonkeyPatch, tmp_path: Path, host: str) -> None:
    write_netrc(tmp_path, f"machine {host}\n  login user\n  password {KEY}\n")
    fake = FakeWandb()
    logger = start(clean, fake, "auto")
    ((mode, settings, arguments),) = fake.calls
    # The key is passed on, so that wandb does not ask for one.
    assert mode == "online" and settings["api_key"] == KEY
    assert arguments["resume"] == "allow" and arguments["id"] == logger.run_id and arguments["dir"] == "folder"


def test_a_public_key_is_not_sent_to_a_private_server(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_netrc(tmp_path, f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    fake = FakeWandb()
    clean.setattr(fake.Settings, "base_url", "https://wandb.private.example")
    start(clean, fake, "auto")
    assert [call[0] for call in fake.calls] == ["offline"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ["offline"]),
        ({"WANDB_API_KEY": KEY}, ["online"]),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, ["offline"]),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "disabled"}, []),
        ({"WANDB_MODE": "online"}, ["offline"]),
    ],
)
def test_auto_by_environment(clean: pytest.MonkeyPatch, environment: dict[str, str], expected: list[str]) -> None:
    for name, value in environment.items():
        clean.setenv(name, value)
    fake = FakeWandb()
    start(clean, fake, "auto")
    assert [call[0] for call in fake.calls] == expected


def test_online_offline_disabled_in_turn(clean: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clean.setenv("WANDB_API_KEY", KEY)
    fake = FakeWandb(failing=("online", "offline"))
    with caplog.at_level(logging.WARNING):
        logger = start(clean, fake, "online", run_id="kept")
        logger.log({"loss": 1.0}, 1)
        logger.finish()
    assert [call[0] for call in fake.calls] == ["online", "offline"]
    assert {call[2]["id"] for call in fake.calls} == {"kept"} and logger.run_id == "kept"
    assert [r.message.split(" (")[0] for r in caplog.records] == [
        "wandb is not reachable",
        "wandb cannot start and is off",
    ]


def test_disabled_starts_nothing_and_keeps_the_id(clean: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    assert start(clean, fake, "disabled").run_id is None
    logger = start(clean, fake, "disabled", run_id="kept")
    logger.log({"loss": 1.0}, 1)
    logger.finish()
    assert logger.run_id == "kept" and fake.calls == []


def test_unknown_mode_is_refused(clean: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"wandb\.mode"):
        start(clean, FakeWandb(), "shared")


def test_flatten() -> None:
    record = {"loss": 1.0, "mfu": None, "eval": {"loss": {"1": [1.0, None], "4": [2.0]}, "accuracy": {"4": 0.5}}}
    assert dict(flatten(record)) == {
        "loss": 1.0,
        "eval/loss/N1/window1": 1.0,
        "eval/loss/N4/window1": 2.0,
        "eval/accuracy/N4": 0.5,
    }
