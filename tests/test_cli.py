"""The console command: its output, its exit code, and that it leaves no files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from sleeptrain.cli import main
from sleeptrain.config import Config
from sleeptrain.errors import DataError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations in calls of `train`, which is replaced and trains nothing."""
    return fake_trainer(monkeypatch, lambda config: 0)


def fake_trainer(monkeypatch: pytest.MonkeyPatch, job: Callable[[Config], int]) -> list[Config]:
    configs: list[Config] = []

    def train(config: Config) -> int:
        configs.append(config)
        return job(config)

    monkeypatch.setitem(sys.modules, "sleeptrain.train.trainer", SimpleNamespace(train=train))
    return configs


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sleeptrain", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def without(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """Commands are loaded as if this module were missing."""

    def load(_: str) -> None:
        raise ModuleNotFoundError(f"No module named '{module}'", name=module)

    monkeypatch.setattr("sleeptrain.cli.import_module", load)


@pytest.mark.parametrize(
    ("command", "missing", "extra"), [("lm_eval", "lm_eval.api", "eval"), ("generate", "transformers", "hf")]
)
def test_a_command_whose_packages_are_not_installed_says_so(
    command: str, missing: str, extra: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(monkeypatch, missing)
    assert main([command, "--help"]) == 2
    package = missing.partition(".")[0]
    way_out = f"install it with pip install 'sleeptrain[{extra}]'"
    assert capsys.readouterr().err == f"sleeptrain: sleeptrain {command} needs {package}; {way_out}\n"


@pytest.mark.parametrize(("command", "missing"), [("convert", "sleeptrain.hf.convert.importing"), ("doctor", "torch")])
def test_another_missing_module_is_no_mistake_of_the_user(
    command: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, missing)
    with pytest.raises(ModuleNotFoundError):
        main([command, "--help"])


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "train" in out and "plan" in out


def test_help_of_a_command_lists_groups_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    (experiments,) = [line for line in out.splitlines() if line.startswith("experiment: ")]
    assert {"rule110", "stdlib"} <= set(experiments.partition(": ")[2].split(", "))
    assert "transformer_tiny" in out and "sleep.passes=1\n      N, the wake pass counted (>= 1)" in out


def test_cfg_prints_the_composed_settings(capsys: pytest.CaptureFixture[str], trained: list[Config]) -> None:
    assert main(["train", "--cfg", "job", "experiment=rule110", "sleep.passes=3"]) == 0
    out = capsys.readouterr().out
    assert "passes: 3" in out and "hydra:" not in out
    assert trained == []


def test_train_gets_the_composed_configuration(trained: list[Config], empty_folder: Path) -> None:
    assert main(["train", "experiment=rule110", "sleep.passes=3", "train.seed=5"]) == 0
    [config] = trained
    assert isinstance(config, Config)
    assert (config.run.name, config.sleep.passes, config.train.seed) == ("rule110", 3, 5)
    assert list(empty_folder.iterdir()) == []


def test_plan_prints_the_description(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "experiment=rule110", "run.name=told"]) == 0
    assert "run       runs/told\n" in capsys.readouterr().out


def test_max_time_is_also_a_flag(trained: list[Config]) -> None:
    assert main(["train", "--max-time", "3:55:00", "experiment=rule110"]) == 0
    assert [config.train.max_time for config in trained] == ["3:55:00"]


def test_a_flag_prints_the_run_folder(
    trained: list[Config], empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["experiment=rule110", "run.root=a b", "run.name=2026_07_20"]
    assert main(["train", "--print-run-folder", *overrides]) == 0
    assert capsys.readouterr().out == "a b/2026_07_20\n"
    assert trained == [] and list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("flags_last", [False, True])
def test_a_sweep_runs_every_job_in_a_folder_of_its_own(
    trained: list[Config], empty_folder: Path, flags_last: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["experiment=rule110", "sleep.passes=1,2", "train.seed=0,1"]
    assert main(["train", *overrides, "-m"] if flags_last else ["train", "-m", *overrides]) == 0
    assert [(config.sleep.passes, config.train.seed) for config in trained] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert [config.run.name for config in trained][:2] == [
        "multirun/rule110/sleep.passes=1,train.seed=0",
        "multirun/rule110/sleep.passes=1,train.seed=1",
    ]
    assert list(empty_folder.iterdir()) == []
    assert capsys.readouterr().err.endswith("all in one page: sleeptrain report runs/multirun/rule110\n")


@pytest.mark.slow
def test_a_sweep_of_experiments_names_the_folder_of_each(
    trained: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    swept = ["experiment=rule110,depo_small", "sleep.passes=1,2", "run.root=my runs"]
    assert main(["plan", "-m", *swept]) == 0
    assert "sleeptrain report" not in capsys.readouterr().err
    assert main(["train", "-m", *swept]) == 0
    folders = "'my runs/multirun/rule110' 'my runs/multirun/depo_small'"
    assert capsys.readouterr().err.endswith(f"all in one page: sleeptrain report {folders}\n")


MISTAKES = [
    (["tran"], ["'tran'", "'train'"]),
    (["train", "experiment=stdlib", "sleep.pases=4"], ["'sleep.pases'", "'sleep.passes'"]),
    (["train", "experiment=stdlib", "model=tny"], ["model=tny", "'tiny'"]),
    (["train", "experiment=stdlib", "sleep.passes=0"], ["sleep.passes", "at least 1"]),
    (["train", "experiment=stdlib", "sleep.when=never"], ["sleep.when", "'never'", "every, unlabelled"]),
    (["train", "experiment=stdlib", "sleep.passes=["], ["sleep.passes=["]),
    (["train", "experiment=stdlib", "sleep.passes=1,2"], ["sleep.passes=1,2", "-m"]),
    (["train", "experiment=stdlib", "--sleep.passes=2"], ["--sleep.passes=2", "no dashes"]),
    (["train", "experiment=stdlib", "--fast"], ["--fast", "--help"]),
    (["train", "experiment=stdlib", "--max-time=3:55"], ["--max-time", "'3:55'", "write 3:55:00"]),
    (["train", "experiment=stdlib", "train.max_time=90"], ["train.max_time", "'90'", "90m", "null"]),
    (["train", "experiment=stdlib", "--cfg", "jobs"], ["--cfg", "'jobs'", "'job'"]),
    (["train", "--cfg", "job", "-m"], ["--cfg", "--multirun"]),
    (["train", "--config-name", "other"], ["--config-name", "hydra.searchpath"]),
    (["train", "experiment=stdlib", "model=null"], ["model=null"]),
    (["train"], ["run.name", "experiment="]),
    (["plan", "experiment=stdlib", "sleep.window=0"], ["sleep.window"]),
    (["train", "-m", "experiment=stdlib", "sleep.passes=1,2,0"], ["sleep.passes", "at least 1"]),
    (["train", "-m", "experiment=stdlib", "sleep.pases=1,2"], ["'sleep.pases'", "'sleep.passes'"]),
    (["train", "-m", "experiment=stdlib", "model=tiny,tny"], ["model=tny", "'tiny'"]),
    (["train", "hydra.mode=MULTIRUN", "experiment=stdlib", "sleep.passes=1,0"], ["sleep.passes", "at least 1"]),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES, ids=[" ".join(arguments) for arguments, _ in MISTAKES])
def test_a_mistake_is_one_line_before_anything_runs(
    arguments: list[str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    trained: list[Config],
    empty_folder: Path,
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("sleeptrain: ") and captured.err.count("\n") == 1, captured.err
    assert [word for word in words if word not in captured.err] == [], captured.err
    assert trained == []
    assert list(empty_folder.iterdir()) == []


def test_a_user_error_of_the_job_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(config: Config) -> int:
        raise DataError("data/stdlib/train: no such folder;\nrun tools/prepare.py")

    fake_trainer(monkeypatch, absent)
    assert main(["train", "experiment=stdlib"]) == 2
    assert capsys.readouterr().err == "sleeptrain: data/stdlib/train: no such folder; run tools/prepare.py\n"


def test_any_other_error_of_the_job_is_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Config) -> int:
        raise ValueError("a mistake in the code")

    fake_trainer(monkeypatch, broken)
    assert main(["train", "experiment=stdlib"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "in broken" in err and err.endswith("ValueError: a mistake in the code\n")


def test_the_exit_code_of_the_job_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_trainer(monkeypatch, lambda config: 7)
    assert main(["train", "experiment=stdlib"]) == 7


def test_a_closed_output_is_no_failure() -> None:
    command = [sys.executable, "-m", "sleeptrain.cli", "plan", "experiment=stdlib", "model.vocab_size=300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, b"")


def test_an_interrupt_ends_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: Config) -> int:
        raise KeyboardInterrupt

    fake_trainer(monkeypatch, interrupted)
    assert main(["train", "experiment=stdlib"]) == 130


def test_details_are_lines_of_their_own(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(config: Config) -> int:
        raise DataError("not the\nsame", ["a: 1 -> 2", "b: 3 -> 4"])

    fake_trainer(monkeypatch, refuses)
    assert main(["train", "experiment=rule110"]) == 2
    assert capsys.readouterr().err == "sleeptrain: not the same\n  a: 1 -> 2\n  b: 3 -> 4\n"


def test_a_sweep_goes_on_after_a_failed_job_and_reports_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at_two_passes(config: Config) -> int:
        if config.sleep.passes == 2:
            raise DataError("a shard is damaged")
        return 0

    configs = fake_trainer(monkeypatch, fail_at_two_passes)
    assert main(["train", "-m", "experiment=rule110", "sleep.passes=1,2,3"]) == 2
    assert [config.sleep.passes for config in configs] == [1, 2, 3]
    output = capsys.readouterr().err
    assert "sleeptrain: a shard is damaged\n" in output and "sleeptrain report runs/multirun/rule110\n" in output


def test_the_state_of_the_process_stays(monkeypatch: pytest.MonkeyPatch, trained: list[Config]) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    arguments, folder = list(sys.argv), os.getcwd()
    main(["train", "experiment=rule110"])
    assert (sys.argv, os.getcwd(), os.environ["HYDRA_FULL_ERROR"]) == (arguments, folder, "0")


def test_mistakes_are_answered_without_torch(empty_folder: Path) -> None:
    code = "import sys; from sleeptrain.cli import main; main(['train', 'pases=1']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, cwd=ROOT)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr


def test_python_m_sleeptrain(empty_folder: Path) -> None:
    done = run("train", "experiment=stdlib", "sleep.pases=4")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert list(empty_folder.iterdir()) == []


@pytest.mark.slow
def test_an_installed_wheel_brings_its_configs(tmp_path: Path) -> None:
    offline = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip = [sys.executable, "-m", "pip"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    subprocess.run([*pip, "wheel", "--no-deps", *offline, "-w", wheels, ROOT], check=True, timeout=240)
    subprocess.run([*pip, "install", "--no-deps", "--target", site, *wheels.iterdir()], check=True, timeout=240)

    def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
        # The wheel is before the checkout on the path, as in an environment of its own.
        code = "import sleeptrain, sys; from sleeptrain.cli import main; print(sleeptrain.__file__); sys.exit(main())"
        command = [sys.executable, "-c", code, *arguments]
        environment = os.environ | {"PYTHONPATH": str(site)}
        return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, env=environment)

    done = installed("train", "--cfg", "job", "experiment=rule110")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site)) and "name: rule110" in done.stdout
    assert installed("train", "experiment=stdlib", "model=tny").returncode == 2
