"""Changes of a running cluster, in words for the terminal."""

from __future__ import annotations

from .changes import Change, Wanted

_SHORTAGES_SHOWN = 5


def plan_text(plan: Change, wanted: Wanted) -> str:
    """What would be done, a line for each kind of thing."""
    if plan.empty:
        return "\n".join([f"nothing to do: {_already(wanted)}", *_shortages(plan)])
    parts = [f"add {', '.join(plan.added)}"] if plan.added else []
    parts += [f"remove {', '.join(plan.removed)}"] if plan.removed else []
    parts += [f"move {plan.moved} of {plan.total} experts"] if plan.moved else []
    lines = [f"plan: {'; '.join(parts)}"]
    if plan.moved:
        lines.append(f"balance: {plan.balance_before:.2f} -> {plan.balance_after:.2f}")
    if plan.cold_share_before or plan.cold_share_after:
        lines.append(f"load of the cold hosts: {plan.cold_share_before:.1%} -> {plan.cold_share_after:.1%}")
    return "\n".join([*lines, *_shortages(plan)])


def done_text(done: Change, planned: Change) -> str:
    """What was done. Shortages are named only where they are not those of the plan, which was shown."""
    lines = [f"done: epoch {done.epoch} after {done.seconds:.1f} s; no request was stopped"]
    return "\n".join([*lines, *(_shortages(done) if done.shortages != planned.shortages else ())])


def _already(wanted: Wanted) -> str:
    """Why a plan for `wanted` is empty."""
    if wanted.rebalance:
        return "no move of experts would win enough"
    if wanted.replicas and wanted.experts is None and wanted.cold is None and wanted.routers is None:
        return "no expert has to move for it"
    return "it is as you ask"


def _shortages(change: Change) -> list[str]:
    lines = [f"short: {shortage}" for shortage in change.shortages[:_SHORTAGES_SHOWN]]
    if (more := len(change.shortages) - len(lines)) > 0:
        lines.append(f"short: and {more} more like these (--json names all)")
    return lines
