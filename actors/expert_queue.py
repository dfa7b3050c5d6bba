"""Which of the experts that a host needs is got from where: the disk and every source take the next ones when they are free.

    waiting ──take──> taken ──deliver──> done        by whoever is first
       └──<──withdraw──┘

Nothing here reads or copies, or knows how long that takes: whoever is faster comes again sooner.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from ..kernels.experts import MlpWeights

Key = tuple[int, int]
"""(layer, expert)."""

DISK: Final = "disk"
"""The giver that has every expert."""

DISK_BYTES: Final = 256 << 20
"""Most that is read at once: four times what the reader has in flight, so that its end, when some threads have nothing left to
do, costs little; and no more memory than that beside what is kept."""

SOURCE_BYTES: Final = 16 << 20
"""Most that is asked of one source at once, above its first expert; small experts are then asked for together."""

PATIENCE_S: Final = 0.25
"""An idle giver takes what is in the hands of one that has given nothing for so long: nobody waits for whoever is slow."""


@dataclass
class _Giver:
    has: frozenset[Key] | None  # None: everything
    taken: set[Key] = field(default_factory=set)
    moved_at: float = 0.0  # when it last took or gave something
    given: int = 0
    given_bytes: int = 0

    def can_give(self, key: Key) -> bool:
        return self.has is None or key in self.has


class ExpertQueue:
    """The experts still to be had; used by one thread for each giver, and one that waits for the end.

    Args:
        sizes: what is needed, and its bytes in the checkpoint.
        sources: givers beside the disk, and what each has.
        on_delivered: told the bytes of each expert when it is there.
        patience_s: see `PATIENCE_S`.
    """

    def __init__(
        self,
        sizes: Mapping[Key, int],
        sources: Mapping[str, frozenset[Key]],
        *,
        on_delivered: Callable[[int], None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        assert DISK not in sources, "no host has the disk's name"
        self._sizes = sizes
        self._on_delivered = on_delivered
        self._patience_s = patience_s
        self._givers = {DISK: _Giver(None), **{name: _Giver(has) for name, has in sources.items()}}
        self._active = set(self._givers)
        copied = frozenset().union(*sources.values())
        # The disk begins at the front, with what it alone has, and sources at the back.
        self._waiting = dict.fromkeys(sorted(sizes, key=lambda key: (key in copied, key)))
        self._done: dict[Key, MlpWeights] = {}
        self._disk_error: BaseException | None = None
        self._error: BaseException | None = None
        self._changed = threading.Condition()  # guards everything above

    def take(self, giver: str) -> list[Key]:
        """What `giver` should give next, having given or lost all it took before; empty if nothing is left for anybody.

        Waits while there is something that may come back.
        """
        me = self._givers[giver]
        with self._changed:
            me.taken.clear()
            while not self._over and giver in self._active:
                now = time.monotonic()
                late, next_late = self._late(now)
                batch = self._batch(giver, self._waiting) or self._batch(giver, late)
                if batch:
                    for key in batch:
                        self._waiting.pop(key, None)
                    me.taken.update(batch)
                    me.moved_at = now
                    return batch
                self._changed.wait(next_late - now)
            return []

    def deliver(self, giver: str, key: Key, weights: MlpWeights) -> None:
        """Have `key`, unless another giver was faster."""
        with self._changed:
            if key in self._done or self._over:
                return
            self._done[key] = weights
            self._waiting.pop(key, None)
            me = self._givers[giver]
            me.moved_at = time.monotonic()
            me.given += 1
            me.given_bytes += self._sizes[key]
            if len(self._done) == len(self._sizes):
                self._changed.notify_all()
        self._on_delivered(self._sizes[key])

    def withdraw(self, giver: str, error: BaseException) -> None:
        """Ask `giver` no more; what it had in hand goes back. Fails the whole where nobody else has what is left."""
        with self._changed:
            self._active.discard(giver)
            if giver == DISK:
                self._disk_error = error
            back, self._givers[giver].taken = self._givers[giver].taken, set()
            elsewhere = {key for name in self._active for key in self._givers[name].taken}
            self._waiting.update(dict.fromkeys(sorted(back - self._done.keys() - elsewhere)))
            if self._disk_error is not None and self._error is None and any(map(self._unavailable, self._sizes)):
                self._error = self._disk_error
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """End without the rest; the first error counts."""
        with self._changed:
            if not self._over:
                self._error = error
            self._changed.notify_all()

    @property
    def over(self) -> bool:
        """Whether everything is there, or it has failed."""
        with self._changed:
            return self._over

    def wait(self, timeout_s: float) -> bool:
        """Whether it is over before the time is."""
        with self._changed:
            return self._changed.wait_for(lambda: self._over, timeout_s)

    def result(self) -> dict[Key, MlpWeights]:
        """Everything; raises what it failed with. Only when it is over."""
        with self._changed:
            assert self._over
            if self._error is not None:
                raise self._error
            return self._done

    def given(self, giver: str) -> tuple[int, int]:
        """Experts that came from `giver`, and their bytes in the checkpoint."""
        with self._changed:
            return self._givers[giver].given, self._givers[giver].given_bytes

    @property
    def _over(self) -> bool:
        return self._error is not None or len(self._done) == len(self._sizes)

    def _unavailable(self, key: Key) -> bool:
        return key not in self._done and not any(self._givers[name].can_give(key) for name in self._active)

    def _late(self, now: float) -> tuple[list[Key], float]:
        """What is in the hands of givers out of patience, and when the next one will be."""
        late: set[Key] = set()
        next_late = now + self._patience_s
        for giver in map(self._givers.__getitem__, self._active):
            if giver.moved_at + self._patience_s <= now:
                late |= giver.taken
            elif giver.taken:
                next_late = min(next_late, giver.moved_at + self._patience_s)
        return sorted(late - self._done.keys()), next_late

    def _batch(self, giver: str, keys: Iterable[Key]) -> list[Key]:
        """The next of `keys` for one giver: the disk's share shrinks with what is left, so that all end at the same time."""
        me = self._givers[giver]
        if giver == DISK:
            candidates = list(keys)
            rivals = len(self._active) - 1
            room = DISK_BYTES
            if rivals:
                room = min(room, sum(self._sizes[key] for key in candidates) // (2 * (1 + rivals)))
        else:
            candidates = [key for key in reversed(list(keys)) if me.can_give(key)]
            room = SOURCE_BYTES
        batch: list[Key] = []
        for key in candidates:
            room -= self._sizes[key]
            if batch and room < 0:
                break
            batch.append(key)
        return batch
