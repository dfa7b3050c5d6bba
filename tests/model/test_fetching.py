"""Models fetched from an imitation of Hugging Face's hub: what comes, how it is checked, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from moray.configs.errors import FetchError
from moray.configs.model_url import ModelUrl
from moray.model.fetching import fetch as fetching
from moray.model.fetching import transfer
from moray.model.fetching.directory import CheckpointDirectory
from moray.model.fetching.fetch import Fetched, fetch, pin
from moray.model.fetching.selection import Parts
from moray.model.progress import Advance, NoProgress

from .hub_server import COMMIT, METADATA, OTHER_COMMIT, REPO, SHARDS, UNIT, HubServer, small_model

URL = ModelUrl.parse(f"hf://{REPO}@{COMMIT}")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer(small_model()).running() as server:
        server.is_the_hub(monkeypatch)
        monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
        yield server


def fetched(models: Path, parts: Parts = "all", *, verify: bool = False) -> Fetched:
    return fetch(URL, models, parts=parts, verify=verify, progress=NoProgress())


def files_in(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}


def wanted(hub: HubServer) -> dict[str, bytes]:
    return {name: content for name, content in hub.files.items() if name in METADATA or name in SHARDS}


# ---- what comes ----------------------------------------------------------------------------------------------------------


def test_exactly_what_is_needed_comes_and_is_checked(hub: HubServer, tmp_path: Path) -> None:
    result = fetched(tmp_path)
    assert files_in(result.path) == wanted(hub)
    assert result.path == tmp_path / "hf" / "org" / "tiny" / COMMIT
    assert result.checked == {"git-sha1": 5, "sha256": 2}
    assert result.transferred == result.nbytes == sum(map(len, wanted(hub).values()))
    assert hub.sent == {name: len(content) for name, content in wanted(hub).items()}
    manifest = json.loads((result.path / ".moray-fetch" / "manifest.json").read_text())
    assert manifest["url"] == str(URL)
    shard = manifest["files"][SHARDS[0]]
    assert shard["digest"] == {"kind": "sha256", "value": hashlib.sha256(hub.files[SHARDS[0]]).hexdigest()}


def test_the_second_time_nothing_is_asked_or_read(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetched(tmp_path)
    hub.requests.clear()
    monkeypatch.setattr(fetching, "digest_of", lambda *a: pytest.fail("hashed again"))
    second = fetched(tmp_path)
    assert (second.path, second.transferred, second.checked) == (first.path, 0, first.checked)
    assert hub.requests == []


def test_metadata_is_everything_but_weights_which_come_later(hub: HubServer, tmp_path: Path) -> None:
    result = fetched(tmp_path, "metadata")
    assert set(files_in(result.path)) == METADATA
    assert not any(hub.sent[name] for name in SHARDS)
    result = fetched(tmp_path)
    assert files_in(result.path) == wanted(hub)
    assert all(hub.count("GET", name) == 1 for name in METADATA)


def test_a_branch_is_fetched_as_the_commit_it_is_now(hub: HubServer, tmp_path: Path) -> None:
    branch = ModelUrl.parse(f"hf://{REPO}")
    assert pin(branch) == URL
    hub.main = OTHER_COMMIT
    assert fetch(branch, tmp_path, progress=NoProgress()).path.name == OTHER_COMMIT
    assert fetched(tmp_path).path.name == COMMIT


def test_a_single_file_is_taken_before_the_index(hub: HubServer, tmp_path: Path) -> None:
    hub.files["model.safetensors"] = b"all of it"
    result = fetched(tmp_path)
    assert not any(hub.sent[name] for name in SHARDS)
    assert (result.path / "model.safetensors").read_bytes() == b"all of it"


def test_files_that_lie_there_already_are_hashed_and_not_fetched(hub: HubServer, tmp_path: Path) -> None:
    to = tmp_path / "copied"
    to.mkdir()
    (to / SHARDS[0]).write_bytes(hub.files[SHARDS[0]])
    (to / SHARDS[1]).write_bytes(b"\0" * len(hub.files[SHARDS[1]]))
    result = fetch(URL, tmp_path, to=to, progress=NoProgress())
    assert (result.path, hub.sent[SHARDS[0]], hub.sent[SHARDS[1]]) == (to, 0, len(hub.files[SHARDS[1]]))
    assert result.repaired == (SHARDS[1],)
    assert files_in(to) == wanted(hub)


# ---- what breaks off -----------------------------------------------------------------------------------------------------


def test_a_cut_connection_goes_on_where_it_was(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after[SHARDS[0]] = [UNIT, UNIT]
    result = fetched(tmp_path)
    assert files_in(result.path) == wanted(hub)
    assert hub.count("GET", SHARDS[0]) == 3
    assert hub.sent[SHARDS[0]] == len(hub.files[SHARDS[0]])


def test_a_server_without_ranges_gives_it_again_from_the_start(hub: HubServer, tmp_path: Path) -> None:
    hub.ranges = False
    hub.cut_after[SHARDS[0]] = [2 * UNIT]
    result = fetched(tmp_path)
    assert files_in(result.path) == wanted(hub)
    assert hub.sent[SHARDS[0]] == len(hub.files[SHARDS[0]]) + (2 * UNIT)


def test_a_fetch_that_was_given_up_goes_on_the_next_time(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after[SHARDS[1]] = [UNIT] + [0] * transfer.TRIES
    with pytest.raises(FetchError, match=f"{SHARDS[1]}: nothing more came in {transfer.TRIES} tries"):
        fetched(tmp_path)
    assert not (tmp_path / URL.directory() / SHARDS[1]).exists(), "a part looks like the whole"
    assert CheckpointDirectory(tmp_path / URL.directory()).state() is None
    before = hub.sent.copy()
    result = fetched(tmp_path)
    assert files_in(result.path) == wanted(hub)
    assert hub.sent[SHARDS[1]] - before[SHARDS[1]] == len(hub.files[SHARDS[1]]) - UNIT
    assert all(hub.count("GET", name) == 1 for name in METADATA)


def test_a_damaged_part_is_found_and_fetched_again(hub: HubServer, tmp_path: Path) -> None:
    hub.cut_after[SHARDS[0]] = [UNIT] + [0] * transfer.TRIES
    with pytest.raises(FetchError):
        fetched(tmp_path)
    (part,) = (tmp_path / URL.directory() / ".moray-fetch" / "partial").glob(f"{SHARDS[0]}.*")
    part.write_bytes(b"\0" * part.stat().st_size)
    assert files_in(fetched(tmp_path).path) == wanted(hub)


def test_the_hub_refusing_is_not_tried_again(hub: HubServer, tmp_path: Path) -> None:
    hub.refused[SHARDS[0]] = 403
    with pytest.raises(FetchError, match=rf"{SHARDS[0]} cannot be read: HTTP 403.*HF_TOKEN"):
        fetched(tmp_path)
    assert hub.count("GET", SHARDS[0]) == 1


def test_an_unknown_model_or_revision_is_said(hub: HubServer, tmp_path: Path) -> None:
    for text in ("hf://org/other", f"hf://{REPO}@nowhere"):
        with pytest.raises(FetchError, match=rf"{text}: HTTP 404"):
            fetch(ModelUrl.parse(text), tmp_path, progress=NoProgress())


# ---- what is damaged -----------------------------------------------------------------------------------------------------


def test_a_file_that_stays_damaged_is_named_and_not_kept(hub: HubServer, tmp_path: Path) -> None:
    hub.damaged.add(SHARDS[0])
    should = hashlib.sha256(hub.files[SHARDS[0]]).hexdigest()
    with pytest.raises(FetchError, match=rf"{SHARDS[0]} is damaged.*sha256.*should be {should}"):
        fetched(tmp_path)
    assert not list((tmp_path / URL.directory()).rglob(f"{SHARDS[0]}*"))
    assert hub.count("GET", SHARDS[0]) == 2
    hub.damaged.clear()
    assert files_in(fetched(tmp_path).path) == wanted(hub)


def test_a_changed_file_is_noticed_and_only_verify_notices_damage_that_left_no_trace(
    hub: HubServer, tmp_path: Path
) -> None:
    path = fetched(tmp_path).path / SHARDS[0]
    before = path.stat()
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)  # a new time of change
    assert fetched(tmp_path).repaired == (SHARDS[0],)
    path.write_bytes(damaged)
    recorded = json.loads((path.parent / ".moray-fetch" / "manifest.json").read_text())["files"][SHARDS[0]]["mtime_ns"]
    os.utime(path, ns=(recorded, recorded))
    assert path.stat().st_size == before.st_size
    assert fetched(tmp_path).repaired == ()
    assert fetched(tmp_path, verify=True).repaired == (SHARDS[0],)
    assert path.read_bytes() == hub.files[SHARDS[0]]


def test_an_index_may_not_lead_out_of_the_directory(hub: HubServer, tmp_path: Path) -> None:
    for name in ("../outside.safetensors", "a/b.safetensors", "model.bin", ".hidden.safetensors"):
        hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": {"t": name}}).encode()
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        with pytest.raises(FetchError, match="only safetensors files beside it"):
            fetched(tmp_path)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (SHARDS[:1], f"1 of 2 files named by .* are not there: {SHARDS[0]}"),
        (("config.json",), "has no config.json"),
        (("model.safetensors.index.json",), "neither model.safetensors nor"),
    ],
)
def test_what_is_not_published_is_said(hub: HubServer, tmp_path: Path, removed: tuple[str, ...], said: str) -> None:
    for name in removed:
        del hub.files[name]
    with pytest.raises(FetchError, match=said):
        fetched(tmp_path)


# ---- disk and lock -------------------------------------------------------------------------------------------------------


class Usage(NamedTuple):
    free: int


def test_a_disk_that_is_too_small_is_refused_before_anything_comes(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched(tmp_path, "metadata")
    needed = sum(len(hub.files[name]) for name in SHARDS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(fetching._SPARE_BYTES + needed - 1))
    with pytest.raises(FetchError, match=rf"{needed} bytes .* still to come, and \d+ .* free; .*weights_dir"):
        fetched(tmp_path)
    assert not any(hub.sent[name] for name in SHARDS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(fetching._SPARE_BYTES + needed))
    fetched(tmp_path)


def test_a_directory_of_another_model_is_refused(hub: HubServer, tmp_path: Path) -> None:
    fetch(URL, tmp_path, to=tmp_path / "it", progress=NoProgress())
    with pytest.raises(FetchError, match=f"holds {URL}, not {URL.pinned(OTHER_COMMIT)}"):
        fetch(URL.pinned(OTHER_COMMIT), tmp_path, to=tmp_path / "it", progress=NoProgress())


def test_a_directory_that_cannot_be_made_is_refused(hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match="cannot be made"):
        fetched(tmp_path / "file")


class Shown:
    """Keeps the names of tasks, and says when there was one that begins with a text."""

    def __init__(self, awaited: str = "") -> None:
        self.names: list[str] = []
        self.done = 0
        self.seen = threading.Event()
        self._awaited = awaited

    @contextmanager
    def task(self, description: str, total_bytes: int) -> Iterator[Advance]:
        self.names.append(description)
        if description.startswith(self._awaited):
            self.seen.set()

        def advance(count: int) -> None:
            self.done += count

        yield advance


def test_many_at_once_fetch_once(hub: HubServer, tmp_path: Path) -> None:
    hub.hold.clear()
    results: list[Fetched] = []
    shown = [Shown("waiting for process") for _ in range(3)]
    threads = [threading.Thread(target=lambda s=s: results.append(fetch(URL, tmp_path, progress=s))) for s in shown]
    threads[0].start()
    assert hub.holding.acquire(timeout=20)
    for thread in threads[1:]:
        thread.start()
    assert all(s.seen.wait(20) for s in shown[1:])
    hub.hold.set()
    for thread in threads:
        thread.join(20)
    assert sorted(result.transferred > 0 for result in results) == [False, False, True]
    assert hub.sent == {name: len(content) for name, content in wanted(hub).items()}
    assert shown[0].done == sum(map(len, wanted(hub).values()))


def test_whoever_wants_metadata_does_not_wait_for_weights(hub: HubServer, tmp_path: Path) -> None:
    hub.hold.clear()
    weights = threading.Thread(target=lambda: fetched(tmp_path))
    weights.start()
    assert hub.holding.acquire(timeout=20)
    assert fetched(tmp_path, "metadata").transferred == 0
    directory = CheckpointDirectory(tmp_path / URL.directory())
    asked = iter([False, True])  # it comes while this one waits
    with directory.held(NoProgress(), lambda: next(asked)) as holder:
        assert holder is None
    hub.hold.set()
    weights.join(20)


def test_whoever_waits_gives_up_on_one_that_does_not_get_on(hub: HubServer, tmp_path: Path) -> None:
    with (
        CheckpointDirectory(tmp_path / URL.directory()).held(NoProgress(), lambda: False),
        pytest.raises(FetchError, match=r"process \d+ on .* holds it and has not got on for 0 s"),
    ):
        fetch(URL, tmp_path, progress=NoProgress(), wait_s=0.0)
