"""The console command. `sleeptrain train` and `sleeptrain plan` have hydra's command line; each command in
OTHER_COMMANDS parses its own arguments.

Exit codes: 0 done; 75 the run was stopped before its end and is saved (start it again); 2 a mistake that the user can
correct (one line on stderr); 1 a failed check of `doctor`, or any other error (one line if a run ends itself because of
its numbers, its processes did not meet, or the last checkpoint was not written; otherwise a traceback); 130 Ctrl-C
outside of a run; 141 a closed pipe. The exit code of a job is passed on.
"""

from __future__ import annotations

import os
import signal
import sys
from argparse import ArgumentError, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from sleeptrain.errors import (
    TOLD_IN_A_LINE,
    ConfigError,
    RefusedByAllError,
    UserError,
    exit_code,
    format_error,
    path_error,
)  # fmt: skip
from sleeptrain.terminal import ArgumentParser, say, show_traceback

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from sleeptrain.config.schema import Config

# Packages are imported inside the functions that need them: help and errors appear at once, and `doctor` works where
# packages are missing.


@dataclass(frozen=True)
class Command:
    """A command with hydra's settings.

    summary: its line in the help.
    run: takes the settings and the values of the flags; returns the exit code.
    add_flags: declares the flags of this command alone.
    """

    summary: str
    run: Callable[[Config, Namespace], int]
    add_flags: Callable[[ArgumentParser], None] = lambda parser: None


class JobFailed(Exception):
    """A job ended with this exit code and has already printed the reason."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def train(config: Config, options: Namespace) -> int:
    from sleeptrain.config.resolved import run_folder

    if options.print_run_folder:
        print(run_folder(config))  # noqa: T201  # scripts read the raw path
        return 0
    if options.max_time is not None:
        config = replace(config, train=replace(config.train, max_time=options.max_time))
    from sleeptrain.train.spawn import num_workers, train_in_workers
    from sleeptrain.train.trainer import train as run_training

    workers = num_workers(config)
    return train_in_workers(config, workers) if workers else run_training(config)


def train_flags(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--max-time", type=max_time, metavar="TIME", help="short for train.max_time=TIME: 3:55:00, 1-12:00:00, 90m"
    )
    parser.add_argument(
        "--print-run-folder",
        action="store_true",
        help="print the run folder of these settings, and train nothing",
    )


def max_time(text: str) -> str:
    """Return the duration unchanged. Raises ArgumentTypeError if it cannot be parsed."""
    from sleeptrain.config.duration import parse_duration

    try:
        parse_duration(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from error
    return text


def plan(config: Config, options: Namespace) -> int:
    from sleeptrain.commands.plan import run
    from sleeptrain.config.paths import naming_settings

    with naming_settings(config):
        return run(config, options)


def plan_flags(parser: ArgumentParser) -> None:
    from sleeptrain.commands.plan import add_flags

    add_flags(parser)


# Commands that parse their own arguments: name -> (module with `main(arguments)`, summary).
OTHER_COMMANDS = {
    "data": (
        "sleeptrain.commands.data",
        "say which documents a step read (which), or what a configuration reads and wastes (describe)",
    ),
    "report": ("sleeptrain.commands.report", "turn runs, or the folder of a sweep, into a page of curves and tables"),
    "evaluate": (
        "sleeptrain.commands.evaluate",
        "held-out loss and accuracy of a checkpoint, with any number of passes",
    ),
    "calibrate": (
        "sleeptrain.commands.calibrate",
        "what stop rules are worth for a checkpoint, and the threshold for a budget of passes",
    ),
    "doctor": ("sleeptrain.commands.doctor", "say whether this machine can train, and what to do where it cannot"),
    "convert": ("sleeptrain.commands.convert", "checkpoints to Hugging Face folders (export) and back (import)"),
    "generate": ("sleeptrain.commands.generate", "continue a text, sleeping whenever a window is full"),
    "lm_eval": ("sleeptrain.hf.harness", "the lm-evaluation-harness, to which --model sleeptrain is known"),
}
# The optional dependency group (extra) that a command needs.
EXTRAS = {"convert": "hf", "generate": "hf", "lm_eval": "eval"}
COMMANDS = {
    "train": Command("train a model; an existing run folder is resumed", train, train_flags),
    "plan": Command(
        "say what a training run will do, need and cost under a layout, without running it", plan, plan_flags
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments` (default: `sys.argv[1:]`) and return the exit code."""
    # GNU OpenMP reads this when torch is loaded: how long CPU threads spin while they wait for each other. With the
    # default, another busy process slows a run many times; a hundredth of it costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        say(_help())
        return 0
    name, *rest = arguments
    try:
        if name in COMMANDS:
            return _run_with_hydra(name, rest)
        if name in OTHER_COMMANDS:
            return _run_other(name, rest)
        from sleeptrain.config.suggest import suggest

        raise ConfigError(f"unknown command '{name}'; {suggest(name, [*COMMANDS, *OTHER_COMMANDS])}")
    except UserError as error:
        return _fail(error)
    except JobFailed as error:
        return error.code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return _reader_has_gone()
    except OSError as error:
        if (user_error := path_error(error)) is None:
            raise
        return _fail(user_error)


def _run_other(name: str, arguments: list[str]) -> int:
    module, _ = OTHER_COMMANDS[name]
    try:
        return import_module(module).main(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if name not in EXTRAS or missing == "sleeptrain":
            raise
        raise ConfigError(
            f"sleeptrain {name} needs {missing}; install it with pip install 'sleeptrain[{EXTRAS[name]}]'"
        ) from error
    except SystemExit as end:  # argparse: `--help`, or a usage error that it has printed
        return int(end.code or 0)


def _help() -> str:
    lines = ["usage: sleeptrain COMMAND [experiment=NAME] [setting=value ...] [-m]", "", "commands:"]
    lines += [f"  {name:<10}{command.summary}" for name, command in COMMANDS.items()]
    lines += [f"  {name:<10}{summary}" for name, (_, summary) in OTHER_COMMANDS.items()]
    lines += ["", "-m runs all combinations of comma-separated values; `sleeptrain COMMAND --help` lists the settings."]
    return "\n".join(lines)


def _reader_has_gone() -> int:
    """Exit code after the reader of stdout, such as `head`, has closed the pipe. This is no failure.

    stdout goes to /dev/null; otherwise the interpreter reports an error when it exits.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def _fail(error: Exception) -> int:
    if not isinstance(error, RefusedByAllError):
        say(format_error(error), sys.stderr)
    return exit_code(error)


def _run_with_hydra(name: str, arguments: list[str]) -> int:
    import hydra

    from sleeptrain.config import compose
    from sleeptrain.config.explain import COMPOSITION_ERRORS, explain
    from sleeptrain.config.reference import help_lines
    from sleeptrain.config.strings import quote_override

    options, arguments = _parse_command_flags(name, arguments)

    def job(composed: DictConfig) -> None:
        code = _run_job(COMMANDS[name], composed, options)
        if code and compose.in_sweep():
            raise JobFailed(code)  # hydra runs the other jobs first, then raises it
        if code:
            sys.exit(code)

    flags, overrides, sweeps = _split_arguments(arguments)
    overrides = [quote_override(override) for override in overrides]
    compose.register_schema()
    application = hydra.main(str(compose.config_dir()), "config", compose.HYDRA_VERSION)(job)
    try:
        with ExitStack() as stack:
            if sweeps:
                roots = compose.validate_sweep(overrides)
                if name == "train":
                    stack.callback(_print_report_command, roots)
                overrides = [*compose.name_by_sweep(overrides), *overrides]
                # Hydra copies the settings of the sweep into this folder; each run folder already holds its own.
                overrides.insert(0, f"hydra.sweep.dir={stack.enter_context(TemporaryDirectory())}")
            stack.enter_context(_process_of_hydra(name, [*flags, *overrides]))
            application()
    except SystemExit as end:  # the exit code of a job, or hydra's exit after `--help`
        if end.code is not None and not isinstance(end.code, int):
            raise
        if not end.code and {"-h", "--help"} & set(flags):
            say("\n".join(help_lines()))
        return end.code or 0
    except COMPOSITION_ERRORS as error:
        raise explain(error, overrides) from error
    return 0


def _print_report_command(roots: Sequence[Path]) -> None:
    """Print the command that puts the runs of a sweep on one page, failed runs included."""
    from sleeptrain.config.overrides import shell_command

    say(f"all in one page: {shell_command('sleeptrain', 'report', *roots)}", sys.stderr)


def _parse_command_flags(name: str, arguments: list[str]) -> tuple[Namespace, list[str]]:
    """(values of the command's own flags, other arguments). Prints the help of these flags above that of hydra."""
    parser = ArgumentParser(
        f"sleeptrain {name}", usage=f"sleeptrain {name} [flags] [setting=value ...] [-m]",
        add_help=False, allow_abbrev=False, exit_on_error=False,
    )  # fmt: skip
    COMMANDS[name].add_flags(parser)
    try:
        options, others = parser.parse_known_args(arguments)
    except ArgumentError as error:
        raise ConfigError(str(error).removeprefix("argument ")) from error
    if {"-h", "--help"} & set(others) and vars(options):
        say(parser.format_help())
    return options, others


def _split_arguments(arguments: list[str]) -> tuple[list[str], list[str], bool]:
    """(hydra's flags, overrides, True for a sweep). Flags may stand anywhere between the overrides."""
    from hydra._internal.utils import get_args_parser

    from sleeptrain.config.overrides import shell_command
    from sleeptrain.config.schema import Config
    from sleeptrain.config.suggest import setting_names

    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        parsed, unknown = parser.parse_known_intermixed_args(arguments)
    except ArgumentError as error:
        raise ConfigError(str(error)) from error
    for flag in unknown:
        name = flag.lstrip("-").partition("=")[0]
        if name in (*setting_names(Config), "experiment"):
            raise ConfigError(f"{flag}: settings take no dashes; write {shell_command(flag.lstrip('-'))}")
        raise ConfigError(f"unknown flag '{flag}'; `sleeptrain COMMAND --help` and `--hydra-help` list the flags")
    if parsed.config_path or parsed.config_name or parsed.config_dir or parsed.experimental_rerun:
        raise ConfigError(
            "--config-path, --config-name, --config-dir and --experimental-rerun are not supported; "
            "add a folder of groups with hydra.searchpath=[file:///its/absolute/path]"
        )
    flags = [argument for argument in arguments if argument not in parsed.overrides]
    prints_only = parsed.help or parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    sweeps = parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    return flags, parsed.overrides, sweeps and not prints_only


def _run_job(command: Command, composed: DictConfig, options: Namespace) -> int:
    """Run one job and return its exit code. Prints errors at once: hydra shows only the first one of a sweep, last."""
    from sleeptrain.config import compose

    try:
        return command.run(compose.resolve_job(composed), options)
    except TOLD_IN_A_LINE as error:
        return _fail(error)
    except BrokenPipeError:
        return _reader_has_gone()
    except Exception as error:
        show_traceback(type(error), error, error.__traceback__)
        return 1


@contextmanager
def _process_of_hydra(name: str, arguments: list[str]) -> Iterator[None]:
    """Set the process state that hydra reads: `sys.argv`, and the variable that lets exceptions reach the caller."""
    old_arguments, old_full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [f"sleeptrain {name}", *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = old_arguments
        if old_full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = old_full_error


if __name__ == "__main__":
    sys.exit(main())
