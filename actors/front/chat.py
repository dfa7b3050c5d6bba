"""/v1/chat/completions: a conversation becomes one prompt; the thought comes back apart from the content."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from typing import Any

from ...model.tokenizer import ChatPrompt
from ..messages import GenerateRequest
from .answer import Answer, AnswerDelta
from .generation import Generation, Run
from .logprobs import chat_logprobs
from .protocol import ChatRequest
from .served_model import ServedModel
from .sse import AnswerFormat, TextEvent
from .text_stream import ReasoningSplitter


def chat_run(request: ChatRequest, prompt: ChatPrompt, model: ServedModel, answer_id: str) -> Run:
    """The one run of a chat request.

    Raises:
        ContextTooLongError: it does not fit the context.
    """
    sampling = request.sampling(model, len(prompt.token_ids), default_max_tokens=None)
    answer = Answer(
        model.tokenizer,
        stops=request.stop,
        splitter=ReasoningSplitter(opened=prompt.opens_reasoning),
        wants_logprobs=sampling.logprobs is not None,
    )
    return Run(GenerateRequest(answer_id, prompt.token_ids, sampling), answer)


def new_chat_id() -> str:
    """An id no other answer has."""
    return f"chatcmpl-{uuid.uuid4().hex}"


class ChatFormat(AnswerFormat):
    """Chat answers as OpenAI writes them, with DeepSeek's `reasoning_content` beside `content`."""

    def __init__(
        self, request: ChatRequest, prompt: ChatPrompt, model: ServedModel, answer_id: str, created: int
    ) -> None:
        self._request = request
        self._prompt = prompt
        self._tokenizer = model.tokenizer
        self._frame = {"id": answer_id, "created": created, "model": model.name}
        self._plain = request.wanted_logprobs() is None and not request.return_token_ids
        self._reasoning: TextEvent | None = None
        self._content: TextEvent | None = None

    def opening(self) -> Iterable[dict[str, Any]]:
        """The chunk that names the role, with the prompt's tokens if they were asked for."""
        chunk = self._chunk({"role": "assistant", "content": ""})
        if self._request.return_token_ids:
            chunk["prompt_token_ids"] = self._prompt.token_ids
            chunk["choices"][0]["token_ids"] = []
        yield chunk

    def chunks(self, index: int, delta: AnswerDelta) -> Iterable[dict[str, Any]]:
        """At most one chunk of thought and one of content; the last one carries what belongs to the tokens."""
        assert index == 0, "a chat request has one answer"
        texts = [{"reasoning_content": delta.reasoning}] if delta.reasoning else []
        if delta.content:
            texts.append({"content": delta.content})
        carries_more = delta.finish_reason or delta.logprobs or (self._request.return_token_ids and delta.token_ids)
        if not texts and carries_more:
            texts.append({})
        for number, text in enumerate(texts, start=1):
            yield self._chunk(text) if number < len(texts) else self._chunk(text, delta)

    def events(self, index: int, delta: AnswerDelta) -> bytes:
        """See `AnswerFormat.events`."""
        if not self._plain or delta.finish_reason is not None:
            return super().events(index, delta)
        data = b""
        if delta.reasoning:
            if self._reasoning is None:
                self._reasoning = TextEvent(lambda text: self._chunk({"reasoning_content": text}))
            data = self._reasoning(delta.reasoning)
        if delta.content:
            if self._content is None:
                self._content = TextEvent(lambda text: self._chunk({"content": text}))
            data += self._content(delta.content)
        return data

    def closing(self, generation: Generation) -> Iterable[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._request.include_usage:
            yield {**self._frame, "object": "chat.completion.chunk", "choices": [], "usage": _usage(generation)}

    def whole(self, generation: Generation, deltas: list[list[AnswerDelta]]) -> dict[str, Any]:
        """The answer as one object; `reasoning_content` is null where the model did not think."""
        parts = deltas[0]
        choice: dict[str, Any] = {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "".join(part.content for part in parts),
                "reasoning_content": "".join(part.reasoning for part in parts) or None,
                "refusal": None,
            },
            "logprobs": self._logprobs(parts),
            "finish_reason": parts[-1].finish_reason,
        }
        body = {**self._frame, "object": "chat.completion", "choices": [choice], "usage": _usage(generation)}
        if self._request.return_token_ids:
            choice["token_ids"] = [token_id for part in parts for token_id in part.token_ids]
            body["prompt_token_ids"] = self._prompt.token_ids
        return body

    def _chunk(self, text: dict[str, str], delta: AnswerDelta | None = None) -> dict[str, Any]:
        delta = delta or AnswerDelta()
        choice: dict[str, Any] = {
            "index": 0,
            "delta": text,
            "logprobs": self._logprobs([delta]) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = delta.token_ids
        chunk = {**self._frame, "object": "chat.completion.chunk", "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk

    def _logprobs(self, parts: list[AnswerDelta]) -> dict[str, Any] | None:
        top = self._request.wanted_logprobs()
        if top is None:
            return None
        return chat_logprobs(self._tokenizer, [entry for part in parts for entry in part.logprobs], top)


def _usage(generation: Generation) -> dict[str, Any]:
    (run,) = generation.runs
    prompt, completion = len(run.request.prompt_token_ids), run.answer.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": run.answer.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": run.answer.reasoning_tokens},
    }
