"""The code speaks the words of the glossary: names that it has retired do not come back."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import sleeptrain

PACKAGE = Path(sleeptrain.__file__).parent
# A name and the one that took its place.
RETIRED = {
    "Beat": "Heartbeat",
    "Board": "HeartbeatStore",
    "GivenUp": "Cancelled",
    "Judge": "FailureDetector",
    "Left": "RoundOutputs",
    "PartOfModel": "DistributedEngine",
    "StageSequence": "StageMicroBatch",
    "Treatment": "UpdateRule",
    "Trouble": "StepFailure",
    "Whereabouts": "Progress",
    "WholeModel": "LocalEngine",
    "_Kept": "SavedInputs",
    "asked": "requested, options",
    "behind": "after",
    "crew": "workers, a pool",
    "given": "inputs, arguments, values",
    "leads": "is_main",
    "left": "outputs, remaining",
    "own_tensors": "local_tensors",
    "settle": "handle_failure",
    "together": "all_or_raise",
    "told": "lines, fields, text",
}
MODULES = {
    "asked": "request_options",
    "costs": "task_costs",
    "crew": "worker_pool",
    "described": "read_config",
    "evaluating": "commands/evaluate",
    "exchange": "matrix_exchange, heartbeat_thread",
    "held_out": "evaluation",
    "meaning": "compatibility",
    "opening": "load_for_inference",
    "order": "scheduler",
    "run": "run_state",
    "turns": "conversation",
    "typed": "from_dict",
    "whole": "full_logits",
}
# Modules that mean what the word says: the order of documents in an epoch, the settings of `run.`.
RIGHT_MODULES = {"data/order.py", "config/schema/run.py"}
# Modules with a side: the left neighbour of a cell, the left operand.
LEFT_SIDE = {"data/tasks/rule110.py", "data/tasks/gsm_infinite/graph.py"}


def names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a module gives or uses, and its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name) | ast.keyword(arg=str(name)):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name, node.lineno


def retired(root: Path, paths: Iterable[Path]) -> list[str]:
    """Each retired name in these files below `root`, with its place and the name that replaces it."""
    return [
        f"{path.relative_to(root)}:{line}: {name}, now {RETIRED[name]}"
        for path in paths
        for name, line in names(ast.parse(path.read_text(encoding="utf-8")))
        if name in RETIRED and not (name == "left" and str(path.relative_to(root)) in LEFT_SIDE)
    ]


@pytest.mark.parametrize("folder", [*sorted(path.name for path in PACKAGE.iterdir() if path.is_dir()), "."])
def test_no_name_is_one_that_was_retired(folder: str) -> None:
    found = retired(PACKAGE, (PACKAGE / folder).rglob("*.py") if folder != "." else PACKAGE.glob("*.py"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["tests", "tools"])
def test_no_name_of_tests_and_tools_is_one_that_was_retired(folder: str) -> None:
    root = Path(__file__).resolve().parents[1]
    # `given` is hypothesis's, `left` a side of a figure or of a graph.
    found = [line for line in retired(root, (root / folder).rglob("*.py")) if not re.search(": (given|left), ", line)]
    assert not found, "\n".join(found)


def test_no_module_is_one_that_was_retired() -> None:
    paths = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py")} - RIGHT_MODULES
    assert not {path for path in paths if Path(path).stem in MODULES}
