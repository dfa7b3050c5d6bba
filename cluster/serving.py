"""`moray serve`: one command from a checkpoint to a URL, and an orderly end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType

from ..configs.deployment import Deployment
from ..configs.errors import ClusterError, ConfigError
from .run_state import ProcessId, RunState, ServerRecord, descendants, end_processes, with_processes

logger = logging.getLogger("moray.serve")

_RECORD_EVERY_S = 5.0
"""How often the record of our processes is brought up to date: restored hosts have new pids."""

_APP = "moray"


def serve(deployment: Deployment, *, address: str | None, local: bool) -> int:
    """Serve until SIGINT or SIGTERM; the process's exit status.

    Args:
        address: a running Ray cluster to join, `auto` for the one on this machine; None starts one.
        local: everything in this process, without Ray.

    Raises:
        MorayError: it could not be started; nothing is left running.
    """
    state = RunState()
    for line in state.clean_up():
        _say(line)
    started = time.monotonic()
    _check_port(deployment)
    stop = threading.Event()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    _catch_signals(stop)
    server: _LocalServer | _RayServer = _LocalServer(deployment) if local else _RayServer(deployment, address)
    own = ProcessId.of(os.getpid())
    assert own is not None
    record = ServerRecord(own, server.url, deployment.served_name)
    try:
        state.write(record)
        server.start(stop)
        if stop.is_set():
            return 130
        record = with_processes(ServerRecord(own, server.url, deployment.served_name, server.session))
        state.write(record)
        hosts, routers = deployment.experts.hosts, deployment.routers.replicas
        _say(
            f"ready: {server.url}  model {deployment.served_name}, {hosts} expert host{'s' * (hosts > 1)}, "
            f"{routers} router{'s' * (routers > 1)}, {time.monotonic() - started:.1f} s  (Ctrl-C stops it)"
        )
        while not stop.wait(_RECORD_EVERY_S):
            record = with_processes(record)
            state.write(record)
        _say("stopping")
        return 0
    finally:
        server.stop()
        leftovers = [p for p in {*record.processes, *descendants(os.getpid())} if p.alive]
        if leftovers:
            logger.warning("%d processes were still running and were ended", end_processes(leftovers))
        state.remove(record)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class _LocalServer:
    """The whole cluster and the front in this process."""

    session = ""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
        self.url = _url(deployment)

    def start(self, stop: threading.Event) -> None:
        """Load everything and begin to listen."""
        import uvicorn

        from ..actors.front.app import create_app
        from ..actors.local_engine import LocalEngine
        from .assembly import front_settings
        from .local import LocalCluster

        self._cluster = LocalCluster(self._deployment)
        self._cluster.router.start()
        engine = LocalEngine(self._cluster.router, self._cluster.status)
        settings = front_settings(self._deployment, front_id="front-0", behind_proxy=False)
        app = create_app(engine, self._cluster.model, settings)
        front = self._deployment.front
        config = uvicorn.Config(app, host=front.host, port=front.port, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        # Signals are ours: uvicorn would take them over, and raise them again when it ends.
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.run, name="uvicorn", daemon=True)
        self._thread.start()
        while not self._server.started and self._thread.is_alive() and not stop.is_set():
            time.sleep(0.01)
        if not self._thread.is_alive():
            raise ClusterError(f"the HTTP server did not start on {self.url}")

    def stop(self) -> None:
        """Stop listening, then the cluster."""
        if hasattr(self, "_server"):
            self._server.should_exit = True
            self._thread.join(timeout=10.0)
        if hasattr(self, "_cluster"):
            self._cluster.close()


class _RayServer:
    """A Serve application on a Ray cluster, which is started if need be."""

    def __init__(self, deployment: Deployment, address: str | None) -> None:
        self._deployment = deployment
        self._address = address
        self._deployed = False
        self.session = ""
        self.url = _url(deployment)

    def start(self, stop: threading.Event) -> None:
        """Check the checkpoint, start or join Ray, deploy, wait until it serves."""
        from ..model.loading import open_model
        from ..model.progress import default_progress
        from .assembly import checkpoint_path, front_settings, router_settings, served_model

        # Refuse what can be refused while it is still a message and not a stack of actors.
        deployment = self._deployment
        config, _ = open_model(checkpoint_path(deployment.model), verify=deployment.verify, progress=default_progress())
        router_settings(deployment, config)
        served_model(deployment, config)
        front_settings(deployment, front_id="check", behind_proxy=True)

        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray
        from ray import serve

        from .serve_app import build

        if self._address is None:
            wanted = (
                deployment.experts.hosts * deployment.experts.cpus
                + deployment.routers.replicas * deployment.routers.cpus
            )
            ray.init(
                address="local",
                num_cpus=max(wanted, os.cpu_count() or 1),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.WARNING,
            )
            self.session = ray._private.worker.global_worker.node.get_session_dir_path()
        else:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.WARNING)
        _catch_signals(stop)  # Ray has put handlers of its own in place, which would end the process
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        front = deployment.front
        serve.start(proxy_location="HeadOnly", http_options={"host": front.host, "port": front.port})
        self._deployed = True
        plain = deployment.model_copy(update={"verify": "headers"}).model_dump()
        handle = serve.run(build(plain), name=_APP, route_prefix="/", blocking=False)
        del handle
        if stop.is_set():
            raise KeyboardInterrupt

    def stop(self) -> None:
        """Take the application down, and Ray with it if it was started here."""
        if "ray" not in sys.modules:
            return
        import ray
        from ray import serve

        if not ray.is_initialized():
            return
        if self._deployed:
            if self._address is None:
                serve.shutdown()
            else:
                serve.delete(_APP)
        ray.shutdown()


def _url(deployment: Deployment) -> str:
    host = deployment.front.host
    shown = "127.0.0.1" if host == "0.0.0.0" else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{deployment.front.port}"


def _check_port(deployment: Deployment) -> None:
    """Refuse a port that is taken before anything is started."""
    front = deployment.front
    family = socket.AF_INET6 if ":" in front.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((front.host, front.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {front.host}:{front.port} ({error.strerror}); choose another with --host or --port"
            ) from error


def _catch_signals(stop: threading.Event) -> None:
    """Have SIGINT and SIGTERM end the wait for them instead of the process."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)


def _say(line: str) -> None:
    print(f"moray: {line}", flush=True)
