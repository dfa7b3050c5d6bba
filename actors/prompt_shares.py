"""How the prompts that are being computed share what a step has for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is left of a prompt.

    Attributes:
        left: tokens until it is through; above 0.
        ready: those of them that could be computed now; above 0.
    """

    left: int
    ready: int


def prompt_shares(prompts: Sequence[Prompt], budget: int) -> list[int]:
    """How many tokens of each prompt to compute in a step.

    The one that came first gets up to half of the budget, so that every prompt, however long, is through in the end; the rest
    goes to the shortest ones first, so that none waits for a long one to end. What nobody else can use is the first one's too.

    Args:
        prompts: in the order of arrival.
        budget: tokens in all.

    Returns:
        Tokens for each, at most those that are ready; in sum the whole budget, or all that are ready where they are fewer.
    """
    shares = [0] * len(prompts)
    if not prompts:
        return shares
    shares[0] = min(prompts[0].ready, (budget + 1) // 2)
    left = budget - shares[0]
    for index in sorted(range(len(prompts)), key=lambda index: prompts[index].left):  # of equals the earlier first
        more = min(prompts[index].ready - shares[index], left)
        shares[index] += more
        left -= more
        if not left:
            break
    return shares
