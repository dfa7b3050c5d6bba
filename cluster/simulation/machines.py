"""Where modelled processes compute: each on a device of its own, or all of them on the cores of one machine.

A process does one thing at a time, in the order in which it was asked to.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from ..replica_counts import Floats, Ints
from .events import Timer, VirtualTime

FRONT = "front"
"""The front's process."""

Then = Callable[[], None]
Lost = Callable[[float], None]
"""Called with the share of the work that was not done."""


class Ask:
    """Expert work that one router waits for, on several hosts.

    Attributes:
        lost: called instead of what follows if one of the hosts is lost before it has answered.
        left: share of the work that was not done when that happened.
    """

    __slots__ = ("begun", "ends", "finish", "hosts", "left", "lost", "missing", "start", "then", "timer", "until")

    def __init__(self, hosts: Ints, then: Then, lost: Lost, begun: float) -> None:
        self.hosts = hosts
        self.then = then
        self.lost = lost
        self.left = 1.0
        self.begun = begun
        self.missing = len(hosts)
        self.start: Floats | None = None
        self.finish: Floats | None = None
        self.until: Floats | None = None
        self.timer: Timer | None = None
        self.ends = begun


class Machines(Protocol):
    """Runs the work of processes. Routers and the front are named, hosts are numbered."""

    def compute(self, who: str, seconds: float, then: Then, *, latency_s: float = 0.0) -> None:
        """Have a process compute once it has done all before; `then` comes `latency_s` after that."""
        ...

    def forget(self, who: str) -> None:
        """The process has ended: nothing follows of what it was asked."""
        ...

    def ask(self, hosts: Ints, seconds: Floats, then: Then, lost: Lost, *, latency_s: float = 0.0) -> Ask:
        """Have hosts [N] compute so long each; `then` comes `latency_s` after the last of them is done."""
        ...

    def withdraw(self, ask: Ask) -> None:
        """Nobody waits for it any more."""
        ...

    def lose(self, host: int) -> list[Ask]:
        """A host ends now, with all that it has to do; who waits for it, and whoever asks it from now on, is not answered."""
        ...

    def give_up(self, host: int) -> list[Ask]:
        """Who has asked a lost host since `lose`; nobody does after this."""
        ...

    def revive(self, host: int) -> None:
        """A host is there, with nothing to do."""
        ...

    def busy_s(self, host: int) -> float:
        """Seconds that a host has computed."""
        ...


class OwnDevices:
    """Every process has a device of its own: when each will be done is known as soon as it is asked.

    Args:
        hosts: how many there are at first.
        times: hosts do everything so many times, once for each router that a modelled one stands for. Its own work comes first,
            that of its twins keeps the host from what others ask later.
    """

    def __init__(self, clock: VirtualTime, hosts: int, *, times: int = 1) -> None:
        self._clock = clock
        self._times = times
        self._free = np.zeros(hosts)
        self._busy = np.zeros(hosts)
        self._asks: dict[int, Ask] = {}
        self._dead: dict[int, list[Ask]] = {}
        self._others: dict[str, float] = {}
        self._timers: dict[str, deque[Timer]] = {}

    def compute(self, who: str, seconds: float, then: Then, *, latency_s: float = 0.0) -> None:
        """See `Machines`."""
        done = max(self._clock.now, self._others.get(who, 0.0)) + seconds
        self._others[who] = done
        timers = self._timers.setdefault(who, deque())
        while timers and timers[0].at < self._clock.now:
            timers.popleft()
        timers.append(self._clock.at(done + latency_s, then))

    def forget(self, who: str) -> None:
        """See `Machines`."""
        for timer in self._timers.pop(who, ()):
            timer.cancel()
        self._others.pop(who, None)

    def ask(self, hosts: Ints, seconds: Floats, then: Then, lost: Lost, *, latency_s: float = 0.0) -> Ask:
        """See `Machines`."""
        now = self._clock.now
        ask = Ask(hosts, then, lost, now)
        for host, waiting in self._dead.items():
            if host in hosts:
                waiting.append(ask)
                return ask
        ask.start = np.maximum(now, self._free[hosts])
        ask.finish = ask.start + seconds
        ask.until = ask.start + self._times * seconds
        self._free[hosts] = ask.until
        self._busy[hosts] += self._times * seconds
        ask.ends = float(ask.finish.max())
        self._asks[id(ask)] = ask

        def answered() -> None:
            del self._asks[id(ask)]
            then()

        ask.timer = self._clock.at(ask.ends + latency_s, answered)
        return ask

    def withdraw(self, ask: Ask) -> None:
        """See `Machines`."""
        if id(ask) in self._asks:
            self._drop(ask)
        for waiting in self._dead.values():
            waiting[:] = [one for one in waiting if one is not ask]

    def lose(self, host: int) -> list[Ask]:
        """See `Machines`."""
        now = self._clock.now
        found = []
        for ask in list(self._asks.values()):
            at = np.flatnonzero(ask.hosts == host)
            assert ask.finish is not None
            if len(at) and ask.finish[at[0]] > now:
                ask.left = (ask.ends - now) / (ask.ends - ask.begun)
                self._drop(ask)
                found.append(ask)
        self._busy[host] -= max(0.0, self._free[host] - now)
        self._free[host] = now
        self._dead[host] = []
        return found

    def give_up(self, host: int) -> list[Ask]:
        """See `Machines`."""
        return self._dead.pop(host, [])

    def revive(self, host: int) -> None:
        """See `Machines`."""
        more = host + 1 - len(self._free)
        if more > 0:
            self._free, self._busy = np.append(self._free, np.zeros(more)), np.append(self._busy, np.zeros(more))
        self._dead.pop(host, None)
        self._free[host] = self._clock.now

    def busy_s(self, host: int) -> float:
        """See `Machines`."""
        return float(self._busy[host] - max(0.0, self._free[host] - self._clock.now))

    def _drop(self, ask: Ask) -> None:
        """Have hosts not do what they have not done of it. What comes after it there does not move forward."""
        assert ask.timer is not None
        assert ask.start is not None
        assert ask.until is not None
        del self._asks[id(ask)]
        ask.timer.cancel()
        undone = np.maximum(0.0, ask.until - np.maximum(ask.start, self._clock.now))
        self._free[ask.hosts] -= undone
        self._busy[ask.hosts] -= undone


class _Job:
    __slots__ = ("ask", "latency_s", "left", "then")

    def __init__(self, seconds: float, then: Then, latency_s: float, ask: Ask | None = None) -> None:
        self.left = seconds
        self.then = then
        self.latency_s = latency_s
        self.ask = ask


class SharedCores:
    """All processes share the cores of one machine: of n that have something to do, each gets cores / n of a core, at most
    one.

    That is what a fair scheduler of an operating system gives on average. Its time slices are not modelled; what it costs to
    change between processes is a constant share of the cores.

    Args:
        cores: that processes find free.
        crowded: what is left of them while more processes have something to do than cores, rounded up, are there.
    """

    def __init__(self, clock: VirtualTime, hosts: int, cores: float, crowded: float) -> None:
        self._clock = clock
        self._cores, self._crowded = cores, crowded
        self._queues: dict[str | int, deque[_Job]] = {host: deque() for host in range(hosts)}
        self._busy: dict[int, float] = dict.fromkeys(range(hosts), 0.0)
        self._dead: dict[int, list[Ask]] = {}
        self._timers: dict[str, list[Timer]] = {}
        self._since = 0.0
        self._timer: Timer | None = None

    def compute(self, who: str, seconds: float, then: Then, *, latency_s: float = 0.0) -> None:
        """See `Machines`."""
        self._catch_up()
        self._queues.setdefault(who, deque()).append(_Job(seconds, then, latency_s))
        self._plan()

    def forget(self, who: str) -> None:
        """See `Machines`."""
        self._catch_up()
        self._queues.pop(who, None)
        for timer in self._timers.pop(who, ()):
            timer.cancel()
        self._plan()

    def ask(self, hosts: Ints, seconds: Floats, then: Then, lost: Lost, *, latency_s: float = 0.0) -> Ask:
        """See `Machines`."""
        ask = Ask(hosts, then, lost, self._clock.now)
        for host, waiting in self._dead.items():
            if host in hosts:
                waiting.append(ask)
                return ask
        self._catch_up()
        for host, work in zip(hosts.tolist(), seconds.tolist(), strict=True):
            self._queues[host].append(_Job(work, then, latency_s, ask))
        self._plan()
        return ask

    def withdraw(self, ask: Ask) -> None:
        """See `Machines`."""
        self._remove(lambda job: job.ask is ask)
        for waiting in self._dead.values():
            waiting[:] = [one for one in waiting if one is not ask]

    def lose(self, host: int) -> list[Ask]:
        """See `Machines`."""
        self._catch_up()
        found = [job.ask for job in self._queues[host] if job.ask is not None]
        self._remove(lambda job: job.ask in found)
        for ask in found:
            ask.left = ask.missing / len(ask.hosts)
        self._dead[host] = []
        return found

    def give_up(self, host: int) -> list[Ask]:
        """See `Machines`."""
        return self._dead.pop(host, [])

    def revive(self, host: int) -> None:
        """See `Machines`."""
        self._dead.pop(host, None)
        self._queues.setdefault(host, deque())
        self._busy.setdefault(host, 0.0)

    def busy_s(self, host: int) -> float:
        """See `Machines`."""
        self._catch_up()
        self._plan()
        return self._busy[host]

    def _remove(self, unwanted: Callable[[_Job], bool]) -> None:
        self._catch_up()
        for queue in self._queues.values():
            kept = [job for job in queue if not unwanted(job)]
            if len(kept) < len(queue):
                queue.clear()
                queue.extend(kept)
        self._plan()

    def _catch_up(self) -> None:
        """Do what has been done since the last look."""
        passed, self._since = self._clock.now - self._since, self._clock.now
        if passed <= 0:
            return
        running = [(who, queue[0]) for who, queue in self._queues.items() if queue]
        work = passed * self._rate(len(running))
        for who, job in running:
            job.left -= work
            if isinstance(who, int):
                self._busy[who] += work

    def _plan(self) -> None:
        """See to it that the job that will be done first is noticed then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        running = [(queue[0].left, index, who) for index, (who, queue) in enumerate(self._queues.items()) if queue]
        if not running:
            return
        left, _, who = min(running)
        self._timer = self._clock.after(max(0.0, left) / self._rate(len(running)), lambda: self._done(who))

    def _rate(self, running: int) -> float:
        """Of a core, what each of those that have something to do gets."""
        cores = self._cores if running <= math.ceil(self._cores) else self._crowded
        return min(1.0, cores / max(1, running))

    def _done(self, who: str | int) -> None:
        self._timer = None
        self._catch_up()
        job = self._queues[who].popleft()
        self._plan()
        if job.ask is not None:
            job.ask.missing -= 1
            if job.ask.missing:
                return
        if not job.latency_s:
            job.then()
            return
        timer = self._clock.after(job.latency_s, job.then)
        if isinstance(who, str):
            mine = self._timers.setdefault(who, [])
            mine[:] = [one for one in mine if one.at >= self._clock.now]
            mine.append(timer)
