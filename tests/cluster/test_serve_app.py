"""How the application's replicas are to run, and how a process that asked them lets go of Serve. Without a cluster."""

from __future__ import annotations

import asyncio
import threading

import pytest

# Serve's own modules, which are imported in the tests for this mark to hold.
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

_HEAD = {"node:__internal_head__": 0.001}


@pytest.mark.parametrize(
    ("given", "fronts"), [({}, _HEAD), ({"resources": {}}, {}), ({"resources": {"web": 1.0}}, {"web": 1.0})]
)
def test_a_node_that_is_lost_takes_neither_controller_nor_fronts_along(
    given: dict[str, object], fronts: dict[str, float]
) -> None:
    from moray.cluster.serve_app import build

    front = build({"model": "tiny-r1", "front": given})._bound_deployment
    controller = front.init_args[1]._bound_deployment
    assert (controller.name, front.name) == ("controller", "front")
    assert controller.ray_actor_options == {"num_cpus": 0, "resources": _HEAD}
    assert front.ray_actor_options == {"num_cpus": 0, "resources": fronts}


def test_serve_takes_the_builder_that_files_name() -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as built

    from moray.cluster.serve_app import build

    assert built(build, {"model": "tiny-r1"})._bound_deployment.name == "front"


def test_the_thread_behind_serve_s_handles_ends_before_ray_does(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.serve._private.router import SingletonThreadRouter

    from moray.cluster.admin import end_serve_thread

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(SingletonThreadRouter, "_asyncio_loop", loop)
    end_serve_thread()
    assert not loop.is_running()
    assert SingletonThreadRouter._asyncio_loop is None
    thread.join(10)
    loop.close()
    end_serve_thread()  # a process without a handle has no such thread
