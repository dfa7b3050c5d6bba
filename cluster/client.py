"""`moray status` and `moray chat`: small clients of a running server's HTTP API."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from ..actors.front.settings import load_api_keys
from ..configs.errors import ClusterError
from .run_state import RunState
from .status_text import print_status

_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 600.0


def status(url: str | None, key_file: Path | None, *, as_json: bool) -> int:
    """Print the state of a server; 0 if it is healthy, 1 if not.

    Raises:
        ClusterError: there is no server.
    """
    with _connected(url, key_file, _TIMEOUT_S) as client:
        found = _json(client.get("/v1/moray/status"))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        print_status(found, Console())
    return 0 if found["health"] == "ok" else 1


def chat(
    url: str | None,
    key_file: Path | None,
    *,
    question: str | None,
    temperature: float | None,
    max_tokens: int | None,
) -> int:
    """Ask one question, or read them line by line; thinking is printed dim, the answer plain.

    Raises:
        ClusterError: there is no server, or it refuses.
    """
    console = Console(highlight=False, soft_wrap=True)
    options = {k: v for k, v in (("temperature", temperature), ("max_tokens", max_tokens)) if v is not None}
    with _connected(url, key_file, _ANSWER_TIMEOUT_S) as client:
        model = _json(client.get("/v1/models"))["data"][0]["id"]
        messages: list[dict[str, str]] = []
        for line in [question] if question is not None else _questions(console):
            messages.append({"role": "user", "content": line})
            answer = _ask(client, {"model": model, "messages": messages, "stream": True, **options}, console)
            messages.append({"role": "assistant", "content": answer})
    return 0


def _questions(console: Console) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold]you:[/bold] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line:
            yield line


def _ask(client: httpx.Client, body: dict[str, Any], console: Console) -> str:
    """Stream one answer to the console; returns its content without the thinking."""
    content = ""
    thinking = False
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            _json(response)
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ClusterError(event["error"]["message"])
            for choice in event["choices"]:
                delta = choice["delta"]
                if delta.get("reasoning_content"):
                    thinking = True
                    console.print(Text(delta["reasoning_content"], style="dim"), end="")
                if delta.get("content"):
                    if thinking:
                        console.print("\n")
                        thinking = False
                    console.print(Text(delta["content"]), end="")
                    content += delta["content"]
    console.print()
    return content


@contextlib.contextmanager
def _connected(url: str | None, key_file: Path | None, timeout_s: float) -> Iterator[httpx.Client]:
    """A client of the named server, or of the one on this machine; what goes wrong on the way becomes `ClusterError`."""
    starting = ""
    if url is None:
        alive = [record for record in RunState().records() if record.server.alive]
        if not alive:
            raise ClusterError("no `moray serve` runs on this machine; start one, or name a server with --url")
        url = alive[0].url
        starting = " (it may still be starting)"
        if len(alive) > 1:
            print(f"moray: {len(alive)} servers run here; taking the newest, {url}", file=sys.stderr)
    headers = {} if key_file is None else {"Authorization": f"Bearer {load_api_keys(key_file)[0]}"}
    base = url.rstrip("/").removesuffix("/v1")
    try:
        with httpx.Client(base_url=base, headers=headers, timeout=timeout_s, trust_env=False) as client:
            yield client
    except httpx.ConnectError as error:
        raise ClusterError(f"nothing answers at {url}{starting}: {error}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ClusterError(f"the server at {url} did not answer as expected: {error!r}") from error


def _json(response: httpx.Response) -> Any:
    """The body of a good answer.

    Raises:
        ClusterError: the server answered with an error.
    """
    if response.status_code != 200:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text[:200]
        raise ClusterError(f"{response.url}: {response.status_code}: {message}")
    return response.json()
