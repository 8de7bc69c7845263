"""Update the tables of docs/commands.md from the parsers of the commands."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action, _SubParsersAction
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from sleeptrain.cli import COMMANDS, OTHER_COMMANDS
from sleeptrain.terminal import ArgumentParser

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"
HEAD = "| argument | meaning |\n|---|---|\n"
# A marker in the page, and the generated table after it.
TABLE = re.compile(r"(<!-- command: (.+?) -->\n)(?:\|.*\n)*")
# Its arguments are those of the lm-evaluation-harness.
FOREIGN = {"lm_eval"}


def main() -> None:
    PAGE.write_text(with_commands(PAGE.read_text()))


def with_commands(page: str) -> str:
    """The page with a new table after each marker (`<!-- command: convert export -->`). Raises KeyError: no command."""
    tables = {name: HEAD + "".join(rows(parser)) for name, parser in parsers()}
    return TABLE.sub(lambda match: match[1] + tables[match[2]], page)


def parsers() -> Iterator[tuple[str, ArgumentParser]]:
    """(name, parser) of every command, and of every part of a command that has parts (`convert export`)."""
    for name, command in COMMANDS.items():
        flags = ArgumentParser(add_help=False)
        command.add_flags(flags)
        yield name, flags
    for name, (module, _) in OTHER_COMMANDS.items():
        if name in FOREIGN:
            continue
        root = import_module(module).parser()
        parts = [action for action in root._actions if isinstance(action, _SubParsersAction)]
        for part in parts:
            yield from ((f"{name} {way}", parser) for way, parser in part.choices.items())
        if not parts:
            yield name, root


def rows(parser: ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.help != SUPPRESS and "--help" not in action.option_strings:
            meaning = (action.help or "") % {**vars(action), "prog": parser.prog}
            yield f"| `{written(action)}` | {meaning}{'; required' if is_required(action) else ''} |\n"


def written(action: Action) -> str:
    """An argument as a command line has it: `--flag VALUE`, `NAME ...`."""
    value = action.metavar or ("\\|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    value = {None: f"{value}", "+": f"{value} ...", "*": f"[{value} ...]", "?": f"[{value}]", 0: ""}[action.nargs]
    return f"{', '.join(action.option_strings)} {value}".strip()


def is_required(action: Action) -> bool:
    return bool(action.option_strings) and action.required


if __name__ == "__main__":
    main()
