"""Triton's interpreter, made to run the kernels of flash-linear-attention on a CPU.

With TRITON_INTERPRET=1 Triton runs a kernel program by program in NumPy. flash-linear-attention was written for its
compiler, and one thing differs. `install` changes Triton for this process; it must run before `fla` is imported,
because kernels are rewritten for the interpreter where they are defined. No configuration can be measured here: see
`tests.kernels.tuning`.

The interpreter rounds products as NumPy does. It stores bf16 as integers and multiplies those, so bf16 is never to be
tested here.
"""

from __future__ import annotations

import ast
import os
import sys
from typing import Any

ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"


def install() -> None:
    """Change Triton for this process. Raises RuntimeError if kernels have been defined already."""
    if "fla" in sys.modules:
        raise RuntimeError("the interpreter must be installed before fla is imported")
    from triton.runtime import interpreter

    _wrap_loop_variables(interpreter.ASTTransformer)


def _wrap_loop_variables(transformer: Any) -> None:
    """Make the variable of `for i in range(...)` a tensor: it is a Python int here, and kernels call `i.to(...)`."""

    def visit_For(self: Any, node: ast.For) -> ast.For:
        self.generic_visit(node)
        called = node.iter.func if isinstance(node.iter, ast.Call) else None
        name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
        if name == "range" and isinstance(node.target, ast.Name):
            variable = node.target.id
            [wrapped] = ast.parse(f"{variable} = interpreter_semantic.to_tensor({variable}, False)").body
            node.body.insert(0, wrapped)
        return node

    transformer.visit_For = visit_For
