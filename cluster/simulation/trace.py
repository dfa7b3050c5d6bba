"""What is asked of a cluster: when requests come, and how long their prompts and answers are."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...configs.errors import ConfigError
from ..argument_types import LENGTHS_WRITTEN

_P95 = 1.6448536269514722
"""The normal distribution's 95th percentile, in standard deviations."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request.

    Attributes:
        at: when it comes, in seconds from the start.
        prompt: tokens of its prompt; output: tokens that are generated.
        cached: tokens of the prompt whose KV pages come with it: they take room and are attended to, but nobody computes them.
        prefix: number of the prefix that its prompt begins with; None if it shares nothing.
        prefix_tokens: length of that prefix.
    """

    at: float
    prompt: int
    output: int
    cached: int = 0
    prefix: int | None = None
    prefix_tokens: int = 0


class Lengths(Protocol):
    """How long prompts, or answers, are."""

    def draw(self, generator: np.random.Generator) -> int:
        """The next one: at least 1."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """All alike."""

    tokens: int

    def draw(self, generator: np.random.Generator) -> int:  # noqa: ARG002
        """See `Lengths`."""
        return self.tokens

    def __str__(self) -> str:
        return str(self.tokens)


@dataclass(frozen=True, slots=True)
class Even:
    """From `least` to `most`, each as often as any other."""

    least: int
    most: int

    def draw(self, generator: np.random.Generator) -> int:
        """See `Lengths`."""
        return int(generator.integers(self.least, self.most + 1))

    def __str__(self) -> str:
        return f"{self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Half of them below `median`, 19 of 20 below `p95`."""

    median: float
    p95: float

    def draw(self, generator: np.random.Generator) -> int:
        """See `Lengths`."""
        sigma = math.log(self.p95 / self.median) / _P95
        return max(1, round(self.median * math.exp(sigma * generator.standard_normal())))

    def __str__(self) -> str:
        return f"lognormal, median {self.median:g}, p95 {self.p95:g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Drawn from lengths that were measured."""

    tokens: tuple[int, ...]

    def draw(self, generator: np.random.Generator) -> int:
        """See `Lengths`."""
        return self.tokens[int(generator.integers(len(self.tokens)))]

    def __str__(self) -> str:
        return f"{len(self.tokens)} measured ones, mean {sum(self.tokens) / len(self.tokens):.0f}"


def parse_lengths(text: str) -> Lengths:
    """Lengths as `LENGTHS_WRITTEN` says: 1024, 64-256, lognormal:MEDIAN:P95, or file:PATH.

    Raises:
        ConfigError: it is not written so, or the file cannot be read.
    """
    kind, _, rest = text.partition(":")
    if kind == "file":
        return _measured(rest)
    if kind == "lognormal":
        return _log_normal(text, rest)
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text, re.ASCII)
    if found is None:
        raise ConfigError(f"{text!r}: must be tokens: {LENGTHS_WRITTEN}")
    least, most = int(found[1]), int(found[2] or found[1])
    if not 1 <= least <= most:
        raise ConfigError(f"{text!r}: must be at least 1, and end where it begins or later")
    return Fixed(least) if found[2] is None else Even(least, most)


def _log_normal(text: str, rest: str) -> LogNormal:
    try:
        median, p95 = map(float, rest.split(":"))
    except ValueError:
        raise ConfigError(f"{text!r}: must be tokens: {LENGTHS_WRITTEN}") from None
    if not 1 <= median < p95 < math.inf:
        raise ConfigError(f"{text!r}: the median must be at least 1, and below the 95th percentile")
    return LogNormal(median, p95)


def _measured(path: str) -> Measured:
    wrong = f"{path}: must hold a number of at least 1 on each line, and at least one line"
    try:
        numbers = tuple(map(int, Path(path).read_text(encoding="utf-8").split()))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from error
    except ValueError:
        raise ConfigError(wrong) from None
    if not numbers or min(numbers) < 1:
        raise ConfigError(wrong)
    return Measured(numbers)


class Trace(Protocol):
    """Where requests come from."""

    @property
    def endless(self) -> bool:
        """Whether requests go on coming for ever."""
        ...

    def arrivals(self) -> Iterator[Arrival]:
        """Those that come whatever happens, in the order of their times; perhaps without end."""
        ...

    def next_of_client(self, at: float) -> Arrival | None:
        """What a client sends whose request ended at this time; None if none is waiting for that."""
        ...

    def shared_by(self, twins: int) -> Trace:
        """What is left of it for one of so many equal parts of a cluster.

        Raises:
            ConfigError: it cannot be divided so.
        """
        ...


@dataclass(frozen=True, slots=True)
class Prefixes:
    """What prompts have in common: each begins with one of `count` texts, chosen evenly.

    Attributes:
        count: how many there are.
        tokens: of each; a shorter prompt is all prefix but its last token.
    """

    count: int
    tokens: int


class _Drawn:
    """Requests of drawn lengths."""

    def __init__(self, prompt: Lengths, output: Lengths, *, seed: int, cached: int, prefixes: Prefixes | None) -> None:
        self.prompt, self.output, self.seed, self.cached, self.prefixes = prompt, output, seed, cached, prefixes
        self._generator = np.random.default_rng([seed, 1])

    def _request(self, at: float) -> Arrival:
        prompt, output = self.prompt.draw(self._generator), self.output.draw(self._generator)
        cached = min(self.cached, prompt - 1)
        if self.prefixes is None:
            return Arrival(at, prompt, output, cached)
        prefix = int(self._generator.integers(self.prefixes.count))
        return Arrival(at, prompt, output, cached, prefix, min(self.prefixes.tokens, prompt - 1))


class Poisson(_Drawn):
    """Requests at a rate, independently of each other and of what becomes of them.

    Args:
        rate: a second.
        prompt, output: lengths.
        seed: of the times and lengths.
        cached: see `Arrival`; all of a shorter prompt but its last token.
        prefixes: what prompts have in common.
    """

    def __init__(
        self,
        rate: float,
        prompt: Lengths,
        output: Lengths,
        *,
        seed: int = 0,
        cached: int = 0,
        prefixes: Prefixes | None = None,
    ) -> None:
        super().__init__(prompt, output, seed=seed, cached=cached, prefixes=prefixes)
        self.rate = rate

    @property
    def endless(self) -> bool:
        """See `Trace`."""
        return True

    def arrivals(self) -> Iterator[Arrival]:
        """See `Trace`."""
        at = 0.0
        while True:
            at += float(self._generator.exponential(1 / self.rate))
            yield self._request(at)

    def next_of_client(self, at: float) -> Arrival | None:  # noqa: ARG002
        """See `Trace`."""
        return None

    def shared_by(self, twins: int) -> Trace:
        """See `Trace`."""
        return Poisson(
            self.rate / twins,
            self.prompt,
            self.output,
            seed=self.seed,
            cached=self.cached,
            prefixes=self.prefixes,
        )

    def __str__(self) -> str:
        return f"{self.rate:g} requests a second, prompts of {self.prompt}, answers of {self.output} tokens"


class Closed(_Drawn):
    """Clients that send their next request as soon as the last one has ended.

    Args:
        clients: how many; their first requests come at the same moment.
        prompt, output, seed, cached, prefixes: see `Poisson`.
        requests: in all; None for no end.
    """

    def __init__(
        self,
        clients: int,
        prompt: Lengths,
        output: Lengths,
        *,
        seed: int = 0,
        cached: int = 0,
        requests: int | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        super().__init__(prompt, output, seed=seed, cached=cached, prefixes=prefixes)
        self.clients, self.requests = clients, requests
        self._sent = 0
        self._left = math.inf if requests is None else requests

    @property
    def endless(self) -> bool:
        """See `Trace`."""
        return self.requests is None

    def arrivals(self) -> Iterator[Arrival]:
        """See `Trace`."""
        while self._left > 0 and self._sent < self.clients:
            self._sent += 1
            self._left -= 1
            yield self._request(0.0)

    def next_of_client(self, at: float) -> Arrival | None:
        """See `Trace`."""
        if self._left <= 0:
            return None
        self._left -= 1
        return self._request(at)

    def shared_by(self, twins: int) -> Trace:
        """See `Trace`."""
        requests = None if self.requests is None else -(-self.requests // twins)
        if self.clients % twins:
            raise ConfigError(
                f"{self.clients} clients cannot be divided among {twins} equal parts of the cluster; use a multiple of {twins}"
            )
        return Closed(
            self.clients // twins,
            self.prompt,
            self.output,
            seed=self.seed,
            cached=self.cached,
            requests=requests,
            prefixes=self.prefixes,
        )

    def __str__(self) -> str:
        return f"{self.clients} clients, prompts of {self.prompt}, answers of {self.output} tokens"


class Listed:
    """Requests one by one, in the order of their times.

    Raises:
        ConfigError: there are none, or they are not in order.
    """

    def __init__(self, requests: Iterable[Arrival], *, source: str = "trace") -> None:
        self.requests: Sequence[Arrival] = tuple(requests)
        self.source = source
        if not self.requests:
            raise ConfigError(f"{source}: holds no request")
        for before, after in itertools.pairwise(self.requests):
            if after.at < before.at:
                raise ConfigError(
                    f"{source}: a request at {after.at:g} s comes after one at {before.at:g} s; sort them"
                )

    @property
    def endless(self) -> bool:
        """See `Trace`."""
        return False

    def arrivals(self) -> Iterator[Arrival]:
        """See `Trace`."""
        return iter(self.requests)

    def next_of_client(self, at: float) -> Arrival | None:  # noqa: ARG002
        """See `Trace`."""
        return None

    def shared_by(self, twins: int) -> Trace:
        """See `Trace`."""
        return Listed(self.requests[::twins], source=self.source)

    def __str__(self) -> str:
        return f"{len(self.requests)} requests of {self.source}"


_FIELDS = {"arrival_s": float, "prompt_tokens": int, "output_tokens": int}


def read_trace(path: Path) -> Listed:
    """A file with one request a line, such as {"arrival_s": 0.25, "prompt_tokens": 812, "output_tokens": 300}.

    "prefix" (a number) and "prefix_tokens" may be there as well: requests of one number share so many tokens.

    Raises:
        ConfigError: it cannot be read, or says something that is not understood; names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--trace {path}: cannot be read ({error})") from error
    return Listed(
        (_arrival(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()),
        source=str(path),
    )


def _arrival(line: str, where: str) -> Arrival:
    try:
        raw: Any = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: is not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: must be an object with {', '.join(_FIELDS)}, found {type(raw).__name__}")
    unknown = raw.keys() - _FIELDS.keys() - {"prefix", "prefix_tokens"}
    missing = _FIELDS.keys() - raw.keys()
    if unknown or missing:
        problem = f"no {', '.join(sorted(missing))}" if missing else f"no such field: {', '.join(sorted(unknown))}"
        raise ConfigError(f"{where}: {problem}; a request has {', '.join(_FIELDS)}, and perhaps prefix, prefix_tokens")
    for field, least in (("arrival_s", 0), ("prompt_tokens", 1), ("output_tokens", 1), ("prefix_tokens", 0)):
        value = raw.get(field, least)
        kinds = (int, float) if field == "arrival_s" else (int,)
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value < math.inf:
            raise ConfigError(f"{where}: {field} = {value!r}: must be a number of at least {least}")
    prefix = raw.get("prefix")
    if prefix is not None and (not isinstance(prefix, int) or isinstance(prefix, bool) or prefix < 0):
        raise ConfigError(f"{where}: prefix = {prefix!r}: must be a whole number of at least 0")
    return Arrival(
        float(raw["arrival_s"]),
        raw["prompt_tokens"],
        raw["output_tokens"],
        prefix=prefix,
        prefix_tokens=min(raw.get("prefix_tokens", 0), raw["prompt_tokens"] - 1),
    )
