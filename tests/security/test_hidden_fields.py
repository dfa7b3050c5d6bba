"""What is secret is in no `repr`, and so in no log line, error or status that somebody makes of an object."""

from __future__ import annotations

import ast

from moray.actors.front.settings import FrontSettings
from moray.cluster.directory import Directory

from .source_tree import is_true, sources

SECRET_NAMES = frozenset({"api_key", "api_keys", "key", "keys", "password", "secret", "token"})


def secret_fields(tree: ast.Module) -> list[tuple[str, ast.AnnAssign]]:
    """Fields of dataclasses whose name says that they are secret; numbers and lists of tokens are not."""
    return [
        (f"{kind.name}.{ast.unparse(line.target)}", line)
        for kind in ast.walk(tree)
        if isinstance(kind, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in kind.decorator_list)
        for line in kind.body
        if isinstance(line, ast.AnnAssign)
        and ast.unparse(line.target) in SECRET_NAMES
        and any(word in ast.unparse(line.annotation) for word in ("str", "bytes"))
    ]


def test_secret_fields_are_not_shown() -> None:
    fields = [field for _, tree in sources() for field in secret_fields(tree)]
    assert {name for name, _ in fields} >= {"Record.secret", "Directory.secret", "FrontSettings.api_keys"}
    shown = []
    for name, line in fields:
        hidden = isinstance(line.value, ast.Call) and any(k.arg == "repr" for k in line.value.keywords)
        if not hidden or is_true(line.value, "repr"):  # type: ignore[arg-type]
            shown.append(name)
    assert shown == []


def test_what_is_hidden_is_hidden() -> None:
    assert "0123456789" not in repr(Directory({"router-0": "10.0.0.1:1"}, b"0123456789abcdef"))
    assert "0123456789" not in repr(FrontSettings(api_keys=("sk-0123456789",)))
