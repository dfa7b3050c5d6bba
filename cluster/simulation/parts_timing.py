"""CPU time of the parts that serve, one by one, in this process and in hosts of its own: what `calibration.py` fits.

CPU time is measured, not time on the clock: what else the machine does then matters far less.
"""

from __future__ import annotations

import itertools
import multiprocessing
import secrets
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...actors.deadline import Deadline
from ...actors.expert_dispatch import ExpertDispatch
from ...actors.expert_host import ExpertHost
from ...actors.links import LinkAddress, dial
from ...actors.messages import GenerateRequest, TokenOutput
from ...actors.native_exchange import native_exchange
from ...actors.placement_table import PlacementTable
from ...actors.router import Router, RouterSettings
from ...configs.errors import ConfigError
from ...kernels.attention_plan import Segment
from ...kernels.cpu.library import set_threads
from ...kernels.experts import MlpWeights, swiglu_mlp
from ...model.compute import Compute
from ...model.config import ModelConfig
from ...model.loading import load_dense, open_model
from ...model.progress import NoProgress
from ...model.sampling import SamplingParams
from ...model.transformer import ForwardBatch, Transformer
from ...model.weights import RouterWeights, router_weights
from ..assembly import host_name
from ..placement import next_placement
from .batches import StepWork
from .cpu_costs import pages

Sample = tuple[Mapping[str, float], float]
"""What was done, by the names of its constants, and the CPU seconds it took."""

_REPEATS = 11
_TIMEOUT_S = 120.0
_ROUTER = "calibration"


class _Nowhere:
    """In place of the experts, so that a router's own work is all there is: each gives its input back."""

    elsewhere = False

    def start(self, layer: int, hidden_states: torch.Tensor, *choice: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        return hidden_states

    def finish(self, pending: torch.Tensor) -> torch.Tensor:
        return pending.float()

    def run_layers(self, *_: object) -> bool:
        """Layers go one by one, as in `layer_samples`: native code would ask hosts. What that costs more, servers show."""
        return False


@dataclass(frozen=True, slots=True)
class Parts:
    """A model on this machine's CPUs."""

    checkpoint: Path
    config: ModelConfig
    compute: Compute
    settings: RouterSettings
    weights: RouterWeights

    @classmethod
    def load(cls, checkpoint: Path, compute: Compute, settings_of: Callable[[ModelConfig], RouterSettings]) -> Parts:
        """Read what a router holds."""
        config, opened = open_model(checkpoint, verify="headers", progress=NoProgress())
        dense, _ = load_dense(opened, config, progress=NoProgress())
        return cls(checkpoint, config, compute, settings_of(config), router_weights(config, dense, compute))

    def transformer(self, layers: int) -> Transformer:
        """The router's part of the first `layers` layers, without routed experts."""
        weights = replace(self.weights, blocks=self.weights.blocks[:layers])
        return Transformer(
            replace(self.config, num_hidden_layers=layers),
            weights,
            _Nowhere(),
            pages=self.settings.pages,
            page_size=self.settings.page_size,
            max_context=self.settings.max_context,
            compute=self.compute,
        )


def cpu_seconds(run: Callable[[], Any], *, repeats: int = _REPEATS) -> float:
    """Median CPU time of this process for `run`, which ran once before."""
    run()
    taken = []
    for _ in range(repeats):
        begun = time.process_time()
        run()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)


# ---- a router ---------------------------------------------------------------------------------------------------------


def _compositions(settings: RouterSettings) -> list[list[tuple[int, int]]]:
    """Steps as lists of (position, tokens): single tokens of many sequences, chunks of one or some, both."""
    most = settings.max_context
    contexts = [c for c in (24, 96, 240, 700) if c < most]
    decode = [[(context, 1)] * count for count in (1, 4, 16, 48) for context in contexts]
    uneven = [[(contexts[i % len(contexts)], 1) for i in range(count)] for count in (4, 16)]
    prompts = [[(0, n)] for n in (16, 64, 256, 512) if n <= min(most, settings.token_budget)]
    chunks = [[(most // 4, min(128, settings.token_budget))], [(0, 48)] * 4]
    steps = decode + uneven + prompts + chunks
    room = settings.pages * settings.page_size
    return [step for step in steps if sum(start + count + settings.page_size for start, count in step) <= room]


def _batch(step: Sequence[tuple[int, int]], settings: RouterSettings, vocabulary: int) -> ForwardBatch:
    ids: list[int] = []
    segments, rows, page = [], [], 0
    for start, count in step:
        needed = -(-(start + count) // settings.page_size)
        segments.append(Segment(len(ids), count, start, list(range(page, page + needed))))
        page += needed
        ids += [(7 * len(ids) + i) % vocabulary for i in range(count)]
        rows.append(len(ids) - 1)
    return ForwardBatch(ids, segments, rows)


def layer_samples(parts: Parts) -> list[Sample]:
    """One layer of a router, without shared and routed experts, for steps of many kinds.

    Raises:
        ConfigError: the model has no two layers with routed experts, which could be told apart.
    """
    config, size = parts.config, parts.settings.page_size
    dense, total = config.first_k_dense_replace, config.num_hidden_layers
    if total - dense < 2:
        raise ConfigError(f"a layer's cost is a difference: {total - dense} layers with routed experts are too few")
    few, many = parts.transformer(dense + 1), parts.transformer(total)
    shared = parts.weights.blocks[dense].mlp
    samples: list[Sample] = []
    for step in _compositions(parts.settings):
        batch = _batch(step, parts.settings, config.vocab_size)
        tokens = len(batch.token_ids)
        layers = total - dense - 1
        seconds = cpu_seconds(partial(many.forward, batch)) - cpu_seconds(partial(few.forward, batch))
        seconds = seconds / layers - _shared_seconds(shared, tokens, parts)
        positions = sum(count * start + count * (count + 1) // 2 for start, count in step)
        rows, longest = sum(start + count for start, count in step), max(start + count for start, count in step)
        features = {
            "layer": 1.0,
            "layer_token": tokens,
            "layer_position": positions,
            "layer_row": rows,
            "layer_page": pages(positions, rows, longest, size),
        }
        if seconds > 0:  # else the two could not be told apart
            samples.append((features, seconds))
    return samples


def _shared_seconds(shared: MlpWeights | None, tokens: int, parts: Parts) -> float:
    if shared is None:
        return 0.0
    rows = torch.randn((tokens, parts.config.hidden_size), dtype=parts.compute.dtype)
    return cpu_seconds(lambda: swiglu_mlp(rows, shared).float())


def shared_samples(parts: Parts) -> list[Sample]:
    """The shared experts of a layer."""
    shared = parts.weights.blocks[parts.config.first_k_dense_replace].mlp
    if not parts.config.n_shared_experts:
        return []
    counts = (1, 4, 16, 64, 256)
    return [({"shared": 1.0, "shared_token": n}, _shared_seconds(shared, n, parts)) for n in counts]


def step_samples(parts: Parts, layers_s: Callable[[StepWork], float]) -> list[Sample]:
    """Steps of a whole router outside its layers: with scheduling, embedding, head, sampling and what is sent to a front.

    Args:
        layers_s: seconds of all layers for what a step computes.
    """
    samples: list[Sample] = []
    for count in (1, 4, 16, 48):
        context = 40
        router = _router(parts)
        for index in range(count):
            router.submit(_request(parts, f"{index}", index, context, answer=64), _ignored)
        router.step()
        while router.scheduler.waiting or not all(s.generated for s in router.scheduler.running):
            router.step()
        seconds = cpu_seconds(router.step)
        at = context + _REPEATS // 2
        outside = seconds - layers_s(StepWork.of_single_tokens(count, count * at, at))
        samples.append(({"step": 1.0, "step_token": count, "step_row": count}, max(1e-6, outside)))
    for length in (64, 256):
        router, numbers = _router(parts), itertools.count()

        def prompt(router: Router = router, numbers: Iterator[int] = numbers, length: int = length) -> None:
            number = next(numbers)
            router.submit(_request(parts, f"{number}", number, length, answer=1), _ignored)
            router.step()

        work = StepWork(length, 0, 1, length * (length + 1) // 2, length, length, length, length)
        outside = cpu_seconds(prompt) - layers_s(work)
        samples.append(({"step": 1.0, "step_token": length, "step_row": 1, "admission": 1}, max(1e-6, outside)))
    return samples


def _router(parts: Parts) -> Router:
    return Router(
        _ROUTER,
        parts.config,
        parts.weights,
        _Nowhere(),  # type: ignore[arg-type]  # of a dispatch, steps use no more than this has
        parts.settings,
        compute=parts.compute,
    )


def _request(parts: Parts, name: str, number: int, prompt: int, *, answer: int) -> GenerateRequest:
    """One whose prompt begins like no other's."""
    count = parts.config.vocab_size
    ids = [number % count, number // count % count, *(i % count for i in range(prompt - 2))]
    return GenerateRequest(name, ids, SamplingParams(answer, temperature=0.0))


def _ignored(outputs: list[TokenOutput]) -> None:
    """A sink."""


# ---- hosts and links --------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Host:
    """A host's process, told by its pipe: "time" asks for its CPU time, the pipe's end ends it."""

    address: LinkAddress
    pipe: Any

    def cpu_s(self) -> float:
        self.pipe.send("time")
        if not self.pipe.poll(_TIMEOUT_S):
            raise TimeoutError(f"a host's process did not answer within {_TIMEOUT_S:g} s")
        return float(self.pipe.recv())


def _serve_host(pipe: Connection, name: str, parts: Mapping[str, Any]) -> None:
    """A host's process."""
    set_threads(1, packed=parts["compute"].packed)
    host = ExpertHost(name, compute=parts["compute"])
    host.load(parts["checkpoint"], parts["slots"], epoch=parts["epoch"])
    pipe.send(host.listen("shm", bind_host="127.0.0.1", secret=parts["secret"]))
    try:
        while True:
            pipe.recv()
            pipe.send(time.process_time())
    except EOFError:
        host.stop()


@contextmanager
def _hosts(parts: Parts, table: PlacementTable, secret: bytes) -> Iterator[dict[str, _Host]]:
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        for name, slots in table.slots.items():
            here, there = context.Pipe()
            about = {
                "compute": parts.compute,
                "checkpoint": parts.checkpoint,
                "slots": slots,
                "epoch": table.epoch,
                "secret": secret,
            }
            process = context.Process(target=_serve_host, args=(there, name, about), name=name, daemon=True)
            process.start()
            there.close()
            started.append((name, process, here))
        found = {}
        for name, _, pipe in started:
            if not pipe.poll(_TIMEOUT_S):
                raise TimeoutError(f"{name} did not start within {_TIMEOUT_S:g} s")
            found[name] = _Host(pipe.recv(), pipe)
        yield found
    finally:
        for _, process, pipe in started:
            pipe.close()
            process.join(10.0)
            if process.is_alive():
                process.kill()
                process.join(10.0)


@dataclass(frozen=True, slots=True)
class LinkSamples:
    """What layers with routed experts took.

    Attributes:
        router: CPU time of a router for sending a layer's tokens out and taking the answers in.
        host: CPU time of a host that is the only one, for one request.
    """

    router: list[Sample]
    host: list[Sample]


def link_samples(parts: Parts, *, most_hosts: int = 3, layers: int = 60) -> LinkSamples:
    """Run layers through one to `most_hosts` hosts over shared memory, with as many experts as wanted in each; with replicas of
    each as well where there is more than one host."""
    config, found = parts.config, LinkSamples([], [])
    secret = secrets.token_bytes(32)
    shapes = [(count, 1) for count in range(1, most_hosts + 1)] + [(count, 2) for count in range(2, most_hosts + 1)]
    for count, replicas in shapes:
        names = [host_name(i) for i in range(count)]
        table = next_placement(config, names, min_replicas=replicas, spare_slots=0)
        with _hosts(parts, table, secret) as hosts:
            links = {
                name: dial(host.address, secret=secret, identity=_ROUTER, deadline=Deadline.after(_TIMEOUT_S))
                for name, host in hosts.items()
            }
            dispatch = ExpertDispatch(table, links, exchange=native_exchange() if parts.compute.packed else None)
            try:
                for tokens, distinct in ((1, 4), (2, 8), (8, 8), (8, 16), (24, 16), (48, 16), (128, 16), (400, 16)):
                    _time_links(parts, dispatch, hosts, tokens, distinct, layers, found, replicas=replicas > 1)
            finally:
                dispatch.close()
    return found


def _time_links(
    parts: Parts,
    dispatch: ExpertDispatch,
    hosts: Mapping[str, _Host],
    tokens: int,
    distinct: int,
    layers: int,
    found: LinkSamples,
    *,
    replicas: bool,
) -> None:
    config, top_k = parts.config, parts.config.num_experts_per_tok
    distinct = max(top_k, min(distinct, config.n_routed_experts, tokens * top_k))
    # Every token's experts are neighbours, so that all `distinct` of them come about equally often.
    first = (np.arange(tokens) * top_k) % distinct
    chosen = (first[:, None] + np.arange(top_k)) % distinct * (config.n_routed_experts // distinct)
    topk_ids = torch.from_numpy(chosen.astype(np.int64))
    weights = torch.full((tokens, top_k), 1 / top_k)
    hidden = torch.randn((tokens, config.hidden_size), dtype=parts.compute.dtype)
    moe_layers = list(config.moe_layers)

    def layer(index: int) -> None:
        dispatch.finish(dispatch.start(moe_layers[index % len(moe_layers)], hidden, topk_ids, weights))

    with torch.inference_mode():
        for index in range(8):
            layer(index)
        before = {name: host.cpu_s() for name, host in hosts.items()}
        own = time.process_time()
        for index in range(layers):
            layer(index)
        own = (time.process_time() - own) / layers
        taken = {name: (host.cpu_s() - before[name]) / layers for name, host in hosts.items()}
    asked = _asked(dispatch.table, chosen, moe_layers)
    pairs = tokens * top_k
    item = parts.compute.dtype.itemsize
    # With replicas, a host is asked for a part of what it has: each pair goes to one of those that could compute it.
    rows = min(pairs, tokens * len(asked)) if replicas else sum(rows for rows, _, _ in asked.values())
    exchanged = (rows + pairs) * config.hidden_size * item
    work = {"exchange": 2.0, "frame": 2.0 * len(asked), "frame_byte": exchanged}
    found.router.append((work | {"choice": 1.0} if replicas else work, own))
    if len(hosts) > 1:
        return  # hosts that compute at the same time slow each other down, which is no part of their work
    for name, (_, host_pairs, host_experts) in asked.items():
        found.host.append(({"host": 1.0, "host_expert": host_experts, "host_pair": host_pairs}, taken[name]))


def _asked(table: PlacementTable, chosen: np.ndarray, layers: Sequence[int]) -> dict[str, tuple[float, float, float]]:
    """Host -> rows, pairs and distinct experts that a layer asks of it, the mean over the layers."""
    sums: dict[str, list[float]] = {}
    for layer in layers:
        held = {name: set(table.slots[name][layer - table.first_layer]) for name in table.slots}
        for name, experts in held.items():
            mine = np.isin(chosen, sorted(experts))
            if mine.any():
                part = sums.setdefault(name, [0.0, 0.0, 0.0])
                part[0] += float(mine.any(axis=1).sum()) / len(layers)
                part[1] += float(mine.sum()) / len(layers)
                part[2] += len(np.unique(chosen[mine])) / len(layers)
    return {name: (rows, pairs, experts) for name, (rows, pairs, experts) in sums.items()}
