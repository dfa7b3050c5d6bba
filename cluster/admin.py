"""`moray scale`, `rebalance` and `drain`: change a running cluster, through Ray: whoever can reach its Ray may."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from ..configs.errors import ClusterError, MorayError
from . import private_ray
from .admin_text import done_text, plan_text
from .changes import Change, Wanted
from .load_progress import LoadingShown
from .run_state import RunState

_CHANGE_TIMEOUT_S = 3600.0
"""As long as loading experts may take."""

_ASK_TIMEOUT_S = 10.0
"""For a plan, or how far a change is; a plan for the largest model takes about a second."""

_THREAD_END_S = 2.0
_THREAD_POLL_S = 0.005


def change(address: str | None, wanted: Wanted, *, dry_run: bool, as_json: bool) -> int:
    """Have a running cluster changed; the plan is printed first, then what was done.

    Args:
        address: of the Ray cluster; None for that of the `moray serve` on this machine.
        wanted: what is asked for.
        dry_run: print the plan, change nothing.
        as_json: print what was done (or would be) as JSON, and nothing else.

    Raises:
        MorayError: there is no such cluster, or it cannot be done; nothing has changed then.
    """
    with controller_at(address or _own_address()) as controller:
        return change_with(controller, wanted, dry_run=dry_run, as_json=as_json)


def change_with(controller: Any, wanted: Wanted, *, dry_run: bool, as_json: bool) -> int:
    """`change` through a handle to the controller's deployment."""
    plan: Change = ask(controller.change.remote(wanted, True), _ASK_TIMEOUT_S)
    if not as_json:
        print(plan_text(plan, wanted), flush=True)
    # Copies that are asked for are from now on, also where nothing moves for them now.
    if dry_run or (plan.empty and not wanted.replicas):
        if as_json:
            print(json.dumps(asdict(plan), indent=2))
        return 0

    def progress() -> tuple[int, int] | None:
        try:
            found: tuple[int, int] | None = ask(controller.change_progress.remote(), _ASK_TIMEOUT_S)
        except ClusterError:
            return None  # only the display waits for it; what is wrong the change itself will say
        return found

    with LoadingShown(progress):
        done: Change = ask(controller.change.remote(wanted, False), _CHANGE_TIMEOUT_S)
    print(json.dumps(asdict(done), indent=2) if as_json else done_text(done, plan))
    return 0


def _own_address() -> str:
    """Ray's address of the newest server that runs on this machine.

    Raises:
        ClusterError: there is none with a Ray cluster.
    """
    running = [record for record in RunState().records() if record.server.alive]
    for record in running:
        if record.ray_address:
            return record.ray_address
    if running:
        raise ClusterError("the server on this machine runs in one process (`--local`), which cannot be changed")
    raise ClusterError("no server runs on this machine: start one with `moray serve`, or give its Ray with --address")


@contextmanager
def controller_at(address: str) -> Iterator[Any]:
    """A handle to the controller of the cluster at `address`.

    Raises:
        ClusterError: Ray is not there, or serves no Moray.
    """
    private_ray.use_token_for(address)
    import ray
    from ray import serve

    from .ray_server import APP

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"Ray at {address} cannot be reached: {error}") from error
    try:
        if APP not in serve.status().applications:
            raise ClusterError(f"the cluster at {address} serves no application {APP!r}")
        yield serve.get_deployment_handle("controller", app_name=APP)
    finally:
        end_serve_thread()
        ray.shutdown()


def end_serve_thread() -> None:
    """End Serve's thread behind handles, which goes on asking Ray for what is new.

    If it does while Ray shuts down, Ray ends the whole process on the spot, with status 1: what was to be said is never said.
    """
    from ray.serve._private.router import SingletonThreadRouter

    loop = SingletonThreadRouter._asyncio_loop
    if loop is None:
        return
    SingletonThreadRouter._asyncio_loop = None  # for the next handle of this process to have one of its own
    loop.call_soon_threadsafe(loop.stop)
    deadline = time.monotonic() + _THREAD_END_S
    while loop.is_running() and time.monotonic() < deadline:
        time.sleep(_THREAD_POLL_S)


def ask(response: Any, timeout_s: float) -> Any:
    """The result of a call to the controller; what it raises as one of our errors."""
    from ray.exceptions import RayError, RayTaskError

    try:
        return response.result(timeout_s=timeout_s)
    except RayTaskError as error:
        if isinstance(error.cause, MorayError):
            raise error.cause from None
        raise ClusterError(str(error)) from error
    except TimeoutError as error:
        raise ClusterError(
            f"the controller did not answer within {timeout_s:.0f} s: it may be changing or restoring something; try again"
        ) from error
    except RayError as error:
        raise ClusterError(f"the controller cannot be asked: {error}") from error
