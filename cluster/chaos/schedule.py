"""What is done to a cluster, and in which order: a pure function of a seed.

Kinds are dealt like cards: all of them in random order, then all again, so that even a short run has every one of them
before it has one twice. Now and then two come at once. Victims are numbers, and become processes when their time has come:
which there are then depends on what happened before.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from ...configs.errors import ConfigError

Role = Literal["expert_host", "router", "controller", "cluster"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of event.

    Attributes:
        role: what it happens to; `cluster` for changes of the whole.
        lasts_s: shortest and longest time it goes on by itself; None for what is over at once.
        takes: nothing can be had from its victim for a while.
    """

    role: Role
    lasts_s: tuple[float, float] | None = None
    takes: bool = False


KINDS: Final[dict[str, Kind]] = {
    "kill-host": Kind("expert_host", takes=True),
    "kill-router": Kind("router", takes=True),
    "kill-controller": Kind("controller", takes=True),
    # Some end before the process counts as stuck, some before it is replaced, some after.
    "stop-host": Kind("expert_host", (1.0, 14.0), takes=True),
    "stop-router": Kind("router", (1.0, 14.0), takes=True),
    "cut-host": Kind("expert_host", (0.5, 4.0), takes=True),
    "slow-host": Kind("expert_host", (2.0, 6.0)),
    "corrupt-reply": Kind("expert_host", (0.2, 2.0), takes=True),
    "full-memory": Kind("expert_host", (0.5, 3.0), takes=True),
    "disk-error": Kind("cluster", (3.0, 6.0)),
    "scale-experts": Kind("cluster"),
    "scale-routers": Kind("cluster"),
    "rebalance": Kind("cluster"),
    "drain-host": Kind("cluster"),
}

PAUSE_S: Final = (0.5, 3.0)
"""Calm before each round: long enough for caches and queues to be what they are under load."""

PAIR_PROBABILITY: Final = 0.3
STAGGER_S: Final = (0.0, 1.5)
"""Between the two events of a pair: the second falls into each part of what the cluster does about the first."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing to be done.

    Attributes:
        kind: a key of `KINDS`.
        victim: chooses among the processes of the kind's role, modulo their number.
        seconds: how long it goes on by itself; 0 for what is over at once.
        seed: for whatever else is to be chosen.
    """

    kind: str
    victim: int
    seconds: float
    seed: int


@dataclass(frozen=True, slots=True)
class Round:
    """One or two events, `stagger_s` apart, after `pause_s` of calm."""

    pause_s: float
    stagger_s: float
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a cluster the rules depend on."""

    hosts: int
    routers: int
    min_replicas: int


def check_kinds(names: Sequence[str] | None) -> tuple[str, ...]:
    """The kinds to deal, each once, in the order of `KINDS`; all of them for None.

    Raises:
        ConfigError: one is unknown, or there is none.
    """
    unknown = [name for name in names or () if name not in KINDS]
    if unknown or (names is not None and not names):
        raise ConfigError(f"no fault is called {', '.join(unknown) or 'nothing'}: choose among {', '.join(KINDS)}")
    return tuple(name for name in KINDS if names is None or name in names)


def may_coincide(first: str, second: str, shape: Shape) -> bool:
    """Whether both may happen at once: some replica of every expert and some router must go on to be there.

    A cluster that has one of something loses it for as long as a restore takes, but not twice over: no second event may
    touch what that restore needs.
    """
    kinds = KINDS[first], KINDS[second]
    if all(kind.role == "cluster" for kind in kinds):
        return False  # changes come one after the other anyway
    taken = [kind.role for kind in kinds if kind.takes]
    hosts, routers, controllers = (taken.count(role) for role in ("expert_host", "router", "controller"))
    if controllers > 1:
        return False
    if controllers and any(kind.role == "cluster" for kind in kinds):
        return False  # it would only be refused
    if hosts and "disk-error" in (first, second):
        return False  # where every disk fails nobody can restore a host
    # Who restores must be there, unless nobody waits for the restore.
    if hosts and hosts >= min(shape.min_replicas, shape.hosts) and (controllers or hosts > 1 or routers):
        return False
    return not (routers and routers >= shape.routers and (controllers or routers > 1 or hosts))


def rounds(seed: int, kinds: Sequence[str], shape: Shape) -> Iterator[Round]:
    """The rounds of a seed, without end. Equal arguments give equal rounds."""
    choice = random.Random(f"moray chaos {seed}")
    deck: list[str] = []
    while True:
        drawn = [_draw(choice, deck, kinds)]
        if choice.random() < PAIR_PROBABILITY:
            second = _draw(choice, deck, kinds)
            if may_coincide(drawn[0], second, shape):
                drawn.append(second)
            else:
                deck.append(second)  # it comes next, alone or with another
        yield Round(
            pause_s=choice.uniform(*PAUSE_S),
            stagger_s=choice.uniform(*STAGGER_S),
            events=tuple(_event(choice, kind) for kind in drawn),
        )


def _draw(choice: random.Random, deck: list[str], kinds: Sequence[str]) -> str:
    if not deck:
        deck += choice.sample(list(kinds), len(kinds))
    return deck.pop()


def _event(choice: random.Random, kind: str) -> Event:
    lasts = KINDS[kind].lasts_s
    # Drawn whether or not they are used: adding a kind that needs them changes nothing else of a seed's rounds.
    victim, share, seed = choice.randrange(1 << 30), choice.random(), choice.randrange(1 << 30)
    seconds = 0.0 if lasts is None else lasts[0] + share * (lasts[1] - lasts[0])
    return Event(kind, victim, round(seconds, 3), seed)
