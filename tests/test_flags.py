"""Every flag in a message belongs to the user's command, or the message names the command before it."""

from __future__ import annotations

import ast
import re
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path

import pytest

import sleeptrain.commands.calibrate
import sleeptrain.commands.convert
import sleeptrain.commands.data
import sleeptrain.commands.doctor
import sleeptrain.commands.evaluate
import sleeptrain.commands.generate
import sleeptrain.commands.report
import tools.prepare
import tools.shards
import tools.tokenizer

ROOT = Path(__file__).resolve().parents[1]
PARSERS = {
    "tools/prepare.py": tools.prepare._parser,
    "tools/tokenizer.py": tools.tokenizer._parser,
    "tools/shards.py": tools.shards._parser,
    "sleeptrain convert": sleeptrain.commands.convert.parser,
    "sleeptrain generate": sleeptrain.commands.generate.parser,
    "sleeptrain evaluate": sleeptrain.commands.evaluate.parser,
    "sleeptrain calibrate": sleeptrain.commands.calibrate.parser,
    "sleeptrain data": sleeptrain.commands.data.parser,
    "sleeptrain report": sleeptrain.commands.report.parser,
    "sleeptrain doctor": sleeptrain.commands.doctor.parser,
}
# {beginning of a file's name: the commands that raise its errors}; the longest beginning counts. None: any command.
REACHED: dict[str, list[str]] = {
    "sleeptrain/data/": [],
    "sleeptrain/commands/data.py": ["sleeptrain data which"],
    "sleeptrain/config/": [],
    "sleeptrain/checkpoint/": [],
    "sleeptrain/checkpoint/find.py": ["sleeptrain evaluate", "sleeptrain convert export", "sleeptrain generate"],
    "sleeptrain/data/consent.py": ["sleeptrain evaluate", "sleeptrain data which"],
    "sleeptrain/report/": [],
    "sleeptrain/hf/": [],
    "sleeptrain/hf/convert/exporting.py": ["sleeptrain convert export"],
    "sleeptrain/hf/convert/fast_tokenizer.py": ["sleeptrain convert export"],
    "sleeptrain/hf/convert/tokenizer_": ["sleeptrain convert export"],
    "sleeptrain/commands/convert.py": ["sleeptrain convert export", "sleeptrain convert import"],
    "sleeptrain/commands/generate.py": ["sleeptrain generate"],
    "sleeptrain/prepare/": ["tools/prepare.py"],
    "sleeptrain/prepare/inputs.py": ["tools/prepare.py", "tools/tokenizer.py"],
    "sleeptrain/prepare/readers.py": ["tools/prepare.py", "tools/tokenizer.py"],
    "sleeptrain/prepare/parquet.py": ["tools/prepare.py", "tools/tokenizer.py"],
    "sleeptrain/prepare/options.py": ["tools/prepare.py", "tools/tokenizer.py"],
    "sleeptrain/commands/evaluate.py": ["sleeptrain evaluate"],
    "sleeptrain/commands/calibrate.py": ["sleeptrain calibrate"],
    "sleeptrain/train/calibration_rows.py": ["sleeptrain calibrate"],
    "tools/prepare.py": ["tools/prepare.py"],
    "tools/tokenizer.py": ["tools/tokenizer.py"],
    "tools/shards.py": ["tools/shards.py verify", "tools/shards.py index"],
}
# Messages that only some of the commands above can raise.
ELSEWHERE = {("sleeptrain/prepare/inputs.py", "--force"): ["tools/prepare.py"]}
OF_ALL = {"--help"}
COMMAND = re.compile(r"tools/\w+\.py(?: (?:verify|index))?|sleeptrain (?:convert (?:export|import)|data \w+|[a-z]\w+)")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z-]*")


def options_of(command: str) -> set[str]:
    """The flags of a command, or of its subcommand if it names one."""
    name = next(name for name in PARSERS if command.startswith(name))
    parser: ArgumentParser = PARSERS[name]()
    for part in command.removeprefix(name).split():
        [parts] = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
        parser = parts.choices[part]
    inner = [action for action in parser._actions if isinstance(action, _SubParsersAction)]
    parsers = [parser, *(choice for action in inner for choice in action.choices.values())]
    return {flag for one in parsers for action in one._actions for flag in action.option_strings} | OF_ALL


def messages(path: Path) -> Iterator[str]:
    """The strings of the errors that a file raises."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise | ast.Assign | ast.Return):
            yield from _texts(node)


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    else:
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


def files() -> list[str]:
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("sleeptrain", "tools")
        for path in (ROOT / folder).rglob("*.py")
    ]
    return sorted(name for name in found if any(name.startswith(start) for start in REACHED))


@pytest.mark.parametrize("name", files())
def test_named_flags_exist(name: str) -> None:
    reached = REACHED[max((start for start in REACHED if name.startswith(start)), key=len)]
    for text in messages(ROOT / name):
        for flag in FLAG.finditer(text):
            named = [found.group() for found in COMMAND.finditer(text[: flag.start()])]
            commands = named[-1:] or ELSEWHERE.get((name, flag.group()), reached)
            assert commands, f"{text!r} names {flag.group()}, and any command may say so"
            for command in commands:
                if any(command.startswith(known) for known in PARSERS):
                    assert flag.group() in options_of(command), f"{text!r}: {command} has no {flag.group()}"
                else:
                    assert command in ("sleeptrain train", "sleeptrain plan"), command
