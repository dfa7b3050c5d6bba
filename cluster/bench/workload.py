"""What a server is asked: prompts as token ids or as text, how long the answers are to be, and when each request is sent.

Everything follows from a seed and the names of what is measured, so that two servers are asked the same. Prompts of different
rounds and levels have nothing in common but what `shared_prefix` says: a server's prefix cache is of no use to them.
"""

from __future__ import annotations

import itertools
import json
import math
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...configs.errors import ConfigError
from ..simulation.trace import Lengths

PromptForm = Literal["ids", "text"]

FIRST_ID = 100
"""Token ids below it may steer a model: DeepSeek's begin and end are 0 and 1."""

CHARACTERS_PER_TOKEN = 4.0
"""Of text, until a server has said how many tokens it sees in some."""

_SYLLABLES = tuple("".join(pair) for pair in itertools.product(string.ascii_lowercase[::-1], "aeiou"))
_SYLLABLES_OF_WORD = 2
_MOST_TURNS = 3


@dataclass(frozen=True, slots=True)
class Level:
    """How hard the server is asked: by so many clients, each with one request at a time; at a rate; or as a trace says.

    Attributes:
        kind: "concurrency", "rate", or "trace" for the trace's own times.
        value: clients, or requests a second on average at random times; 1 for the trace's own.
    """

    kind: Literal["concurrency", "rate", "trace"]
    value: float

    def __str__(self) -> str:
        if self.kind == "rate":
            return f"{self.value:g} requests/s"
        if self.kind == "trace":
            return "the trace's times"
        return f"{self.value:.0f} stream{'' if self.value == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids or text.
        prompt_tokens: how many, as far as is known before a server has counted them.
        output_tokens: `max_tokens`.
        at: when to send it, in seconds from the start; None as soon as a client is free.
    """

    prompt: list[int] | str
    prompt_tokens: int
    output_tokens: int
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange of a trace: the prompt's text, or only its length, and the length of the answer.

    Attributes:
        prompt: its text, if the trace has it.
        prompt_tokens, output_tokens: lengths in tokens; None where only texts are known.
        output_characters: length of the answer's text, where its tokens are not known.
        arrival_s: when it came; None where the trace does not say.
    """

    prompt: str | None
    prompt_tokens: int | None
    output_tokens: int | None
    output_characters: int | None = None
    arrival_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked.

    Attributes:
        prompt, output: lengths in tokens; unused with a trace.
        trace: exchanges to take prompts and lengths from, in order and from the beginning again.
        shared_prefix: tokens that all prompts of a level and round begin with, beside their own.
        vocab_size: token ids are drawn from `FIRST_ID` to below it.
        seed: of everything that is drawn.
        characters_per_token: of this server's tokenizer, for prompts that are text.
    """

    prompt: Lengths
    output: Lengths
    trace: tuple[Turn, ...] | None
    shared_prefix: int
    vocab_size: int
    seed: int
    characters_per_token: float = CHARACTERS_PER_TOKEN

    def asks(self, form: PromptForm, name: str) -> Iterator[Ask]:
        """Requests without end.

        Args:
            form: of their prompts; those of a trace with texts are text all the same.
            name: of what is measured; another name gives other requests.
        """
        generator = np.random.default_rng([self.seed, *name.encode()])
        if self.has_texts:
            form = "text"
        prefix = self._made_up(form, self.shared_prefix, generator)
        for number in itertools.count():
            own: list[int] | str
            at = None
            if self.trace is None:
                length, output = self.prompt.draw(generator), self.output.draw(generator)
                own = self._made_up(form, length, generator)
            else:
                turn = self.trace[number % len(self.trace)]
                output = turn.output_tokens or self._tokens(turn.output_characters or 0)
                length = turn.prompt_tokens or self._tokens(len(turn.prompt or ""))
                at = turn.arrival_s
                own = turn.prompt or self._made_up(form, length, generator)
            prompt: Any = prefix + own  # type: ignore[operator]  # both are of one form
            yield Ask(prompt, length + self.shared_prefix, max(1, output), at)

    @property
    def has_texts(self) -> bool:
        """Whether its trace has texts, so that all prompts are text."""
        return self.trace is not None and any(turn.prompt is not None for turn in self.trace)

    @property
    def has_times(self) -> bool:
        """Whether its trace says when each request came."""
        return self.trace is not None and self.trace[0].arrival_s is not None

    def arrivals(self, asks: Iterator[Ask], rate: float, name: str) -> Iterator[Ask]:
        """The same requests at random times, so many a second on average."""
        generator = np.random.default_rng([self.seed, 1, *name.encode()])
        at = 0.0
        for ask in asks:
            at += float(generator.exponential(1 / rate))
            yield Ask(ask.prompt, ask.prompt_tokens, ask.output_tokens, at)

    def _made_up(self, form: PromptForm, tokens: int, generator: np.random.Generator) -> list[int] | str:
        if form == "ids":
            ids: list[int] = generator.integers(FIRST_ID, self.vocab_size, size=tokens).tolist()
            return ids
        return made_up_text(tokens, self.characters_per_token, generator)

    def _tokens(self, characters: int) -> int:
        return max(1, round(characters / self.characters_per_token))


def made_up_text(tokens: int, characters_per_token: float, generator: np.random.Generator) -> str:
    """Words that no language has, about as long as so many tokens."""
    wanted = round(tokens * characters_per_token)
    syllables = generator.integers(len(_SYLLABLES), size=wanted // 2 + 1)
    ends = generator.random(len(syllables)) < 1 / _SYLLABLES_OF_WORD
    pieces = (_SYLLABLES[syllable] + (" " if end else "") for syllable, end in zip(syllables, ends, strict=True))
    return "".join(pieces)[:wanted]


def read_trace(path: Path) -> tuple[Turn, ...]:
    """Exchanges of a file: ShareGPT's JSON (a list of conversations), or JSON lines.

    A line is a conversation of the same form; or has "prompt" or "prompt_tokens", and "output_tokens" or "output", and perhaps
    "arrival_s": a trace of `moray simulate` is one. Of a conversation the first question is asked, and its answer's length
    wanted.

    Raises:
        ConfigError: it cannot be read, or holds nothing that is understood; names the line or conversation.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: cannot be read ({error})") from error
    if text.lstrip()[:1] == "[":
        try:
            entries = [(f"conversation {n}", raw) for n, raw in enumerate(json.loads(text), 1)]
        except ValueError as error:
            raise ConfigError(f"--trace {path}: is not JSON ({error})") from error
    else:
        entries = []
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    entries.append((f"line {number}", json.loads(line)))
                except ValueError as error:
                    raise ConfigError(f"--trace {path}, line {number}: is not JSON ({error})") from error
    turns = [turn for where, raw in entries if (turn := _turn(raw, f"--trace {path}, {where}")) is not None]
    if not turns:
        raise ConfigError(f"--trace {path}: holds no exchange of a question and an answer")
    times = [turn.arrival_s for turn in turns if turn.arrival_s is not None]
    if times and (len(times) < len(turns) or times != sorted(times)):
        raise ConfigError(f"--trace {path}: arrival_s must be in every line and in order, or in none")
    return tuple(turns)


def _turn(raw: Any, where: str) -> Turn | None:
    """One exchange; None for a conversation that has no question with an answer."""
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be an object, found {type(raw).__name__}")
    conversation = raw.get("conversations", raw.get("conversation", raw.get("messages")))
    if conversation is not None:
        return _first_exchange(conversation, where)
    prompt, prompt_tokens = raw.get("prompt"), raw.get("prompt_tokens")
    output, output_tokens = raw.get("output"), raw.get("output_tokens")
    if (prompt is None and prompt_tokens is None) or (output is None and output_tokens is None):
        raise ConfigError(
            f"{where}: has {', '.join(raw) or 'nothing'}; needs conversations, or prompt or prompt_tokens, and output or "
            "output_tokens"
        )
    for name, value in (("prompt_tokens", prompt_tokens), ("output_tokens", output_tokens)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ConfigError(f"{where}: {name} = {value!r}: must be a whole number of at least 1")
    for name, value in (("prompt", prompt), ("output", output)):
        if value is not None and (not isinstance(value, str) or not value):
            raise ConfigError(f"{where}: {name} must be a text, and not empty")
    at = raw.get("arrival_s")
    if at is not None and (not isinstance(at, int | float) or isinstance(at, bool) or not 0 <= at < math.inf):
        raise ConfigError(f"{where}: arrival_s = {at!r}: must be a number of at least 0")
    characters = None if output is None else len(output)
    return Turn(prompt, prompt_tokens, output_tokens, characters, None if at is None else float(at))


def _first_exchange(conversation: Any, where: str) -> Turn | None:
    try:
        said: Sequence[tuple[str, str]] = [
            (turn.get("from") or turn["role"], turn.get("value") or turn.get("content") or "") for turn in conversation
        ]
        ((first, question), (_, answer)) = [turn for turn in said[:_MOST_TURNS] if turn[0] != "system"][:2]
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where}: turns must have from and value, or role and content ({error!r})") from error
    except ValueError:
        return None  # fewer than two turns
    if first not in ("human", "user") or not question or not answer:
        return None
    return Turn(question, None, None, len(answer))
