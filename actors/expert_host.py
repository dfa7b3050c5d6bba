"""ExpertHost: holds routed experts in slots and runs them for any router that links to it. It has no other state."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

import torch

from ..configs.errors import ClusterError, LinkError
from ..kernels.experts import ExpertWeights, grouped_mlp
from ..model.compute import Compute, instructions_used
from ..model.loading import BytesRead
from ..model.progress import Progress
from ..model.reader import DEFAULT_THREADS
from . import warm_up
from .background import run_in_background
from .busy_time import BusyTime
from .deadline import Deadline
from .expert_loading import ExpertLoader
from .held_experts import HeldExperts
from .host_loop import ComputeTurn, HostLoop
from .links import Frame, InlineLink, Link, LinkAddress, LinkKind, Listener, listen
from .links.base import TensorForm
from .links.wire import MAX_PAYLOAD_BYTES
from .model_files import ModelFiles
from .moe_frames import Kind, MoeHeader, check_pairs
from .native_library import actors_library
from .placement_table import EMPTY
from .reports import HostReport
from .weight_copy import Sources, give

logger = logging.getLogger("moray.expert_host")

_IDLE_POLL_S = 1.0
_LOAD_TIMEOUT_S = 3600.0
"""For one load: 654 GB over ten hosts from a slow shared disk take half an hour."""

_READS_BESIDE_SERVING = 1
"""Reads in flight while routers are served; see `expert_loading.py`."""

_REPLY_TIMEOUT_S = 10.0
"""A router that does not take a reply for this long is treated as gone: its own step waits for it with nothing else to do."""

Room: TypeAlias = Callable[[tuple[TensorForm, ...]], tuple[torch.Tensor, ...] | None]
"""What `Link.prepare` is without its deadline."""

_COMPUTED_IN = (torch.bfloat16, torch.float16, torch.float32)


class ExpertHost:
    """Serves the experts in its slots over links; several routers at once, one thread each, one computation at a time.

    Hosts that need some of its experts copy them over links of their own, beside that.

    Args:
        host_id: unique in the cluster, e.g. `expert-host-0`; empty for a host that stands by until it is told who to be.
        compute: where and in what the experts compute.
    """

    def __init__(self, host_id: str, *, compute: Compute) -> None:
        self.host_id = host_id
        self.compute = compute
        self._files = ModelFiles()
        self._held = HeldExperts()
        library = actors_library() if compute.packed else None
        self._one_at_a_time = ComputeTurn(library)
        self._loop = None
        if library is not None:
            self._loop = HostLoop(library, self._one_at_a_time, reply_timeout_s=_REPLY_TIMEOUT_S)
        self._busy = BusyTime(compute.device)
        self._pairs = 0  # computed in Python; guarded by the turn above, as what `_busy` counts
        self._stopping = threading.Event()
        self._listeners: list[Listener] = []
        self._links: set[Link] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards the two above

    def become(self, host_id: str) -> None:
        """Be `host_id` from now on, having stood by; before this, a host neither listens nor loads.

        Raises:
            ClusterError: it is another host already.
        """
        if self.host_id:
            raise ClusterError(f"{self.host_id} cannot become {host_id}: only a host that stands by can")
        self.host_id = host_id

    def warm_up(self, checkpoint: Path) -> None:
        """Do what the first load and the first request would wait for: open the checkpoint, compute once with made-up weights.

        Raises:
            CheckpointError: the checkpoint cannot be opened.
        """
        config, _ = self._files.open(checkpoint)
        with self._one_at_a_time:
            warm_up.warm_up(config, self.compute)

    def load(
        self,
        checkpoint: Path,
        slots: Sequence[Sequence[int]],
        *,
        epoch: int,
        progress: Progress | None = None,
        sources: Sources | None = None,
        link: LinkKind | Literal["auto"] = "auto",
        secret: bytes = b"",
        gently: bool = False,
    ) -> BytesRead:
        """Hold the experts in `slots` (for each layer with routed experts, the expert in each slot, or `EMPTY`) as of `epoch`.
        Where there is a layer more, it is the MTP layer.

        Gets exactly those that no epoch served here has; the others stay where they are in memory. Earlier epochs are
        served on until `retire`: routers change over one by one, and none waits for this. Loads take turns.

        Args:
            epoch: one that is served already is replaced.
            progress: where to show how far it is, whether experts are read or copied.
            sources: live hosts to copy from beside reading, whichever is faster: experts that several have are asked of
                whoever is free. One that fails is left out.
            link: kind of the links to them.
            secret: the cluster's; needed where there are sources.
            gently: leave the cores to other processes; for a host that serves nothing yet, others ignore it.

        Returns:
            What was read and copied now.

        Raises:
            CheckpointError: a tensor is missing, damaged or holds NaN, and no source has it; nothing has changed then.
            ClusterError: the epoch was given up by `abandon` or `retire` meanwhile; nothing has changed then.
        """
        self._check_named("load")
        with self._held.loading(epoch) as loading:
            config, opened = self._files.open(checkpoint)
            config = config.with_moe_layers(len(slots))
            layers = config.moe_layers
            assert len(slots) == len(layers), (len(slots), len(layers))
            wanted = [(layer, e) for layer, held in zip(layers, slots, strict=True) for e in held if e != EMPTY]
            held = self._held.all()
            kept = {key: held.pop(key) for key in set(wanted) & held.keys()}  # whatever is retired meanwhile
            serving = bool(self._held.epochs)
            loader = ExpertLoader(
                host_id=self.host_id,
                epoch=epoch,
                checkpoint=opened,
                config=config,
                compute=self.compute,
                sources=sources or {},
                link=link,
                secret=secret,
                threads=_READS_BESIDE_SERVING if serving else DEFAULT_THREADS,
            )
            deadline = Deadline.after(_LOAD_TIMEOUT_S)
            missing = [key for key in wanted if key not in kept]

            def get() -> BytesRead:
                new, read, copied = loader.load(missing, progress=progress, check=loading.check, deadline=deadline)
                self._held.add(loading, layers, slots, kept | new)
                return BytesRead(data=read, headers=self._files.header_bytes(), copied=copied)

            if serving or not gently:
                return get()
            torch.empty(0, device=self.compute.device)  # threads that CUDA starts must not inherit the low weight
            return run_in_background(get, timeout_s=_LOAD_TIMEOUT_S + _REPLY_TIMEOUT_S)

    def retire(self, epoch: int) -> None:
        """Stop serving every epoch but `epoch`, and free what only the others held: no router uses them any more.

        Loads for earlier epochs end with an error, those for later ones go on.
        """
        self._held.retire(epoch)

    def abandon(self, epoch: int) -> None:
        """Stop serving `epoch` alone; loads for it end with an error, soon. No router has taken it up, nor ever will."""
        self._held.abandon(epoch)

    def report(self) -> HostReport:
        """The host's account of itself; never waits for a computation."""
        turn = self._one_at_a_time
        return HostReport(
            self._held.epochs,
            self._busy.seconds + turn.native_busy_s,
            self._pairs + turn.native_pairs,
            self._held.resident_bytes,
            instructions_used(self.compute),
        )

    def listen(self, kind: LinkKind, *, bind_host: str, secret: bytes) -> LinkAddress:
        """Accept routers, and hosts that copy, on a new listener and return its address."""
        self._check_named("listen")
        listener = listen(kind, bind_host=bind_host, secret=secret, identity=self.host_id)
        self._listeners.append(listener)
        self._start(self._accept, listener)
        return listener.address

    def attach(self, link: Link) -> None:
        """Serve a link made elsewhere (tests) in a thread of its own."""
        self._check_named("serve")
        with self._lock:
            self._links.add(link)
        self._start(self._serve, link)

    def inline_link(self, router: str) -> InlineLink:
        """The router's end of a new link within this process; its waits run this host's work in the router's thread."""
        self._check_named("serve")
        router_end, host_end = InlineLink.pair(router, self.host_id)

        host_end.drive(lambda: self._answer(host_end))
        with self._lock:
            self._links.add(host_end)
        return router_end

    def handle(self, frame: Frame, room: Room | None = None) -> tuple[bytes, Sequence[torch.Tensor]]:
        """The reply to one request frame: header and tensors. What the request did wrong is answered, not raised.

        Args:
            frame: the request.
            room: asked for memory that outputs are written into, if it has any; see `Link.prepare`.

        Raises:
            ValueError: the header is none, so that there is nobody to answer.
            LinkError: `room` did.
        """
        header = MoeHeader.unpack(frame.header)
        answer: Sequence[torch.Tensor]
        try:
            if header.kind is Kind.FETCH:
                kind, answer = Kind.WEIGHTS, give(self._held.find, header.layer, frame.tensors)
            else:
                kind, answer = Kind.DONE, self._run(header, frame.tensors, room)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            # Who asked must hear of it whatever went wrong, and the others must not suffer.
            explains_itself = isinstance(error, ValueError)
            reason = f"{self.host_id}: layer {header.layer}: {type(error).__name__}: {error}"
            logger.error("%s", reason, exc_info=not explains_itself)
            return MoeHeader(Kind.FAILED, header.layer, header.epoch, header.sequence, reason).pack(), []
        return MoeHeader(kind, header.layer, header.epoch, header.sequence).pack(), answer

    def _run(self, header: MoeHeader, tensors: Sequence[torch.Tensor], room: Room | None) -> Sequence[torch.Tensor]:
        if header.kind is not Kind.WORK or len(tensors) != 2:
            raise ValueError(f"expected WORK with 2 tensors, got {header.kind.name} with {len(tensors)}")
        experts = self._held.layer(header.epoch, header.layer)
        hidden_states, pairs = tensors
        if hidden_states.dim() != 2 or pairs.dim() != 2 or pairs.shape[0] != 2 or pairs.dtype != torch.int32:
            shapes = f"{list(hidden_states.shape)} and {list(pairs.shape)} {pairs.dtype}"
            raise ValueError(f"expected [T, H] and [2, P] torch.int32, got {shapes}")
        _check_sizes(hidden_states, pairs, experts)
        device, dtype = self.compute.device, hidden_states.dtype
        if not pairs.is_cuda:
            pairs = pairs.clone()  # from here on nobody else can change what is checked and then followed
        if device.type == "cuda" and not pairs.is_cuda:
            check_pairs(pairs, hidden_states.shape[0])  # on the GPU nobody will
        count = pairs.shape[1]
        out: tuple[torch.Tensor, ...] | None = None
        if room is not None and device.type == "cpu" and dtype == self.compute.dtype:
            out = room(((dtype, (count, hidden_states.shape[1])),))
        with self._one_at_a_time, torch.inference_mode():
            rows, slots = pairs.to(device).unbind()
            own = hidden_states.to(device=device, dtype=self.compute.dtype)
            with self._busy.measured():
                if out is None:
                    out = (grouped_mlp(own, rows, slots, experts).to(dtype),)
                else:
                    grouped_mlp(own, rows, slots, experts, out=out[0])
            self._pairs += count
        return out

    def stop(self) -> None:
        """Stop listening, drop every link and wait for the threads; loads end with an error. Idempotent."""
        self._stopping.set()
        self._held.end_loads("its host stops")
        for listener in self._listeners:
            listener.close()
        with self._lock:
            links, threads = list(self._links), list(self._threads)
        for link in links:
            link.abort()
        deadline = Deadline.after(5.0)
        for thread in threads:
            thread.join(deadline.remaining())
            if thread.is_alive():
                logger.error("%s: thread %s did not stop", self.host_id, thread.name)

    @property
    def pid(self) -> int:
        """Process this host lives in."""
        return os.getpid()

    def _check_named(self, what: str) -> None:
        if not self.host_id:
            raise ClusterError(f"a host that stands by cannot {what}: have it become one first")

    def _start(self, target: object, argument: object) -> None:
        assert callable(target)
        with self._lock:
            thread = threading.Thread(
                target=target, args=(argument,), name=f"{self.host_id}-{len(self._threads)}", daemon=True
            )
            thread.start()
            self._threads = [*(t for t in self._threads if t.is_alive()), thread]

    def _accept(self, listener: Listener) -> None:
        while not self._stopping.is_set():
            link = listener.accept(deadline=Deadline.after(_IDLE_POLL_S))
            if link is not None:
                logger.info("%s: linked to %s over %s", self.host_id, link.peer, link.kind)
                self.attach(link)

    def _answer(self, link: Link) -> None:
        """Take a request and answer it."""
        deadline = Deadline.after(_REPLY_TIMEOUT_S)

        def room(forms: tuple[TensorForm, ...]) -> tuple[torch.Tensor, ...] | None:
            return link.prepare(forms, deadline=deadline)

        header, tensors = self.handle(link.recv(deadline=deadline), room)
        link.send(header, tensors, deadline=Deadline.after(_REPLY_TIMEOUT_S))

    def _wait(self, link: Link) -> bool:
        """Wait for a request that Python is to answer; native code answers meanwhile what it can."""
        if self._loop is not None and not self._loop.serve(link, self._held.table):
            return False
        return link.wait(deadline=Deadline.after(_IDLE_POLL_S))

    def _serve(self, link: Link) -> None:
        try:
            while not self._stopping.is_set():
                if self._wait(link):
                    self._answer(link)
        except LinkError as error:
            if not self._stopping.is_set():
                logger.info("%s: %s", self.host_id, error)
        except ValueError as error:
            logger.error("%s: dropped %s: %s", self.host_id, link.peer, error)
        finally:
            with self._lock:
                self._links.discard(link)
            link.close()


def _check_sizes(hidden_states: torch.Tensor, pairs: torch.Tensor, experts: ExpertWeights) -> None:
    """Refuse work that kernels would read beyond its tensors for, or whose result no frame could carry.

    Raises:
        ValueError: no dtype that a router computes in, another hidden size, or too large a result: a few bytes ask for each
            row of it.
    """
    if hidden_states.dtype not in _COMPUTED_IN:
        raise ValueError(
            f"hidden states in {hidden_states.dtype}; routers compute in {', '.join(map(str, _COMPUTED_IN))}"
        )
    for weights in experts.values():
        width = weights.hidden_size
        if hidden_states.shape[1] != width:
            raise ValueError(f"hidden states of {hidden_states.shape[1]} for experts of {width}")
        break
    nbytes = pairs.shape[1] * hidden_states.shape[1] * hidden_states.element_size()
    if nbytes > MAX_PAYLOAD_BYTES:
        raise ValueError(f"a result of {nbytes} bytes, a frame carries {MAX_PAYLOAD_BYTES}: ask in parts")
