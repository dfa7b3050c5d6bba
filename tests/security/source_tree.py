"""The sources of the package, parsed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import moray

ROOT = Path(moray.__file__).resolve().parent
ROOMS = ("configs", "kernels", "model", "actors", "cluster")


@cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return tuple((path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))) for path in paths)


def named(function: ast.expr) -> str:
    """`torch.load` for the call of it; what is before the last two names is left out."""
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Attribute):
        return f"{named(function.value).rpartition('.')[2]}.{function.attr}"
    return ""


def calls(tree: ast.Module) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield named(node.func), node


def is_true(call: ast.Call, keyword: str) -> bool:
    """Whether a call has the keyword, and not as a plain False."""
    given = next((k.value for k in call.keywords if k.arg == keyword), None)
    return given is not None and not (isinstance(given, ast.Constant) and given.value is False)
