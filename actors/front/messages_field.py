"""The `messages` of a chat request: checked by hand, so that each refusal names the message and the field."""

from __future__ import annotations

from typing import Any, Literal

from ...configs.errors import RequestError
from ...model.chat_template import ChatMessage

_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    # OpenAI's newer name for the same thing; templates know only the old one.
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
}

_IGNORED = frozenset({"annotations", "name", "reasoning", "reasoning_content", "refusal"})
"""What an answer carries beside its text, so that clients can send it back as it came. Published templates drop earlier
thoughts, and none of them shows names."""

_ONLY_EMPTY = frozenset({"audio", "function_call", "tool_calls"})
"""Taken when null or empty, as clients send them back from an answer."""


def parse_messages(value: Any) -> tuple[ChatMessage, ...]:
    """The conversation of a chat request.

    Raises:
        RequestError: it is empty, does not end with something to answer, or a message cannot be rendered.
    """
    if not isinstance(value, list) or not value:
        raise RequestError("messages: must be a list of at least one message", param="messages")
    messages = tuple(_parse_message(message, f"messages[{number}]") for number, message in enumerate(value))
    if messages[-1].role == "assistant":
        raise RequestError(
            f'messages[{len(messages) - 1}].role = "assistant": the last message must be one to '
            "answer, from the user or the system; to have a text continued, send it to /v1/completions",
            param="messages",
        )
    return messages


def _parse_message(message: Any, where: str) -> ChatMessage:
    if not isinstance(message, dict):
        raise RequestError(f"{where}: must be an object with role and content", param=where)
    role = message.get("role")
    if role in ("tool", "function"):
        raise RequestError(f'{where}.role = "{role}": the model is served without tools', param=f"{where}.role")
    if not isinstance(role, str) or role not in _ROLES:
        raise RequestError(
            f"{where}.role = {role!r}: must be one of {', '.join(sorted(_ROLES))}",
            param=f"{where}.role",
        )
    for name, field in message.items():
        if name in ("role", "content") or name in _IGNORED:
            continue
        if name in _ONLY_EMPTY:
            if field in (None, []):
                continue
            raise RequestError(
                f"{where}.{name}: not supported; the model is served without tools", param=f"{where}.{name}"
            )
        raise RequestError(
            f"{where}.{name}: no such field; role and content are supported",
            param=f"{where}.{name}",
            code="unknown_parameter",
        )
    content = message.get("content")
    if content is None and role == "assistant":
        # The answer to a request that ended inside the thought comes back like this.
        content = ""
    return ChatMessage(role=_ROLES[role], content=_text_of(content, f"{where}.content"))


def _text_of(content: Any, where: str) -> str:
    """A message's text: a string, or text parts, which are joined as they are."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: must be a string or a list of text parts", param=where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(
                f"{where}[{number}].type = {kind!r}: not supported; this model reads text parts only", param=where
            )
        if not isinstance(part.get("text"), str):
            raise RequestError(f"{where}[{number}].text: must be a string", param=where)
        texts.append(part["text"])
    return "".join(texts)
