"""One answer as it grows: the engine's tokens in, what the client may see out."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...configs.errors import QueueFullError
from ...model.tokenizer import Tokenizer
from ..messages import TokenLogprobs, TokenOutput
from .http_errors import EngineFailedError
from .text_stream import Detokenizer, ReasoningSplitter, SplitText, StopMatcher


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """One token with its log-probabilities; `text_offset` is where its text begins in the answer, in characters."""

    token_id: int
    text_offset: int
    logprobs: TokenLogprobs


@dataclass(frozen=True, slots=True)
class AnswerDelta:
    """What became certain since the last one. Concatenated, deltas are the answer.

    Attributes:
        reasoning: more of the chain of thought.
        content: more of the answer proper.
        token_ids: every token generated, the end-of-sentence token and those of a stop string included.
        logprobs: as `token_ids`, but without tokens that begin in or after a stop string, which would leak it.
        finish_reason: set in the last delta.
    """

    reasoning: str = ""
    content: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenEntry] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


def joined(first: AnswerDelta, second: AnswerDelta) -> AnswerDelta:
    """Two deltas of one answer that follow each other, as one."""
    return AnswerDelta(
        first.reasoning + second.reasoning,
        first.content + second.content,
        [*first.token_ids, *second.token_ids],
        [*first.logprobs, *second.logprobs],
        second.finish_reason,
    )


class Answer:
    """Turns one request's outputs into deltas; how the engine groups tokens into outputs changes nothing in sum.

    Args:
        tokenizer: the model's.
        stops: stop strings. They apply to the whole text, thoughts included.
        splitter: takes the thought out of the text; None leaves it in, for plain completions.
        wants_logprobs: every token must come with its log-probabilities.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stops: Sequence[str] = (),
        splitter: ReasoningSplitter | None = None,
        wants_logprobs: bool = False,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._splitter = splitter
        self._wants_logprobs = wants_logprobs
        self._offsets: list[int] = []  # where each token's text begins, in characters of the whole text
        self._cached_tokens: int | None = None
        self._decoded = 0  # characters of the whole text so far
        self._released = 0  # of these, how many are known to lie before any stop string
        self._unreported: deque[TokenEntry] = deque()

    @property
    def completion_tokens(self) -> int:
        """Tokens generated and used; those after a stop string in the same output are not."""
        return len(self._offsets)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt that were not computed, because the first router had them."""
        return self._cached_tokens or 0

    @property
    def reasoning_tokens(self) -> int:
        """Tokens of the thought, `<think>` and `</think>` among them where the model wrote them."""
        if self._splitter is None or not self._splitter.has_thought:
            return 0
        if self._splitter.thought_end is None:
            return len(self._offsets)
        return bisect_left(self._offsets, self._splitter.thought_end)

    def feed(self, output: TokenOutput) -> AnswerDelta:
        """Take the engine's next output.

        Raises:
            QueueFullError: the output says that the request was turned away.
            EngineFailedError: the output says that the request failed, or breaks the engine's promises.
        """
        if self._cached_tokens is None:
            self._cached_tokens = output.cached_tokens
        if output.retry_after_s is not None:
            raise QueueFullError(output.error or "the request waited for too long", retry_after_s=output.retry_after_s)
        if output.finish_reason in ("error", "cancelled"):
            raise EngineFailedError(
                output.error or f"the server ended the request: {output.finish_reason}",
                status=503 if output.finish_reason == "cancelled" else 500,
            )
        if self._wants_logprobs and len(output.logprobs or ()) != len(output.token_ids):
            raise EngineFailedError(
                f"the engine sent {len(output.logprobs or ())} log-probabilities for {len(output.token_ids)} tokens"
            )
        token_ids: list[int] = []
        text = ""
        for number, token_id in enumerate(output.token_ids):
            token_ids.append(token_id)
            self._offsets.append(self._decoded)
            if self._wants_logprobs and output.logprobs is not None:
                self._unreported.append(TokenEntry(token_id, self._decoded, output.logprobs[number]))
            text += self._advance(self._detokenizer.feed(token_id))
            if self._matcher.stopped:
                break
        if output.finish_reason is not None and not self._matcher.stopped:
            text += self._advance(self._detokenizer.flush())
        finish_reason: Literal["stop", "length"] | None = None
        if self._matcher.stopped:
            finish_reason = "stop"
        elif output.finish_reason is not None:
            text += self._matcher.flush()
            finish_reason = "length" if output.finish_reason == "length" else "stop"
        self._released += len(text)
        split = self._split(text, last=finish_reason is not None)
        return AnswerDelta(split.reasoning, split.content, token_ids, self._report(finish_reason), finish_reason)

    def _advance(self, text: str) -> str:
        self._decoded += len(text)
        return self._matcher.feed(text)

    def _split(self, text: str, *, last: bool) -> SplitText:
        if self._splitter is None:
            return SplitText(content=text)
        split = self._splitter.feed(text)
        if not last:
            return split
        rest = self._splitter.flush()
        return SplitText(split.reasoning + rest.reasoning, split.content + rest.content)

    def _report(self, finish_reason: str | None) -> list[TokenEntry]:
        """Entries whose text has begun to be visible; at the end all but those of a stop string."""
        everything = finish_reason is not None and not self._matcher.stopped
        ready = []
        while self._unreported and (everything or self._unreported[0].text_offset < self._released):
            ready.append(self._unreported.popleft())
        return ready
