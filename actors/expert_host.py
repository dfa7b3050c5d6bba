"""ExpertHost: holds routed experts in slots and runs them for any router that links to it. It has no other state."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..configs.errors import LinkError
from ..kernels.experts import ExpertWeights, MlpWeights, grouped_mlp
from ..model.checkpoint import Checkpoint
from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.loading import load_experts
from ..model.progress import Progress
from ..model.reader import BytesRead
from ..model.weights import mlp_weights
from .deadline import Deadline
from .links import Frame, InlineLink, Link, LinkAddress, LinkKind, Listener, listen
from .moe_frames import Kind, MoeHeader
from .placement_table import EMPTY

logger = logging.getLogger("moray.expert_host")

_IDLE_POLL_S = 1.0
_REPLY_TIMEOUT_S = 10.0
"""A router that does not take a reply for this long is treated as gone: its own step waits for it with nothing else to do."""


def _check_pairs(pairs: torch.Tensor, tokens: int) -> None:
    """Refuse pairs [2, P] (rows, slots) that a kernel would follow out of its tensors.

    Raises:
        ValueError: a row is no token of the frame, or the slots do not ascend.
    """
    rows, slots = pairs.unbind()
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < tokens:
        raise ValueError(f"rows {int(rows.min())} to {int(rows.max())} of {tokens} tokens")
    if slots.numel() and (int(slots[0]) < 0 or bool((slots.diff() < 0).any())):
        raise ValueError("slots do not ascend from 0 on")


@dataclass(frozen=True, slots=True)
class _Epoch:
    """What one placement epoch has here: MLPs by (layer, logical expert), and the same by layer and slot."""

    experts: dict[tuple[int, int], MlpWeights]
    layers: dict[int, ExpertWeights]


class ExpertHost:
    """Serves the experts in its slots over links; several routers at once, one thread each, one computation at a time.

    Args:
        host_id: unique in the cluster, e.g. `expert-host-0`.
        compute: where and in what the experts compute.
    """

    def __init__(self, host_id: str, *, compute: Compute) -> None:
        self.host_id = host_id
        self.compute = compute
        self._epochs: dict[int, _Epoch] = {}  # what is served; replaced as a whole, never changed in place
        self._one_at_a_time = threading.Lock()
        self._stopping = threading.Event()
        self._listeners: list[Listener] = []
        self._links: set[Link] = set()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()  # guards the two above

    def load(
        self, checkpoint: Path, slots: Sequence[Sequence[int]], *, epoch: int, progress: Progress | None = None
    ) -> BytesRead:
        """Hold the experts in `slots` (for each layer with routed experts, the expert in each slot, or `EMPTY`) as of `epoch`.

        Reads exactly those that no epoch served here has; the others stay where they are in memory. Earlier epochs are
        served on until `retire`: routers change over one by one, and none waits for this.

        Returns:
            What was read now.

        Raises:
            CheckpointError: a tensor is missing, damaged or holds NaN; nothing has changed then.
        """
        config = ModelConfig.load(checkpoint)
        layers = config.moe_layers
        assert len(slots) == len(layers), (len(slots), len(layers))
        wanted = [
            (layer, expert) for layer, held in zip(layers, slots, strict=True) for expert in held if expert != EMPTY
        ]
        held = {key: weights for served in self._epochs.values() for key, weights in served.experts.items()}
        missing = [key for key in wanted if key not in held]
        stored, bytes_read = load_experts(Checkpoint.open(checkpoint), config, missing, progress=progress)
        held |= {key: mlp_weights(weights, self.compute) for key, weights in stored.items()}
        experts = {key: held[key] for key in wanted}
        placed = {
            layer: ExpertWeights({s: experts[layer, expert] for s, expert in enumerate(of_layer) if expert != EMPTY})
            for layer, of_layer in zip(layers, slots, strict=True)
        }
        self._epochs = {**self._epochs, epoch: _Epoch(experts, placed)}
        return bytes_read

    def retire(self, epoch: int) -> None:
        """Stop serving every epoch but `epoch`, and free what only the others held: no router uses them any more."""
        self._epochs = {served: held for served, held in self._epochs.items() if served == epoch}

    def listen(self, kind: LinkKind, *, bind_host: str, secret: bytes) -> LinkAddress:
        """Accept routers on a new listener and return its address."""
        listener = listen(kind, bind_host=bind_host, secret=secret, identity=self.host_id)
        self._listeners.append(listener)
        self._start(self._accept, listener)
        return listener.address

    def attach(self, link: Link) -> None:
        """Serve a link made elsewhere (local mode, tests) in a thread of its own."""
        with self._lock:
            self._links.add(link)
        self._start(self._serve, link)

    def inline_link(self, router: str) -> InlineLink:
        """The router's end of a new link within this process; its waits run this host's work in the router's thread."""
        router_end, host_end = InlineLink.pair(router, self.host_id)

        def answer() -> None:
            header, tensors = self.handle(host_end.recv(deadline=Deadline.after(_REPLY_TIMEOUT_S)))
            host_end.send(header, tensors, deadline=Deadline.after(_REPLY_TIMEOUT_S))

        host_end.drive(answer)
        with self._lock:
            self._links.add(host_end)
        return router_end

    def handle(self, frame: Frame) -> tuple[bytes, list[torch.Tensor]]:
        """The reply to one request frame: header and tensors. What the request did wrong is answered, not raised.

        Raises:
            ValueError: the header is none, so that there is nobody to answer.
        """
        header = MoeHeader.unpack(frame.header)
        try:
            outputs = self._run(header, frame.tensors)
        except (ValueError, RuntimeError, KeyError, IndexError) as error:
            # The router must hear of it whatever went wrong, and the other routers must not suffer.
            logger.exception("%s: layer %d failed", self.host_id, header.layer)
            reason = f"{self.host_id}: layer {header.layer}: {type(error).__name__}: {error}"
            return MoeHeader(Kind.FAILED, header.layer, header.epoch, header.sequence, reason).pack(), []
        return MoeHeader(Kind.DONE, header.layer, header.epoch, header.sequence).pack(), [outputs]

    def _run(self, header: MoeHeader, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        if header.kind is not Kind.WORK or len(tensors) != 2:
            raise ValueError(f"expected WORK with 2 tensors, got {header.kind.name} with {len(tensors)}")
        epochs = self._epochs
        if header.epoch not in epochs:
            raise ValueError(f"placement epoch {header.epoch} is not served here; {list(epochs)} are")
        hidden_states, pairs = tensors
        if hidden_states.dim() != 2 or pairs.dim() != 2 or pairs.shape[0] != 2 or pairs.dtype != torch.int32:
            shapes = f"{list(hidden_states.shape)} and {list(pairs.shape)} {pairs.dtype}"
            raise ValueError(f"expected [T, H] and [2, P] torch.int32, got {shapes}")
        device = self.compute.device
        if device.type == "cuda" and not pairs.is_cuda:
            _check_pairs(pairs, hidden_states.shape[0])  # on the GPU nobody will
        with self._one_at_a_time, torch.inference_mode():
            rows, slots = pairs.to(device).unbind()
            return grouped_mlp(hidden_states.to(device), rows, slots, epochs[header.epoch].layers[header.layer])

    def stop(self) -> None:
        """Stop listening, drop every link and wait for the threads. Idempotent."""
        self._stopping.set()
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

    def _serve(self, link: Link) -> None:
        try:
            while not self._stopping.is_set():
                if link.wait(deadline=Deadline.after(_IDLE_POLL_S)):
                    header, tensors = self.handle(link.recv(deadline=Deadline.after(_REPLY_TIMEOUT_S)))
                    link.send(header, tensors, deadline=Deadline.after(_REPLY_TIMEOUT_S))
        except LinkError as error:
            if not self._stopping.is_set():
                logger.info("%s: %s", self.host_id, error)
        except ValueError as error:
            logger.error("%s: dropped %s: %s", self.host_id, link.peer, error)
        finally:
            with self._lock:
                self._links.discard(link)
            link.close()
