"""Clients that keep asking a cluster, and compare every token with what local mode says."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import httpx

from moray import LLM

from .hosts import Host

_ANSWER_S = 120.0
"""Longest silence of a stream."""

_PAUSE_S = 0.5
"""Between two questions of one client: what else runs here has two cores, too."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and how to sample: greedily, or with noise of this seed."""

    prompt: tuple[int, ...]
    seed: int | None
    max_tokens: int

    @property
    def sampling(self) -> dict[str, float | int]:
        """As the API and local mode both call it."""
        if self.seed is None:
            return {"temperature": 0.0}
        return {"temperature": 1.0, "top_p": 1.0, "seed": self.seed}

    def expected(self, llm: LLM) -> list[int]:
        """What local mode answers."""
        answers = llm.generate([list(self.prompt)], max_tokens=self.max_tokens, ignore_eos=True, **self.sampling)  # type: ignore[arg-type]
        return answers[0].token_ids

    def ask(self, client: httpx.Client, heard: Callable[[int], None] = lambda _: None) -> list[int]:
        """What the server streams; `heard` is told how many tokens there are so far.

        Raises:
            AssertionError: it refused, or the stream ended in an error.
        """
        body = {
            "model": "tiny-r1",
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            **self.sampling,
        }
        found: list[int] = []
        with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    found += event["choices"][0]["token_ids"]
                    heard(len(found))
        return found


def questions(count: int, max_tokens: int) -> list[Question]:
    """Different ones, every other one with noise."""
    return [
        Question(tuple(100 + (7 * i + j) % 200 for j in range(20 + 9 * i)), 41 + i if i % 2 else None, max_tokens)
        for i in range(count)
    ]


class Traffic:
    """Streams that run one after the other, one client for each question, as long as the context lasts.

    Args:
        url: of the server.
        host: machine that the clients are on.
        asked: what they ask, each another question every time.
        expected: the right answers.

    Attributes:
        right: how many were.
        wrong: answers that were not what they must be, and streams that failed.
    """

    def __init__(self, url: str, host: Host, asked: Sequence[Question], expected: Sequence[list[int]]) -> None:
        self.right = 0
        self.wrong: list[str] = []
        self._url = url
        self._host = host
        self._asked = list(zip(asked, expected, strict=True))
        self._stopping = threading.Event()
        self._lock = threading.Lock()  # guards `right` and `wrong`
        self._running = ExitStack()

    def __enter__(self) -> Self:
        threads = self._running.enter_context(self._host.threads(len(self._asked)))
        self._running.callback(self._stopping.set)
        for index in range(len(self._asked)):
            threads.submit(self._keep_asking, index)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.close()

    def _keep_asking(self, first: int) -> None:
        with httpx.Client(base_url=self._url, timeout=_ANSWER_S, trust_env=False) as client:
            for question, expected in itertools.islice(itertools.cycle(self._asked), first, None):
                try:
                    found = question.ask(client)
                except Exception as error:  # whatever it is: the test is told
                    verdict = f"{question}: {error!r}"
                else:
                    verdict = "" if found == expected else f"{question}: {found} where {expected} belongs"
                with self._lock:
                    if verdict:
                        self.wrong.append(verdict)
                    else:
                        self.right += 1
                if self._stopping.wait(_PAUSE_S):
                    return


class Streams:
    """Streams that begin at once, with a look at how far they are; waits for them at the end of the context.

    Args:
        url: of the server.
        host: machine that the clients are on.
        asked: what they ask.
    """

    def __init__(self, url: str, host: Host, asked: Sequence[Question]) -> None:
        self._url = url
        self._host = host
        self._asked = list(asked)
        self._tokens = [0] * len(self._asked)
        self._running = ExitStack()
        self._answers: list[Future[list[int]]] = []

    def __enter__(self) -> Self:
        threads = self._running.enter_context(self._host.threads(len(self._asked)))
        self._answers = [threads.submit(self._ask, index) for index in range(len(self._asked))]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._running.close()

    def tokens(self) -> list[int]:
        """How many each has had so far."""
        return list(self._tokens)

    def answers(self, *, within_s: float) -> list[list[int]]:
        """What each said; raises what went wrong."""
        deadline = time.monotonic() + within_s
        return [answer.result(max(0.0, deadline - time.monotonic())) for answer in self._answers]

    def _ask(self, index: int) -> list[int]:
        def heard(tokens: int) -> None:
            self._tokens[index] = tokens

        with httpx.Client(base_url=self._url, timeout=_ANSWER_S, trust_env=False) as client:
            return self._asked[index].ask(client, heard)
