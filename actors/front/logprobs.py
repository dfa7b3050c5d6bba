"""Log-probabilities in OpenAI's two formats: `content[]` of chat, and the parallel lists of plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...model.tokenizer import Tokenizer
from .answer import TokenEntry

FLOOR = -9999.0
"""Stands for minus infinity, which JSON has no word for; OpenAI uses the same number."""


def chat_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a chat answer: one entry per token, the thought's among them."""

    def one(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": _text(data, prefix=""), "logprob": max(logprob, FLOOR), "bytes": list(data)}

    content = []
    for entry in entries:
        most_likely = zip(entry.logprobs.top_ids[:top], entry.logprobs.top_logprobs, strict=False)
        content.append(
            one(entry.token_id, entry.logprobs.logprob)
            | {"top_logprobs": [one(token_id, logprob) for token_id, logprob in most_likely]}
        )
    return {"content": content, "refusal": None}


def completion_logprobs(tokenizer: Tokenizer, entries: Sequence[TokenEntry], top: int) -> dict[str, Any]:
    """`choices[].logprobs` of a plain completion. `top_logprobs` holds the chosen token too, as OpenAI's does."""

    def name(token_id: int) -> str:
        return _text(tokenizer.token_bytes(token_id), prefix="bytes:")

    top_logprobs = []
    for entry in entries:
        chances = {
            name(token_id): max(logprob, FLOOR)
            for token_id, logprob in zip(entry.logprobs.top_ids[:top], entry.logprobs.top_logprobs, strict=False)
        }
        chances.setdefault(name(entry.token_id), max(entry.logprobs.logprob, FLOOR))
        top_logprobs.append(chances)
    return {
        "tokens": [name(entry.token_id) for entry in entries],
        "token_logprobs": [max(entry.logprobs.logprob, FLOOR) for entry in entries],
        "top_logprobs": top_logprobs,
        "text_offset": [entry.text_offset for entry in entries],
    }


def _text(data: bytes, *, prefix: str) -> str:
    """A token as text; part of a character is written as its bytes in hexadecimal."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in data)
