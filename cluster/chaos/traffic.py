"""Live traffic with known answers: streams over HTTP, compared token by token with what the calm cluster says."""

from __future__ import annotations

import contextlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import httpx

from ...configs.errors import ClusterError

QUESTIONS: Final = 16
_PROMPT_TOKENS: Final = (1, 90)
_ANSWER_TOKENS: Final = (30, 160)
_TOKEN_IDS: Final = (100, 300)
"""Ids that every vocabulary has."""

SILENCE_S: Final = 180.0
"""A stream that says nothing for so long is lost: three times the default of `restore_timeout_s`."""

_CALM_AT_ONCE: Final = 4
HANG_UP_SHARE: Final = 0.15
"""Of requests whose client goes away in the middle of the answer."""

_REFUSED_PAUSE_S: Final = 0.3
_REFUSED: Final = (429, 503)

GAP_FLOOR_S: Final = 0.02
"""Shorter gaps are not kept: hours of traffic must not fill the memory of who watches it for leaks."""

Outcome = Literal["finished", "cancelled", "altered", "lost", "refused"]


@dataclass(frozen=True, slots=True)
class Question:
    """A request whose answer is determined: greedy where `temperature` is 0, else by its `seed`."""

    prompt: tuple[int, ...]
    max_tokens: int
    temperature: float
    seed: int

    def body(self, model: str) -> dict[str, Any]:
        """The request as the API takes it."""
        return {
            "model": model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
        }


def questions(seed: int, count: int = QUESTIONS) -> tuple[Question, ...]:
    """Questions of a seed: every other one greedy, lengths varied, some with a beginning in common as cached ones have."""
    choice = random.Random(f"moray chaos questions {seed}")
    common = [choice.randrange(*_TOKEN_IDS) for _ in range(_PROMPT_TOKENS[1])]
    found = []
    for number in range(count):
        length = choice.randint(*_PROMPT_TOKENS)
        shared = choice.choice((0, length // 2))
        prompt = (*common[:shared], *(choice.randrange(*_TOKEN_IDS) for _ in range(length - shared)))
        temperature = 0.0 if number % 2 else round(choice.uniform(0.3, 1.2), 2)
        found.append(Question(prompt, choice.randint(*_ANSWER_TOKENS), temperature, choice.randrange(1 << 32)))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request; `token_ids` as far as they came. Not yet compared with anything."""

    outcome: Outcome
    token_ids: list[int]
    detail: str = ""


def ask(
    client: httpx.Client,
    body: Mapping[str, Any],
    *,
    arrived: Callable[[int], None] = lambda _: None,
    hang_up_after: int | None = None,
) -> Answer:
    """Send one streaming request and read its answer.

    Args:
        arrived: called with the number of new tokens whenever some have come.
        hang_up_after: close the connection in the middle of the answer once so many tokens have come.
    """
    token_ids: list[int] = []
    try:
        with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                detail = f"{response.status_code}: {response.text[:200]}"
                return Answer("refused" if response.status_code in _REFUSED else "lost", token_ids, detail)
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    return Answer("finished", token_ids)
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Answer("lost", token_ids, event["error"]["message"])
                new = event["choices"][0]["token_ids"]
                token_ids += new
                arrived(len(new))
                if hang_up_after is not None and len(token_ids) >= hang_up_after:
                    return Answer("cancelled", token_ids)
    except (httpx.HTTPError, httpx.StreamError) as error:
        return Answer("lost", token_ids, f"{type(error).__name__}: {error}")
    return Answer("lost", token_ids, "the stream ended without an end")


def judged(answer: Answer, expected: Sequence[int]) -> Answer:
    """The answer as `altered` if it is not the expected one, or not its beginning where it is not whole."""
    if answer.outcome == "refused":
        return answer
    given = answer.token_ids
    if answer.outcome == "finished" and given == list(expected):
        return answer
    if answer.outcome != "finished" and given == list(expected[: len(given)]):
        return answer
    pairs = enumerate(zip(given, expected, strict=False))
    at = next((i for i, (found, wanted) in pairs if found != wanted), min(len(given), len(expected)))
    return Answer("altered", given, f"{len(given)} tokens of {len(expected)} came, and they differ from token {at} on")


def undisturbed(client: httpx.Client, model: str, asked: Sequence[Question]) -> dict[Question, list[int]]:
    """The answers of a cluster at rest, each asked for twice, in another order and company the second time.

    Raises:
        ClusterError: one was not answered, or answered in two ways: then nothing can be compared with it.
    """

    def answers(order: Sequence[Question]) -> dict[Question, Answer]:
        with ThreadPoolExecutor(_CALM_AT_ONCE) as pool:
            return dict(zip(order, pool.map(lambda question: ask(client, question.body(model)), order), strict=True))

    first, second = answers(asked), answers(asked[::-1])
    for question in asked:
        for answer in (first[question], second[question]):
            if answer.outcome != "finished" or len(answer.token_ids) != question.max_tokens:
                raise ClusterError(f"the calm cluster does not answer: {answer.detail or answer.outcome}")
        if first[question].token_ids != second[question].token_ids:
            raise ClusterError("the calm cluster gives two answers to one question: there is nothing to compare with")
    return {question: first[question].token_ids for question in asked}


@dataclass(slots=True)
class _Stream:
    """One thread of requests. `gaps` has (when it began, when it ended) of every longer gap between two tokens."""

    gaps: list[tuple[float, float]] = field(default_factory=list)
    last: float | None = None
    tokens: int = 0

    def arrived(self, count: int) -> None:
        now = time.monotonic()
        self.tokens += count
        if self.last is not None and now - self.last >= GAP_FLOOR_S:
            self.gaps.append((self.last, now))
        self.last = now


class Traffic:
    """Concurrent streams that go on until `stop`, each asking one question after another.

    Args:
        make_client: makes the HTTP client of one stream.
        model: what to ask.
        answers: the questions, and what must be answered.
        streams: how many.
        seed: of who asks what, and who hangs up when.
        hang_up_share: of requests that are given up midway.

    Attributes:
        failures: altered and lost requests, in words.
    """

    def __init__(
        self,
        make_client: Callable[[], httpx.Client],
        model: str,
        answers: Mapping[Question, Sequence[int]],
        *,
        streams: int,
        seed: int,
        hang_up_share: float = HANG_UP_SHARE,
    ) -> None:
        self._make_client = make_client
        self._model = model
        self._answers = answers
        self._questions = list(answers)
        self._seed = seed
        self._hang_up_share = hang_up_share
        self._streams = [_Stream() for _ in range(streams)]
        self._threads: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._counts: dict[Outcome, int] = dict.fromkeys(("finished", "cancelled", "altered", "lost", "refused"), 0)
        self.failures: list[str] = []

    @property
    def counts(self) -> dict[Outcome, int]:
        """Requests by what became of them, so far."""
        with self._lock:
            return dict(self._counts)

    @property
    def tokens(self) -> int:
        """Tokens that have come, over all streams, so far."""
        return sum(stream.tokens for stream in self._streams)

    def start(self) -> None:
        """Begin."""
        for index in range(len(self._streams)):
            thread = threading.Thread(target=self._run, args=(index,), name=f"moray-stream-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float) -> bool:
        """Ask nothing more and wait for what is under way; False if some of it has not ended by then."""
        self._stopping.set()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def longest_gap(self, since: float, until: float) -> float:
        """The longest gap between two tokens of one stream that has anything of [since, until] in it, in seconds."""
        longest = 0.0
        for stream in self._streams:
            for began, ended in reversed(stream.gaps):
                if ended < since:
                    break
                if began <= until:
                    longest = max(longest, ended - began)
            last = stream.last
            if last is not None and last <= until:
                longest = max(longest, time.monotonic() - last)
        return longest

    def _run(self, index: int) -> None:
        choice = random.Random(f"moray chaos stream {self._seed} {index}")
        with self._make_client() as client:
            while not self._stopping.is_set():
                question = choice.choice(self._questions)
                hangs_up = choice.random() < self._hang_up_share
                after = choice.randint(1, max(1, question.max_tokens - 1))
                self._ask(client, index, question, after if hangs_up else None)

    def _ask(self, client: httpx.Client, index: int, question: Question, hang_up_after: int | None) -> None:
        stream = self._streams[index]
        answer = ask(client, question.body(self._model), arrived=stream.arrived, hang_up_after=hang_up_after)
        stream.last = None
        answer = judged(answer, self._answers[question])
        with self._lock:
            self._counts[answer.outcome] += 1
            if answer.outcome in ("altered", "lost"):
                self.failures.append(f"stream {index}: {answer.outcome}: {answer.detail}")
        if answer.outcome == "refused":
            self._stopping.wait(_REFUSED_PAUSE_S)


@contextlib.contextmanager
def running(traffic: Traffic, *, end_s: float = SILENCE_S) -> Iterator[Traffic]:
    """The traffic, started; stopped at the end, where streams that do not end are lost.

    Raises:
        ClusterError: some have not ended.
    """
    traffic.start()
    try:
        yield traffic
    except BaseException:
        traffic.stop(0.0)  # interrupted: nobody waits for the answers
        raise
    if not traffic.stop(end_s):
        raise ClusterError(f"streams have not ended {end_s:.0f} s after the last was asked")
