"""A web server in this process that answers as Hugging Face's hub does, and fails in the ways a test asks for."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

COMMIT = "c0ffee" + 34 * "0"
OTHER_COMMIT = "decaf0" + 34 * "0"
REPO = "org/tiny"

UNIT = 16 << 10
"""Connections are cut after some of it; several blocks of a stream, for which `is_the_hub` takes smaller ones."""


class HubServer:
    """Serves `files` as the model `REPO` at `/{REPO}/resolve/{commit}/NAME`, and as a plain folder at `/files/NAME`.

    Attributes:
        files: content by name; may be changed.
        sent: bytes of content sent, by name.
        requests: "METHOD path" of every request, in order.
        cut_after: for a name, after how many bytes of each of the next answers the connection is cut.
        damaged: names of which a byte is wrong in every answer.
        refused: status to answer with, by name.
        ranges: whether ranges are given; else the whole file, always.
        hold: while cleared, files of at least `hold_bytes` stop half-way until it is set or the server closes.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.main = COMMIT
        self.sent: Counter[str] = Counter()
        self.requests: list[str] = []
        self.cut_after: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.refused: dict[str, int] = {}
        self.ranges = True
        self.hold = threading.Event()
        self.hold.set()
        self.hold_bytes = UNIT
        self.holding = threading.Semaphore(0)
        self._server = _Server(("127.0.0.1", 0), lambda *a: _Handler(self, *a))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=lambda: self._server.serve_forever(0.02), daemon=True)

    def count(self, method: str, name: str) -> int:
        """How often a file was asked for."""
        return sum(r.startswith(method + " ") and r.endswith("/" + name) for r in self.requests)

    def model_info(self, commit: str) -> dict[str, Any]:
        """What the hub's API says of the model."""
        siblings: list[dict[str, Any]] = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(content).hexdigest()
                sibling["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            siblings.append(sibling)
        return {
            "id": REPO,
            "sha": commit,
            "siblings": siblings,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
        }

    def is_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have huggingface_hub ask this server in this process, where tests otherwise keep it from asking anybody."""
        monkeypatch.setattr("moray.model.fetching.hub._BLOCK_BYTES", UNIT // 8)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    @contextmanager
    def running(self) -> Iterator[HubServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self.hold.set()
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, hub: HubServer, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            known = {"main": self.hub.main, COMMIT: COMMIT, OTHER_COMMIT: OTHER_COMMIT}
            revision = parts[5] if len(parts) > 5 else "main"
            if "/".join(parts[2:4]) != REPO or revision not in known:
                self._send(404, b'{"error": "Repository not found"}', body=body)
            else:
                self._send(200, json.dumps(self.hub.model_info(known[revision])).encode(), body=body)
            return
        name = parts[-1]
        of_hub = "/".join(parts[:2]) == REPO and parts[2] == "resolve" and parts[3] in (COMMIT, OTHER_COMMIT)
        content = self.hub.files.get(name) if of_hub or parts[0] == "files" else None
        if name in self.hub.refused:
            self._send(self.hub.refused[name], b"refused", body=body)
        elif content is None:
            self._send(404, b"Entry not found", body=body)
        else:
            self._file(name, content, body=body)

    def _send(self, status: int, content: bytes, *, body: bool) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def _file(self, name: str, content: bytes, *, body: bool) -> None:
        whole, start = content, 0
        etag = hashlib.md5(whole).hexdigest()
        if name in self.hub.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        end = len(content)
        asked = self.headers.get("Range")
        if asked and self.hub.ranges:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1, len(whole)) if last else len(whole)
        part = content[start:end]
        self.send_response(206 if asked and self.hub.ranges else 200)
        if asked and self.hub.ranges:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(whole)}")
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Accept-Ranges", "bytes" if self.hub.ranges else "none")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if not body:
            return
        cuts = self.hub.cut_after.get(name)
        cut = cuts.pop(0) if cuts else None
        if len(part) >= self.hub.hold_bytes and not self.hub.hold.is_set():
            self._write(name, part[: len(part) // 2])
            self.hub.holding.release()
            self.hub.hold.wait(60)
            part = part[len(part) // 2 :]
        self._write(name, part if cut is None else part[:cut])
        if cut is not None:
            self.close_connection = True

    def _write(self, name: str, content: bytes) -> None:
        try:
            self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        else:
            self.hub.sent[name] += len(content)


def random_bytes(count: int, seed: int) -> bytes:
    """The same ones every time."""
    return hashlib.shake_128(b"%d" % seed).digest(count)


def small_model(shard_bytes: int = 3 * UNIT) -> dict[str, bytes]:
    """Files of a published model: what is needed, and what is not."""
    shards = {f"model-0000{i}-of-00002.safetensors": random_bytes(shard_bytes + i, i) for i in (1, 2)}
    weight_map = {f"tensor{i}": name for i, name in enumerate(shards)}
    return {
        ".gitattributes": b"*.safetensors filter=lfs",
        "README.md": b"# a model",
        "config.json": b'{"hidden_size": 4}',
        "generation_config.json": b"{}",
        "tokenizer.json": b'{"tokenizer": true}',
        "tokenizer_config.json": b"{}",
        "model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
        **shards,
        "consolidated.safetensors": b"another layout",
        "pytorch_model.bin": b"a pickle",
        "figures/benchmark.jpg": b"an image",
    }


METADATA = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "model.safetensors.index.json",
}
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
