"""Whoever starts a server that lets everybody in is told so."""

from __future__ import annotations

import pytest

from moray.cluster.listening import open_doors
from moray.configs.deployment import Deployment


def served_at(host: str, **front: str) -> Deployment:
    return Deployment.from_dict({"model": "tiny-r1", "front": {"host": host, **front}}, source="test")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.7", "::1", "localhost"])
def test_this_machine_may_use_it_without_a_key(host: str) -> None:
    assert open_doors(served_at(host), None) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "gpu-box"])
def test_others_may_not_without_a_word(host: str) -> None:
    [door] = open_doors(served_at(host), None)
    assert f"whoever reaches {host}:8000 may use the model" in door
    assert open_doors(served_at(host, api_key_file="keys"), None) == []


@pytest.mark.parametrize(("mode", "doors"), [("disabled", 1), ("token", 0), (None, 1)])
def test_a_ray_that_asks_for_no_token_is_named(monkeypatch: pytest.MonkeyPatch, mode: str | None, doors: int) -> None:
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    assert len(open_doors(served_at("127.0.0.1"), "10.0.0.1:6379")) == doors
    assert open_doors(served_at("127.0.0.1"), None) == []
