"""The engine in small pieces, for tests of Moray and of whatever runs on top of it: hosts and routers built by hand."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..model.compute import Compute
from ..model.config import ModelConfig
from ..model.loading import Drafts, load_dense, open_model
from ..model.weights import router_weights
from .deadline import Deadline
from .expert_dispatch import ExpertDispatch
from .expert_host import ExpertHost
from .links import Link, LinkKind, dial
from .messages import GenerateRequest, TokenLogprobs, TokenOutput
from .native_exchange import native_exchange
from .placement_table import PlacementTable
from .router import Router, RouterSettings

SECRET = b"the secret of the engine's tests"

SETTINGS = RouterSettings(
    page_size=8, pages=128, max_context=128, token_budget=64, max_running=16, max_waiting=64, restore_timeout_s=20.0
)
"""Limits that the small models of `model/testing.py` fit into, with pages for eight whole contexts."""


@dataclass
class Recorder:
    """A sink that keeps everything, and knows what a sink must never see.

    Attributes:
        outputs: by request, in order.
        calls: number of calls, which is one a step.
    """

    outputs: dict[str, list[TokenOutput]] = field(default_factory=dict)
    calls: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def __call__(self, batch: list[TokenOutput]) -> None:
        """Take one step's outputs."""
        assert batch, "a step without outputs for a front sends it nothing"
        assert len({output.request_id for output in batch}) == len(batch), "a request has one output a step"
        with self._changed:
            self.calls += 1
            for output in batch:
                earlier = self.outputs.setdefault(output.request_id, [])
                assert not earlier or earlier[-1].finish_reason is None, f"{output.request_id} had ended already"
                earlier.append(output)
            self._changed.notify_all()

    def __hash__(self) -> int:
        return id(self)

    def tokens(self, request_id: str) -> list[int]:
        """What a request produced so far."""
        return [token for output in self.outputs.get(request_id, []) for token in output.token_ids]

    def logprobs(self, request_id: str) -> list[TokenLogprobs]:
        """The log-probabilities that came with them."""
        return [entry for output in self.outputs.get(request_id, []) for entry in output.logprobs or []]

    def end(self, request_id: str) -> TokenOutput | None:
        """The request's last output, once it has ended."""
        last = self.outputs.get(request_id, [TokenOutput(request_id)])[-1]
        return None if last.finish_reason is None else last

    def wait(self, *request_ids: str, tokens: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until all have ended, or have `tokens` tokens; raises TimeoutError with what is still missing."""

        def missing() -> list[str]:
            return [r for r in request_ids if not self.end(r) and (tokens is None or len(self.tokens(r)) < tokens)]

        with self._changed:
            if not self._changed.wait_for(lambda: not missing(), timeout_s):
                raise TimeoutError(f"{missing()} went on after {timeout_s} s")


class EngineParts:
    """A checkpoint read once, and routers and expert hosts made of it. `close` ends all of them.

    Args:
        checkpoint: a directory, e.g. of `write_random_checkpoint`.
        dtype: what everything computes in, on the CPU, unless `compute` says otherwise.
        drafts: whether the MTP layer is read; whether it drafts, the settings of each router say.
    """

    def __init__(
        self,
        checkpoint: Path,
        dtype: torch.dtype = torch.float32,
        *,
        compute: Compute | None = None,
        drafts: Drafts = "off",
    ) -> None:
        self.checkpoint = checkpoint
        self.compute = compute or Compute.on_cpu(dtype)
        self.config, opened = open_model(checkpoint, verify="headers", drafts=drafts)
        dense, _ = load_dense(opened, self.config)
        self.weights = router_weights(self.config, dense, self.compute)
        self.opened: list[Router | ExpertHost] = []

    def table(self, hosts: int, *, replicas: int = 1, epoch: int = 1) -> PlacementTable:
        """Expert e on host e mod `hosts`, and on the `replicas` - 1 hosts after it."""
        experts = range(self.config.n_routed_experts)
        return PlacementTable(
            epoch=epoch,
            first_layer=self.config.first_k_dense_replace,
            experts=len(experts),
            slots={
                f"expert-host-{h}": tuple(
                    tuple(e for e in experts if (h - e) % hosts < replicas) for _ in self.config.moe_layers
                )
                for h in range(hosts)
            },
        )

    def host(self, host_id: str, table: PlacementTable) -> ExpertHost:
        """A loaded host."""
        host = ExpertHost(host_id, compute=self.compute)
        host.load(self.checkpoint, table.slots[host_id], epoch=table.epoch)
        self.opened.append(host)
        return host

    def link(self, host: ExpertHost, kind: LinkKind, router_id: str = "router-0") -> Link:
        """A new link to a host of this process, of any kind."""
        if kind == "inline":
            return host.inline_link(router_id)
        address = host.listen(kind, bind_host="127.0.0.1", secret=SECRET)
        return dial(address, secret=SECRET, identity=router_id, deadline=Deadline.after(30.0))

    def router(
        self,
        table: PlacementTable,
        links: Mapping[str, Link],
        settings: RouterSettings = SETTINGS,
        *,
        router_id: str = "router-0",
        reply_timeout_s: float = 30.0,
    ) -> Router:
        """A router that has not been started."""
        exchange = native_exchange() if self.compute.packed else None
        dispatch = ExpertDispatch(table, links, reply_timeout_s=reply_timeout_s, exchange=exchange)
        router = Router(router_id, self.config, self.weights, dispatch, settings, compute=self.compute)
        self.opened.append(router)
        return router

    def engine(
        self,
        hosts: int = 1,
        kind: LinkKind = "inline",
        settings: RouterSettings = SETTINGS,
        *,
        replicas: int = 1,
        reply_timeout_s: float = 30.0,
    ) -> Router:
        """A router linked to `hosts` hosts of this process."""
        table = self.table(hosts, replicas=replicas)
        links = {host_id: self.link(self.host(host_id, table), kind) for host_id in table.slots}
        return self.router(table, links, settings, reply_timeout_s=reply_timeout_s)

    def close(self) -> None:
        """Stop everything that was made; routers first."""
        for part in sorted(self.opened, key=lambda part: isinstance(part, ExpertHost)):
            part.stop()
        self.opened.clear()


def run(router: Router, requests: Sequence[GenerateRequest], *, max_steps: int = 10_000) -> Recorder:
    """Step a router that has no thread until every request has ended, looking at its pages after every step."""
    recorder = Recorder()
    for request in requests:
        router.submit(request, recorder)
    for _ in range(max_steps):
        if not router.busy:
            break
        router.step()
        router.pool.check()
    assert not router.busy, f"not done after {max_steps} steps"
    assert router.pool.in_use == 0, "pages must be given back at the end"
    return recorder


def random_prompt(config: ModelConfig, seed: int, length: int) -> list[int]:
    """Token ids that depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    prompt: list[int] = torch.randint(0, config.vocab_size, (length,), generator=generator).tolist()
    return prompt
