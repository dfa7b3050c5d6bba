"""What clients may send: OpenAI's fields that are supported, and a stated refusal for each that is not.

A field that would change the answer is either honoured or refused by name; it is never dropped. Fields that change
nothing (bookkeeping such as `user` and `metadata`) are taken and ignored, whatever they hold.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails, from_json

from ...configs.errors import ContextTooLongError, RequestError
from ...model.chat_template import ChatMessage
from ...model.sampling import SamplingParams
from .messages_field import parse_messages
from .served_model import ServedModel
from .settings import MAX_PROMPTS, MAX_STOP_CHARACTERS, MAX_STOP_STRINGS

MAX_LOGPROBS = 20
"""Most likely tokens reported per position, as in OpenAI's API."""

_IGNORED = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
    }
)
"""Taken whatever they hold: they do not change what the model writes."""

_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "audio": ((), "this model writes text only"),
    "best_of": ((1,), "one answer is generated for each prompt"),
    "echo": ((False,), "prepend the prompt yourself; return_token_ids returns its tokens"),
    "frequency_penalty": ((0,), "penalties are not supported; leave it out or send 0"),
    "function_call": (("none", "auto"), "the model is served without tools"),
    "functions": (([],), "the model is served without tools"),
    "logit_bias": (({},), "biases are not supported; leave it out"),
    "modalities": ((["text"],), "this model writes text only"),
    "moderation": ((), "answers are not moderated here"),
    "n": ((1,), "send the request several times, with different seeds"),
    "prediction": ((), "predicted outputs are not supported"),
    "presence_penalty": ((0,), "penalties are not supported; leave it out or send 0"),
    "reasoning_effort": ((), "the model decides how long it thinks; bound the answer with max_tokens"),
    "response_format": (({"type": "text"},), "constrained output is not supported; ask for the format in a message"),
    "suffix": (("",), "insertion is not supported"),
    "tool_choice": (("none", "auto"), "the model is served without tools"),
    "tools": (([],), "the model is served without tools"),
    "verbosity": (("medium",), "ask for the length in a message"),
    "web_search_options": ((), "the model has no access to the web"),
}
"""Known fields that are not supported: the values that change nothing (null always is one), and what to do instead."""


class StreamOptions(BaseModel):
    """`stream_options`. Obfuscation, padding against observers of chunk sizes, may be asked for and is not done."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(BaseModel):
    """The fields both endpoints share."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    stop: tuple[str, ...] = ()
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> tuple[str, ...]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
            raise RequestError(f"stop = {shown(value)}: must be a string or a list of strings", param="stop")
        if len(stops) > MAX_STOP_STRINGS:
            raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are supported", param="stop")
        if not all(stops):
            raise RequestError(f"stop = {shown(value)}: an empty string would stop before the answer", param="stop")
        if (longest := max(map(len, stops), default=0)) > MAX_STOP_CHARACTERS:
            raise RequestError(
                f"stop has a string of {longest} characters; at most {MAX_STOP_CHARACTERS} are supported", param="stop"
            )
        return tuple(stops)

    @model_validator(mode="after")
    def _agree(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is only allowed with stream = true", param="stream_options")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise RequestError(
                f"max_tokens = {self.max_tokens} and max_completion_tokens = {self.max_completion_tokens} differ; send "
                "one of them",
                param="max_tokens",
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def wanted_logprobs(self) -> int | None:
        """How many most likely tokens to report per position; None reports nothing."""
        raise NotImplementedError

    def sampling(self, model: ServedModel, prompt_tokens: int, *, default_max_tokens: int | None) -> SamplingParams:
        """Sampling for one prompt; what the request leaves open comes from the checkpoint's defaults.

        Args:
            model: the served model.
            prompt_tokens: length of the prompt.
            default_max_tokens: bound of the answer where the request has none; None is whatever is left of the context.

        Raises:
            ContextTooLongError: prompt, or prompt and `max_tokens`, exceed the context.
        """
        left = model.max_context - prompt_tokens
        if left < 1:
            raise ContextTooLongError(
                f"the prompt has {prompt_tokens} tokens, but the context holds {model.max_context} including at "
                "least one token of the answer; shorten the prompt",
                param="messages" if isinstance(self, ChatRequest) else "prompt",
            )
        asked = self.max_completion_tokens if self.max_tokens is None else self.max_tokens
        if asked is not None and asked > left:
            raise ContextTooLongError(
                f"the prompt has {prompt_tokens} tokens and max_tokens is {asked}, together {prompt_tokens + asked}, "
                f"but the context holds {model.max_context}; max_tokens may be up to {left} for this prompt",
                param="max_completion_tokens" if self.max_tokens is None else "max_tokens",
            )
        defaults = model.defaults
        top_k = defaults.top_k if self.top_k is None else max(self.top_k, 0)
        return SamplingParams(
            max_tokens=asked or min(left, default_max_tokens or left),
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_k=min(top_k, model.vocab_size),
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            min_p=defaults.min_p if self.min_p is None else self.min_p,
            # The sampler's noise takes 64 unsigned bits; negative seeds are their two's complement.
            seed=secrets.randbits(63) if self.seed is None else self.seed % (1 << 64),
            logprobs=self.wanted_logprobs(),
            stop_token_ids=() if self.ignore_eos else model.eos_token_ids,
        )


class ChatRequest(GenerationRequest):
    """Body of /v1/chat/completions."""

    messages: tuple[ChatMessage, ...]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("messages", mode="plain")
    @classmethod
    def _conversation(cls, value: Any) -> tuple[ChatMessage, ...]:
        return parse_messages(value)

    @model_validator(mode="after")
    def _logprobs_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(f"top_logprobs = {self.top_logprobs} needs logprobs = true", param="top_logprobs")
        return self

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    """Body of /v1/completions. `prompt` becomes a tuple of prompts, each text or token ids."""

    prompt: tuple[str | list[int], ...]
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompts(cls, value: Any) -> tuple[str | list[int], ...]:
        return _parse_prompts(value)

    def wanted_logprobs(self) -> int | None:
        """See the base class."""
        return self.logprobs


RequestT = TypeVar("RequestT", bound=GenerationRequest)


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """Read and check a request's body.

    Raises:
        RequestError: it is not JSON, or a field is missing, unknown, unsupported or out of range.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the request body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise RequestError(f"the request body is {shown(raw)}; must be a JSON object", code="invalid_json")
    fields = {}
    for name, value in raw.items():
        if name in _IGNORED:
            continue
        if name in _REFUSED and name not in kind.model_fields:
            neutral, instead = _REFUSED[name]
            if value is not None and not any(_same(value, other) for other in neutral):
                raise RequestError(
                    f"{name} = {shown(value)} is not supported: {instead}", param=name, code="unsupported_parameter"
                )
            continue
        fields[name] = value
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise _request_error(error.errors(include_url=False)[0], kind) from None


def shown(value: Any) -> str:
    """A client's value as JSON, cut to a length that fits an error message."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 100 else f"{text[:90]}... ({len(text)} characters)"


def _same(value: Any, neutral: Any) -> bool:
    """Equality that tells 1 from true, which Python does not, but not 0 from 0.0."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _parse_prompts(value: Any) -> tuple[str | list[int], ...]:
    if isinstance(value, str):
        prompts: list[Any] = [value]
    elif isinstance(value, list) and value and all(type(item) is int for item in value):
        prompts = [value]
    elif isinstance(value, list) and value:
        prompts = value
    else:
        raise RequestError(
            f"prompt = {shown(value)}: must be a text, a list of token ids, or a list of these, and not empty",
            param="prompt",
        )
    if len(prompts) > MAX_PROMPTS:
        raise RequestError(f"prompt has {len(prompts)} prompts; at most {MAX_PROMPTS} fit one request", param="prompt")
    for number, prompt in enumerate(prompts):
        where = "prompt" if prompts is not value else f"prompt[{number}]"
        is_ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise RequestError(f"{where} = {shown(prompt)}: must be a text or a list of token ids", param="prompt")
        if not prompt:
            raise RequestError(f"{where} is empty; must hold at least one character or token id", param="prompt")
    return tuple(prompts)


_LIMITS = {
    "greater_than_equal": ("ge", "at least"),
    "greater_than": ("gt", "above"),
    "less_than_equal": ("le", "at most"),
    "less_than": ("lt", "below"),
}

_TYPES = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "an integer",
    "model_type": "an object",
    "string_type": "a string",
}


def _request_error(details: ErrorDetails, kind: type[GenerationRequest]) -> RequestError:
    """Our error for pydantic's first complaint: names the field, the value and what it must be."""
    original = details.get("ctx", {}).get("error")
    if isinstance(original, RequestError):
        return original
    name = ".".join(str(part) for part in details["loc"])
    problem, value = details["type"], shown(details["input"])
    if problem == "missing":
        return RequestError(f"{name} is missing", param=name, code="missing_required_parameter")
    if problem == "extra_forbidden":
        known = ", ".join(sorted(kind.model_fields))
        return RequestError(
            f"{name} = {value}: no such field; supported are {known}", param=name, code="unknown_parameter"
        )
    if problem in _LIMITS:
        key, words = _LIMITS[problem]
        return RequestError(f"{name} = {value}: must be {words} {details['ctx'][key]}", param=name)
    return RequestError(f"{name} = {value}: must be {_TYPES.get(problem, details['msg'])}", param=name)
