"""`moray serve` on Ray: a Serve application on a cluster that is started for it, or on one that runs already."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..configs.deployment import Deployment
from ..configs.errors import CheckpointError, ClusterError, ConfigError, FetchError, MorayError
from . import private_ray
from .front_door import FrontDoor
from .listening import check_port, url_of
from .load_progress import LoadingShown

if TYPE_CHECKING:
    pass

logger = logging.getLogger("moray.serve")

APP = "moray"
"""Name of the Serve application."""

_OBJECT_STORE_BYTES = 128 << 20
"""Ray carries no tensors here; its default, a third of the memory, would be reserved for nothing."""

_SERVE_GONE_S = 60.0
"""How long Serve may take to end its own processes."""

_STOP_S = 50.0
"""For the end in order: less than the minute after which Ray ends a process that it cannot serve."""

_RAY_GONE_S = 3.0
"""How long the end may take once Ray's own processes are gone, as they are at its very end."""

_POLL_S = 0.05

_CALL_S = 2.0
"""For a question that a controller answers in milliseconds."""


class RayServer:
    """A Serve application on a Ray cluster, which is started if need be.

    Args:
        address: the cluster to join, `auto` for the one on this machine; None starts one.
        token: where to keep the token of the one that is started.
    """

    def __init__(self, deployment: Deployment, address: str | None, *, token: Path) -> None:
        self._deployment = deployment
        self._address = address
        self._token = token
        self._deployed = False
        self._started_serve = False
        self._keep_logs = False
        self._sessions: Path | None = None
        self._node: Any = None
        self._door: FrontDoor | None = None
        self.url = url_of(deployment.front.host, deployment.front.port)

    @property
    def session(self) -> str:
        """Directory of the Ray session that was started here; empty before, and on a cluster that was joined."""
        # Known by its name, which ends in this process's id: it is there as soon as Ray begins to start.
        found = self._sessions.glob(f"session_*_{os.getpid()}") if self._sessions is not None else ()
        return str(max(found, default=""))

    @property
    def ray_address(self) -> str:
        """Where Ray can be reached; empty before it is."""
        import ray

        return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else ""

    def start(self) -> None:
        """Check the checkpoint, start or join Ray, deploy, wait until it serves.

        Raises:
            MorayError: it could not be started; call `stop` all the same.
        """
        self._check()
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            if self._address is None:
                private_ray.make_token(self._token)
            else:
                private_ray.use_token_for(self._address)
            import ray

            # Ray's processes take seconds to come up, and so does torch, which this needs.
            checking = _beside(self._check_weights)
            try:
                with _keeping_sigterm():
                    if self._address is None:
                        self._start_ray()
                    else:
                        ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING)
            except Exception:
                checking.result()  # what is wrong with the model comes first; an interrupt waits for nothing
                raise
            checking.result()
            self._deploy()
        except MorayError:
            raise
        except Exception as error:
            # Ray and Serve raise whatever comes when they cannot start, join or deploy; a bare Exception too.
            explained = start_error(f"{error}\n{self._accounts()}", logs=self.session)
            self._keep_logs = isinstance(explained, ClusterError)
            raise explained from error

    def _check(self) -> None:
        """Refuse what can be refused at once, while it is still a message and not a stack of actors."""
        from ..model.config import ModelConfig
        from .assembly import checkpoint_path, front_settings, pinned, router_settings, served_model
        from .placement import first_placement

        self._deployment = deployment = pinned(self._deployment)
        if self._address is None:
            self._door = FrontDoor(deployment.front.host, deployment.front.port)
        path = checkpoint_path(deployment.model, weights_dir=deployment.weights_dir, parts="metadata")
        config = ModelConfig.load(path)
        served_model(deployment, config)
        front_settings(deployment, front_id="check", behind_proxy=True)
        router_settings(deployment, config)
        first_placement(config, deployment.experts)

    def _check_weights(self) -> None:
        """Refuse the rest before any process of ours is started."""
        import torch

        from ..model.compute import use_instructions
        from ..model.progress import default_progress
        from .assembly import compute
        from .model_check import check_model

        deployment = self._deployment
        gpus = torch.cuda.device_count()
        if self._address is None:
            use_instructions(compute(deployment, gpus=gpus))  # as its processes will, which come to this machine
        check_model(deployment, gpus=max(gpus, deployment.device == "cuda"), progress=default_progress())

    def _start_ray(self) -> None:
        import ray
        from ray._common.utils import get_default_ray_temp_dir

        self._sessions = private_ray.session_folder(Path(get_default_ray_temp_dir()).parent)
        # Ray's default of 15 is for batch jobs: a server would come after whatever else the machine does.
        os.environ.setdefault("RAY_worker_niceness", "0")
        cpus, labels = logical_resources(self._deployment)
        with private_ray.few_processes():
            ray.init(
                address="local",
                _temp_dir=str(self._sessions),
                num_cpus=max(cpus, os.cpu_count() or 1),
                resources=labels,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
        self._node = ray._private.worker._global_node

    def _deploy(self) -> None:
        from ray import serve
        from ray.serve.context import _get_global_client

        from .serve_app import build_behind

        # What goes wrong is raised; its warnings are about handles that wait for replicas still starting.
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        front = self._deployment.front
        running = None if self._address is None else _get_global_client(raise_if_no_controller_running=False)
        if self._door is not None:
            serve.start(proxy_location="Disabled")
        elif running is None:
            check_port(front.host, front.port)
            self._started_serve = True
            serve.start(proxy_location="HeadOnly", http_options={"host": front.host, "port": front.port})
        else:
            if APP in serve.status().applications:
                raise ClusterError(
                    f"the cluster at {self._address} runs an application {APP!r} already; end it "
                    "(`serve shutdown` ends everything of Serve there), or leave out --address to start a cluster"
                )
            # Serve listens where it was told when it was started; it cannot be told anew.
            self.url = url_of(running.http_config.host, running.http_config.port)
        self._deployed = True
        plain = self._deployment.model_copy(update={"verify": "headers"}).model_dump()  # checked in full already
        with LoadingShown(_load_progress):
            door = None if self._door is None else self._door.name
            serve.run(build_behind(plain, door=door), name=APP, route_prefix="/", blocking=False)

    def _accounts(self) -> str:
        """What Serve's deployments say of themselves: the error of a process is there, and not in what `run` raises."""
        import ray
        from ray import serve

        if not (self._deployed and ray.is_initialized()):
            return ""
        application = serve.status().applications.get(APP)
        return "\n".join(d.message for d in application.deployments.values()) if application else ""

    def check(self) -> None:
        """Look whether Ray itself still runs.

        Raises:
            ClusterError: one of its own processes has ended, without which nothing can be started or restored.
        """
        node = self._node
        ended = [kind for kind, _ in node.dead_processes()] if node is not None else []
        if ended:
            raise ClusterError(f"Ray's {', '.join(ended)} ended, which no cluster survives; start it again")

    def stop(self) -> None:
        """Take the application down, and whatever else of Serve and Ray was started here.

        What does not end in order is left for the caller to end: its processes run below this one.
        """
        if self._door is not None:
            self._door.close()
        if "ray" not in sys.modules:
            return
        import ray

        if ray.is_initialized():
            # In a thread, for it cannot be interrupted: where Ray's processes got the same SIGTERM as this one, Ray waits
            # a minute for them, and then ends this process as it stands.
            stopping = threading.Thread(target=self._stop_in_order, name="moray-stop", daemon=True)
            stopping.start()
            if not self._waited_for(stopping):
                logger.warning("Ray does not answer any more; ending its processes")
        if self.session and not self._keep_logs:
            shutil.rmtree(self.session, ignore_errors=True)

    def _waited_for(self, stopping: threading.Thread) -> bool:
        deadline = time.monotonic() + _STOP_S
        while stopping.is_alive():
            stopping.join(_POLL_S)
            if self._node is not None and self._node.dead_processes():
                deadline = min(deadline, time.monotonic() + _RAY_GONE_S)
            if time.monotonic() > deadline:
                return False
        return True

    def _stop_in_order(self) -> None:
        import ray

        try:
            self._take_down()
        except (ray.exceptions.RayError, RuntimeError, TimeoutError) as error:
            # The processes are ended in any case: with Ray if it was started here, else by their owner's end.
            logger.warning("the application did not end in order: %s", error)
        ray.shutdown()

    def _take_down(self) -> None:
        from ray import serve

        if self._deployed:
            serve.delete(APP)
        if self._address is not None and self._started_serve and not serve.status().applications:
            _shut_down_serve()


def logical_resources(deployment: Deployment) -> tuple[int, dict[str, float]]:
    """CPUs and labelled resources that a Ray cluster of one machine must claim to have for all that may be asked of it.

    They mean nothing on one machine; with them, a deployment file for many machines runs there, too.
    """
    experts, cold, routers = deployment.experts, deployment.experts.cold, deployment.routers
    sections = (
        (experts, max(experts.hosts, experts.max_hosts) + experts.standby),
        (cold, max(cold.hosts, cold.max_hosts)),
        (routers, max(routers.replicas, routers.max_replicas)),
    )
    labels: dict[str, float] = {}
    for section, count in sections:
        for name, amount in section.resources.items():
            labels[name] = labels.get(name, 0.0) + count * amount
    whole = {name: float(math.ceil(amount)) for name, amount in labels.items()}
    return sum(count * section.cpus for section, count in sections), whole


def _beside(function: Callable[[], None]) -> Future[None]:
    """Run `function` in a thread that does not keep the process from ending."""
    outcome: Future[None] = Future()

    def run() -> None:
        try:
            function()
            outcome.set_result(None)
        except BaseException as error:  # whatever it is, it belongs to whoever asks for the result
            outcome.set_exception(error)

    threading.Thread(target=run, name="moray-check", daemon=True).start()
    return outcome


def _load_progress() -> tuple[int, int] | None:
    """Bytes the starting cluster has read and will have read; None while its controller cannot be asked."""
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        handle = serve.get_deployment_handle("controller", app_name=APP)
        progress: tuple[int, int] = handle.load_progress.remote().result(timeout_s=_CALL_S)
    except (RayServeException, ray.exceptions.RayError, KeyError, TimeoutError, RuntimeError):
        return None  # it does not run yet, or any more
    return progress


@contextlib.contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Undo what `ray.init` does to SIGTERM: its handler ends the process where it stands."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _shut_down_serve() -> None:
    """End Serve's controller and proxies.

    As `serve.shutdown`, whose call to the controller stays open until the controller kills itself: Ray then prints that
    the call has failed and will be retried for ever.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    controller: Any = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    ray.get(controller.graceful_shutdown.remote(wait=False), timeout=_SERVE_GONE_S)
    deadline = time.monotonic() + _SERVE_GONE_S
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            return
        time.sleep(_POLL_S)
    raise TimeoutError(f"Serve's controller still runs after {_SERVE_GONE_S:.0f} s")


_RAISED = re.compile(r"^(?:\S*?errors\.)?(ConfigError|CheckpointError|\w+Error): (.+)$", re.MULTILINE)


def start_error(text: str, *, logs: str) -> MorayError:
    """What to tell of a failure inside Ray: of all the text of Ray and Serve, the error that was raised in the process.

    Args:
        text: Ray's account, with the remote traceback.
        logs: directory of the Ray session, if it was started here.
    """
    found: list[tuple[str, str]] = _RAISED.findall(text)
    kind, message = found[-1] if found else ("", text.strip().splitlines()[0] if text.strip() else "no reason given")
    if kind == "ConfigError":
        return ConfigError(message)
    if kind == "CheckpointError":
        return CheckpointError(message)
    if kind == "FetchError":
        return FetchError(message)
    where = f"; its logs are in {logs}/logs" if logs else ""
    return ClusterError(f"the cluster did not start: {message}{where}")
