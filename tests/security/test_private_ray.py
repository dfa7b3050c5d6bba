"""The Ray of a server is its own user's alone."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moray.cluster import private_ray
from moray.cluster.run_state import ProcessId, RunState, ServerRecord
from moray.configs.errors import ConfigError


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the tests set is undone, and Ray, if another test has imported it, is left alone."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/no/such/file")
    monkeypatch.delitem(sys.modules, "ray", raising=False)


def test_a_token_is_for_its_user_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        private_ray.make_token(tmp_path / "moray" / "token")
    finally:
        os.umask(umask)
    token = tmp_path / "moray" / "token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    assert len(token.read_text()) == 64
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(token)
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_tokens_differ_and_none_is_written_over(tmp_path: Path) -> None:
    for name in ("one", "two"):
        private_ray.make_token(tmp_path / name)
    assert (tmp_path / "one").read_text() != (tmp_path / "two").read_text()
    with pytest.raises(FileExistsError):
        private_ray.make_token(tmp_path / "one")


@pytest.mark.parametrize(
    ("address", "ours"), [("10.0.0.1:6379", True), ("auto", True), ("10.0.0.2:6379", False)], ids=str
)
def test_commands_find_the_token_of_their_server(address: str, ours: bool) -> None:
    own = ProcessId.of(os.getpid())
    assert own is not None
    state = RunState()
    state.write(ServerRecord(own, "http://127.0.0.1:1", "tiny-r1", ray_address="10.0.0.1:6379"))
    private_ray.make_token(state.token_path(own))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    private_ray.use_token_for(address)
    assert os.environ["RAY_AUTH_MODE"] == ("token" if ours else "disabled")


def test_a_server_that_has_ended_has_no_token() -> None:
    state, gone = RunState(), ProcessId(os.getpid(), 1)
    record = ServerRecord(gone, "http://127.0.0.1:1", "tiny-r1", ray_address="10.0.0.1:6379")
    state.write(record)
    private_ray.make_token(state.token_path(gone))
    os.environ["RAY_AUTH_MODE"] = "disabled"
    private_ray.use_token_for("10.0.0.1:6379")
    assert os.environ["RAY_AUTH_MODE"] == "disabled"
    state.remove(record)
    assert list(state.folder.iterdir()) == []


def test_sessions_are_in_a_folder_that_nobody_else_enters(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        folder = private_ray.session_folder(tmp_path)
    finally:
        os.umask(umask)
    assert folder.parent.stat().st_mode & 0o777 == 0o700
    assert private_ray.session_folder(tmp_path) == folder


@pytest.mark.parametrize("trap", ["open", "link", "file"])
def test_a_folder_that_others_have_a_hand_in_is_not_used(tmp_path: Path, trap: str) -> None:
    private = tmp_path / f"moray-{os.getuid()}"
    if trap == "open":
        private.mkdir()
        private.chmod(0o755)
    elif trap == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        private.symlink_to(tmp_path / "elsewhere")
    else:
        private.write_text("")
    with pytest.raises(ConfigError, match="alone"):
        private_ray.session_folder(tmp_path)
