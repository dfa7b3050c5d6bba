"""Without what fake machines take, their tests are skipped, and say why."""

from __future__ import annotations

import pytest

from . import hosts


def test_without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert hosts.missing() == "needs root, to make namespaces"


def test_without_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda command, path: None if command in ("sshd", "rsync") else command)
    assert hosts.missing().startswith("needs sshd, rsync (apt-get install openssh-server ")
