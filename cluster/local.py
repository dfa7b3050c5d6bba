"""Local mode: the whole cluster in one process, its parts joined by inline links, without Ray.

The same classes as on a cluster do the work, so what a script or a test sees here is what a cluster answers, bit for bit.
This is what running with Ray in local mode used to mean; Ray has removed that mode.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Self

import torch

from ..actors.expert_dispatch import ExpertDispatch
from ..actors.expert_host import ExpertHost
from ..actors.front.answer import Answer as GrowingAnswer
from ..actors.front.text_stream import ReasoningSplitter
from ..actors.messages import ClusterStatus, GenerateRequest, ProcessStatus, TokenOutput
from ..actors.router import Router
from ..configs.deployment import EMBEDDED_MODEL, Deployment
from ..configs.errors import RequestError
from ..kernels.cpu.library import set_threads
from ..model.compute import instructions_used, use_instructions
from ..model.loading import load_dense, open_model
from ..model.progress import Progress, default_progress
from ..model.reader import BytesRead
from ..model.sampling import SamplingParams
from ..model.tokenizer import ChatMessage
from ..model.weights import router_weights
from .assembly import (
    checkpoint_path,
    compute,
    drafts,
    host_compute,
    pinned,
    router_name,
    router_settings,
    served_model,
)
from .placement import first_placement
from .threads import given_threads, threads_here

_THOUGHT_TAIL = 16
"""Tokens at the end of a prompt in which an opened thought is looked for: the tag and the newlines after it."""


class LocalCluster:
    """Expert hosts and one router in this process. `router.start()` gives it a thread; else call `router.step()`."""

    def __init__(self, deployment: Deployment, *, progress: Progress | None = None) -> None:
        progress = progress or default_progress()
        self.deployment = deployment = pinned(deployment)
        path = checkpoint_path(deployment.model, weights_dir=deployment.weights_dir, progress=progress)
        gpus = torch.cuda.device_count()
        self.config, checkpoint = open_model(
            path, verify=deployment.verify, drafts=drafts(deployment, gpus=gpus), progress=progress
        )
        settings = router_settings(deployment, self.config)
        self.model = served_model(deployment, self.config)
        computing = compute(deployment, gpus=gpus)
        routers = deployment.routers
        set_threads(threads_here(given_threads(routers.threads, routers.cpus, computing), 1), packed=computing.packed)
        use_instructions(computing)
        self._computing = {router_name(0): computing}
        self.table = first_placement(self.config, deployment.experts)
        self.hosts: list[ExpertHost] = []
        self._bytes_read: dict[str, BytesRead] = {}
        links = {}
        for host_id, slots in self.table.slots.items():
            host = ExpertHost(host_id, compute=host_compute(deployment, host_id, gpus=gpus))
            use_instructions(host.compute)
            self._computing[host_id] = host.compute
            self._bytes_read[host_id] = host.load(path, slots, epoch=self.table.epoch, progress=progress)
            links[host_id] = host.inline_link(router_name(0))
            self.hosts.append(host)
        dense, self._bytes_read[router_name(0)] = load_dense(checkpoint, self.config, progress=progress)
        dispatch = ExpertDispatch(self.table, links, reply_timeout_s=deployment.experts.reply_timeout_s)
        weights = router_weights(self.config, dense, computing)
        self.router = Router(router_name(0), self.config, weights, dispatch, settings, compute=computing)

    def status(self) -> ClusterStatus:
        """The state of everything; see `ClusterStatus`."""
        stats = self.router.stats()
        healthy = stats.unreachable_experts == 0
        node = os.uname().nodename
        return ClusterStatus(
            model=self.model.name,
            epoch=self.table.epoch,
            health="ok" if healthy else "unavailable",
            reason="" if healthy else "; ".join(stats.broken_links),
            processes=[
                ProcessStatus(
                    id=name,
                    role="router" if name == self.router.router_id else "expert_host",
                    pid=os.getpid(),
                    node=node,
                    state="ready",
                    data_bytes_read=read.data,
                    header_bytes_read=read.headers,
                    instructions=instructions_used(self._computing[name]),
                )
                for name, read in self._bytes_read.items()
            ],
            routers=[stats],
        )

    def close(self) -> None:
        """Stop everything. Idempotent."""
        self.router.stop()
        for host in self.hosts:
            host.stop()


@dataclass(frozen=True, slots=True)
class Answer:
    """One prompt's continuation.

    Attributes:
        text: what follows the thinking (everything, for a model or prompt without any).
        reasoning: the chain of thought, or None where there is none.
        token_ids: all generated tokens, those of the reasoning and the end token included.
        finish_reason: "stop" or "length".
    """

    text: str
    reasoning: str | None
    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class LLM:
    """A model in this process: `LLM("tiny-r1").generate(["What is 2 + 3?"], temperature=0)[0].text`.

    Args:
        model: a checkpoint directory, a URL to fetch it from, or `tiny-r1`; see `Deployment`.
        experts: number of expert hosts to spread the experts over; any number gives the same answers.
        deployment: every other setting, as keyword arguments of `Deployment`. `cpu_instructions` holds for the whole process:
            a model that is made later in it changes what all of them compute with.

    Raises:
        ConfigError, CheckpointError: a setting or the checkpoint cannot be used.
    """

    def __init__(
        self, model: str | os.PathLike[str] = EMBEDDED_MODEL, *, experts: int = 1, **deployment: object
    ) -> None:
        description = {"model": os.fspath(model), "experts": {"hosts": experts}, **deployment}
        asked = Deployment.from_dict(description, source="LLM")
        # The prompts of a call wait for each other for as long as it takes.
        patient = asked.routers.model_copy(update={"max_wait_s": None})
        self.cluster = LocalCluster(asked.model_copy(update={"routers": patient}))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[str] | Sequence[list[int]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
        chat: bool | None = None,
    ) -> list[Answer]:
        """Continue all prompts together; returns one answer each, in order.

        Args:
            prompts: texts or lists of token ids.
            max_tokens: most tokens of each answer; by default what is left of the context.
            temperature, top_p, top_k, min_p: see `SamplingParams`; by default the checkpoint's own recommendation.
            seed: the same seed gives the same answers.
            ignore_eos: go on after an end token, up to `max_tokens`.
            chat: put texts through the chat template, as one user message each (the default for texts where the model has
                a template); lists of token ids are taken as they are.

        Raises:
            RequestError: a prompt or a setting cannot be served.
            EngineFailedError: a request failed.
        """
        if isinstance(prompts, str):
            raise RequestError("prompts is one text: give a list of prompts", param="prompts")
        model = self.cluster.model
        requests: list[GenerateRequest] = []
        outputs: dict[str, list[TokenOutput]] = {}
        opened: dict[str, bool] = {}
        for prompt in prompts:
            ids, opens_reasoning = self._token_ids(prompt, chat)
            left = model.max_context - len(ids)
            sampling = SamplingParams(
                max_tokens=max(1, left) if max_tokens is None else max_tokens,
                temperature=model.defaults.temperature if temperature is None else temperature,
                top_p=model.defaults.top_p if top_p is None else top_p,
                top_k=model.defaults.top_k if top_k is None else top_k,
                min_p=model.defaults.min_p if min_p is None else min_p,
                seed=seed,
                stop_token_ids=() if ignore_eos else model.eos_token_ids,
            )
            requests.append(GenerateRequest(f"local-{next(self._ids)}", ids, sampling))
            opened[requests[-1].request_id] = opens_reasoning
        self._run(requests, outputs)
        return [self._answer(outputs[r.request_id], opened[r.request_id]) for r in requests]

    def _run(self, requests: list[GenerateRequest], outputs: dict[str, list[TokenOutput]]) -> None:
        """Step the router until every request has ended; `outputs` gets what each produced."""
        router = self.cluster.router

        def sink(batch: list[TokenOutput]) -> None:
            for output in batch:
                outputs.setdefault(output.request_id, []).append(output)

        waiting = iter(requests)
        pending: GenerateRequest | None = next(waiting, None)
        try:
            while pending is not None or router.busy:
                # Hand over what the queue takes now and the rest as it drains.
                while pending is not None and router.has_room:
                    router.submit(pending, sink)
                    pending = next(waiting, None)
                router.step()
        except BaseException:
            for request in requests:
                router.cancel(request.request_id)
            router.step()
            raise

    def _token_ids(self, prompt: str | list[int], chat: bool | None) -> tuple[list[int], bool]:
        """The prompt as token ids, and whether it ends inside a thought."""
        tokenizer = self.cluster.model.tokenizer
        if not isinstance(prompt, str):
            end = tokenizer.decode(prompt[-_THOUGHT_TAIL:], skip_special_tokens=False)
            return list(prompt), end.rstrip().endswith("<think>")
        if chat is None:
            chat = tokenizer.has_chat_template
        if chat:
            rendered = tokenizer.apply_chat_template([ChatMessage("user", prompt)])
            return rendered.token_ids, rendered.opens_reasoning
        return tokenizer.encode(prompt), False

    def _answer(self, outputs: list[TokenOutput], opens_reasoning: bool) -> Answer:
        growing = GrowingAnswer(self.cluster.model.tokenizer, splitter=ReasoningSplitter(opened=opens_reasoning))
        deltas = [growing.feed(output) for output in outputs]
        reason = deltas[-1].finish_reason
        assert reason is not None, "the router ends every request"
        reasoning = "".join(delta.reasoning for delta in deltas)
        return Answer(
            text="".join(delta.content for delta in deltas),
            reasoning=reasoning or None,
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=reason,
        )

    def close(self) -> None:
        """Free everything. Idempotent."""
        self.cluster.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
