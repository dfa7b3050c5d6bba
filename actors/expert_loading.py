"""Getting experts into memory: from the disk and from hosts that hold them, at the same time.

Beside serving, a load runs in ordinary threads with one read in flight. Nothing in it holds the interpreter's lock for longer
than it takes to start a numpy or torch call (99 of 100 wake-ups of another thread came less than 0.3 ms late on an idle
machine), and with the cores shared with two busy processes the 99th percentile of answers was 13 ms; 2 reads in flight made
that 29 ms, 8 reads 79 ms. It does not run in the background (`background.py`), which is for hosts that serve nothing yet:
its threads, of little weight, would hold that lock while they wait for a core, and answers took up to 0.8 s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Final, Literal

import torch

from ..configs.errors import CheckpointError, ClusterError, ConfigError, LinkError
from ..kernels.experts import MlpWeights
from ..model.checkpoint import Checkpoint
from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.loading import ExpertWeights, expert_layout, load_experts
from ..model.progress import NoProgress, Progress, default_progress
from ..model.weights import mlp_weights
from .deadline import Deadline
from .dialling import dial_host
from .expert_queue import DISK, ExpertQueue, Key
from .links import Link, LinkKind
from .weight_copy import Layout, Sources, WeightCopier, WeightSource, mlp_layout

logger = logging.getLogger("moray.expert_host")

SILENCE_S: Final = 5.0
"""A source that sends nothing for so long is asked no more. Nobody waits for it until then: see `expert_queue.PATIENCE_S`."""

_LOOK_S: Final = 0.1
"""Between looks at whether the load is still wanted."""

_JOIN_S: Final = 1.0
"""For threads to notice the end. One that dials, or waits for a disk that hangs, may take longer; it ends by itself."""


class _NotNeededError(Exception):
    """Ends a read of what others have given meanwhile."""


@dataclass(frozen=True, kw_only=True)
class ExpertLoader:
    """What all parts of one load have in common.

    Attributes:
        host_id: who loads, for sources and the log.
        epoch: for which.
        checkpoint, config: what to read.
        compute: where and in what the experts will compute.
        sources: hosts to copy from, beside reading.
        link: kind of the links to them.
        secret: the cluster's; needed where there are sources.
        threads: reads in flight.
        silence_s: see `SILENCE_S`.
    """

    host_id: str
    epoch: int
    checkpoint: Checkpoint
    config: ModelConfig
    compute: Compute
    sources: Sources
    link: LinkKind | Literal["auto"]
    secret: bytes = field(repr=False)
    threads: int
    silence_s: float = SILENCE_S

    def load(
        self, missing: Sequence[Key], *, progress: Progress | None, check: Callable[[], None], deadline: Deadline
    ) -> tuple[dict[Key, MlpWeights], int, int]:
        """Get the experts that are `missing`: these, and their bytes in the checkpoint that were read, and copied instead.

        Args:
            missing: what to get.
            progress: where to show how far it is, whatever the source.
            check: looked at now and then; what it raises ends the load.
            deadline: for all of it.

        Raises:
            CheckpointError: the disk failed, and the sources do not have all the rest.
            ClusterError: it was not done in time.
        """
        wanted = sorted(set(missing))
        if not wanted:
            return {}, 0, 0
        started = time.monotonic()
        stored = {key: expert_layout(self.checkpoint, self.config, *key) for key in wanted}
        sizes = {key: layout.nbytes for key, layout in stored.items()}
        sources = {
            name: s for name, s in self.sources.items() if name != self.host_id and not s.experts.isdisjoint(sizes)
        }
        with (progress or default_progress()).task("experts", sum(sizes.values())) as advance:
            queue = ExpertQueue(sizes, {name: s.experts for name, s in sources.items()}, on_delivered=advance)
            givers = _Givers(self, queue, _Layouts(stored, self.compute))
            try:
                givers.start(sources)
                while not queue.wait(_LOOK_S):
                    check()
                    if deadline.passed:
                        raise ClusterError(f"{self.host_id}: loading epoch {self.epoch} was not done in time")
            except BaseException as error:
                queue.fail(error)
            givers.end()
            experts = queue.result()
        (_, read), copied = queue.given(DISK), sum(queue.given(name)[1] for name in sources)
        logger.info(
            "event=experts_loaded host=%s epoch=%d experts=%d read_bytes=%d copied_bytes=%d duration_s=%.3f",
            *(self.host_id, self.epoch, len(experts), read, copied, time.monotonic() - started),
        )
        return experts, read, copied


class _Layouts:
    """What each expert must be once it is loaded; one layout for all that are stored alike."""

    def __init__(self, stored: Mapping[Key, ExpertWeights], compute: Compute) -> None:
        self._stored = stored
        self._compute = compute
        self._by_dtypes: dict[tuple[torch.dtype, ...], Layout] = {}

    def batches(self, keys: Sequence[Key]) -> Iterator[tuple[int, list[int], Layout]]:
        """(layer, experts, their layout) for all `keys`."""
        for (layer, dtypes), group in groupby(keys, key=lambda key: (key[0], self._dtypes(key))):
            together = list(group)
            if dtypes not in self._by_dtypes:
                self._by_dtypes[dtypes] = mlp_layout(self._stored[together[0]], self._compute)
            yield layer, [expert for _, expert in together], self._by_dtypes[dtypes]

    def _dtypes(self, key: Key) -> tuple[torch.dtype, ...]:
        stored = self._stored[key]  # shapes are the model's; FP8 or not is up to each matrix
        return stored.gate_proj.weight.dtype, stored.up_proj.weight.dtype, stored.down_proj.weight.dtype


class _Givers:
    """The threads that fill a queue."""

    def __init__(self, load: ExpertLoader, queue: ExpertQueue, layouts: _Layouts) -> None:
        self._load = load
        self._queue = queue
        self._layouts = layouts
        self._threads: list[threading.Thread] = []
        self._links: list[Link] = []
        self._lock = threading.Lock()  # guards the links

    def start(self, sources: Sources) -> None:
        """Begin to read, and to copy from each source."""
        self._start(DISK, self._read)
        for name, source in sources.items():
            self._start(name, partial(self._copy, name, source))

    def end(self) -> None:
        """Have the threads end, once the queue is over."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.abort()
        deadline = Deadline.after(_JOIN_S)
        for thread in self._threads:
            thread.join(deadline.remaining())
            if thread.is_alive():
                logger.info("event=load_thread_left host=%s thread=%s", self._load.host_id, thread.name)

    def _start(self, giver: str, give: Callable[[], None]) -> None:
        def run() -> None:
            try:
                give()
            except BaseException as error:  # whatever it is, it belongs to the caller of the load
                self._queue.fail(error)

        thread = threading.Thread(target=run, name=f"{self._load.host_id}-load-{giver}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _read(self) -> None:
        load, queue = self._load, self._queue
        try:
            while batch := queue.take(DISK):
                stored, _ = load_experts(
                    load.checkpoint,
                    load.config,
                    sorted(batch),
                    threads=load.threads,
                    progress=NoProgress(),  # the queue shows what has arrived, from everywhere
                    check=self._still_needed,
                )
                for key in list(stored):
                    queue.deliver(DISK, key, mlp_weights(stored.pop(key), load.compute))
                    self._still_needed()
        except _NotNeededError:
            return
        except (CheckpointError, OSError) as error:
            logger.error("event=disk_failed host=%s epoch=%d reason=%s", load.host_id, load.epoch, error)
            queue.withdraw(DISK, error)

    def _still_needed(self) -> None:
        if self._queue.over:
            raise _NotNeededError

    def _copy(self, name: str, source: WeightSource) -> None:
        load, queue = self._load, self._queue
        started = time.monotonic()
        link: Link | None = None
        try:
            link = dial_host(
                source.addresses,
                load.link,
                host=name,
                secret=load.secret,
                identity=load.host_id,
                device=load.compute.device,
                timeout_s=load.silence_s,
            )
            with self._lock:
                self._links.append(link)
            copier = WeightCopier(link, epoch=load.epoch, device=load.compute.device, silence_s=load.silence_s)
            while batch := queue.take(name):
                for layer, experts, layout in self._layouts.batches(sorted(batch)):
                    for expert, weights in copier.copy(layer, experts, layout):
                        queue.deliver(name, (layer, expert), weights)
        except (LinkError, ConfigError) as error:
            if not queue.over:  # else it is our own end of the link that was closed
                logger.warning("event=source_failed host=%s source=%s reason=%s", load.host_id, name, error)
                queue.withdraw(name, error)
        finally:
            if link is not None:
                link.close()
            logger.info(
                "event=copied host=%s source=%s experts=%d bytes=%d duration_s=%.3f",
                *(load.host_id, name, *queue.given(name), time.monotonic() - started),
            )
