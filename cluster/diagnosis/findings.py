"""What a check has to say: one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["ok", "warn", "fail"]
"""`fail`: serving will not start, or not be right; `warn`: it will be slower or harder to keep than it need be."""


_WELL_SHOWN = 4
"""Lines of one check that say that all is well; a large cluster has one for each node."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        level: how bad it is.
        what: what was found, with its value.
        what_to_do: for the reader; "" where all is well.
        node: where; several with commas; "" for the cluster as a whole.
    """

    check: str
    level: Level
    what: str
    what_to_do: str = ""
    node: str = ""


def ok(check: str, what: str) -> Finding:
    """All is well."""
    return Finding(check, "ok", what)


def warn(check: str, what: str, what_to_do: str) -> Finding:
    """It could be better."""
    return Finding(check, "warn", what, what_to_do)


def fail(check: str, what: str, what_to_do: str) -> Finding:
    """It must be mended."""
    return Finding(check, "fail", what, what_to_do)


def at(node: str, findings: Iterable[Finding]) -> list[Finding]:
    """The findings, said of a node."""
    return [replace(finding, node=node) for finding in findings]


def merged(findings: Sequence[Finding], nodes: int) -> list[Finding]:
    """Findings as they are printed: by check, and those that several nodes share word for word as one.

    Args:
        findings: each of one node, or of none.
        nodes: how many there are in all.
    """
    together: dict[Finding, list[str]] = {}
    for finding in findings:
        together.setdefault(replace(finding, node=""), []).append(finding.node)
    by_check: dict[str, list[Finding]] = {}
    for finding, found in together.items():
        by_check.setdefault(finding.check, []).append(replace(finding, node=_names(found, nodes)))
    return [finding for found in by_check.values() for finding in _fewer(found)]


def _fewer(findings: Sequence[Finding]) -> list[Finding]:
    """Those of one check, with only the first few that are well."""
    well = [finding for finding in findings if finding.level == "ok"]
    if len(well) <= _WELL_SHOWN:
        return list(findings)
    left_out = set(well[_WELL_SHOWN:])
    more = Finding(findings[0].check, "ok", f"and {len(left_out)} more, all well (--json has them)")
    return [finding for finding in findings if finding not in left_out] + [more]


def _names(found: Sequence[str], nodes: int) -> str:
    names = list(dict.fromkeys(name for name in found if name))
    return f"all {nodes}" if len(names) == nodes > 1 else ", ".join(names)
