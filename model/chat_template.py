"""The checkpoint's own chat template, rendered in a sandbox, with what clients write kept from becoming control tokens.

A chat template marks turns with added tokens such as `<｜User｜>`. If a client's text holds those characters and the
rendered prompt is tokenized as a whole, the client has forged a turn. So there are two steps here:

1. Before rendering, every added token spelt out in a message is replaced by a placeholder that only this rendering
   knows, and so is an unfinished one at the very end of a message, which the template's next characters might finish.
   Nothing else changes: the template still sees the rest of the text, its length to a few characters, and its ends.
2. The rendered text is cut at the added tokens, all of which are now the template's own, and the placeholders are put
   back afterwards. The text between is tokenized by a tokenizer that has no added tokens, so what a client wrote can
   only ever become ordinary tokens.

`<think>` and `</think>` stay visible in assistant messages: templates look for them there, to drop old thoughts.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..configs.errors import CheckpointError, RequestError

THINK_OPEN = "<think>"
THINK_CLOSE = "</think>"

MAX_TEMPLATE_OVERHEAD = 1 << 20
"""Characters a template may add to its messages; published ones add dozens a message, so more is a runaway loop."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token matched in text before BPE runs; `lstrip` and `rstrip` make it swallow the whitespace beside it."""

    content: str
    lstrip: bool = False
    rstrip: bool = False


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered prompt: one added token of the template's, or text that holds none."""

    text: str
    is_added_token: bool


class ChatTemplate:
    """A compiled template.

    Args:
        source: the jinja2 text.
        variables: special tokens by the names templates know them under (`bos_token`, `eos_token`).
        added_tokens: every added token of the tokenizer.
        origin: the file the template came from, named in errors.

    Raises:
        CheckpointError: the template is not valid jinja2.
    """

    def __init__(
        self, source: str, *, variables: Mapping[str, str], added_tokens: Iterable[AddedToken], origin: str
    ) -> None:
        # The settings, filter and functions Hugging Face gives its templates; the sandbox bounds range() itself.
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise CheckpointError(
                f"{origin}: the chat template is not valid jinja2 ({error}); download the file again"
            ) from error
        self._variables = dict(variables)
        self._added_tokens = tuple(added_tokens)
        self._cut = _pattern_of(self._added_tokens)
        contents = {token.content for token in self._added_tokens}
        self._hidden_everywhere = _Hider(contents)
        self._hidden_in_answers = _Hider(contents - {THINK_OPEN, THINK_CLOSE})

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> list[Segment]:
        """Render a conversation; the segments' texts concatenated are the prompt.

        Raises:
            RequestError: the template refuses the conversation.
        """
        placeholders = _Placeholders()
        turns = [
            {
                "role": message.role,
                "content": (self._hidden_in_answers if message.role == "assistant" else self._hidden_everywhere).hide(
                    message.content, placeholders
                ),
            }
            for message in messages
        ]
        text = self._run(turns, add_generation_prompt)
        segments = []
        for number, piece in enumerate(self._cut.split(text)):
            # `split` with one group alternates between the text around matches and the matches.
            if piece:
                segments.append(Segment(placeholders.restore(piece), is_added_token=number % 2 == 1))
        return segments

    def _run(self, turns: list[dict[str, str]], add_generation_prompt: bool) -> str:
        limit = MAX_TEMPLATE_OVERHEAD + 2 * sum(len(turn["content"]) for turn in turns)
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(
                messages=turns,
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._variables,
            ):
                pieces.append(piece)
                length += len(piece)
                if length > limit:
                    raise RequestError(
                        f"the chat template wrote more than {limit} characters for {len(turns)} messages"
                    )
        except RequestError:
            raise
        except TemplateError as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        except Exception as error:
            # A template is code from the checkpoint and may fail in any way on roles or contents it does not expect.
            raise RequestError(
                f"the model's chat template failed on these messages: {type(error).__name__}: {error}", param="messages"
            ) from error
        return "".join(pieces)


class _Placeholders:
    """What was hidden in one rendering. The nonce is random, so that nothing a client writes can name a placeholder."""

    def __init__(self) -> None:
        # Digits and private-use characters only: unchanged by upper(), lower(), trim and escaping.
        self._nonce = str(secrets.randbits(64))
        self._literals: list[str] = []
        self._pattern = re.compile(f"\ue000{self._nonce}:(\\d+)\ue001")

    def add(self, literal: str) -> str:
        """The placeholder that stands for `literal` from now on."""
        self._literals.append(literal)
        return f"\ue000{self._nonce}:{len(self._literals) - 1}\ue001"

    def restore(self, text: str) -> str:
        """`text` with every placeholder replaced by what it stands for."""
        if not self._literals:
            return text
        restored = self._pattern.sub(lambda match: self._literals[int(match[1])], text)
        if self._nonce in restored:
            raise RequestError(
                "the model's chat template cut a message in the middle of a control token's text; "
                "remove control tokens from the messages",
                param="messages",
            )
        return restored


class _Hider:
    """Finds added tokens, and an unfinished one at the end, in what a client wrote."""

    def __init__(self, contents: Iterable[str]) -> None:
        contents = frozenset(contents)
        # Possessive (`++`): one placeholder for a run of tokens, without a way back for each of them.
        self._whole = re.compile(f"{_any_of(contents)}++")
        self._prefixes = frozenset(content[:end] for content in contents for end in range(1, len(content)))
        self._longest_prefix = max(map(len, self._prefixes), default=0)

    def hide(self, text: str, placeholders: _Placeholders) -> str:
        """`text` with placeholders for everything that is, or at its end could become, an added token."""
        hidden = self._whole.sub(lambda match: placeholders.add(match[0]), text)
        for length in range(min(self._longest_prefix, len(hidden)), 0, -1):
            if hidden[-length:] in self._prefixes:
                return hidden[:-length] + placeholders.add(hidden[-length:])
        return hidden


def _pattern_of(tokens: Sequence[AddedToken]) -> re.Pattern[str]:
    """A pattern with one group that matches any added token, the longest first, as the tokenizers library does."""
    stripping = [
        # Only from the beginning of a run of whitespace: trying each of its characters would take quadratic time.
        ("(?:(?<!\\s)\\s++)?" if token.lstrip else "") + re.escape(token.content) + ("\\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: len(token.content), reverse=True)
        if token.lstrip or token.rstrip
    ]
    plain = _any_of(frozenset(token.content for token in tokens if not (token.lstrip or token.rstrip)))
    return re.compile(f"({'|'.join([*stripping, plain])})")


def _any_of(words: frozenset[str]) -> str:
    """A pattern that matches the longest of `words`, as a tree: published tokenizers have 800 added tokens with the same
    beginning, and a plain alternation would try each of them wherever a client writes that beginning."""
    if not words:
        return "(?!)"
    rests: dict[str, set[str]] = {}
    for word in words - {""}:
        rests.setdefault(word[0], set()).add(word[1:])
    if not rests:
        return ""
    branches = [re.escape(first) + _any_of(frozenset(rest)) for first, rest in sorted(rests.items())]
    return f"(?:{'|'.join(branches)}){'?' if '' in words else ''}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Templates' `tojson`: unlike jinja2's own it does not escape HTML, which is what models were trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    """Templates' way to refuse a conversation."""
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    """Templates' way to write today's date, in the server's time zone."""
    return datetime.now().astimezone().strftime(format)
