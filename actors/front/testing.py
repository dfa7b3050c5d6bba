"""A scripted engine and a toy tokenizer: for tests, and for anyone who wants the API without a model behind it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import tokenizers

from ..engine_client import EngineClient
from ..messages import ClusterStatus, GenerateRequest, RouterStats, TokenLogprobs, TokenOutput


@dataclass(frozen=True, slots=True)
class Pause:
    """A step of a script: go on once the event is set."""

    event: asyncio.Event


Step = list[int] | Pause | TokenOutput | Exception
"""What one step does: yield tokens, wait, yield an output as it is (its request id is replaced), or raise."""


@dataclass
class ScriptedEngine(EngineClient):
    """Plays a script for every request.

    A script that ends without a `finish_reason` ends with "stop". Token steps obey the request: they stop with "length"
    at `max_tokens` and with "stop" at one of its stop ids, and carry log-probabilities if asked.

    Attributes:
        script: the steps for a request; called once for each.
        state: what `status` answers; an exception is raised instead.
        requests: every request, in order of arrival.
        finished: ids of requests whose script ended by itself.
        cancelled: ids of requests that were closed early.
    """

    script: Callable[[GenerateRequest], Sequence[Step]]
    state: ClusterStatus | Exception = field(
        default_factory=lambda: ClusterStatus("scripted", 1, "ok", "", [], [RouterStats("router-0")])
    )
    requests: list[GenerateRequest] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        """See `EngineClient`."""
        self.requests.append(request)
        try:
            async for output in self._play(request):
                if output.finish_reason is not None:
                    # Noted first: whoever takes the last output need not come back for the end of the iteration.
                    self.finished.append(request.request_id)
                yield output
        finally:
            if request.request_id not in self.finished:
                self.cancelled.append(request.request_id)

    async def _play(self, request: GenerateRequest) -> AsyncGenerator[TokenOutput]:
        generated = 0
        for step in self.script(request):
            # Even a step that does not wait lets others run, as a real engine's would.
            await asyncio.sleep(0)
            if isinstance(step, Pause):
                await step.event.wait()
            elif isinstance(step, Exception):
                self.finished.append(request.request_id)
                raise step
            elif isinstance(step, TokenOutput):
                yield replace(step, request_id=request.request_id)
                if step.finish_reason is not None:
                    return
            else:
                output = _obeying(request, step, generated)
                generated += len(output.token_ids)
                yield output
                if output.finish_reason is not None:
                    return
        yield TokenOutput(request.request_id, [], [] if request.sampling.logprobs is not None else None, "stop")

    async def status(self) -> ClusterStatus:
        """See `EngineClient`."""
        if isinstance(self.state, Exception):
            raise self.state
        return self.state


def made_up_logprobs(token_id: int, top: int) -> TokenLogprobs:
    """Log-probabilities a scripted engine reports: the chosen token first, then the ids after it, ever less likely."""
    return TokenLogprobs(-0.5, [token_id + n for n in range(top)], [-0.5 - n for n in range(top)])


def _obeying(request: GenerateRequest, tokens: Sequence[int], generated: int) -> TokenOutput:
    """One output with as many of the tokens as the request allows."""
    sampling = request.sampling
    kept: list[int] = []
    reason = None
    for token_id in tokens:
        kept.append(token_id)
        if token_id in sampling.stop_token_ids:
            reason = "stop"
        elif generated + len(kept) >= sampling.max_tokens:
            reason = "length"
        if reason is not None:
            break
    logprobs = (
        None if sampling.logprobs is None else [made_up_logprobs(token_id, sampling.logprobs) for token_id in kept]
    )
    return TokenOutput(
        request.request_id, kept, logprobs, "length" if reason == "length" else "stop" if reason else None
    )


R1_CHAT_TEMPLATE = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(system_prompt='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system_prompt = message['content'] %}{%- endif %}{%- endfor -%}
{{ bos_token }}{{ ns.system_prompt }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' %}{% set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{%- endif %}
{%- endfor -%}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""
"""DeepSeek-R1's template without its tools: opens the thought for the model."""


def write_toy_tokenizer(directory: Path, *, chat_template: str | None = R1_CHAT_TEMPLATE) -> None:
    """Write a byte-level BPE with DeepSeek's added tokens: 256 bytes, a few merges, published file layout."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=specials,
    )
    library.train_from_iterator(
        ["the answer to the question is that the sum is seven hundred and ten", "你好"], trainer
    )
    library.add_tokens(
        [
            tokenizers.AddedToken(name, special=False, normalized=False)
            for name in ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
        ]
    )
    library.save(str(directory / "tokenizer.json"))
    config: dict[str, object] = {
        "add_bos_token": True,
        "bos_token": {"__type": "AddedToken", "content": specials[0]},
        "eos_token": specials[1],
        "pad_token": specials[2],
    }
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
