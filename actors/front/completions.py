"""/v1/completions: prompts as text or token ids are continued as they are, each into a choice of its own."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from ...configs.errors import RequestError
from ..messages import GenerateRequest
from .answer import Answer, AnswerDelta
from .generation import Generation, Run
from .logprobs import completion_logprobs
from .protocol import CompletionRequest
from .served_model import ServedModel
from .sse import AnswerFormat, TextEvent


def prompt_token_ids(prompt: str | list[int], model: ServedModel) -> list[int]:
    """A prompt's tokens. Text is raw: special tokens spelt out in it count as such, unlike in chat messages.

    Raises:
        RequestError: an id is not in the vocabulary.
    """
    if isinstance(prompt, str):
        return model.tokenizer.encode(prompt)
    if not 0 <= min(prompt) <= max(prompt) < model.vocab_size:
        bad = next(token_id for token_id in prompt if not 0 <= token_id < model.vocab_size)
        raise RequestError(
            f"prompt has the token id {bad}, but the model's ids are 0 to {model.vocab_size - 1}", param="prompt"
        )
    return prompt


def completion_runs(
    request: CompletionRequest,
    prompts: Sequence[list[int]],
    model: ServedModel,
    answer_id: str,
    *,
    default_max_tokens: int | None,
) -> list[Run]:
    """One run per prompt.

    Raises:
        ContextTooLongError: one of them does not fit the context.
    """
    runs = []
    for number, prompt in enumerate(prompts):
        sampling = request.sampling(model, len(prompt), default_max_tokens=default_max_tokens)
        answer = Answer(model.tokenizer, stops=request.stop, wants_logprobs=sampling.logprobs is not None)
        runs.append(Run(GenerateRequest(f"{answer_id}-{number}", prompt, sampling), answer))
    return runs


def new_completion_id() -> str:
    """An id no other answer has."""
    return f"cmpl-{uuid.uuid4().hex}"


class CompletionFormat(AnswerFormat):
    """Plain completions as OpenAI writes them."""

    def __init__(
        self,
        request: CompletionRequest,
        prompts: Sequence[list[int]],
        model: ServedModel,
        answer_id: str,
        created: int,
    ) -> None:
        self._request = request
        self._prompts = prompts
        self._tokenizer = model.tokenizer
        self._frame = {"id": answer_id, "object": "text_completion", "created": created, "model": model.name}
        self._opened: set[int] = set()
        self._plain = request.wanted_logprobs() is None and not request.return_token_ids
        self._texts: dict[int, TextEvent] = {}

    def opening(self) -> Iterable[dict[str, Any]]:
        """Nothing: there is no role to name."""
        return ()

    def chunks(self, index: int, delta: AnswerDelta) -> Iterable[dict[str, Any]]:
        """One chunk, unless there is nothing to say yet."""
        wants_ids = bool(self._request.return_token_ids)
        if not (delta.content or delta.finish_reason or delta.logprobs or (wants_ids and delta.token_ids)):
            return
        choice = self._choice(index, [delta])
        if self._request.wanted_logprobs() is not None and not delta.logprobs:
            choice["logprobs"] = None
        if wants_ids and index not in self._opened:
            choice["prompt_token_ids"] = self._prompts[index]
        self._opened.add(index)
        yield self._chunk(choice)

    def events(self, index: int, delta: AnswerDelta) -> bytes:
        """See `AnswerFormat.events`."""
        if not self._plain or delta.finish_reason is not None:
            return super().events(index, delta)
        if not delta.content:
            return b""
        write = self._texts.get(index)
        if write is None:
            write = TextEvent(lambda text: self._chunk(self._choice(index, [AnswerDelta(content=text)])))
            self._texts[index] = write
        return write(delta.content)

    def closing(self, generation: Generation) -> Iterable[dict[str, Any]]:
        """The usage, if it was asked for."""
        if self._request.include_usage:
            yield {**self._frame, "choices": [], "usage": _usage(generation)}

    def whole(self, generation: Generation, deltas: list[list[AnswerDelta]]) -> dict[str, Any]:
        """All choices as one object."""
        choices = [self._choice(index, parts) for index, parts in enumerate(deltas)]
        if self._request.return_token_ids:
            for choice, prompt in zip(choices, self._prompts, strict=True):
                choice["prompt_token_ids"] = prompt
        return {**self._frame, "choices": choices, "usage": _usage(generation)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        chunk = {**self._frame, "choices": [choice]}
        if self._request.include_usage:
            chunk["usage"] = None
        return chunk

    def _choice(self, index: int, parts: list[AnswerDelta]) -> dict[str, Any]:
        top = self._request.wanted_logprobs()
        entries = [entry for part in parts for entry in part.logprobs]
        choice: dict[str, Any] = {
            "index": index,
            "text": "".join(part.content for part in parts),
            "logprobs": None if top is None else completion_logprobs(self._tokenizer, entries, top),
            "finish_reason": parts[-1].finish_reason,
        }
        if self._request.return_token_ids:
            choice["token_ids"] = [token_id for part in parts for token_id in part.token_ids]
        return choice


def _usage(generation: Generation) -> dict[str, Any]:
    prompt = sum(len(run.request.prompt_token_ids) for run in generation.runs)
    completion = sum(run.answer.completion_tokens for run in generation.runs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(run.answer.cached_tokens for run in generation.runs)},
    }
