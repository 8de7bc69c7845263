"""Each module with logic has its tests in a file of its name, in the same folders."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE, TESTS = ROOT / "sleeptrain", ROOT / "tests"


def functions(body: list[ast.stmt], in_class: bool = False) -> Iterator[str]:
    """The names of functions, and of methods and properties that are not dunders; those of Protocols do not count."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not (in_class and node.name.startswith("__") and node.name.endswith("__")):
                yield node.name
        elif isinstance(node, ast.ClassDef):
            if not any("Protocol" in ast.unparse(base) for base in node.bases):
                yield from functions(node.body, in_class=True)
        elif isinstance(node, ast.If | ast.Try):
            yield from functions([*node.body, *node.orelse], in_class)


def modules() -> Iterator[str]:
    """The modules with logic, by their paths in the package without the suffix."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        if path.stem in ("__init__", "__main__") or name.startswith("config/schema/"):
            continue
        if any(functions(ast.parse(path.read_text(encoding="utf-8")).body)):
            yield name


def has_tests(module: str) -> bool:
    path = TESTS / module
    return path.with_name(f"test_{path.name}.py").is_file()


def test_each_module_with_logic_has_a_test_file_of_its_name() -> None:
    missing = [name for name in modules() if not has_tests(name)]
    assert not missing, f"without tests/<folders>/test_<name>.py: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("source", "logic"),
    [
        ("def run(): ...", True),
        ("async def run(): ...", True),
        ("class A:\n    def run(self): ...", True),
        ("@dataclass\nclass A:\n    x: int\n    @property\n    def double(self): return 2 * self.x", True),
        ("if True:\n    def run(): ...", True),
        ("class A:\n    class B:\n        def run(self): ...", True),
        ("def __getattr__(name): ...", True),
        ("LIMIT = 3\nNAMES = [str(n) for n in range(3)]", False),
        ("@dataclass\nclass A:\n    x: int\n    def __post_init__(self): ...", False),
        ("class A(Protocol):\n    def run(self): ...", False),
        ("class A(Protocol[T]):\n    def run(self): ...", False),
        ("class Wrong(Exception): ...", False),
    ],
)
def test_what_counts_as_logic(source: str, logic: bool) -> None:
    assert any(functions(ast.parse(source).body)) == logic
