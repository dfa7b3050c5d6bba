"""Whether what is to serve together computes with the same instructions of its CPUs.

Each set of instructions rounds in its own way, so with several of them the bits of an answer depend on where it was computed.
Between the native kernels and torch, or a GPU, they do anyhow, and whoever deploys both has asked for that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Final, get_args

from ..configs.deployment import CpuInstructions

KNOWN: Final[tuple[str, ...]] = get_args(CpuInstructions)[1:]
"""Instructions of the native kernels, the lowest first."""


def grouped(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Value -> the names that have it, the commonest first; without those whose value is ""."""
    found: dict[str, list[str]] = {}
    for name, value in values.items():
        if value:
            found.setdefault(value, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def told_apart(found: Mapping[str, Sequence[str]], those: str) -> str:
    """The commonest value, and who has others; `those` is what they all are, as in "nodes"."""
    (usual, many), *others = found.items()
    told = [f"{value} on {', '.join(names)}" for value, names in others]
    return f"{usual} on {many[0] if len(many) == 1 else f'{len(many)} {those}'}, {', '.join(told)}"


def lowest(instructions: Collection[str]) -> str:
    """Of several sets of the native kernels, the one that every machine has which has any of them."""
    return min(instructions, key=KNOWN.index)


def mixtures(used: Mapping[str, str]) -> list[str]:
    """What there is to say of processes that should compute alike and do not: who computes with what, and what to do about it.

    Args:
        used: process -> its instructions, as it reports them; "" for one that computes on a GPU.
    """
    why = "each rounds in its own way, so answers may depend on which of them computed what"
    found = []
    native = grouped({name: one for name, one in used.items() if one in KNOWN})
    if len(native) > 1:
        same = f"cpu_instructions: {lowest(native)} has all compute alike"
        found.append(f"{told_apart(native, 'processes')}: {why}; {same}")
    torch = grouped({name: one for name, one in used.items() if one not in KNOWN})
    if len(torch) > 1:
        same = "have them on nodes of one kind (`resources`), or leave dtype at auto"
        found.append(f"{told_apart(torch, 'processes')}: {why}; {same}")
    return found
