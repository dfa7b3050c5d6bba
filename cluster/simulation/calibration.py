"""From measurements on one machine to the constants of `cpu_costs.py`.

Routers, hosts and links are measured alone (`parts_timing.py`). What a whole server costs beside them (front, proxy, Ray, the
client) is taken from a few runs of one, given as `ServedRun`s: `tests/bench/simulator.py` makes them, and checks the outcome
against other runs. Constants come out of non-negative least squares in which samples count by their relative errors, so that
short steps count as much as long ones.
"""

from __future__ import annotations

import itertools
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from ...configs.deployment import Deployment
from ...configs.errors import ConfigError
from ...kernels.cpu.library import set_threads
from ..assembly import checkpoint_path, compute, router_settings
from ..threads import given_threads, threads_here
from .batches import StepWork
from .cpu_costs import ALONE, Calibration, CpuConstants, CpuCosts, Machine
from .parts_timing import Parts, Sample, layer_samples, link_samples, shared_samples, step_samples


@dataclass(frozen=True, slots=True)
class ServedRun:
    """What a server did in some seconds, and who spent how much CPU time meanwhile.

    Attributes:
        seconds: on the clock.
        routers, hosts: of the server; streams: requests at once.
        prompt, answer: tokens of each request.
        steps: of all routers; tokens: generated; prompts: tokens of prompts that were computed; requests: that ended.
        router_cpu, host_cpu: seconds of all routers, and of all hosts; other_cpu: of everything else, the client included.
    """

    seconds: float
    routers: int
    hosts: int
    streams: int
    prompt: int
    answer: int
    steps: int
    tokens: int
    prompts: int
    requests: int
    router_cpu: float
    host_cpu: float
    other_cpu: float


def fit(samples: Sequence[Sample]) -> tuple[dict[str, float], float]:
    """Constants that explain the samples best, none negative, and the root mean square of the relative errors.

    All sets of constants that are not zero are tried: there are few.

    Raises:
        ConfigError: there are fewer samples than constants.
    """
    names = sorted({name for features, _ in samples for name in features})
    if len(samples) < len(names):
        raise ConfigError(f"{len(samples)} samples for {len(names)} constants: {', '.join(names)}")
    rows = np.array([[features.get(name, 0.0) / seconds for name in names] for features, seconds in samples])
    ones = np.ones(len(samples))
    best, least = np.zeros(len(names)), float(len(samples))
    for size in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), size):
            columns = list(chosen)
            # Columns differ by orders of magnitude: brought to one length, so that none counts as a rounding error.
            lengths = np.linalg.norm(rows[:, columns], axis=0)
            if not lengths.all():
                continue
            solution = np.linalg.lstsq(rows[:, columns] / lengths, ones, rcond=None)[0] / lengths
            missed = float(((rows[:, columns] @ solution - ones) ** 2).sum())
            if (solution >= 0).all() and missed < least:
                best, least = np.zeros(len(names)), missed
                best[columns] = solution
    return dict(zip(names, best.tolist(), strict=True)), float(np.sqrt(least / len(samples)))


def calibrate(deployment: Deployment, idle: ServedRun, runs: Sequence[ServedRun]) -> Calibration:
    """Measure everything for a deployment's model, and fit it.

    Args:
        deployment: of the server that the runs are of.
        idle: a run without requests.
        runs: with requests, of more kinds than one, and of servers with more or fewer hosts.
    """
    routers, computing = deployment.routers, compute(deployment, gpus=0)
    threads = threads_here(given_threads(routers.threads, routers.cpus, computing), routers.replicas)
    set_threads(threads, packed=computing.packed)
    path = checkpoint_path(deployment.model)
    parts = Parts.load(path, computing, lambda config: router_settings(deployment, config))
    alone, missed = _alone(parts)
    constants, missed_served = served_constants(alone, parts, idle, runs)
    return Calibration(constants, machine(deployment.model), missed | missed_served)


def _alone(parts: Parts) -> tuple[CpuConstants, dict[str, float]]:
    """What the parts cost by themselves, and what the fits miss; nothing of the front's side."""
    names = {field.name for field in fields(CpuConstants)} - {"cores", "crowded"}
    cores = float(os.cpu_count() or 1)
    constants = CpuConstants(**dict.fromkeys(names, 0.0), cores=cores, crowded=cores)
    found: dict[str, float] = {}
    for name, samples in (("layer", layer_samples(parts)), ("shared", shared_samples(parts))):
        if samples:
            fitted, found[name] = fit(samples)
            constants = replace(constants, **fitted)
    costs = CpuCosts(constants, page_size=parts.settings.page_size)
    fitted, found["step"] = fit(step_samples(parts, lambda work: _layers_s(costs, parts, work, work.last)))
    constants = replace(constants, **fitted)
    links = link_samples(parts)
    for name, samples in (("router's links", links.router), ("host", links.host)):
        fitted, found[name] = fit(samples)
        constants = replace(constants, **fitted)
    return constants, found


def _layers_s(costs: CpuCosts, parts: Parts, work: StepWork, last: StepWork) -> float:
    """CPU seconds of a router in all layers of a step, of which the last, one with experts, computes something else."""

    def layer(of: StepWork) -> float:
        return costs.router_layer(of.tokens, of.kv_positions, of.kv_rows, of.longest)

    layers, moe = parts.config.num_hidden_layers - 1, len(parts.config.moe_layers) - 1
    above = layer(last) + costs.shared_experts(last.tokens)
    return layers * layer(work) + moe * costs.shared_experts(work.tokens) + above


_STEP = ("step", "step_token", "step_row", "admission")
_LAYER = ("layer", "layer_token", "layer_position", "layer_row", "layer_page", "shared", "shared_token")
_LINKS = ("exchange", "frame", "frame_byte", "choice")
_HOSTS = ("host", "host_expert", "host_pair")
_SERVED = ("step", "step_row", "admission")
"""Of a router: what a front is told for each row, and what a request costs, show in full in a server alone."""


def served_constants(
    alone: CpuConstants, parts: Parts, idle: ServedRun, runs: Sequence[ServedRun]
) -> tuple[CpuConstants, dict[str, float]]:
    """Add what only whole servers show: the front's side, and by how much routers and hosts cost more in them than alone.

    Args:
        alone: constants of the parts by themselves.
        parts: of the model.
        idle, runs: see `calibrate`.

    Returns:
        The constants, and what the fits miss.
    """
    background = (idle.router_cpu + idle.host_cpu + idle.other_cpu) / idle.seconds
    fronts: list[Sample] = []
    routers: list[Sample] = []
    hosts: list[Sample] = []
    several_sizes = len({run.routers + run.hosts for run in runs}) > 1
    for run in runs:
        steps = run.steps
        crowd = run.routers + run.hosts - ALONE if several_sizes else 0
        work = {"front": steps, "front_token": run.tokens, "request": run.requests, "request_token": run.prompts}
        fronts.append((work, run.other_cpu - idle.other_cpu / idle.seconds * run.seconds))
        router_s, host_s = _expected(run, alone, parts)
        router_cpu = (run.router_cpu - idle.router_cpu / idle.seconds * run.seconds) / steps
        host_cpu = (run.host_cpu - idle.host_cpu / idle.seconds * run.seconds) / steps
        served = {"step": 1.0, "step_row": run.tokens / steps, "admission": run.requests / steps}
        routers.append((_times(router_s, crowd) | served, router_cpu))
        moe, top_k = len(parts.config.moe_layers), parts.config.num_experts_per_tok
        pairs = (moe * run.tokens + (moe - 1) * run.prompts) / steps * top_k
        hosts.append((_times(host_s, crowd) | {"host_pair": pairs}, host_cpu))
    front, missed_front = fit(fronts)
    router, missed_router = fit(routers)
    host, missed_host = fit(hosts)
    constants = {name: getattr(alone, name) * router["times"] for name in (*_STEP, *_LAYER, *_LINKS)}
    constants |= {name: getattr(alone, name) * host["times"] for name in _HOSTS}
    for name in _SERVED:
        constants[name] += router[name]
    constants["host_pair"] += host["host_pair"]
    constants |= {"background": background, "wake": _wake(runs, len(parts.config.moe_layers))}
    for name, fitted in (("router_process", router), ("host_process", host)):
        constants[name] = fitted["process"] / fitted["times"] if fitted.get("process") and fitted["times"] else 0.0
    return replace(alone, **constants, **front), {
        "front of a server": missed_front,
        "routers of a server": missed_router,
        "hosts of a server": missed_host,
        "routers of a server, times alone": router["times"],
        "hosts of a server, times alone": host["times"],
    }


def _times(seconds: float, crowd: int) -> dict[str, float]:
    """What parts take alone, as one constant's work, and as another's where so many processes more than `ALONE` are there."""
    return {"times": seconds, "process": seconds * crowd} if crowd else {"times": seconds}


def _wake(runs: Sequence[ServedRun], moe_layers: int) -> float:
    """What is left of a step beside its router and one host, for each of two waits a layer, where least is asked of the cores:
    elsewhere that is also waiting for one, which is simulated."""
    least = min(run.streams for run in runs)
    return statistics.mean(
        max(0.0, run.seconds - run.router_cpu - run.host_cpu / run.hosts) / (2 * moe_layers * run.steps)
        for run in runs
        if run.streams == least
    )


def _expected(run: ServedRun, alone: CpuConstants, parts: Parts) -> tuple[float, float]:
    """CPU seconds of a router, and of all hosts, in a mean step of a run, if they cost what they do alone."""
    config, item = parts.config, parts.compute.dtype.itemsize
    costs = CpuCosts(alone, page_size=parts.settings.page_size)
    moe, top_k, experts = len(config.moe_layers), config.num_experts_per_tok, config.n_routed_experts
    rows, prompts, begun = run.tokens / run.steps, run.prompts / run.steps, run.requests / run.steps
    decoding = max(0.0, rows - begun)
    tokens = decoding + prompts
    context = run.prompt + run.answer / 2
    # The one of several that has come furthest: of n evenly spread over an answer, n / (n + 1) of it.
    longest = run.prompt + run.answer * max(1.0, decoding) / (max(1.0, decoding) + 1)
    read = decoding * context + prompts
    positions = decoding * context + prompts * run.prompt / 2
    sampled = decoding * context + begun * run.prompt
    # Means are no whole numbers, and what is begun in a step far less than one request.
    router_s = alone.step + alone.step_token * tokens + alone.step_row * rows + alone.admission * begun
    work = StepWork(
        tokens=round(tokens),
        decoding=round(decoding),
        sampled=round(rows),
        kv_positions=round(positions),
        kv_rows=round(read),
        longest=round(longest),
        sampled_positions=round(sampled),
        sampled_longest=round(longest),
    )
    # Whether others are spared is a matter of each step, not of the mean: chunks of prompts are long enough for it.
    router_s += _layers_s(costs, parts, work, work.sampled_alone)
    row_bytes = config.hidden_size * item
    host_s = 0.0
    for layers, routed in ((moe - 1, tokens), (1, rows)):
        pairs, sent_rows = routed * top_k, routed * run.hosts * (1 - (1 - 1 / run.hosts) ** top_k)
        there = costs.exchange(round(sent_rows * row_bytes), 0, run.hosts)
        router_s += layers * (there + costs.exchange(0, round(pairs * row_bytes), run.hosts))
        touched = experts * (1 - (1 - top_k / experts) ** routed)
        host_s += layers * run.hosts * costs.host_layer(round(pairs / run.hosts), round(touched / run.hosts))
    return router_s, host_s


def machine(model: str) -> Machine:
    """This one."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return Machine(cpu, os.cpu_count() or 1, platform.python_version(), str(torch.__version__), model)
