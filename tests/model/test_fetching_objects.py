"""Models fetched from folders: in a store that fsspec imitates, and on a web server."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from moray.configs.errors import ConfigError, FetchError
from moray.configs.model_url import ModelUrl
from moray.model.fetching import objects, transfer
from moray.model.fetching.fetch import Fetched, fetch, pin
from moray.model.progress import NoProgress

from .hub_server import METADATA, SHARDS, UNIT, HubServer, small_model

IN_MEMORY = ModelUrl.parse("memory://bucket/tiny")


@pytest.fixture
def files() -> dict[str, bytes]:
    return {name: content for name, content in small_model().items() if "/" not in name}


@pytest.fixture
def store(files: dict[str, bytes]) -> Iterator[Any]:
    found = fsspec.filesystem("memory")
    for name, content in files.items():
        found.pipe_file(f"{IN_MEMORY.address}/{name}", content)
    try:
        yield found
    finally:
        found.rm("/bucket", recursive=True)


@pytest.fixture
def web(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(objects, "BLOCK_BYTES", UNIT)
    with HubServer(files).running() as server:
        yield server


def fetched(url: ModelUrl, models: Path) -> Fetched:
    return fetch(url, models, progress=NoProgress())


def names_in(path: Path) -> set[str]:
    return {p.name for p in path.iterdir() if p.is_file()}


def sums(files: dict[str, bytes]) -> bytes:
    lines = [f"{hashlib.sha256(content).hexdigest()}  {name}\n" for name, content in files.items()]
    return "".join(lines).encode()


def assert_whole(result: Fetched, files: dict[str, bytes]) -> None:
    assert names_in(result.path) == METADATA | set(SHARDS)
    assert all((result.path / name).read_bytes() == files[name] for name in names_in(result.path))


# ---- a store -------------------------------------------------------------------------------------------------------------


def test_without_checksums_sizes_are_checked_and_that_is_said(
    store: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    result = fetched(IN_MEMORY, tmp_path)
    assert_whole(result, files)
    assert result.checked == {"size": 7}
    assert result.url.is_pinned
    assert fetched(result.url, tmp_path).transferred == 0


def test_a_list_of_checksums_is_held(store: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    listed = {name: content for name, content in files.items() if name != "config.json"}
    store.pipe_file(f"{IN_MEMORY.address}/SHA256SUMS", sums(listed))
    result = fetched(IN_MEMORY, tmp_path)
    assert_whole(result, files)
    assert result.checked == {"sha256": 6, "size": 1}
    store.pipe_file(f"{IN_MEMORY.address}/{SHARDS[1]}", bytes(len(files[SHARDS[1]])))
    with pytest.raises(FetchError, match=f"{SHARDS[1]} is damaged where it comes from"):
        fetched(IN_MEMORY, tmp_path / "again")
    store.pipe_file(f"{IN_MEMORY.address}/SHA256SUMS", b"no sums")
    with pytest.raises(FetchError, match="SHA256SUMS is not what `sha256sum"):
        fetched(IN_MEMORY, tmp_path / "again")


def test_a_folder_that_changed_is_refused_by_whoever_was_told_what_it_was(store: Any, tmp_path: Path) -> None:
    then = pin(IN_MEMORY)
    assert pin(IN_MEMORY) == then
    store.pipe_file(f"{IN_MEMORY.address}/config.json", b'{"hidden_size": 8}')
    assert pin(IN_MEMORY) != then
    with pytest.raises(FetchError, match=f"has changed: its fingerprint was {then.version}"):
        fetched(then, tmp_path)
    assert fetched(IN_MEMORY, tmp_path).url != then


def test_a_shared_folder_is_brought_to_a_local_disk(files: dict[str, bytes], tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    for name, content in files.items():
        (shared / name).write_bytes(content)
    result = fetched(ModelUrl.parse(f"file://{shared}"), tmp_path / "local")
    assert_whole(result, files)
    assert tmp_path / "local" in result.path.parents


def test_the_checksums_of_googles_storage_are_held(
    store: Any, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Google(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
        """Lists an MD5 of each object, as gcsfs does."""

        protocol = "gs"
        damaged = ""

        def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
            found = super().ls(path.replace("gs://", "memory://"), detail=True)
            for entry in found:
                name = entry["name"].rsplit("/", 1)[-1]
                md5 = hashlib.md5(b"" if name == self.damaged else store.cat_file(entry["name"])).digest()
                entry["md5Hash"] = base64.b64encode(md5).decode()
            return found

        def open(self, path: str, *arguments: Any, **options: Any) -> Any:
            return super().open(path.replace("gs://", "memory://"), *arguments, **options)

    monkeypatch.setattr(objects, "_file_system", lambda url: Google())
    url = ModelUrl.parse("gs://bucket/tiny")
    assert fetched(url, tmp_path).checked == {"md5": 7}
    Google.damaged = SHARDS[0]
    with pytest.raises(FetchError, match=f"{SHARDS[0]} is damaged .* its md5 is"):
        fetched(url, tmp_path / "again")


@pytest.mark.parametrize(("scheme", "library", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_library_is_named_with_its_extra(
    scheme: str, library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"pip install 'moray-serve\[{extra}\]', on every node"):
        fetched(ModelUrl.parse(f"{scheme}://bucket/tiny"), tmp_path)


def test_unknown_schemes_and_missing_folders_are_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing reads nosuch://"):
        fetched(ModelUrl.parse("nosuch://bucket/tiny"), tmp_path)
    with pytest.raises(FetchError, match="FileNotFoundError"):
        fetched(ModelUrl.parse("memory://bucket/none"), tmp_path)


def test_only_what_may_pass_is_tried_again(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StoreError(Exception):
        """As botocore's ClientError."""

        response: Any = None

    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.001)
    asked = 0

    def ls(self: Any, path: str, **options: Any) -> Any:
        nonlocal asked
        asked += 1
        raise StoreError("no")

    monkeypatch.setattr(MemoryFileSystem, "ls", ls)
    for status, tries in ((404, 1), (403, 1), (429, transfer.TRIES), (503, transfer.TRIES), (None, transfer.TRIES)):
        asked = 0
        StoreError.response = None if status is None else {"ResponseMetadata": {"HTTPStatusCode": status}}
        with pytest.raises(FetchError, match="StoreError: no"):
            fetched(IN_MEMORY, tmp_path)
        assert asked == tries, status


# ---- a web server --------------------------------------------------------------------------------------------------------


def test_a_web_server_needs_no_listing(web: HubServer, files: dict[str, bytes], tmp_path: Path) -> None:
    url = ModelUrl.parse(f"{web.url}/files")
    result = fetched(url, tmp_path)
    assert_whole(result, files)
    assert result.checked == {"size": 7}
    assert web.sent["README.md"] == web.sent["pytorch_model.bin"] == 0
    web.files["SHA256SUMS"] = sums(files)
    assert fetched(url, tmp_path).checked == {"sha256": 7}


def test_a_broken_connection_goes_on_in_the_middle_of_a_file(
    web: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    web.files["SHA256SUMS"] = sums(files)
    whole = UNIT + 1  # the first block comes
    web.cut_after[SHARDS[0]] = [whole, UNIT // 2]
    assert_whole(fetched(ModelUrl.parse(f"{web.url}/files"), tmp_path), files)
    assert web.sent[SHARDS[0]] == len(files[SHARDS[0]]) + UNIT // 2


def test_a_web_server_without_ranges_is_read_from_the_start(
    web: HubServer, files: dict[str, bytes], tmp_path: Path
) -> None:
    web.ranges = False
    web.cut_after[SHARDS[0]] = [UNIT]
    assert_whole(fetched(ModelUrl.parse(f"{web.url}/files"), tmp_path), files)


def test_what_a_web_server_refuses_is_said(web: HubServer, tmp_path: Path) -> None:
    web.refused[SHARDS[0]] = 403
    with pytest.raises(FetchError, match=f"{SHARDS[0]} cannot be read: ClientResponseError: 403"):
        fetched(ModelUrl.parse(f"{web.url}/files"), tmp_path)
    assert web.count("HEAD", SHARDS[0]) == 1


def test_a_web_server_that_does_not_answer_is_not_one_that_has_nothing(
    web: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "TRIES", 2)
    web.refused["generation_config.json"] = 503
    with pytest.raises(FetchError, match=r"nothing more came in .* 503"):
        fetched(ModelUrl.parse(f"{web.url}/files"), tmp_path)
    assert not any(web.sent[name] for name in METADATA - {"model.safetensors.index.json"})


def test_a_web_folder_without_a_model_is_said(web: HubServer, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"has no config\.json"):
        fetched(ModelUrl.parse(f"{web.url}/nothing"), tmp_path)
