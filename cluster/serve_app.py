"""The Ray Serve application: a controller and any number of fronts. `serve deploy` files name `build`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatus

from ..actors.front.app import create_app
from ..actors.front.http_server import HttpServer
from ..actors.messages import ClusterStatus, ProcessStatus
from ..actors.router_client import ClusterClient
from ..configs.deployment import ON_HEAD, Deployment
from ..configs.errors import ClusterError, MorayError
from ..model.config import ModelConfig
from .assembly import checkpoint_path, front_settings, pinned, served_model
from .changes import Change, Wanted
from .directory import LOAD_TIMEOUT_S, Directory
from .front_door import borrowed

if TYPE_CHECKING:  # the controller brings torch, without which a front comes up sooner
    from .controller import Controller

_LOADING_TIMEOUT_S = LOAD_TIMEOUT_S
"""How long the processes may stand still with loading before a front gives up: however long all of it takes."""

_CONTROLLER_TIMEOUT_S = 60.0
"""For an answer of a controller that asks every process for it."""

_STATUS_TIMEOUT_S = 2.0

_FRONT_GRACE_S = 3.0
"""How long a front that ends lets its streams go on."""

_UNLIMITED = 1_000_000
"""Serve must not hold requests back: routers queue, and refuse with 429, by what they can really take."""


class ControllerDeployment:
    """The controller in a Serve replica.

    The processes it starts do not end with it: where the replica dies, Serve starts another one, which finds them and takes
    them over; requests go on meanwhile. They end with the application.
    """

    async def __init__(self, deployment: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        _configure_logging()
        from .controller import Controller
        from .ledger import RayLedger
        from .spawning import Spawner

        self._application = serve.get_replica_context().app_name
        self._controller: Controller = Controller(
            Deployment.from_dict(deployment), Spawner(self._application), RayLedger(self._application)
        )
        await asyncio.to_thread(self._controller.check)
        await asyncio.to_thread(self._controller.prepare)
        # Loading takes minutes for a large model, and can be watched meanwhile; whoever needs the cluster waits for it.
        self._starting = asyncio.create_task(asyncio.to_thread(self._controller.start))

    async def directory(self) -> Directory:
        """Where the routers are, once they serve.

        Raises:
            MorayError: the cluster did not start.
        """
        await asyncio.shield(self._starting)
        return self._controller.directory()

    async def status(self) -> ClusterStatus:
        """Every process, health and events; the controller itself is one of the processes."""
        status = self._controller.status()
        own = ProcessStatus("controller", "controller", os.getpid(), ray.util.get_node_ip_address(), "ready")
        return replace(status, processes=[*status.processes, own])

    async def load_progress(self) -> tuple[int, int]:
        """Bytes read so far, and in all; see `Controller.load_progress`."""
        return await asyncio.to_thread(self._controller.load_progress)

    async def change_progress(self) -> tuple[int, int] | None:
        """See `Controller.change_progress`."""
        return await asyncio.to_thread(self._controller.change_progress)

    async def change(self, wanted: Wanted, dry_run: bool) -> Change:
        """See `Controller.change`.

        Raises:
            MorayError: it cannot be done; the cluster is what it was.
        """
        await asyncio.shield(self._starting)
        return await asyncio.to_thread(self._controller.change, wanted, dry_run=dry_run)

    async def __del__(self) -> None:
        # Serve calls this when it ends the replica in order.
        with contextlib.suppress(AttributeError):
            ended = await asyncio.to_thread(_application_ends, self._application)
            await asyncio.to_thread(self._controller.stop if ended else self._controller.leave)


def _application_ends(name: str) -> bool:
    """Whether the whole application goes, and not only this replica of it, which Serve would replace."""
    try:
        found = serve.status().applications.get(name)
    except (RayError, RayServeException, RuntimeError):
        return True  # Serve itself goes
    return found is None or found.status in (ApplicationStatus.DELETING, ApplicationStatus.NOT_STARTED)


class FrontDeployment:
    """One front: the OpenAI API over connections to the routers.

    Args:
        door: name of the `FrontDoor` at which it takes its clients; None leaves that to Serve's proxy.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, deployment: dict[str, Any], controller: DeploymentHandle, door: str | None
    ) -> None:
        _configure_logging()
        self._deployment = Deployment.from_dict(deployment)
        self._controller = controller
        self._front_id = f"front-{serve.get_replica_context().replica_id.unique_id}"
        self._path = await asyncio.to_thread(self._metadata)
        directory = await self._first_directory()
        self._client = ClusterClient(
            self._routers,
            self._status,
            secret=directory.secret,
            front_id=self._front_id,
            restore_timeout_s=self._deployment.routers.restore_timeout_s,
        )
        await self._client.connect()
        self._app = self._built_app(behind_proxy=door is None)
        self._server: HttpServer | None = None
        if door is not None:
            self._server = await HttpServer.start(self._app, borrowed(door), grace_s=_FRONT_GRACE_S)

    def _metadata(self) -> Path:
        deployment = self._deployment
        return checkpoint_path(deployment.model, weights_dir=deployment.weights_dir, parts="metadata")

    async def _first_directory(self) -> Directory:
        """Where the routers are, once they serve: as long as loading gets on, it is waited for."""
        asking = asyncio.ensure_future(self._ask("directory", None))
        seen = None
        try:
            while not (await asyncio.wait({asking}, timeout=_LOADING_TIMEOUT_S))[0]:
                progress = await self._ask("load_progress", _CONTROLLER_TIMEOUT_S)
                if progress == seen:
                    raise ClusterError(f"the cluster has not got on with loading for {_LOADING_TIMEOUT_S:.0f} s")
                seen = progress
            directory: Directory = await asking
        finally:
            asking.cancel()
        return directory

    def _built_app(self, *, behind_proxy: bool) -> FastAPI:
        config = ModelConfig.load(self._path)
        settings = front_settings(self._deployment, front_id=self._front_id, behind_proxy=behind_proxy)
        return create_app(self._client, served_model(self._deployment, config), settings)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Serve asks now and then, and replaces a replica that raises."""
        if self._server is not None and self._server.ended:
            raise ClusterError(f"{self._front_id}: the HTTP server has ended")

    async def _routers(self) -> dict[str, str]:
        directory: Directory = await self._ask("directory", _STATUS_TIMEOUT_S)
        self._client.secret = directory.secret
        return directory.routers

    async def _status(self) -> ClusterStatus:
        status: ClusterStatus = await self._ask("status", _STATUS_TIMEOUT_S)
        return status

    async def _ask(self, method: str, timeout_s: float | None) -> Any:
        try:
            return await asyncio.wait_for(getattr(self._controller, method).remote(), timeout_s)
        except TimeoutError as error:
            raise ClusterError(f"the controller did not answer {method} within {timeout_s} s") from error
        except (RayError, RayServeException) as error:
            if isinstance(error, MorayError):
                raise  # the controller's own answer
            raise ClusterError(f"the controller did not answer {method}: {error}") from error

    async def __del__(self) -> None:
        with contextlib.suppress(AttributeError):
            if self._server is not None:
                await self._server.stop()
            await self._client.aclose()


def build(args: dict[str, Any]) -> serve.Application:
    """The application for a deployment given as plain data: what a Serve file's `import_path` names and its `args` go to.

    Serve takes a function of this one argument, and no other.

    Raises:
        ConfigError, FetchError: see `build_behind`.
    """
    return build_behind(args, door=None)


def build_behind(args: dict[str, Any], *, door: str | None) -> serve.Application:
    """The same, its fronts behind a door.

    Args:
        door: see `FrontDeployment`.

    Raises:
        ConfigError, FetchError: the description cannot be used, or there is no such model; nothing was started.
    """
    # Fixed here, once for the cluster: were each process to look, two might find different weights behind one name.
    deployment = pinned(Deployment.from_dict(args, source="args"))
    plain = deployment.model_dump()
    common = {
        "max_ongoing_requests": _UNLIMITED,
        "graceful_shutdown_wait_loop_s": 0.1,
        "max_constructor_retry_count": 1,  # what was refused once will be again
        # A replica that stands still is noticed and replaced: after three times that it did not answer in time.
        "health_check_period_s": 2.0,
        "health_check_timeout_s": 4.0,
    }
    controller = serve.deployment(
        name="controller",
        graceful_shutdown_timeout_s=30.0,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},  # a node that is lost must not take it along
        **common,
    )(ControllerDeployment)
    front = serve.deployment(
        name="front",
        num_replicas=deployment.front.replicas,
        graceful_shutdown_timeout_s=_FRONT_GRACE_S + 2.0,
        ray_actor_options={"num_cpus": 0, "resources": deployment.front.resources},
        **common,
    )(serve.ingress()(FrontDeployment))
    return front.bind(plain, controller.bind(plain), door)


def _configure_logging() -> None:
    logging.getLogger("moray").setLevel(logging.INFO)
