"""Who may import whom: every module's imports, those inside functions included, against the rooms of the design."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "moray"
ALLOWED = {
    "configs": {"configs"},
    "kernels": {"kernels"},
    "model": {"model", "kernels", "configs"},
    "actors": {"actors", "model", "kernels", "configs"},
    "cluster": {"cluster", "actors", "model", "kernels", "configs", "__version__"},
}
MODULES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def imported(path: Path, tree: ast.AST | None = None) -> list[tuple[int, str]]:
    """(line, absolute name) of everything `path` imports, at any level."""
    package = (PACKAGE, *path.relative_to(ROOT).parent.parts)
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree or ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *((node.module,) if node.module else ())))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            (name, *_) = [ast.literal_eval(a) if isinstance(a, ast.Constant) else "?" for a in node.args] or ["?"]
            found.append((node.lineno, str(name)))
    return found


def offences(path: Path, tree: ast.AST | None = None) -> list[str]:
    room = path.relative_to(ROOT).parts[0]
    found = []
    for line, name in imported(path, tree):
        parts = name.split(".")
        where = f"{path.relative_to(ROOT)}:{line}"
        if parts[0] == "ray" and room != "cluster":
            found.append(f"{where} imports {name}: only cluster may import ray")
        if parts[0] == PACKAGE and parts[1:2] and parts[1] not in ALLOWED[room]:
            found.append(f"{where} imports {name}: {room} may import {', '.join(sorted(ALLOWED[room]))}")
        if parts[0] == "?":
            found.append(f"{where} imports by a computed name: nobody can check that")
    return found


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_what_they_may(room: str) -> None:
    modules = [path for path in MODULES if path.relative_to(ROOT).parts[0] == room]
    assert modules, f"no modules in {room}"
    found = [offence for path in modules for offence in offences(path)]
    assert not found, "\n" + "\n".join(found)


def test_kernels_package_stays_empty() -> None:
    """Anything in it would run in every process that imports one kernel."""
    assert (ROOT / "kernels" / "__init__.py").read_text() == ""


def test_the_package_imports_nothing_heavy_by_itself() -> None:
    """`import moray` costs nothing: what is imported at the top level of its face is the standard library's typing."""
    tree = ast.parse((ROOT / "__init__.py").read_text())
    names = [
        name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom) for name in [ast.unparse(node)]
    ]
    assert names == ["from __future__ import annotations", "from typing import TYPE_CHECKING"]


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("kernels/gate.py", "from ..model.config import ModelConfig", "kernels may import kernels"),
        ("model/config.py", "def f():\n    from ..actors import router", ":2 imports moray.actors.router"),
        ("actors/router.py", "import ray", "only cluster may import ray"),
        ("actors/front/app.py", "from ray import serve", "only cluster may import ray"),
        ("actors/front/app.py", "from ...cluster import local", "imports moray.cluster.local"),
        ("model/config.py", "from .. import cluster", "imports moray.cluster"),
        ("configs/errors.py", "import moray.kernels.gate", "imports moray.kernels.gate"),
        ("kernels/gate.py", "__import__('ray')", "only cluster may import ray"),
        ("kernels/gate.py", "import importlib\nimportlib.import_module(name)", "computed name"),
    ],
)
def test_the_rule_sees(module: str, source: str, complaint: str) -> None:
    found = offences(ROOT / module, ast.parse(source))
    assert len(found) == 1
    assert complaint in found[0]
